"""Checkpoints of important sessions: what a killed tracker loses, and what stands when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.postgres import PostgresServer
from tests.support.services import RunningService, StartService

# How often a tracker of these tests looks what is due, and what a busy machine may add to it and to the commit.
LOOK_SECONDS = 0.1
SLACK_SECONDS = 1.5


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=value))
    return duration


class Tracker:
    """A tracker as a worker sees it."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        self.metadata = metadata
        self.channel = channel
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(channel)

    async def start(self, session_id: str, **fields: Any) -> pb.Session:
        request = pb.StartSessionRequest(session_id=session_id, **fields)
        session: pb.Session = (await self.sessions.StartSession(request, metadata=self.metadata)).session
        return session

    async def report(self, session_id: str, page: int, **fields: Any) -> int:
        update = pb.ProgressUpdate(session_id=session_id, sequence=page, current_page=page, total_pages=1000, **fields)
        answer = await self.sessions.ReportProgress(pb.ReportProgressRequest(updates=[update]), metadata=self.metadata)
        verdict: int = answer.verdicts[0]
        return verdict

    async def get(self, session_id: str) -> pb.GetSessionResponse:
        answer: pb.GetSessionResponse = await self.watch.GetSession(
            pb.GetSessionRequest(session_id=session_id), metadata=self.metadata
        )
        return answer

    async def totals(self) -> pb.GetTotalsResponse:
        answer: pb.GetTotalsResponse = await self.watch.GetTotals(pb.GetTotalsRequest(), metadata=self.metadata)
        return answer

    async def complete(self, session_id: str, pages: int) -> pb.CrawlingResult:
        request = pb.CompleteSessionRequest(session_id=session_id, state=pb.SESSION_STATE_COMPLETED, total_pages=pages)
        result: pb.CrawlingResult = (await self.sessions.CompleteSession(request, metadata=self.metadata)).result
        return result


class Process:
    """A tracker in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, tracker: Tracker) -> None:
        self._process = process
        self.tracker = tracker

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()
        await self.tracker.channel.close()


StartProcess = Callable[[RunningService], Awaitable[Process]]


@pytest.fixture
async def start_process(postgres_server: PostgresServer) -> AsyncIterator[StartProcess]:
    """Starts trackers on a running one's database, and kills those that are left."""
    started: list[Process] = []

    async def start(service: RunningService) -> Process:
        root = Path(__file__).parents[2]
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")}
        prefix = "MUSTER_SESSION_TRACKER__"
        environ |= {
            "PYTHONPATH": os.pathsep.join((str(root), str(root / "sdk" / "python"))),
            f"{prefix}GRPC__LISTEN": address,
            f"{prefix}METRICS__LISTEN": "127.0.0.1:0",
            f"{prefix}POSTGRES__DSN": postgres_server.dsn(service.database, "muster_session_tracker"),
            f"{prefix}IDENTITY__DSN": postgres_server.dsn(service.database, "muster_identity"),
            f"{prefix}CHECKPOINTS__INTERVAL_SECONDS": str(LOOK_SECONDS),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from services.cli.main import main; main()",
            "serve",
            "session-tracker",
            env=environ,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        channel = grpc.aio.insecure_channel(address)
        running = Process(process, Tracker(channel, await service.metadata(Role.WORKER)))
        started.append(running)
        async with asyncio.timeout(30):
            await channel.channel_ready()
        return running

    yield start
    for running in started:
        with contextlib.suppress(ProcessLookupError):
            await running.kill()


@contextlib.asynccontextmanager
async def connected(service: RunningService) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(service.dsn)
    try:
        await connection.execute("SET search_path = session_tracker")
        yield connection
    finally:
        await connection.close()


async def saved_page(service: RunningService, session_id: str) -> int | None:
    async with connected(service) as connection:
        page: int | None = await connection.fetchval(
            "SELECT current_page FROM session_checkpoints WHERE session_id = $1", session_id
        )
        return page


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_killed_tracker_loses_what_came_after_the_last_checkpoint_and_no_more(
    start_service: StartService, start_process: StartProcess
) -> None:
    service = await start_service("session_tracker")
    process = await start_process(service)
    tracker = process.tracker
    await tracker.start("by time", checkpoint=pb.CheckpointPolicy(every=seconds(1)), slot_id="slot")
    await tracker.start("by pages", checkpoint=pb.CheckpointPolicy(every_pages=10))
    await tracker.start("not important")
    acknowledged: list[float] = []
    begun = time.monotonic()
    page = 0
    while time.monotonic() < begun + 3.0:
        page += 1
        for name in ("by time", "by pages", "not important"):
            assert await tracker.report(name, page) == pb.UPDATE_VERDICT_TAKEN
        acknowledged.append(time.monotonic())
        await asyncio.sleep(0.01)
    killed = time.monotonic()
    await process.kill()

    by_time, by_pages = await saved_page(service, "by time"), await saved_page(service, "by pages")
    assert by_time
    assert by_pages
    lost_seconds = killed - acknowledged[by_time - 1]
    assert lost_seconds <= 1.0 + LOOK_SECONDS + SLACK_SECONDS
    behind = page - by_pages
    print(f"lost {lost_seconds:.2f} s by time and {behind} pages by pages, at {page / 3.0:.0f} pages/s")
    within_slack = sum(moment > killed - LOOK_SECONDS - SLACK_SECONDS for moment in acknowledged)
    assert behind <= 10 + within_slack

    process = await start_process(service)
    tracker = process.tracker
    restored = (await tracker.get("by time")).session
    assert (restored.state, restored.rebuilding, restored.important) == (pb.SESSION_STATE_LOST, True, True)
    assert (restored.current_page, restored.slot_id) == (by_time, "slot")
    assert "checkpoint" in restored.reason
    totals = await tracker.totals()
    assert (totals.live, totals.rebuilding, totals.pages) == (2, True, by_time + by_pages)
    assert await tracker.report("not important", page + 1) == pb.UPDATE_VERDICT_UNKNOWN_SESSION
    assert await tracker.report("by time", by_time) == pb.UPDATE_VERDICT_STALE, "what was saved does not go back"
    assert await tracker.report("by time", page + 1) == pb.UPDATE_VERDICT_TAKEN
    healed = (await tracker.get("by time")).session
    assert (healed.state, healed.rebuilding) == (pb.SESSION_STATE_RUNNING, False)
    assert healed.current_page == page + 1
    assert (await tracker.totals()).rebuilding
    await tracker.report("by pages", page + 1)
    assert not (await tracker.totals()).rebuilding
    await tracker.complete("by time", page + 2)
    assert await saved_page(service, "by time") is None, "it goes with the result"
    await process.kill()


async def test_all_that_describes_a_session_comes_back(start_service: StartService) -> None:
    service = await start_service("session_tracker", checkpoints={"interval_seconds": 0.05})
    tracker = Tracker(service.channel, await service.metadata(Role.WORKER))
    key = str(uuid4())
    error = pb.ErrorEntry(error_class="http_503", message="busy", page=3)
    error.at.FromSeconds(1_800_000_000)
    await tracker.start(
        key,
        stage="list",
        slot_id="slot",
        client_id="pc",
        tags=["nightly"],
        config_snapshot_json='{"depth": 2, "api_key": "x"}',
        allocation_key=key,
        lease_token=b"t" * 16,
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        checkpoint=pb.CheckpointPolicy(every_pages=1),
    )
    await tracker.report(
        key, 5, stage="detail", errors_by_class=[pb.ErrorCount(error_class="http_503", count=4)], last_errors=[error]
    )
    before = await tracker.get(key)

    async def saved() -> bool:
        return await saved_page(service, key) == 5

    await until(saved)
    again = await start_service("session_tracker", database=service.database)
    after = await Tracker(again.channel, tracker.metadata).get(key)
    assert (after.session.rebuilding, after.session.state) == (True, pb.SESSION_STATE_LOST)
    for name in ("state", "reason", "rebuilding", "pages_per_second"):
        after.session.ClearField(name)
        before.session.ClearField(name)
    for name in ("state_since", "updated_at"):
        getattr(after.session, name).CopyFrom(getattr(before.session, name))
    assert after.session == before.session
    assert after.last_errors == before.last_errors
    assert after.config_snapshot_json == before.config_snapshot_json
    assert '"x"' not in after.config_snapshot_json


async def test_a_tracker_that_ends_in_good_order_loses_nothing(start_service: StartService) -> None:
    service = await start_service("session_tracker", checkpoints={"interval_seconds": 60})
    tracker = Tracker(service.channel, await service.metadata(Role.WORKER))
    await tracker.start("run", checkpoint=pb.CheckpointPolicy())
    await tracker.report("run", 7)
    assert await saved_page(service, "run") is None
    await service.chassis.drain()
    assert await saved_page(service, "run") == 7


async def test_checkpoints_are_updated_in_place_and_counters_alone_are_written(start_service: StartService) -> None:
    service = await start_service("session_tracker", checkpoints={"interval_seconds": 0.02})
    tracker = Tracker(service.channel, await service.metadata(Role.WORKER))
    for number in range(20):
        await tracker.start(
            f"s{number}",
            config_snapshot_json='{"a": "' + "x" * 8000 + '"}',
            checkpoint=pb.CheckpointPolicy(every_pages=1),
        )
    for page in range(1, 9):
        for number in range(20):
            await tracker.report(f"s{number}", page)

        async def saved(page: int = page) -> bool:
            return await saved_page(service, "s19") == page

        await until(saved)
    async with connected(service) as connection:
        described = await connection.fetchval("SELECT min(length(described)) FROM session_checkpoints")
        assert described > 8000
        await connection.execute("SELECT pg_stat_force_next_flush()")

        async def counted() -> bool:
            row = await connection.fetchrow(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'session_checkpoints'"
            )
            assert row is not None
            return bool(row["n_tup_upd"] >= 140 and row["n_tup_hot_upd"] >= 0.9 * row["n_tup_upd"])

        await until(counted)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (pb.CheckpointPolicy(every_pages=1_000_001), "checkpoint.every_pages"),
        (pb.CheckpointPolicy(every=seconds(0.5)), "checkpoint.every"),
        (pb.CheckpointPolicy(every=seconds(3601)), "checkpoint.every"),
    ],
)
async def test_a_wrong_policy_is_refused(start_service: StartService, policy: pb.CheckpointPolicy, field: str) -> None:
    service = await start_service("session_tracker")
    tracker = Tracker(service.channel, await service.metadata(Role.WORKER))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tracker.start("run", checkpoint=policy)
    assert f"{field}:" in (caught.value.details() or "")
