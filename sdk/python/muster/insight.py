"""What the allocator knows, and why it decides as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import IntEnum

from muster import values
from muster.allocator.v1 import insight_pb2, insight_pb2_grpc
from muster.calls import Transport
from muster.slots import DailyTracking, tracking
from muster.values import Setting
from muster.work import BlockerKind, ClientIdentity, NoWork, identity_message, no_work


class AllocationStatus(IntEnum):
    """Where an allocation stands; UNSPECIFIED in a filter means any."""

    UNSPECIFIED = 0
    LEASED = 1
    SUCCEEDED = 2
    FAILED = 3
    BLOCKED = 4
    EXPIRED = 5
    RELEASED = 6


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing in the way of work: it holds back `count` of the `of` slots or exits looked at."""

    kind: BlockerKind
    count: int
    of: int
    example_ids: tuple[str, ...]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why there is no work: the nearest blocker first; none when work would be handed out."""

    blockers: tuple[Blocker, ...]
    available_units: int


@dataclass(frozen=True, slots=True)
class WorkTotals:
    """The organization's live figures."""

    active_slots: int
    leased: int
    clients_online: int
    clients: int
    exits: int
    exit_uses: int
    exit_capacity: int
    today: DailyTracking
    check_ins_pending: int
    quarantined: int
    available_units: int


@dataclass(frozen=True, slots=True)
class SimulatedUnit:
    """One unit that would be handed out; `exit_id` and `exit_provider` are empty when it would have none."""

    slot_id: str
    keyword: str
    target: str
    exit_id: str
    exit_provider: str
    needs_persona: bool


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a client would get now: units, or the reason why there would be none."""

    units: tuple[SimulatedUnit, ...]
    no_work: NoWork | None


@dataclass(frozen=True, slots=True)
class DashboardRow:
    """One slot's day; `completion_rate` is finished units by quota, 0 to 1."""

    slot_id: str
    keyword: str
    tracking: DailyTracking
    completion_rate: float


@dataclass(frozen=True, slots=True)
class ClientPerformance:
    """One client's day, by its results' time."""

    client_id: str
    client_name: str
    client_ip: str
    active_instances: int
    tasks: int
    mean_execution: timedelta
    succeeded: int


@dataclass(frozen=True, slots=True)
class SettingsEffect:
    """What came of one combination of settings; the rate lies between `rate_low` and `rate_high` (95 %, Wilson)."""

    settings: Mapping[str, Setting]
    results: int
    succeeded: int
    mean_execution: timedelta
    success_rate: float
    rate_low: float
    rate_high: float


@dataclass(frozen=True, slots=True)
class BlockCount:
    """One kind of block in the last hour, and the distinct clients it came from."""

    block_type: str
    count: int
    affected_clients: int


@dataclass(frozen=True, slots=True)
class ClientActivity:
    """One client's last hour."""

    client_id: str
    last_activity: datetime
    instances_used: int
    folders_used: int
    reports: int


@dataclass(frozen=True, slots=True)
class WeekOfClient:
    """What came of one week; `week` is its Monday, `client_id` is empty for the organization as a whole."""

    week: str
    client_id: str
    results: int
    succeeded: int
    failed: int
    blocked: int
    execution: timedelta
    computed_at: datetime


@dataclass(frozen=True, slots=True)
class AllocationRecord:
    """An allocation as recorded; `late` says that its result came after its lease had run out."""

    allocation_key: str
    slot_id: str
    work_date: str
    status: AllocationStatus
    late: bool
    client_id: str
    instance_number: int
    exit_id: str
    persona_id: str
    allocated_at: datetime
    expires_at: datetime
    ended_at: datetime | None


class Insight:
    """`client.insight`: explanations, live figures and the day's work. Role: operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> insight_pb2_grpc.InsightServiceAsyncStub:
        return self._transport.stub(insight_pb2_grpc.InsightServiceStub)

    async def explain(
        self, *, slot_id: str = "", target: str = "", region: str = "", client_id: str = ""
    ) -> Explanation:
        """Says why a slot, or the whole organization, gets no work, as any client or this one sees it.

        Raises:
            NotFound: the organization has no such slot.
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.ExplainAllocationRequest(
            slot_id=slot_id, target=target, region=region, client_id=client_id
        )
        answer = await self._transport.call(self._stub.ExplainAllocation, request)
        blockers = tuple(
            Blocker(
                values.member(BlockerKind, item.kind),
                item.count,
                item.of,
                tuple(item.example_ids),
                item.message,
                item.remedy,
            )
            for item in answer.blockers
        )
        return Explanation(blockers, answer.available_units)

    async def simulate(
        self, client: ClientIdentity, *, max_items: int = 1, target: str = "", region: str = ""
    ) -> Simulation:
        """Says what a client would get now, without leasing anything; the arguments are those of `Work.allocate`.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.SimulateAllocationRequest(
            client=identity_message(client), max_items=max_items, target=target, region=region
        )
        answer = await self._transport.call(self._stub.SimulateAllocation, request)
        units = tuple(
            SimulatedUnit(unit.slot_id, unit.keyword, unit.target, unit.exit_id, unit.exit_provider, unit.needs_persona)
            for unit in answer.units
        )
        return Simulation(units, no_work(answer) if answer.HasField("no_work") else None)

    async def totals(self) -> WorkTotals:
        """Reads the live figures, at most a second old.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._stub.GetTotals, insight_pb2.GetTotalsRequest())
        return WorkTotals(
            answer.active_slots,
            answer.leased,
            answer.clients_online,
            answer.clients,
            answer.exits,
            answer.exit_uses,
            answer.exit_capacity,
            tracking(answer.today),
            answer.check_ins_pending,
            answer.quarantined,
            answer.available_units,
        )

    async def dashboard(self, work_date: date | None = None, *, page_size: int = 100) -> AsyncIterator[DashboardRow]:
        """Yields one day's slots by completion rate, highest first; None means today.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        day = work_date.isoformat() if work_date else ""
        request = insight_pb2.GetDashboardRequest(work_date=day, page_size=page_size)
        async for answer in self._transport.pages(self._stub.GetDashboard, request):
            for row in answer.rows:
                yield DashboardRow(row.slot_id, row.keyword, tracking(row.tracking), row.completion_rate)

    async def client_performance(self, work_date: date | None = None) -> tuple[ClientPerformance, ...]:
        """Reads one day's results by client, most first; None means today.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        day = work_date.isoformat() if work_date else ""
        request = insight_pb2.GetClientPerformanceRequest(work_date=day)
        answer = await self._transport.call(self._stub.GetClientPerformance, request)
        return tuple(
            ClientPerformance(
                item.client_id,
                item.client_name,
                item.client_ip,
                item.active_instances,
                item.tasks,
                timedelta(milliseconds=item.mean_execution_ms),
                item.succeeded,
            )
            for item in answer.clients
        )

    async def settings_effect(self, settings: Sequence[str] = (), *, target: str = "") -> tuple[SettingsEffect, ...]:
        """Reads the results of the last 7 days by the settings that were applied, the best first.

        Args:
            settings: Only these tell groups apart, up to 16; empty for all that were applied.
            target: Only slots with this target; empty for any.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.GetSettingsEffectRequest(settings=settings, target=target)
        answer = await self._transport.call(self._stub.GetSettingsEffect, request)
        return tuple(
            SettingsEffect(
                values.plain_settings(item.settings),
                item.results,
                item.succeeded,
                timedelta(milliseconds=item.mean_execution_ms),
                item.success_rate,
                item.rate_low,
                item.rate_high,
            )
            for item in answer.groups
        )

    async def blocks(self) -> tuple[BlockCount, ...]:
        """Reads the blocked results of the last hour by type, most first.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._stub.GetBlockReport, insight_pb2.GetBlockReportRequest())
        return tuple(BlockCount(item.block_type, item.count, item.affected_clients) for item in answer.blocks)

    async def client_activity(self, client_id: str = "", *, client_ip: str = "") -> tuple[ClientActivity, ...]:
        """Reads what one client, or the clients behind one address, did in the last hour.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.GetClientActivityRequest(client_id=client_id, client_ip=client_ip)
        answer = await self._transport.call(self._stub.GetClientActivity, request)
        return tuple(
            ClientActivity(
                item.client_id,
                values.required_moment(item, "last_activity"),
                item.instances_used,
                item.folders_used,
                item.reports,
            )
            for item in answer.clients
        )

    async def weekly(
        self, day: date | None = None, *, client_id: str = "", page_size: int = 100
    ) -> AsyncIterator[WeekOfClient]:
        """Yields what came of the weeks that are over, the newest first: the organization, then each client.

        Args:
            day: Only the week of this day; None for all.
            client_id: Only this client; empty for all, and the organization as a whole.
            page_size: Rows that one call asks for, 1 to 1000.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.ListWeeklyStatisticsRequest(
            week=day.isoformat() if day else "", client_id=client_id, page_size=page_size
        )
        async for answer in self._transport.pages(self._stub.ListWeeklyStatistics, request):
            for row in answer.rows:
                yield WeekOfClient(
                    row.week,
                    row.client_id,
                    row.results,
                    row.succeeded,
                    row.failed,
                    row.blocked,
                    timedelta(milliseconds=row.execution_ms),
                    values.required_moment(row, "computed_at"),
                )

    async def allocations(
        self,
        work_date: date | None = None,
        *,
        status: AllocationStatus = AllocationStatus.UNSPECIFIED,
        slot_id: str = "",
        page_size: int = 100,
    ) -> AsyncIterator[AllocationRecord]:
        """Yields the allocations of one work date, newest first; None means today.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = insight_pb2.ListAllocationsRequest(
            work_date=work_date.isoformat() if work_date else "",
            status=insight_pb2.AllocationStatus.ValueType(status),
            slot_id=slot_id,
            page_size=page_size,
        )
        async for answer in self._transport.pages(self._stub.ListAllocations, request):
            for item in answer.allocations:
                yield _record(item)


def _record(item: insight_pb2.AllocationRecord) -> AllocationRecord:
    return AllocationRecord(
        allocation_key=item.allocation_key,
        slot_id=item.slot_id,
        work_date=item.work_date,
        status=values.member(AllocationStatus, item.status),
        late=item.late,
        client_id=item.client_id,
        instance_number=item.instance_number,
        exit_id=item.exit_id,
        persona_id=item.persona_id,
        allocated_at=values.required_moment(item, "allocated_at"),
        expires_at=values.required_moment(item, "expires_at"),
        ended_at=values.moment(item, "ended_at"),
    )
