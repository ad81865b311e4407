"""Two `muster serve session-tracker --engine redis` on one Redis, as they are deployed, and one of them killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from services.config import PostgresConfig
from services.identity.keys import KeyStore
from services.launcher.guard import guarded_argv
from services.postgres import Database
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer

SECONDS = 30.0
POLL_SECONDS = 0.02


async def until(done: Callable[[], Any], what: str) -> Any:
    """Returns the first answer that is true, within `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not (answer := await done()):
        assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s: {what}"
        await asyncio.sleep(POLL_SECONDS)
    return answer


class Process:
    """One replica in a process of its own."""

    def __init__(self, folder: Path, config: Path, metadata: Any) -> None:
        self._log = folder / "log"
        self._metadata = metadata
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                guarded_argv(
                    [
                        sys.executable, "-m", "services.cli.main", "serve", "session-tracker", "--engine", "redis",
                        "--config", str(config),
                    ],
                    on_parent_death=signal.SIGKILL,
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")},
            )  # fmt: skip
        self._channel: grpc.aio.Channel | None = None

    async def ready(self) -> None:
        """Waits until it serves."""

        async def address() -> str | None:
            assert self._process.poll() is None, self._log.read_text()
            for line in self._log.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry.get("event") == "ready":
                        return str(entry["grpc"])
            return None

        self._channel = grpc.aio.insecure_channel(await until(address, "it serves"))
        self._sessions: Any = session_pb2_grpc.SessionServiceStub(self._channel)
        self._watch: Any = session_pb2_grpc.WatchServiceStub(self._channel)

    async def start(self, session_id: str) -> None:
        request = pb.StartSessionRequest(session_id=session_id)
        await self._sessions.StartSession(request, metadata=self._metadata)

    async def report(self, session_id: str, sequence: int) -> int:
        update = pb.ProgressUpdate(session_id=session_id, sequence=sequence, current_page=sequence)
        answer = await self._sessions.ReportProgress(
            pb.ReportProgressRequest(updates=[update]), metadata=self._metadata
        )
        return int(answer.verdicts[0])

    async def complete(self, session_id: str) -> None:
        request = pb.CompleteSessionRequest(session_id=session_id, state=pb.SESSION_STATE_COMPLETED, total_pages=9)
        await self._sessions.CompleteSession(request, metadata=self._metadata)

    async def shows(self, session_id: str, **fields: Any) -> bool:
        """Whether a session is shown with these fields."""
        try:
            answer = await self._watch.GetSession(pb.GetSessionRequest(session_id=session_id), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return all(getattr(answer.session, name) == value for name, value in fields.items())

    async def rebuilding(self) -> bool:
        totals = await self._watch.GetTotals(pb.GetTotalsRequest(), metadata=self._metadata)
        return bool(totals.rebuilding)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        self._process.kill()
        self._process.wait()


@pytest.fixture
async def processes(
    tmp_path: Path,
    postgres_server: PostgresServer,
    redis_server: RedisServer,
    migrated_database: Callable[[str], contextlib.AbstractContextManager[str]],
) -> AsyncIterator[list[Process]]:
    async with contextlib.AsyncExitStack() as stack:
        database = stack.enter_context(migrated_database("session_tracker"))
        identity = postgres_server.dsn(database, "muster_identity")
        keys = await Database.connect(PostgresConfig.model_validate({"dsn": identity}), "test")
        stack.push_async_callback(keys.close)
        _, key = await KeyStore(keys).create("acme", Role.WORKER)
        config = tmp_path / "muster.toml"
        tables: dict[str, dict[str, Any]] = {
            "grpc": {"listen": "127.0.0.1:0"},
            "metrics": {"listen": "127.0.0.1:0"},
            "postgres": {"dsn": postgres_server.dsn(database, "muster_session_tracker")},
            "identity": {"dsn": identity},
            "sessions": {"lost_after_seconds": 2.0},
            "engine": {"url": redis_server.url, "beat_seconds": 0.2, "replica_life_seconds": 1.0},
        }
        lines = [
            line
            for table, values in tables.items()
            for line in (
                f"[session_tracker.{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()),
            )
        ]  # fmt: skip
        config.write_text("\n".join(lines), encoding="utf-8")
        metadata = (("authorization", f"Bearer {key}"),)
        made: list[Process] = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            made.append(Process(tmp_path / name, config, metadata))
            stack.push_async_callback(made[-1].close)
        for process in made:
            await process.ready()
        yield made


async def test_a_killed_process_hands_its_sessions_over(processes: list[Process]) -> None:
    first, second = processes
    for session_id in ("back", "silent"):
        await first.start(session_id)
        assert await first.report(session_id, 3) == pb.UPDATE_VERDICT_TAKEN
    for session_id in ("back", "silent"):
        await until(lambda name=session_id: second.shows(name, current_page=3), "it is known at the other")  # type: ignore[misc]
    first.send(signal.SIGKILL)
    # A worker that comes back is known at once, before anybody has noticed that the process is dead.
    assert await second.report("back", 4) == pb.UPDATE_VERDICT_TAKEN
    # One that does not is missed by the process that took its session over: only an owner judges silence.
    await until(lambda: second.shows("silent", state=pb.SESSION_STATE_LOST), "its silence is noticed")


async def test_a_process_that_was_frozen_bows_to_its_heir(processes: list[Process]) -> None:
    first, second = processes
    await first.start("a")
    await first.report("a", 1)
    await until(lambda: second.shows("a", current_page=1), "it is known at the other")
    first.send(signal.SIGSTOP)
    try:
        for sequence in range(2, 20):
            assert await second.report("a", sequence) == pb.UPDATE_VERDICT_TAKEN
        await until(lambda: second.shows("a", sequence=19), "it went on")
    finally:
        first.send(signal.SIGCONT)
    await until(lambda: first.shows("a", sequence=19, current_page=19), "it knows what it missed")
    assert await first.report("a", 10) == pb.UPDATE_VERDICT_STALE


async def test_a_killed_redis_is_said_and_healed(processes: list[Process], redis_server: RedisServer) -> None:
    first, second = processes
    await first.start("a")
    await until(lambda: second.shows("a"), "it is known at the other")
    redis_server.kill()
    for process in processes:
        await until(process.rebuilding, "it says that it rebuilds")
    assert await first.report("a", 1) == pb.UPDATE_VERDICT_TAKEN
    assert await second.shows("a", current_page=0)
    redis_server.start()
    await until(lambda: second.shows("a", current_page=1), "what was missed is known")

    async def whole() -> bool:
        return not await first.rebuilding() and not await second.rebuilding()

    await until(whole, "both are whole")


async def test_what_was_completed_before_a_stop_is_known_at_the_others(processes: list[Process]) -> None:
    first, second = processes
    await first.start("a")
    await until(lambda: second.shows("a"), "it is known at the other")
    await first.complete("a")
    first.send(signal.SIGTERM)
    await until(lambda: second.shows("a", state=pb.SESSION_STATE_COMPLETED, current_page=9), "its end is known")
