"""InsightService: translates and validates; the database answers."""

from __future__ import annotations

from uuid import UUID

from muster.allocator.v1 import insight_pb2, insight_pb2_grpc, work_pb2

from allocator.clients import Clients
from allocator.explanation import Explanation
from allocator.insight import AllocationRecord
from allocator.insight_store import InsightStore
from allocator.positions import rate_position, uuid_position
from allocator.translation import day_text, moment, tracking_message
from services import pages
from services.call import current
from services.status import Context
from services.validate import Checks


class InsightServicer(insight_pb2_grpc.InsightServiceServicer):
    """Reads."""

    def __init__(self, store: InsightStore, explanation: Explanation, clients: Clients) -> None:
        self._store = store
        self._explanation = explanation
        self._clients = clients

    async def ExplainAllocation(
        self, request: insight_pb2.ExplainAllocationRequest, context: Context
    ) -> insight_pb2.ExplainAllocationResponse:
        """Says why there is no work."""
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id, required=False) if request.slot_id else None
        target = checks.text("target", request.target, max_length=128)
        region = checks.text("region", request.region, max_length=64)
        checks.done()
        blockers, units = await self._explanation.explain(
            await self._organization(), slot_id, target or None, region or None
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

    async def GetTotals(self, request: insight_pb2.GetTotalsRequest, context: Context) -> insight_pb2.GetTotalsResponse:
        """Reads the live figures."""
        totals = await self._store.totals(await self._organization())
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
        )

    async def GetDashboard(
        self, request: insight_pb2.GetDashboardRequest, context: Context
    ) -> insight_pb2.GetDashboardResponse:
        """Reads one day by completion."""
        checks = Checks()
        day = checks.day("work_date", request.work_date, required=False)
        size = checks.page(request.page_size)
        checks.done()
        organization_id = await self._organization()
        scope = f"GetDashboard {organization_id} {request.work_date}"
        after = rate_position(pages.decode(request.page_token, scope))
        rows = await self._store.dashboard(organization_id, day, after, size)
        token = pages.encode([rows[-1].rate, str(rows[-1].slot_id)], scope) if len(rows) == size else ""
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
        organization_id = await self._organization()
        scope = f"ListAllocations {organization_id} {request.work_date} {status} {slot_id}"
        before = uuid_position(pages.decode(request.page_token, scope))
        records = await self._store.allocations(
            organization_id, day, status=status or None, slot_id=slot_id, before=before, size=size
        )
        token = pages.encode([str(records[-1].allocation_key)], scope) if len(records) == size else ""
        return insight_pb2.ListAllocationsResponse(
            allocations=[_record(record) for record in records], next_page_token=token
        )

    async def _organization(self) -> UUID:
        principal = current().principal
        await self._clients.meet_organization(principal.organization_id, principal.time_zone)
        return principal.organization_id


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
