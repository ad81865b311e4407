"""An allocator under test: short calls on its contract, its database by the back door, and its invariants in SQL."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import asyncpg
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from muster.allocator.v1 import (
    exit_pb2,
    exit_pb2_grpc,
    insight_pb2,
    insight_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
    work_pb2,
    work_pb2_grpc,
)

from services.call import Role
from tests.support.services import RunningService

Metadata = tuple[tuple[str, str], ...]

# Each is empty while all is well.
INVARIANTS = {
    "quota passed": """
        SELECT * FROM daily_work_tracking WHERE allocated - expired - released > quota""",
    "a day made twice": "SELECT FROM daily_work_tracking GROUP BY work_date, slot_id HAVING count(*) > 1",
    "cap passed": "SELECT * FROM exits WHERE use_count > cap OR use_count < 0",
    "live and ended": "SELECT allocation_key FROM leases JOIN work_allocations USING (allocation_key)",
    "ended twice": "SELECT allocation_key FROM work_allocations GROUP BY 1 HAVING count(*) > 1",
    "counters differ from rows": """
        SELECT * FROM (
          SELECT slot_id, work_date, count(*) AS allocated,
            count(*) FILTER (WHERE status = 2) AS succeeded, count(*) FILTER (WHERE status = 3) AS failed,
            count(*) FILTER (WHERE status = 4) AS blocked, count(*) FILTER (WHERE status = 5) AS expired,
            count(*) FILTER (WHERE status = 6) AS released
          FROM (SELECT slot_id, work_date, 1 AS status FROM leases
            UNION ALL SELECT slot_id, work_date, status FROM work_allocations) a GROUP BY 1, 2) r
        FULL JOIN daily_work_tracking t USING (slot_id, work_date)
        WHERE (coalesce(r.allocated, 0), coalesce(r.succeeded, 0), coalesce(r.failed, 0), coalesce(r.blocked, 0),
            coalesce(r.expired, 0), coalesce(r.released, 0))
          IS DISTINCT FROM (t.allocated, t.succeeded, t.failed, t.blocked, t.expired, t.released)""",
    "a result without its allocation, or twice, or lost": """
        SELECT * FROM (SELECT allocation_key, count(*) AS rows FROM work_results GROUP BY 1) r
        FULL JOIN (SELECT allocation_key FROM work_allocations WHERE status IN (2, 3, 4)) a USING (allocation_key)
        WHERE r.rows IS DISTINCT FROM 1 OR a.allocation_key IS NULL""",
    "quarantine differs from its allocations": """
        SELECT * FROM quarantined_results q
        FULL JOIN (SELECT allocation_key FROM work_allocations WHERE quarantined) a USING (allocation_key)
        WHERE q.allocation_key IS NULL OR a.allocation_key IS NULL""",
}


async def until(condition: Callable[[], Awaitable[bool]], *, seconds: float = 10.0) -> None:
    """Waits until a condition holds, which it must within `seconds`."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def spec(**values: Any) -> slot_pb2.SlotSpec:
    """A slot that is good today."""
    defaults: dict[str, Any] = {
        "keyword": "laptop",
        "start_date": "2020-01-01",
        "end_date": "2099-12-31",
        "daily_quota": 100,
    }
    return slot_pb2.SlotSpec(**{**defaults, **values})


def lease(allocation: work_pb2.Allocation) -> work_pb2.Lease:
    """What names an allocation's lease."""
    return work_pb2.Lease(allocation_key=allocation.allocation_key, lease_token=allocation.lease_token)


def result(allocation: work_pb2.Allocation, outcome: int = 1, **values: Any) -> work_pb2.WorkResult:
    """A small result."""
    if outcome == work_pb2.WORK_OUTCOME_BLOCKED:
        values.setdefault("block_type", "captcha")
    values.setdefault("execution_time", Duration(seconds=2))
    return work_pb2.WorkResult(lease=lease(allocation), outcome=work_pb2.WorkOutcome.ValueType(outcome), **values)


@dataclass(slots=True)
class Allocator:
    """A running allocator."""

    service: RunningService
    work: work_pb2_grpc.WorkServiceAsyncStub
    slots: slot_pb2_grpc.SlotServiceAsyncStub
    exits: exit_pb2_grpc.ExitServiceAsyncStub
    insight: insight_pb2_grpc.InsightServiceAsyncStub
    operator: Metadata
    worker: Metadata
    # The back door kept open, for a test that uses it all the time; one call at a time.
    door: asyncpg.Connection[asyncpg.Record] | None = None

    @classmethod
    async def of(cls, service: RunningService) -> Allocator:
        """Wraps a service of the organization "acme"."""
        return cls(
            service,
            work_pb2_grpc.WorkServiceStub(service.channel),
            slot_pb2_grpc.SlotServiceStub(service.channel),
            exit_pb2_grpc.ExitServiceStub(service.channel),
            insight_pb2_grpc.InsightServiceStub(service.channel),
            await service.metadata(Role.OPERATOR),
            await service.metadata(Role.WORKER),
        )

    async def slot(self, **values: Any) -> slot_pb2.Slot:
        """Makes a slot; by default one that needs no exit."""
        values.setdefault("without_exit", True)
        request = slot_pb2.CreateSlotRequest(request_id=str(uuid.uuid4()), spec=spec(**values))
        return (await self.slots.CreateSlot(request, metadata=self.operator)).slot

    async def update(self, slot_id: str, reason: str = "", etag: str = "", **values: Any) -> slot_pb2.Slot:
        """Changes a slot."""
        request = slot_pb2.UpdateSlotRequest(
            slot_id=slot_id,
            spec=slot_pb2.SlotSpec(**values),
            update_mask=FieldMask(paths=list(values)),
            reason=reason,
            etag=etag,
        )
        return (await self.slots.UpdateSlot(request, metadata=self.operator)).slot

    async def add_exits(self, count: int, **values: Any) -> list[exit_pb2.Exit]:
        """Imports exits on ports from 3128."""
        specs = [exit_pb2.ExitSpec(endpoint=f"http://127.0.0.1:{3128 + number}", **values) for number in range(count)]
        return list(
            (await self.exits.ImportExits(exit_pb2.ImportExitsRequest(exits=specs), metadata=self.operator)).exits
        )

    async def ask(self, items: int = 1, client: str = "pc-1", **values: Any) -> work_pb2.AllocateWorkResponse:
        """Asks for work under a fresh request id, unless one is given."""
        values.setdefault("request_id", str(uuid.uuid4()))
        request = work_pb2.AllocateWorkRequest(
            client=work_pb2.ClientIdentity(client_id=client), max_items=items, **values
        )
        return await self.work.AllocateWork(request, metadata=self.worker)

    async def take(self, items: int = 1, **values: Any) -> list[work_pb2.Allocation]:
        """Asks for work and gets all of it."""
        response = await self.ask(items, **values)
        assert len(response.allocations) == items, response
        return list(response.allocations)

    async def submit(self, *results: work_pb2.WorkResult, client: str = "pc-1") -> list[work_pb2.SubmittedResult]:
        """Submits results."""
        request = work_pb2.SubmitResultsRequest(client=work_pb2.ClientIdentity(client_id=client), results=results)
        return list((await self.work.SubmitResults(request, metadata=self.worker)).results)

    async def renew(self, *leases: work_pb2.Lease) -> list[work_pb2.RenewedLease]:
        """Renews leases."""
        request = work_pb2.RenewLeasesRequest(leases=leases)
        return list((await self.work.RenewLeases(request, metadata=self.worker)).leases)

    async def release(self, *leases: work_pb2.Lease) -> list[work_pb2.ReleasedLease]:
        """Releases leases."""
        request = work_pb2.ReleaseLeasesRequest(leases=leases)
        return list((await self.work.ReleaseLeases(request, metadata=self.worker)).leases)

    async def heartbeat(self, client: str = "pc-1", goodbye: bool = False) -> work_pb2.HeartbeatResponse:
        """Says that a client lives."""
        request = work_pb2.HeartbeatRequest(client=work_pb2.ClientIdentity(client_id=client), goodbye=goodbye)
        return await self.work.Heartbeat(request, metadata=self.worker)

    async def explain(self, **values: Any) -> insight_pb2.ExplainAllocationResponse:
        """Asks why there is no work."""
        return await self.insight.ExplainAllocation(
            insight_pb2.ExplainAllocationRequest(**values), metadata=self.operator
        )

    async def totals(self) -> insight_pb2.GetTotalsResponse:
        """Reads the totals."""
        return await self.insight.GetTotals(insight_pb2.GetTotalsRequest(), metadata=self.operator)

    async def connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """Opens the back door; the caller closes it."""
        return await asyncpg.connect(self.service.dsn, server_settings={"search_path": "allocator"})

    async def sql(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs a statement by the back door."""
        if self.door is not None:
            return await self.door.fetch(statement, *arguments)
        connection = await self.connect()
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def waits_for_a_lock(self) -> bool:
        """Whether any session waits for another's lock."""
        return bool(await self.sql("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

    async def run_out(self, *allocations: work_pb2.Allocation) -> None:
        """Lets leases run out, as time would."""
        keys = [uuid.UUID(allocation.allocation_key) for allocation in allocations]
        await self.sql(
            """UPDATE leases SET granted_at = granted_at - interval '1 day', expires_at = now() - interval '1 second',
              renewable_until = renewable_until, sweep_at = now() - interval '1 second'
            WHERE allocation_key = ANY ($1)""",
            keys,
        )

    async def swept(self, *allocations: work_pb2.Allocation) -> None:
        """Waits until the sweep has ended leases; needs a service with a short `leases.sweep_seconds`."""
        keys = [uuid.UUID(allocation.allocation_key) for allocation in allocations]

        async def gone() -> bool:
            return not await self.sql("SELECT FROM leases WHERE allocation_key = ANY ($1)", keys)

        await until(gone)

    async def tracking(self, slot_id: str) -> dict[str, int]:
        """Reads today's counters of a slot."""
        rows = await self.sql(
            "SELECT quota, allocated, succeeded, failed, blocked, expired, released FROM daily_work_tracking "
            "WHERE slot_id = $1",
            uuid.UUID(slot_id),
        )
        (row,) = rows
        return dict(row)

    async def check_invariants(self, names: Iterable[str] = tuple(INVARIANTS)) -> None:
        """Asserts the invariants over all rows."""
        for name in names:
            broken = await self.sql(INVARIANTS[name])
            assert not broken, f"{name}: {broken[:3]}"
