"""What is read once: one session with all that is known of it, pages of live sessions, roll-ups, results by client."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import RunningService, StartService
from tests.support.watchers import Metadata, Worker


class Reader:
    """Reads as a worker of an organization, or as somebody else."""

    def __init__(self, service: RunningService, metadata: Metadata) -> None:
        self.stub: Any = session_pb2_grpc.WatchServiceStub(service.channel)
        self.metadata = metadata

    async def listed(self, size: int = 0, **filter: Any) -> list[str]:
        request = pb.ListSessionsRequest(page_size=size, filter=pb.SessionFilter(**filter))
        found: list[str] = []
        while True:
            page = await self.stub.ListSessions(request, metadata=self.metadata)
            found += [session.session_id for session in page.sessions]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def totals(self, **fields: Any) -> pb.GetTotalsResponse:
        answer: pb.GetTotalsResponse = await self.stub.GetTotals(pb.GetTotalsRequest(**fields), metadata=self.metadata)
        return answer


@pytest.fixture
async def service(start_service: StartService) -> RunningService:
    return await start_service("session_tracker")


async def test_a_session_is_read_with_all_that_is_known_of_it(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, reader = Worker(service, metadata), Reader(service, metadata)
    await worker.start("run", slot_id="slot", config_snapshot_json='{"depth": 3, "api_key": "s3cret"}')
    before = datetime.now(UTC)
    met = [pb.ErrorEntry(error_class="timeout", message=f"page {page}", page=page) for page in range(1, 11)]
    for entry in met:
        entry.at.FromDatetime(before)
    await worker.page(
        "run",
        page=12,
        errors_count=11,
        errors_by_class=[pb.ErrorCount(error_class="dns", count=1), pb.ErrorCount(error_class="timeout", count=10)],
        last_errors=met,
    )
    answer = await reader.stub.GetSession(pb.GetSessionRequest(session_id="run"), metadata=metadata)
    assert [(entry.error_class, entry.message, entry.page) for entry in answer.last_errors] == [
        ("timeout", f"page {page}", page) for page in range(1, 11)
    ]
    assert abs(answer.last_errors[0].at.ToDatetime(UTC) - before) < timedelta(milliseconds=1)
    assert [(count.error_class, count.count) for count in answer.session.errors_by_class] == [
        ("timeout", 10),
        ("dns", 1),
    ]
    assert '"depth"' in answer.config_snapshot_json
    assert "s3cret" not in answer.config_snapshot_json
    assert len(answer.pages_per_span) == 30
    assert sum(answer.pages_per_span[-2:]) == 12, "the span may just have ended"
    age = datetime.now(UTC) - answer.span_begins.ToDatetime(UTC)
    assert timedelta(seconds=-1) < age < timedelta(seconds=11)


async def test_a_session_without_a_report_has_an_empty_series(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    await Worker(service, metadata).start("run")
    reader = Reader(service, metadata)
    answer = await reader.stub.GetSession(pb.GetSessionRequest(session_id="run"), metadata=metadata)
    assert list(answer.pages_per_span) == [0] * 30
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.stub.GetSession(pb.GetSessionRequest(session_id="other"), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_pages_go_on_by_id_whatever_begins_and_ends_in_between(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, reader = Worker(service, metadata), Reader(service, metadata)
    await worker.start(*[f"s{number:02}" for number in range(0, 20, 2)])
    request = pb.ListSessionsRequest(page_size=4)
    first = await reader.stub.ListSessions(request, metadata=metadata)
    assert [session.session_id for session in first.sessions] == ["s00", "s02", "s04", "s06"]
    # One before the position is not missed by it, one behind it is found, and one that ended is not.
    await worker.start("s01", "s09")
    await worker.complete("s06")
    await worker.complete("s12")
    request.page_token = first.next_page_token
    second = await reader.stub.ListSessions(request, metadata=metadata)
    assert [session.session_id for session in second.sessions] == ["s08", "s09", "s10", "s14"]
    assert await reader.listed(size=3) == [
        "s00", "s01", "s02", "s04", "s08", "s09", "s10", "s14", "s16", "s18",
    ]  # fmt: skip
    assert await reader.listed(states=[pb.SESSION_STATE_COMPLETED]) == ["s06", "s12"], "finished a short while ago"


async def test_lists_are_filtered_by_all_that_is_given(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, reader = Worker(service, metadata), Reader(service, metadata)
    await worker.start("a", slot_id="x", client_id="pc-1", tags=["red"], stage="list")
    await worker.start("b", slot_id="x", client_id="pc-2", tags=["red", "blue"], stage="list")
    await worker.start("c", slot_id="y", client_id="pc-1", tags=["blue"], stage="detail")
    await worker.page("a", "c", page=1)
    assert await reader.listed(slot_id="x") == ["a", "b"]
    assert await reader.listed(client_id="pc-1") == ["a", "c"]
    assert await reader.listed(tag="blue") == ["b", "c"]
    assert await reader.listed(stage="detail") == ["c"]
    assert await reader.listed(states=[pb.SESSION_STATE_RUNNING], slot_id="x") == ["a"]
    assert await reader.listed(slot_id="x", client_id="pc-2", tag="red", stage="list") == ["b"]
    assert await reader.listed(slot_id="z") == []


async def test_totals_are_of_a_slot_an_organization_or_all(service: RunningService) -> None:
    mine, theirs = await service.metadata(Role.WORKER), await service.metadata(Role.WORKER, "umbrella")
    worker, other = Worker(service, mine), Worker(service, theirs)
    await worker.start("a", "b", slot_id="x")
    await worker.start("c", slot_id="y")
    await other.start("a", slot_id="x")
    await worker.page("a", "b", page=10, products_found=2, errors_count=1)
    await worker.page("c", page=5, state=pb.SESSION_STATE_PAUSED)
    await other.page("a", page=100)
    reader = Reader(service, mine)
    slot = await reader.totals(slot_id="x")
    assert (slot.live, slot.pages, slot.products, slot.errors) == (2, 20, 4, 2)
    whole = await reader.totals()
    assert (whole.live, whole.pages) == (3, 25)
    assert (whole.by_state["RUNNING"], whole.by_state["PAUSED"]) == (2, 1)
    assert not whole.rebuilding
    assert (await reader.totals(slot_id="nobody's")).live == 0
    fleet = await Reader(service, await service.metadata(Role.SERVICE, "suite")).totals(fleet=True)
    assert (fleet.live, fleet.pages) == (4, 125)
    await worker.complete("a", total_pages=10)
    assert ((await reader.totals(slot_id="x")).live, (await reader.totals()).live) == (1, 2)
    assert (await reader.totals()).results_committed == 1


@pytest.mark.parametrize("role", [Role.WORKER, Role.OPERATOR, Role.ADMIN])
async def test_the_fleet_is_for_other_services_only(service: RunningService, role: Role) -> None:
    reader = Reader(service, await service.metadata(role))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.totals(fleet=True)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_results_are_filtered_by_client(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    for name, client, slot in (("a", "pc-1", "x"), ("b", "pc-2", "x"), ("c", "pc-1", "y")):
        await worker.start(name, client_id=client, slot_id=slot)
        await worker.complete(name)
    reader = Reader(service, await service.metadata(Role.OPERATOR))

    async def found(**fields: Any) -> list[str]:
        names: list[str] = []
        request = pb.ListResultsRequest(page_size=1, **fields)
        while True:
            page = await reader.stub.ListResults(request, metadata=reader.metadata)
            names += [result.session_id for result in page.results]
            if not page.next_page_token:
                return names
            request.page_token = page.next_page_token

    assert await found(client_id="pc-1") == ["c", "a"]
    assert await found(client_id="pc-1", slot_id="x") == ["a"]
    assert await found(client_id="pc-3") == []
    page = await reader.stub.ListResults(pb.ListResultsRequest(page_size=1, client_id="pc-1"), metadata=reader.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.stub.ListResults(
            pb.ListResultsRequest(page_size=1, client_id="pc-2", page_token=page.next_page_token),
            metadata=reader.metadata,
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reader.stub.ListResults(pb.ListResultsRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, "results are the operators'"
