"""Ids of another organization, in every field that takes one: answered as if there was no such thing."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import admin_pb2, client_pb2, exit_pb2, insight_pb2, slot_pb2, target_pb2, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, lease, result, spec
from tests.support.bad_input import seconds
from tests.support.services import StartService

_MODULES = (work_pb2, slot_pb2, exit_pb2, target_pb2, client_pb2, insight_pb2, admin_pb2)
SERVICES = {name: service for module in _MODULES for name, service in module.DESCRIPTOR.services_by_name.items()}


@dataclass(slots=True)
class Theirs:
    """What the other organization has: a slot, an exit that was toggled and cools down, leases, results, a target."""

    slot: str
    exit: str
    live: work_pb2.Allocation
    quarantined: str


class Caller:
    """Calls by name, as a principal of "acme"."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    async def __call__(self, name: str, request: Any, organization: str = "acme") -> Any:
        service, _, method = name.partition("/")
        role = {"WorkService": Role.WORKER, "AdminService": Role.ADMIN}.get(service, Role.OPERATOR)
        answers = {
            "WorkService": work_pb2,
            "SlotService": slot_pb2,
            "ExitService": exit_pb2,
            "TargetService": target_pb2,
            "ClientService": client_pb2,
            "InsightService": insight_pb2,
            "AdminService": admin_pb2,
        }
        call: Any = self._allocator.service.channel.unary_unary(
            f"/{SERVICES[service].full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(answers[service], f"{method}Response").FromString,
        )
        return await call(request, metadata=await self._allocator.service.metadata(role, organization))

    async def reason(self, name: str, request: Any) -> str:
        """Returns the reason with which a call is refused as not found."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self(name, request)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND, refused.value
        status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]
        assert status is not None
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        return str(info.reason)


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    made = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.1}))
    made.door = await made.connect()
    yield made
    await made.door.close()


@pytest.fixture
async def theirs(allocator: Allocator) -> Theirs:
    service = allocator.service
    other = await Allocator.of(service)
    other.door = allocator.door
    other.operator = await service.metadata(Role.OPERATOR, "other")
    other.worker = await service.metadata(Role.WORKER, "other")
    await other.add_exits(1)
    slot = await other.slot(keyword="theirs", external_id="theirs", target="shop", daily_quota=1, without_exit=False)
    (expired,) = await other.take(client="their-pc")
    await other.run_out(expired)
    await other.swept(expired)
    (live,) = await other.take(client="their-pc")
    (kept,) = await other.submit(result(expired, 3, exit_signal=work_pb2.EXIT_SIGNAL_RATE_LIMITED), client="their-pc")
    assert kept.disposition == work_pb2.RESULT_DISPOSITION_QUARANTINED
    (exit_,) = (await other.exits.ListExits(exit_pb2.ListExitsRequest(), metadata=other.operator)).exits
    call = Caller(allocator)
    for name, request in (
        ("ExitService/ToggleExit", exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id)),
        ("TargetService/SetTargetPolicy", _policy()),
    ):
        await call(name, request, "other")
    return Theirs(slot.slot_id, exit_.exit_id, live, expired.allocation_key)


@pytest.fixture
def call(allocator: Allocator) -> Caller:
    return Caller(allocator)


def _policy() -> target_pb2.SetTargetPolicyRequest:
    return target_pb2.SetTargetPolicyRequest(target="shop", policy=target_pb2.TargetPolicy(max_in_flight=3))


def _act() -> admin_pb2.Act:
    return admin_pb2.Act(request_id=str(uuid.uuid4()), reason="because")


async def _rows(allocator: Allocator) -> dict[str, str]:
    """Returns a digest of every table's rows of the other organization."""
    other = await allocator.service.organization_id("other")
    tables = await allocator.sql(
        "SELECT table_name FROM information_schema.columns c JOIN pg_class p ON p.relname = c.table_name "
        "WHERE table_schema = 'allocator' AND column_name = 'organization_id' AND NOT relispartition "
        "AND relnamespace = 'allocator'::regnamespace"
    )
    digests = {}
    for row in tables:
        name = row["table_name"]
        (found,) = await allocator.sql(
            f"SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) AS digest FROM {name} t WHERE organization_id = $1",
            other,
        )
        digests[name] = found["digest"]
    return digests


async def test_slots(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    before = await _rows(allocator)
    update = slot_pb2.UpdateSlotRequest(
        slot_id=theirs.slot, spec=spec(keyword="mine"), update_mask=FieldMask(paths=["keyword"])
    )
    for name, request in (
        ("GetSlot", slot_pb2.GetSlotRequest(slot_id=theirs.slot)),
        ("UpdateSlot", update),
        ("PauseSlot", slot_pb2.PauseSlotRequest(slot_id=theirs.slot)),
        ("ResumeSlot", slot_pb2.ResumeSlotRequest(slot_id=theirs.slot)),
        ("ListSlotHistory", slot_pb2.ListSlotHistoryRequest(slot_id=theirs.slot)),
    ):
        assert await call.reason(f"SlotService/{name}", request) == "SLOT_NOT_FOUND", name
    assert not (await call("SlotService/ListSlots", slot_pb2.ListSlotsRequest(external_id="theirs"))).slots
    assert not (await call("SlotService/ListSlots", slot_pb2.ListSlotsRequest(target="shop"))).slots
    # An external id is an organization's own: the same one makes another slot.
    made = (
        await call(
            "SlotService/CreateSlot",
            slot_pb2.CreateSlotRequest(request_id=str(uuid.uuid4()), spec=spec(external_id="theirs")),
        )
    ).slot
    assert made.slot_id != theirs.slot
    assert await _rows(allocator) == before


async def test_exits(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    before = await _rows(allocator)
    for name, request in (
        ("SetExitEnabled", exit_pb2.SetExitEnabledRequest(exit_id=theirs.exit)),
        ("ToggleExit", exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=theirs.exit)),
        ("ClearExitHealth", exit_pb2.ClearExitHealthRequest(exit_id=theirs.exit)),
    ):
        assert await call.reason(f"ExitService/{name}", request) == "EXIT_NOT_FOUND", name
    assert not (await call("ExitService/ListExits", exit_pb2.ListExitsRequest())).exits
    assert not (await call("ExitService/ListExitToggles", exit_pb2.ListExitTogglesRequest(exit_id=theirs.exit))).toggles
    assert not (await call("ExitService/ListExitHealth", exit_pb2.ListExitHealthRequest(exit_id=theirs.exit))).health
    forecast = await call("ExitService/ForecastExits", exit_pb2.ForecastExitsRequest())
    assert (forecast.room, forecast.capacity) == (0, 0)
    # A toggle that was refused has not used up its request id.
    own = await allocator.service.organization_id()
    assert not await allocator.sql("SELECT FROM requests WHERE organization_id = $1", own)
    assert await _rows(allocator) == before


async def test_leases_and_results(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    before = await _rows(allocator)
    (renewed,) = await allocator.renew(lease(theirs.live))
    assert renewed.error.reason == "ALLOCATION_NOT_FOUND"
    (released,) = await allocator.release(lease(theirs.live))
    assert released.error.reason == "ALLOCATION_NOT_FOUND"
    (submitted,) = await allocator.submit(result(theirs.live))
    assert submitted.error.reason == "ALLOCATION_NOT_FOUND"
    # The same machine's name in another organization is another machine.
    assert (await allocator.heartbeat("their-pc", goodbye=True)).released_leases == 0
    assert (await allocator.ask(client="their-pc", target="shop")).no_work.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    (theirs_asked,) = await allocator.sql(
        "SELECT request_id FROM requests WHERE method = 'AllocateWork' ORDER BY created_at LIMIT 1"
    )
    again = await allocator.ask(client="their-pc", request_id=str(theirs_asked["request_id"]))
    assert not again.allocations
    assert await _rows(allocator) == before


async def test_clients_and_targets(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    before = await _rows(allocator)
    draining = client_pb2.SetClientDrainingRequest(client_id="their-pc", draining=True)
    assert await call.reason("ClientService/SetClientDraining", draining) == "CLIENT_NOT_FOUND"
    dead = client_pb2.DeclareInstanceDeadRequest(act=_act(), client_id="their-pc")
    assert await call.reason("ClientService/DeclareInstanceDead", dead) == "CLIENT_NOT_FOUND"
    assert not (await call("ClientService/ListClients", client_pb2.ListClientsRequest())).clients
    assert not (await call("TargetService/ListTargets", target_pb2.ListTargetsRequest())).targets
    resume = target_pb2.ResumeTargetRequest(target="shop")
    assert await call.reason("TargetService/ResumeTarget", resume) == "TARGET_NOT_FOUND"
    # A name is not an id: holding it holds one's own target.
    hold = target_pb2.HoldTargetRequest(target="shop", duration=seconds(60))
    assert (await call("TargetService/HoldTarget", hold)).target.policy.max_in_flight == 0
    assert await _rows(allocator) == before


async def test_insight(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    await allocator.sql(
        "INSERT INTO weekly_statistics VALUES ($1, '2026-03-02', 'their-pc', 1, 1, 0, 0, 1, now())",
        await allocator.service.organization_id("other"),
    )
    before = await _rows(allocator)
    explain = insight_pb2.ExplainAllocationRequest(slot_id=theirs.slot)
    assert await call.reason("InsightService/ExplainAllocation", explain) == "SLOT_NOT_FOUND"
    whole = await call("InsightService/ExplainAllocation", insight_pb2.ExplainAllocationRequest())
    assert whole.available_units == 0
    assert theirs.slot not in str(whole)
    simulate = insight_pb2.SimulateAllocationRequest(client=work_pb2.ClientIdentity(client_id="their-pc"))
    assert not (await call("InsightService/SimulateAllocation", simulate)).units
    listed = insight_pb2.ListAllocationsRequest(slot_id=theirs.slot)
    assert not (await call("InsightService/ListAllocations", listed)).allocations
    assert not (await call("InsightService/GetDashboard", insight_pb2.GetDashboardRequest())).rows
    assert not (await call("InsightService/GetClientPerformance", insight_pb2.GetClientPerformanceRequest())).clients
    assert not (await call("InsightService/GetSettingsEffect", insight_pb2.GetSettingsEffectRequest())).groups
    assert not (await call("InsightService/GetBlockReport", insight_pb2.GetBlockReportRequest())).blocks
    assert not (await call("InsightService/ListWeeklyStatistics", insight_pb2.ListWeeklyStatisticsRequest())).rows
    for activity in (
        insight_pb2.GetClientActivityRequest(client_id="their-pc"),
        insight_pb2.GetClientActivityRequest(client_ip="127.0.0.1"),
    ):
        assert not (await call("InsightService/GetClientActivity", activity)).clients
    totals = await call("InsightService/GetTotals", insight_pb2.GetTotalsRequest())
    assert (totals.active_slots, totals.leased, totals.clients, totals.exits, totals.quarantined) == (0, 0, 0, 0, 0)
    assert await _rows(allocator) == before


async def test_acts(allocator: Allocator, call: Caller, theirs: Theirs) -> None:
    before = await _rows(allocator)
    revoked = await call(
        "AdminService/RevokeLeases",
        admin_pb2.RevokeLeasesRequest(act=_act(), allocation_keys=[theirs.live.allocation_key]),
    )
    assert [one.error.reason for one in revoked.leases] == ["ALLOCATION_NOT_FOUND"]
    for slot, client in ((theirs.slot, ""), ("", "their-pc"), ("", "")):
        aged = admin_pb2.ReleaseByAgeRequest(act=_act(), older_than=seconds(0), slot_id=slot, client_id=client)
        answer = await call("AdminService/ReleaseByAge", aged)
        assert (answer.released, answer.remaining, list(answer.example_keys)) == (0, 0, [])
    reopen = admin_pb2.ReopenQuotaRequest(act=_act(), slot_id=theirs.slot, units=1)
    assert await call.reason("AdminService/ReopenQuota", reopen) == "SLOT_NOT_FOUND"
    for method in ("AcceptQuarantinedResults", "DiscardQuarantinedResults"):
        request = getattr(admin_pb2, f"{method}Request")(act=_act(), allocation_keys=[theirs.quarantined])
        answer = await call(f"AdminService/{method}", request)
        assert [one.error.reason for one in answer.results] == ["QUARANTINED_RESULT_NOT_FOUND"]
    for listed in (
        admin_pb2.ListQuarantinedResultsRequest(slot_id=theirs.slot),
        admin_pb2.ListQuarantinedResultsRequest(),
    ):
        assert not (await call("AdminService/ListQuarantinedResults", listed)).results
    entries = (await call("AdminService/ListAuditEntries", admin_pb2.ListAuditEntriesRequest())).entries
    assert all(theirs.slot not in entry.resource for entry in entries)
    assert await _rows(allocator) == before
