"""InsightService: translates and validates."""

from __future__ import annotations

from muster.allocator.v1 import insight_pb2, insight_pb2_grpc, work_pb2

from allocator.allocation import Allocation
from allocator.blockers import NoWork
from allocator.clients import Clients
from allocator.explanation import Explanation
from allocator.insight import AllocationRecord
from allocator.insight_store import InsightStore
from allocator.positions import day_position, rate_position, week_position
from allocator.reports import Reports, SettingsEffect
from allocator.translation import (
    client_identity,
    day_text,
    moment,
    no_work_message,
    settings_message,
    tracking_message,
)
from allocator.weekly import WeekOfClient
from allocator.weekly_store import WeeklyStore
from services import pages
from services.status import Context
from services.validate import Checks

_MOST_ITEMS = 256
_MOST_NAMES = 16


class InsightServicer(insight_pb2_grpc.InsightServiceServicer):
    """Reads."""

    def __init__(
        self,
        store: InsightStore,
        weekly: WeeklyStore,
        reports: Reports,
        explanation: Explanation,
        allocation: Allocation,
        clients: Clients,
    ) -> None:
        self._store = store
        self._weekly = weekly
        self._reports = reports
        self._explanation = explanation
        self._allocation = allocation
        self._clients = clients

    async def ExplainAllocation(
        self, request: insight_pb2.ExplainAllocationRequest, context: Context
    ) -> insight_pb2.ExplainAllocationResponse:
        """Says why there is no work."""
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id, required=False) if request.slot_id else None
        target = checks.text("target", request.target, max_length=128)
        region = checks.text("region", request.region, max_length=64)
        client_id = checks.identifier("client_id", request.client_id, required=False)
        checks.done()
        blockers, units = await self._explanation.explain(
            (await self._clients.caller()).organization_id, slot_id, target or None, region or None, client_id
        )
        return insight_pb2.ExplainAllocationResponse(
            blockers=[
                insight_pb2.Blocker(
                    kind=work_pb2.BlockerKind.ValueType(blocker.kind),
                    count=blocker.count,
                    of=blocker.of,
                    example_ids=[str(example) for example in blocker.examples],
                    message=blocker.message,
                    remedy=blocker.remedy,
                )
                for blocker in blockers
            ],
            available_units=units,
        )

    async def SimulateAllocation(
        self, request: insight_pb2.SimulateAllocationRequest, context: Context
    ) -> insight_pb2.SimulateAllocationResponse:
        """Says what a client would get."""
        checks = Checks()
        client = client_identity(checks, request, context)
        items = checks.number("max_items", request.max_items or 1, least=1, most=_MOST_ITEMS)
        target = checks.text("target", request.target, max_length=128)
        region = checks.text("region", request.region, max_length=64)
        checks.done()
        outcome = await self._allocation.simulate(
            (await self._clients.caller()).organization_id, client.client_id, items, target or None, region or None
        )
        if isinstance(outcome, NoWork):
            return insight_pb2.SimulateAllocationResponse(no_work=no_work_message(outcome))
        return insight_pb2.SimulateAllocationResponse(
            units=[
                insight_pb2.SimulatedUnit(
                    slot_id=str(unit.slot_id),
                    keyword=unit.keyword,
                    target=unit.target,
                    exit_id=str(unit.exit_id or ""),
                    exit_provider=unit.exit_provider,
                    needs_persona=unit.needs_persona,
                )
                for unit in outcome
            ]
        )

    async def GetTotals(self, request: insight_pb2.GetTotalsRequest, context: Context) -> insight_pb2.GetTotalsResponse:
        """Reads the live figures."""
        totals = await self._reports.totals((await self._clients.caller()).organization_id)
        return insight_pb2.GetTotalsResponse(
            active_slots=totals.active_slots,
            leased=totals.leased,
            clients_online=totals.clients_online,
            clients=totals.clients,
            exits=totals.exits,
            exit_uses=totals.exit_uses,
            exit_capacity=totals.exit_capacity,
            today=tracking_message(totals.today),
            check_ins_pending=totals.check_ins_pending,
            quarantined=totals.quarantined,
            available_units=totals.available_units,
        )

    async def GetDashboard(
        self, request: insight_pb2.GetDashboardRequest, context: Context
    ) -> insight_pb2.GetDashboardResponse:
        """Reads one day by completion."""
        checks = Checks()
        day = checks.day("work_date", request.work_date, required=False)
        size = checks.page(request.page_size)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        scope = f"GetDashboard {organization_id} {request.work_date}"
        position = rate_position(pages.decode(request.page_token, scope))
        if position is not None:
            # That of the first page, though it may be tomorrow by now.
            day = position[0]
        elif day is None:
            day = await self._reports.today(organization_id)
        rows = await self._reports.dashboard(organization_id, day, position[1:] if position else None, size)
        token = ""
        if len(rows) == size:
            token = pages.encode([day_text(day), rows[-1].rate, str(rows[-1].slot_id)], scope)
        return insight_pb2.GetDashboardResponse(
            rows=[
                insight_pb2.DashboardRow(
                    slot_id=str(row.slot_id),
                    keyword=row.keyword,
                    tracking=tracking_message(row.tracking),
                    completion_rate=row.rate / 1e6,
                )
                for row in rows
            ],
            next_page_token=token,
        )

    async def GetClientPerformance(
        self, request: insight_pb2.GetClientPerformanceRequest, context: Context
    ) -> insight_pb2.GetClientPerformanceResponse:
        """Reads one day by client."""
        checks = Checks()
        day = checks.day("work_date", request.work_date, required=False)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        rows = await self._reports.client_performance(
            organization_id, day or await self._reports.today(organization_id)
        )
        return insight_pb2.GetClientPerformanceResponse(
            clients=[
                insight_pb2.ClientPerformance(
                    client_id=row.client_id,
                    client_name=row.client_name,
                    client_ip=row.client_ip,
                    active_instances=row.active_instances,
                    tasks=row.tasks,
                    mean_execution_ms=row.mean_execution_ms,
                    succeeded=row.succeeded,
                )
                for row in rows
            ]
        )

    async def GetSettingsEffect(
        self, request: insight_pb2.GetSettingsEffectRequest, context: Context
    ) -> insight_pb2.GetSettingsEffectResponse:
        """Reads the last 7 days by settings."""
        checks = Checks()
        checks.count("settings", request.settings, least=0, most=_MOST_NAMES)
        checks.unique("settings", request.settings)
        for number, name in enumerate(request.settings[:_MOST_NAMES]):
            checks.text(f"settings[{number}]", name, min_length=1, max_length=64)
        target = checks.text("target", request.target, max_length=128)
        checks.done()
        names = tuple(sorted(request.settings))
        rows = await self._reports.settings_effect(
            (await self._clients.caller()).organization_id, names, target or None
        )
        return insight_pb2.GetSettingsEffectResponse(groups=[_effect(row) for row in rows])

    async def GetBlockReport(
        self, request: insight_pb2.GetBlockReportRequest, context: Context
    ) -> insight_pb2.GetBlockReportResponse:
        """Reads the last hour's blocks."""
        rows = await self._reports.blocks((await self._clients.caller()).organization_id)
        return insight_pb2.GetBlockReportResponse(
            blocks=[
                insight_pb2.BlockCount(
                    block_type=row.block_type, count=row.count, affected_clients=row.affected_clients
                )
                for row in rows
            ]
        )

    async def GetClientActivity(
        self, request: insight_pb2.GetClientActivityRequest, context: Context
    ) -> insight_pb2.GetClientActivityResponse:
        """Reads a client's last hour."""
        checks = Checks()
        client_id = checks.identifier("client_id", request.client_id, required=not request.client_ip)
        address = checks.address("client_ip", request.client_ip)
        checks.done()
        rows = await self._reports.client_activity(
            (await self._clients.caller()).organization_id, client_id or None, None if client_id else address
        )
        return insight_pb2.GetClientActivityResponse(
            clients=[
                insight_pb2.ClientActivity(
                    client_id=row.client_id,
                    last_activity=moment(row.last_activity),
                    instances_used=row.instances_used,
                    folders_used=row.folders_used,
                    reports=row.reports,
                )
                for row in rows
            ]
        )

    async def ListWeeklyStatistics(
        self, request: insight_pb2.ListWeeklyStatisticsRequest, context: Context
    ) -> insight_pb2.ListWeeklyStatisticsResponse:
        """Pages through the weeks that are over."""
        checks = Checks()
        day = checks.day("week", request.week, required=False)
        client_id = checks.identifier("client_id", request.client_id, required=False)
        size = checks.page(request.page_size)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        scope = f"ListWeeklyStatistics {organization_id} {request.week} {client_id}"
        after = week_position(pages.decode(request.page_token, scope))
        rows = await self._weekly.page(organization_id, day, client_id or None, after, size)
        token = pages.encode([day_text(rows[-1].week), rows[-1].client_id], scope) if len(rows) == size else ""
        return insight_pb2.ListWeeklyStatisticsResponse(rows=[_week(row) for row in rows], next_page_token=token)

    async def ListAllocations(
        self, request: insight_pb2.ListAllocationsRequest, context: Context
    ) -> insight_pb2.ListAllocationsResponse:
        """Pages through the allocations of one day."""
        checks = Checks()
        day = checks.day("work_date", request.work_date, required=False)
        statuses = insight_pb2.AllocationStatus.values()
        status = checks.choice("status", request.status, statuses, "the values of AllocationStatus")
        slot_id = checks.uuid("slot_id", request.slot_id, required=False) if request.slot_id else None
        size = checks.page(request.page_size)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        scope = f"ListAllocations {organization_id} {request.work_date} {status} {slot_id}"
        position = day_position(pages.decode(request.page_token, scope))
        if position is not None:
            day = position[0]
        elif day is None:
            day = await self._reports.today(organization_id)
        before = position[1] if position else None
        records = await self._store.allocations(
            organization_id, day, status=status or None, slot_id=slot_id, before=before, size=size
        )
        token = pages.encode([day_text(day), str(records[-1].allocation_key)], scope) if len(records) == size else ""
        return insight_pb2.ListAllocationsResponse(
            allocations=[_record(record) for record in records], next_page_token=token
        )


def _effect(effect: SettingsEffect) -> insight_pb2.SettingsEffect:
    low, high = effect.interval()
    return insight_pb2.SettingsEffect(
        settings=settings_message(effect.settings),
        results=effect.results,
        succeeded=effect.succeeded,
        mean_execution_ms=effect.mean_execution_ms,
        success_rate=effect.success_rate(),
        rate_low=low,
        rate_high=high,
    )


def _week(row: WeekOfClient) -> insight_pb2.WeeklyStatistics:
    return insight_pb2.WeeklyStatistics(
        week=day_text(row.week),
        client_id=row.client_id,
        results=row.results,
        succeeded=row.succeeded,
        failed=row.failed,
        blocked=row.blocked,
        execution_ms=row.execution_ms,
        computed_at=moment(row.computed_at),
    )


def _record(record: AllocationRecord) -> insight_pb2.AllocationRecord:
    return insight_pb2.AllocationRecord(
        allocation_key=str(record.allocation_key),
        slot_id=str(record.slot_id),
        work_date=day_text(record.work_date),
        status=insight_pb2.AllocationStatus.ValueType(record.status),
        late=record.late,
        client_id=record.client_id,
        instance_number=record.instance_number,
        exit_id=str(record.exit_id or ""),
        persona_id=str(record.persona_id or ""),
        allocated_at=moment(record.allocated_at),
        expires_at=moment(record.expires_at),
        ended_at=moment(record.ended_at),
    )
