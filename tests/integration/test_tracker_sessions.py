"""The session tracker over its contract: start, report, stream, list, totals, restart, isolation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import RunningService, StartService

Metadata = tuple[tuple[str, str], ...]


class Tracker:
    """A running tracker and its stubs."""

    def __init__(self, service: RunningService, metadata: Metadata) -> None:
        self.service = service
        self.metadata = metadata
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(service.channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(service.channel)

    async def start(self, session_id: str, **fields: Any) -> pb.Session:
        request = pb.StartSessionRequest(session_id=session_id, **fields)
        session: pb.Session = (await self.sessions.StartSession(request, metadata=self.metadata)).session
        return session

    async def report(self, *updates: pb.ProgressUpdate) -> pb.ReportProgressResponse:
        request = pb.ReportProgressRequest(updates=updates)
        response: pb.ReportProgressResponse = await self.sessions.ReportProgress(request, metadata=self.metadata)
        return response

    async def get(self, session_id: str) -> pb.Session:
        request = pb.GetSessionRequest(session_id=session_id)
        session: pb.Session = (await self.watch.GetSession(request, metadata=self.metadata)).session
        return session

    async def totals(self) -> pb.GetTotalsResponse:
        response: pb.GetTotalsResponse = await self.watch.GetTotals(pb.GetTotalsRequest(), metadata=self.metadata)
        return response


@pytest.fixture
async def tracker(start_service: StartService) -> Tracker:
    service = await start_service("session_tracker", sessions={"max_per_organization": 1500})
    return Tracker(service, await service.metadata(Role.WORKER))


def update(session_id: str, sequence: int, **fields: Any) -> pb.ProgressUpdate:
    return pb.ProgressUpdate(session_id=session_id, sequence=sequence, **fields)


def reason(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    raise AssertionError("no ErrorInfo")


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_session_is_registered_reported_and_read(tracker: Tracker) -> None:
    began = datetime.now(UTC) - timedelta(seconds=90)
    given = pb.StartSessionRequest(
        session_id="run 1", stage="검색", total_pages=10, slot_id="slot", client_id="pc-7", tags=["a", "b"],
        config_snapshot_json='{"pages": 10}',
    )  # fmt: skip
    given.started_at.FromDatetime(began)
    started = (await tracker.sessions.StartSession(given, metadata=tracker.metadata)).session
    assert started.state == pb.SESSION_STATE_QUEUED
    assert started.started_at.ToDatetime(UTC) == began
    assert (started.stage, started.total_pages, started.slot_id, started.client_id) == ("검색", 10, "slot", "pc-7")
    assert list(started.tags) == ["a", "b"]
    response = await tracker.report(
        update("run 1", 1, current_page=4, total_pages=10, products_found=40, errors_count=1, stage="list")
    )
    assert list(response.verdicts) == [pb.UPDATE_VERDICT_TAKEN]
    session = await tracker.get("run 1")
    assert (session.state, session.stage, session.current_page) == (pb.SESSION_STATE_RUNNING, "list", 4)
    assert (session.total_pages, session.products_found, session.errors_count, session.sequence) == (10, 40, 1, 1)
    assert session.started_at.ToDatetime(UTC) == began
    assert abs(session.updated_at.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(seconds=5)
    assert not session.HasField("estimated_completion")
    assert session.eta_method == ""
    for number in range(2, 6):
        await tracker.report(update("run 1", number, current_page=number + 3, total_pages=10))
    session = await tracker.get("run 1")
    assert session.eta_method == "pace"
    assert session.estimated_completion.ToDatetime(UTC) >= session.updated_at.ToDatetime(UTC) - timedelta(seconds=1)
    again = await tracker.start("run 1", stage="other")
    assert again.current_page == 8, "answered with what stands"


async def test_verdicts_stand_in_the_order_of_the_request(tracker: Tracker) -> None:
    await tracker.start("a")
    await tracker.report(update("a", 5, current_page=5))
    response = await tracker.report(
        update("x", 1), update("a", 5), update("a", 6, current_page=6), update("a", 4), update("y", 1)
    )
    assert list(response.verdicts) == [
        pb.UPDATE_VERDICT_UNKNOWN_SESSION,
        pb.UPDATE_VERDICT_STALE,
        pb.UPDATE_VERDICT_TAKEN,
        pb.UPDATE_VERDICT_STALE,
        pb.UPDATE_VERDICT_UNKNOWN_SESSION,
    ]
    assert (await tracker.get("a")).current_page == 6


async def test_the_stream_answers_each_batch_in_order(tracker: Tracker) -> None:
    for name in "abc":
        await tracker.start(name)

    async def batches() -> AsyncIterator[pb.ReportStreamRequest]:
        for batch in range(1, 51):
            yield pb.ReportStreamRequest(
                batch=batch,
                updates=[
                    update("a", batch, current_page=batch),
                    update("b", 1),
                    update("gone", batch),
                    update("gone", batch),
                    update("c", batch, products_found=batch),
                ],
            )

    answers = [answer async for answer in tracker.sessions.ReportStream(batches(), metadata=tracker.metadata)]
    assert [answer.batch for answer in answers] == list(range(1, 51))
    assert (answers[0].taken, answers[0].stale) == (3, 0)
    assert {(answer.taken, answer.stale) for answer in answers[1:]} == {(2, 1)}
    assert all(list(answer.unknown_sessions) == ["gone"] for answer in answers)
    assert (await tracker.get("a")).current_page == 50


async def test_a_malformed_batch_ends_the_stream_and_those_before_it_stand(tracker: Tracker) -> None:
    await tracker.start("a")

    async def batches() -> AsyncIterator[pb.ReportStreamRequest]:
        yield pb.ReportStreamRequest(batch=1, updates=[update("a", 1, current_page=1)])
        yield pb.ReportStreamRequest(batch=2, updates=[update("a", 2, current_page=2), update("a", 0)])
        yield pb.ReportStreamRequest(batch=3, updates=[update("a", 3, current_page=3)])

    stream = tracker.sessions.ReportStream(batches(), metadata=tracker.metadata)
    assert (await stream.read()).batch == 1
    error = await refused(stream.read())
    assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "updates[1].sequence" in (error.details() or "")
    assert (await tracker.get("a")).current_page == 1, "nothing of the malformed batch was taken"


async def test_totals_equal_a_scan(tracker: Tracker) -> None:
    for number in range(60):
        await tracker.start(f"s{number:02}")
    states = (0, pb.SESSION_STATE_PAUSED, pb.SESSION_STATE_RATE_LIMITED)
    for sequence in (1, 2):
        await tracker.report(
            *(
                update(
                    f"s{number:02}", sequence, state=states[number % 3], current_page=number * sequence,
                    products_found=number, errors_count=sequence,
                )
                for number in range(50)
            )
        )  # fmt: skip
    totals = await tracker.totals()
    listed = await tracker.watch.ListSessions(pb.ListSessionsRequest(page_size=1000), metadata=tracker.metadata)
    assert totals.live == len(listed.sessions) == 60
    assert totals.pages == sum(session.current_page for session in listed.sessions)
    assert totals.products == sum(session.products_found for session in listed.sessions)
    assert totals.errors == sum(session.errors_count for session in listed.sessions)
    names = [pb.SessionState.Name(session.state).removeprefix("SESSION_STATE_") for session in listed.sessions]
    assert {name: count for name, count in totals.by_state.items() if count} == {
        name: names.count(name) for name in set(names)
    }
    assert totals.pages_per_second == pytest.approx(totals.pages / 10)


async def test_sessions_are_listed_by_id_page_by_page_and_filtered(tracker: Tracker) -> None:
    for number in range(25):
        await tracker.start(
            f"s{number:02}", slot_id=f"slot-{number % 2}", client_id=f"pc-{number % 5}", stage="search",
            tags=["odd"] if number % 2 else [],
        )  # fmt: skip
    await tracker.report(update("s03", 1, stage="deep", state=pb.SESSION_STATE_PAUSED))

    async def listed(size: int, **fields: Any) -> list[str]:
        found: list[str] = []
        request = pb.ListSessionsRequest(page_size=size, filter=pb.SessionFilter(**fields))
        while True:
            page = await tracker.watch.ListSessions(request, metadata=tracker.metadata)
            assert len(page.sessions) <= size
            found += [session.session_id for session in page.sessions]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    assert await listed(7) == [f"s{number:02}" for number in range(25)]
    assert await listed(25) == [f"s{number:02}" for number in range(25)]
    assert await listed(3, slot_id="slot-1", client_id="pc-3") == ["s03", "s13", "s23"]
    assert await listed(3, stage="deep") == ["s03"]
    assert await listed(3, states=[pb.SESSION_STATE_PAUSED]) == ["s03"]
    assert await listed(9, states=[0]) == [f"s{number:02}" for number in range(25)], "unspecified is any"
    assert len(await listed(5, tag="odd")) == 12

    page = await tracker.watch.ListSessions(pb.ListSessionsRequest(page_size=2), metadata=tracker.metadata)
    foreign = pb.ListSessionsRequest(
        page_token=page.next_page_token, filter=pb.SessionFilter(states=[pb.SESSION_STATE_PAUSED])
    )
    for request in (foreign, pb.ListSessionsRequest(page_token="nonsense")):
        error = await refused(tracker.watch.ListSessions(request, metadata=tracker.metadata))
        assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


async def test_missing_sessions_and_the_limit(tracker: Tracker) -> None:
    error = await refused(tracker.get("nobody"))
    assert (error.code(), reason(error)) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    for number in range(1500):
        await tracker.start(f"s{number}")
    error = await refused(tracker.start("one more"))
    assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_LIMIT_REACHED")
    await tracker.start("s7")


async def test_a_restart_is_healed_by_the_next_report(tracker: Tracker, start_service: StartService) -> None:
    await tracker.start("run", total_pages=9)
    newest = update("run", 8, current_page=8, total_pages=9, products_found=80, errors_count=1, stage="list")
    await tracker.report(newest)
    before = await tracker.get("run")
    service = await start_service("session_tracker", database=tracker.service.database)
    restarted = Tracker(service, tracker.metadata)
    assert list((await restarted.report(newest)).verdicts) == [pb.UPDATE_VERDICT_UNKNOWN_SESSION]
    await restarted.start("run", total_pages=9, started_at=before.started_at, progress=newest)
    assert list((await restarted.report(newest)).verdicts) == [pb.UPDATE_VERDICT_STALE]
    after = await restarted.get("run")
    after.updated_at.CopyFrom(before.updated_at)
    after.state_since.CopyFrom(before.state_since)
    assert (before.reason, after.reason) == ("reported running", "registered again")
    after.reason = before.reason
    assert after == before


async def test_organizations_do_not_see_each_other(tracker: Tracker) -> None:
    other = Tracker(tracker.service, await tracker.service.metadata(Role.WORKER, organization="umbrella"))
    await tracker.start("run")
    await other.start("run")
    await other.start("theirs")
    await other.report(update("run", 1, current_page=7))
    assert (await tracker.get("run")).current_page == 0
    assert list((await tracker.report(update("theirs", 1))).verdicts) == [pb.UPDATE_VERDICT_UNKNOWN_SESSION]
    assert reason(await refused(tracker.get("theirs"))) == "SESSION_NOT_FOUND"
    assert ((await tracker.totals()).live, (await other.totals()).live) == (1, 2)
    page = await other.watch.ListSessions(pb.ListSessionsRequest(page_size=1), metadata=other.metadata)
    request = pb.ListSessionsRequest(page_size=10, page_token=page.next_page_token)
    mine = await tracker.watch.ListSessions(request, metadata=tracker.metadata)
    assert [session.session_id for session in mine.sessions] == []


async def test_many_crawls_at_once_lose_nothing(tracker: Tracker) -> None:
    """Eight streams of their own and a unary client report at once; every session ends where its worker left it."""

    async def crawl(worker: int) -> None:
        ids = [f"{worker}-{number}" for number in range(20)]
        for session_id in ids:
            await tracker.start(session_id)

        async def batches() -> AsyncIterator[pb.ReportStreamRequest]:
            for page in range(1, 41):
                yield pb.ReportStreamRequest(
                    batch=page, updates=[update(name, page, current_page=page, products_found=3 * page) for name in ids]
                )

        taken = 0
        async for answer in tracker.sessions.ReportStream(batches(), metadata=tracker.metadata):
            taken += answer.taken
        assert taken == 800

    async def unary() -> None:
        await tracker.start("unary")
        for page in range(1, 101):
            await tracker.report(update("unary", page, current_page=page))

    await asyncio.gather(unary(), *(crawl(worker) for worker in range(8)))
    totals = await tracker.totals()
    assert (totals.live, totals.pages, totals.products) == (161, 8 * 20 * 40 + 100, 8 * 20 * 120)


async def test_streams_end_when_the_service_drains(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    tracker = Tracker(service, await service.metadata(Role.WORKER))
    await tracker.start("a")
    stream = tracker.sessions.ReportStream(metadata=tracker.metadata)
    await stream.write(pb.ReportStreamRequest(batch=1, updates=[update("a", 1)]))
    assert (await stream.read()).batch == 1
    watching = tracker.watch.WatchSessions(pb.WatchSessionsRequest(), metadata=tracker.metadata)
    assert (await watching.read()).snapshot
    async with asyncio.timeout(5):
        await service.chassis.drain()
        for call in (stream, watching):
            error = await refused(call.read())
            assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


def test_unknown_ids_are_cheap_to_name() -> None:
    # The longest answer to the largest batch fits into a message of the default size.
    answer = pb.ReportStreamResponse(unknown_sessions=[str(uuid4())[:8] + "€" * 120 for _ in range(1000)])
    assert answer.ByteSize() < 4 * 2**20
