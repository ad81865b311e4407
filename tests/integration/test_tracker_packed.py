"""Packed updates on the report stream: handles, arrays, verdicts, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import StartService


class Stream:
    """An open report stream and what is read of its sessions."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        self.metadata = metadata
        self.channel = channel
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(channel)
        self.call: Any = self.sessions.ReportStream(metadata=metadata)
        self.batch = 0

    async def start(self, *names: str, **fields: Any) -> None:
        for name in names:
            request = pb.StartSessionRequest(session_id=name, **fields)
            await self.sessions.StartSession(request, metadata=self.metadata)

    async def send(
        self, names: tuple[str, ...] = (), updates: tuple[pb.ProgressUpdate, ...] = (), **arrays: list[int]
    ) -> pb.ReportStreamResponse:
        self.batch += 1
        packed = pb.PackedUpdates(**arrays) if arrays else None  # type: ignore[arg-type]
        await self.call.write(pb.ReportStreamRequest(batch=self.batch, names=names, updates=updates, packed=packed))
        async with asyncio.timeout(10):
            answer: pb.ReportStreamResponse = await self.call.read()
        assert answer.batch == self.batch
        return answer

    async def get(self, session_id: str) -> pb.Session:
        answer = await self.watch.GetSession(pb.GetSessionRequest(session_id=session_id), metadata=self.metadata)
        session: pb.Session = answer.session
        return session


@pytest.fixture
async def stream(start_service: StartService) -> AsyncIterator[Stream]:
    service = await start_service("session_tracker")
    opened = Stream(service.channel, await service.metadata(Role.WORKER))
    yield opened
    opened.call.cancel()


async def test_packed_updates_are_taken_like_others(stream: Stream) -> None:
    await stream.start("a", "b", "c", total_pages=10)
    answer = await stream.send(
        ("a", "b", "c"),
        handle=[0, 2, 1],
        sequence=[1, 1, 1],
        current_page=[3, 4, 5],
        total_pages=[10, 10, 20],
        products_found=[30, 40, 50],
        errors_count=[0, 1, 2],
        state=[0, pb.SESSION_STATE_PAUSED, pb.SESSION_STATE_RATE_LIMITED],
    )
    assert (answer.taken, answer.stale, list(answer.unknown_sessions)) == (3, 0, [])
    a, b, c = [await stream.get(name) for name in "abc"]
    assert (a.state, a.current_page, a.total_pages, a.products_found, a.errors_count) == (2, 3, 10, 30, 0)
    assert (b.state, b.current_page, b.total_pages, b.products_found, b.errors_count) == (4, 5, 20, 50, 2)
    assert (c.state, c.current_page, c.total_pages, c.products_found, c.errors_count) == (3, 4, 10, 40, 1)
    answer = await stream.send(handle=[0, 1], sequence=[1, 2], current_page=[9, 9])
    assert (answer.taken, answer.stale) == (1, 1)
    a, b, _ = [await stream.get(name) for name in "abc"]
    assert a.current_page == 3
    assert (b.current_page, b.total_pages, b.products_found, b.errors_count) == (9, 20, 50, 2), "empty arrays keep"
    assert b.state == pb.SESSION_STATE_RUNNING, "no states: all are running"
    totals = await stream.watch.GetTotals(pb.GetTotalsRequest(), metadata=stream.metadata)
    assert (totals.pages, totals.products, totals.errors) == (3 + 9 + 4, 30 + 50 + 40, 0 + 2 + 1)


async def test_an_unknown_session_is_named_and_its_handle_serves_once_it_is_started(stream: Stream) -> None:
    await stream.start("known")
    answer = await stream.send(("known", "later"), handle=[0, 1], sequence=[1, 1], current_page=[1, 1])
    assert (answer.taken, list(answer.unknown_sessions)) == (1, ["later"])
    await stream.start("later", progress=pb.ProgressUpdate(session_id="later", sequence=1, current_page=1))
    answer = await stream.send(handle=[1], sequence=[2], current_page=[7])
    assert (answer.taken, list(answer.unknown_sessions)) == (1, [])
    assert (await stream.get("later")).current_page == 7


async def test_a_session_that_ended_is_stale_on_its_handle(stream: Stream) -> None:
    await stream.start("a")
    await stream.send(("a",), handle=[0], sequence=[1], current_page=[1])
    request = pb.CompleteSessionRequest(session_id="a", state=pb.SESSION_STATE_COMPLETED, total_pages=4)
    await stream.sessions.CompleteSession(request, metadata=stream.metadata)
    answer = await stream.send(handle=[0], sequence=[2], current_page=[2])
    assert (answer.taken, answer.stale) == (0, 1)
    assert (await stream.get("a")).state == pb.SESSION_STATE_COMPLETED


async def test_a_full_update_and_a_packed_one_of_the_same_batch_come_in_this_order(stream: Stream) -> None:
    await stream.start("a")
    update = pb.ProgressUpdate(session_id="a", sequence=1, current_page=1, stage="detail", reason="began")
    answer = await stream.send(("a",), (update,), handle=[0], sequence=[2], current_page=[2])
    assert (answer.taken, answer.stale) == (2, 0)
    session = await stream.get("a")
    assert (session.current_page, session.stage, session.reason) == (2, "detail", "began")


async def test_batches_that_repeat_the_sessions_of_the_last_are_seen_at_once_and_in_order(stream: Stream) -> None:
    names = tuple(f"s{number:02}" for number in range(50))
    await stream.start(*names, total_pages=900)
    everyone: Any = {"handle": list(range(50)), "total_pages": [900] * 50, "errors_count": [0] * 50}
    for page in range(1, 60):
        answer = await stream.send(
            names if page == 1 else (),
            sequence=[page] * 50,
            current_page=[page] * 50,
            products_found=[2 * page] * 50,
            **everyone,
        )
        assert (answer.taken, answer.stale) == (50, 0)
        if page % 7 == 0:
            assert (await stream.get("s49")).current_page == page
    unary = pb.ProgressUpdate(session_id="s07", sequence=60, current_page=100, total_pages=900)
    verdicts = await stream.sessions.ReportProgress(pb.ReportProgressRequest(updates=[unary]), metadata=stream.metadata)
    assert list(verdicts.verdicts) == [pb.UPDATE_VERDICT_TAKEN]
    request = pb.CompleteSessionRequest(session_id="s08", state=pb.SESSION_STATE_COMPLETED, total_pages=59)
    await stream.sessions.CompleteSession(request, metadata=stream.metadata)
    answer = await stream.send(sequence=[60] * 50, current_page=[60] * 50, **everyone)
    assert (answer.taken, answer.stale) == (48, 2)
    pages = [(await stream.get(name)).current_page for name in names]
    assert pages == [100 if name == "s07" else 59 if name == "s08" else 60 for name in names]
    totals = await stream.watch.GetTotals(pb.GetTotalsRequest(), metadata=stream.metadata)
    assert (totals.live, totals.pages) == (49, 48 * 60 + 100)


async def test_what_is_no_message_at_all_is_refused(stream: Stream) -> None:
    raw: Any = stream.channel.stream_stream("/muster.session_tracker.v1.SessionService/ReportStream")
    call = raw(metadata=stream.metadata)
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("names", "arrays", "field"),
    [
        (("a",), {"handle": [1], "sequence": [1]}, "packed.handle[0]"),
        (("a", "b"), {"handle": [0, 0], "sequence": [1, 2]}, "packed.handle"),
        (("a",), {"handle": [0]}, "packed.sequence"),
        (("a",), {"handle": [0], "sequence": [1, 2]}, "packed.sequence"),
        (("a",), {"handle": [0], "sequence": [0]}, "packed.sequence[0]"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "current_page": [1]}, "packed.current_page"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "total_pages": [1]}, "packed.total_pages"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "products_found": [1]}, "packed.products_found"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "errors_count": [1]}, "packed.errors_count"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "state": [2]}, "packed.state"),
        (("a", "b"), {"handle": [0, 1], "sequence": [1, 1], "state": [2, 7]}, "packed.state[1]"),
        (("",), {"handle": [0], "sequence": [1]}, "names[0]"),
        (("x" * 129,), {"handle": [0], "sequence": [1]}, "names[0]"),
        (tuple(f"n{n}" for n in range(1001)), {"handle": [0], "sequence": [1]}, "names"),
        (("a",), {"sequence": [1]}, "updates"),
        (("a",), {}, "updates"),
        (tuple(f"n{n}" for n in range(1000)), {"handle": list(range(1001)), "sequence": [1] * 1001}, "packed.handle"),
    ],
)
async def test_wrong_arrays_are_named_and_change_nothing(
    stream: Stream, names: tuple[str, ...], arrays: dict[str, list[int]], field: str
) -> None:
    await stream.start("a")
    packed = pb.PackedUpdates(**arrays)  # type: ignore[arg-type]
    await stream.call.write(pb.ReportStreamRequest(batch=1, names=names, packed=packed))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await stream.call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}: " in (caught.value.details() or "")
    assert (await stream.get("a")).state == pb.SESSION_STATE_QUEUED


async def test_what_describes_a_session_is_reported_in_full_updates(stream: Stream) -> None:
    await stream.start("a", stage="list", total_pages=5)
    error = pb.ErrorEntry(error_class="http_503", message="busy", page=2)
    error.at.FromSeconds(1_800_000_000)
    update = pb.ProgressUpdate(
        session_id="a", sequence=1, current_page=2, total_pages=5, errors_count=4, state=pb.SESSION_STATE_RATE_LIMITED,
        reason="asked to wait 30 s", last_errors=[error],
        errors_by_class=[pb.ErrorCount(error_class="timeout", count=1), pb.ErrorCount(error_class="http_503", count=3)],
    )  # fmt: skip
    await stream.send((), (update,))
    session = await stream.get("a")
    assert (session.state, session.reason) == (pb.SESSION_STATE_RATE_LIMITED, "asked to wait 30 s")
    assert [(counted.error_class, counted.count) for counted in session.errors_by_class] == [
        ("http_503", 3),
        ("timeout", 1),
    ]
    since = session.state_since
    await stream.send(("a",), handle=[0], sequence=[2], current_page=[3], state=[pb.SESSION_STATE_RATE_LIMITED])
    session = await stream.get("a")
    assert (session.reason, session.state_since) == ("asked to wait 30 s", since), "kept while the state stays"
    await stream.send(handle=[0], sequence=[3], current_page=[3])
    assert (await stream.get("a")).reason == "reported running"
    answer = await stream.watch.GetSession(pb.GetSessionRequest(session_id="a"), metadata=stream.metadata)
    assert list(answer.last_errors) == [error]
    assert len(answer.pages_per_span) == 30
    assert sum(answer.pages_per_span) == 3
