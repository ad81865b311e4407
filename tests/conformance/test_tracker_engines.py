"""One contract, whichever the engine: the real service over gRPC, on process memory and as two replicas on Redis.

Workers call one address and readers another. On memory that is the same service; on Redis the reader's replica never
takes a report, and so shows only what came to it through the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.redis import running_redis
from tests.support.services import RunningService, StartService

SECONDS = 15.0
POLL_SECONDS = 0.01


class Side:
    """What one caller sees: the stubs of one address."""

    def __init__(self, service: RunningService, worker: Any, operator: Any) -> None:
        self.service = service
        self.worker = worker
        self.operator = operator
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(service.channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(service.channel)
        self.control: Any = session_pb2_grpc.ControlServiceStub(service.channel)

    async def start(self, session_id: str, **fields: Any) -> pb.Session:
        request = pb.StartSessionRequest(session_id=session_id, **fields)
        session: pb.Session = (await self.sessions.StartSession(request, metadata=self.worker)).session
        return session

    async def report(self, session_id: str, sequence: int, page: int, **fields: Any) -> int:
        update = pb.ProgressUpdate(session_id=session_id, sequence=sequence, current_page=page, **fields)
        request = pb.ReportProgressRequest(updates=[update])
        return (await self.sessions.ReportProgress(request, metadata=self.worker)).verdicts[0]  # type: ignore[no-any-return]

    async def complete(self, session_id: str, **fields: Any) -> pb.CrawlingResult:
        fields.setdefault("state", pb.SESSION_STATE_COMPLETED)
        request = pb.CompleteSessionRequest(session_id=session_id, **fields)
        result: pb.CrawlingResult = (await self.sessions.CompleteSession(request, metadata=self.worker)).result
        return result

    async def get(self, session_id: str) -> pb.Session | None:
        """Returns a session, or None where it is not known."""
        try:
            answer = await self.watch.GetSession(pb.GetSessionRequest(session_id=session_id), metadata=self.worker)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return None
            raise
        session: pb.Session = answer.session
        return session

    async def totals(self, **fields: Any) -> pb.GetTotalsResponse:
        totals: pb.GetTotalsResponse = await self.watch.GetTotals(pb.GetTotalsRequest(**fields), metadata=self.worker)
        return totals


class Tracker:
    """A tracker with an address for workers and one for readers."""

    def __init__(self, here: Side, there: Side) -> None:
        self.here = here
        self.there = there


async def until(done: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Returns the first answer that is true, within `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not (answer := await done()):
        assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s: {what}"
        await asyncio.sleep(POLL_SECONDS)
    return answer


@pytest.fixture(params=["memory", "redis"])
async def tracker(request: pytest.FixtureRequest, start_service: StartService) -> AsyncIterator[Tracker]:
    async def side(service: RunningService) -> Side:
        return Side(service, *keys)

    tables: dict[str, Any] = {"sessions": {"max_per_organization": 50, "finished_seconds": 1.0}}
    if request.param == "memory":
        service = await start_service("session_tracker", **tables)
        keys = [await service.metadata(Role.WORKER), await service.metadata(Role.OPERATOR)]
        only = await side(service)
        yield Tracker(only, only)
        return
    with running_redis() as redis:
        tables["engine"] = {"kind": "redis", "url": redis.url, "flush_seconds": 0.01, "beat_seconds": 0.1}
        first = await start_service("session_tracker", **tables)
        keys = [await first.metadata(Role.WORKER), await first.metadata(Role.OPERATOR)]
        second = await start_service("session_tracker", database=first.database, **tables)
        yield Tracker(await side(first), await side(second))
        for service in (second, first):
            await service.channel.close()
            await service.chassis.drain()


async def shown(side: Side, session_id: str, **fields: Any) -> pb.Session:
    """Waits until a session is shown with these fields."""

    async def matches() -> pb.Session | None:
        session = await side.get(session_id)
        if session is not None and all(getattr(session, name) == value for name, value in fields.items()):
            return session
        return None

    session: pb.Session = await until(matches, f"{session_id} with {fields}")
    return session


async def test_a_session_is_shown_as_it_is_reported(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a", stage="list", total_pages=9, slot_id="s", client_id="c", tags=["x", "y"])
    first = await shown(there, "a", state=pb.SESSION_STATE_QUEUED)
    assert (first.stage, first.total_pages, first.slot_id, first.client_id, list(first.tags)) == (
        "list", 9, "s", "c", ["x", "y"],
    )  # fmt: skip
    errors = [pb.ErrorCount(error_class="timeout", count=2), pb.ErrorCount(error_class="dns", count=3)]
    await here.report(
        "a",
        1,
        4,
        total_pages=9,
        products_found=5,
        errors_count=5,
        stage="detail",
        reason="off we go",
        errors_by_class=errors,
    )
    session = await shown(there, "a", current_page=4)
    mine = await here.get("a")
    assert mine is not None
    for name in (
        "state",
        "stage",
        "products_found",
        "errors_count",
        "reason",
        "sequence",
        "started_at",
        "errors_by_class",
    ):
        assert getattr(session, name) == getattr(mine, name), name
    assert session.state == pb.SESSION_STATE_RUNNING
    assert [(entry.error_class, entry.count) for entry in session.errors_by_class] == [("dns", 3), ("timeout", 2)]
    assert abs(session.updated_at.ToNanoseconds() - mine.updated_at.ToNanoseconds()) < 50_000_000
    await here.report("a", 2, 5, total_pages=9, state=pb.SESSION_STATE_PAUSED, reason="lunch")
    session = await shown(there, "a", state=pb.SESSION_STATE_PAUSED)
    assert (session.reason, session.current_page) == ("lunch", 5)


async def test_old_repeated_and_unordered_reports_change_nothing(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a")
    assert await here.report("a", 5, 5) == pb.UPDATE_VERDICT_TAKEN
    await shown(there, "a", current_page=5)
    for side in (here, there):
        assert await side.report("a", 5, 6) == pb.UPDATE_VERDICT_STALE
        assert await side.report("a", 4, 4) == pb.UPDATE_VERDICT_STALE
    assert await here.report("b", 1, 1) == pb.UPDATE_VERDICT_UNKNOWN_SESSION
    for side in (here, there):
        await shown(side, "a", current_page=5, sequence=5)


async def test_a_worker_goes_on_at_another_address(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a", stage="list")
    await here.report("a", 1, 1)
    await shown(there, "a", current_page=1)
    assert await there.report("a", 2, 2) == pb.UPDATE_VERDICT_TAKEN
    session = await shown(here, "a", current_page=2)
    assert session.stage == "list"
    # Registered again, as after a broken connection: what stands is the answer.
    again = await there.start("a", progress=pb.ProgressUpdate(session_id="a", sequence=1, current_page=1))
    assert (again.current_page, again.sequence) == (2, 2)


async def test_packed_reports_are_shown(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    names = [f"s{number:02}" for number in range(20)]
    for name in names:
        await here.start(name)
    stream = here.sessions.ReportStream(metadata=here.worker)
    for batch in range(1, 6):
        await stream.write(
            pb.ReportStreamRequest(
                batch=batch,
                names=names if batch == 1 else [],
                packed=pb.PackedUpdates(
                    handle=range(20), sequence=[batch] * 20, current_page=[batch * 10] * 20, products_found=range(20)
                ),
            )
        )
        answer = await stream.read()
        assert (answer.batch, answer.taken) == (batch, 20)
    for number in (0, 19):
        await shown(there, names[number], current_page=50, products_found=number)
    stream.cancel()


async def test_a_watcher_sees_a_snapshot_and_then_every_session_s_latest_state(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a")
    await here.start("b")
    await shown(there, "b")
    held: dict[str, pb.Session] = {}
    call = there.watch.WatchSessions(pb.WatchSessionsRequest(interval=Duration()), metadata=there.worker)

    async def read() -> None:
        async with asyncio.timeout(SECONDS):
            answer = await call.read()
        if answer.snapshot:
            held.clear()
        held.update({session.session_id: session for session in answer.sessions})
        for session_id in answer.removed:
            held.pop(session_id, None)

    await read()
    assert set(held) == {"a", "b"}
    for sequence in range(1, 30):
        await here.report("a", sequence, sequence)
    await here.start("c")
    while not ("c" in held and held["a"].current_page == 29):
        await read()
    await here.complete("b", total_pages=7)
    while held["b"].state != pb.SESSION_STATE_COMPLETED:
        await read()
    assert held["b"].current_page == 7
    while "b" in held:
        await read()
    call.cancel()


async def test_totals_and_lists_are_the_same_everywhere(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    for number in range(12):
        await here.start(f"s{number:02}", slot_id=f"slot-{number % 2}")
        await here.report(f"s{number:02}", 1, number, products_found=1, errors_count=2)
    await shown(there, "s11", current_page=11)

    async def agree() -> bool:
        mine, theirs = await here.totals(), await there.totals()
        return (mine.live, dict(mine.by_state), mine.pages, mine.products, mine.errors) == (
            theirs.live, dict(theirs.by_state), theirs.pages, theirs.products, theirs.errors,
        ) and mine.live == 12  # fmt: skip

    await until(agree, "totals agree")
    for side in (here, there):
        totals = await side.totals()
        assert (totals.pages, totals.products, totals.errors, totals.rebuilding) == (66, 12, 24, False)
        assert (await side.totals(slot_id="slot-1")).live == 6
        listed: list[str] = []
        token = ""
        while True:
            request = pb.ListSessionsRequest(filter=pb.SessionFilter(slot_id="slot-1"), page_size=4, page_token=token)
            page = await side.watch.ListSessions(request, metadata=side.worker)
            listed += [session.session_id for session in page.sessions]
            if not (token := page.next_page_token):
                break
        assert listed == [f"s{number:02}" for number in range(1, 12, 2)]


async def test_a_session_is_completed_once_wherever_it_is_said(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a", slot_id="s", stage="list", config_snapshot_json='{"depth": 3}')
    await here.report("a", 1, 3)
    await shown(there, "a", current_page=3)
    result = await there.complete("a", total_pages=4, state=pb.SESSION_STATE_FAILED, message="gave up")
    assert (result.slot_id, result.stage, result.config_snapshot_json) == ("s", "list", '{"depth": 3}')
    session = await shown(here, "a", state=pb.SESSION_STATE_FAILED)
    assert session.current_page == 4
    # Repeated anywhere it is the same answer; another result is refused.
    assert await here.complete("a", total_pages=4, state=pb.SESSION_STATE_FAILED, message="gave up") == result
    for side in (here, there):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await side.complete("a", total_pages=5)
        assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert await side.report("a", 2, 9) != pb.UPDATE_VERDICT_TAKEN
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await side.start("a")
        assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS


async def test_a_command_reaches_the_worker_s_stream(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    await here.start("a")
    await here.start("b")
    stream = here.sessions.ReportStream(metadata=here.worker)
    updates = [pb.ProgressUpdate(session_id=name, sequence=1, current_page=1) for name in "ab"]
    await stream.write(pb.ReportStreamRequest(batch=1, updates=updates))
    assert (await stream.read()).taken == 2
    await shown(there, "a", current_page=1)
    request = pb.ControlSessionsRequest(session_ids=["a"], kind=pb.COMMAND_KIND_PAUSE, reason="maintenance")
    assert (await there.control.ControlSessions(request, metadata=there.operator)).told == 1
    async with asyncio.timeout(SECONDS):
        told = (await stream.read()).commands
    assert [(command.session_id, command.kind) for command in told] == [("a", pb.COMMAND_KIND_PAUSE)]
    # Told again with every answer, until it is carried out.
    update = pb.ProgressUpdate(session_id="a", sequence=2, current_page=2)
    await stream.write(pb.ReportStreamRequest(batch=2, updates=[update]))
    assert [command.number for command in (await stream.read()).commands] == [told[0].number]
    update = pb.ProgressUpdate(
        session_id="a", sequence=3, current_page=2, state=pb.SESSION_STATE_PAUSED, acknowledged_command=told[0].number
    )
    await stream.write(pb.ReportStreamRequest(batch=3, updates=[update]))
    assert not (await stream.read()).commands
    session = await shown(there, "a", state=pb.SESSION_STATE_PAUSED)
    assert session.acknowledged_command == told[0].number
    stream.cancel()


async def test_organizations_do_not_see_each_other(tracker: Tracker) -> None:
    here, there = tracker.here, tracker.there
    other = Side(there.service, await here.service.metadata(Role.WORKER, "umbrella"), ())
    await here.start("a")
    await other.start("a", stage="theirs")
    await other.report("a", 1, 9)
    assert await here.report("a", 1, 1) == pb.UPDATE_VERDICT_TAKEN
    session = await shown(there, "a", current_page=1)
    assert session.stage == ""
    assert (await other.totals()).pages == 9
