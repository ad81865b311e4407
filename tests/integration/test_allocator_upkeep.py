"""What the allocator does by the clock: the rows of a new day, old request ids, gauges."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from allocator import metrics
from allocator.allocation_store import AllocationStore
from allocator.gauges import Gauges
from allocator.partitions import Partitions
from allocator.upkeep import Upkeep
from services.postgres import Database
from tests.support.allocator import Allocator
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


@pytest.fixture
async def upkeep(allocator: Allocator) -> AsyncIterator[Upkeep]:
    """The same upkeep as the service's, to be run when a test wants it."""
    postgres = allocator.service.chassis.config.postgres
    database = await Database.connect(postgres, "upkeep", search_path="allocator")
    partitions = Partitions(database)
    yield Upkeep(database, AllocationStore(database, partitions), partitions)
    await database.close()


async def test_the_rows_of_a_new_day_are_made_for_slots_that_may_work(allocator: Allocator, upkeep: Upkeep) -> None:
    eligible = await allocator.slot(daily_quota=7)
    paused = await allocator.slot(is_active=False)
    past = await allocator.slot(start_date="2024-01-01", end_date="2024-01-31")
    await allocator.sql("DELETE FROM daily_work_tracking")
    await allocator.sql("DELETE FROM tracked_days")
    await upkeep.round()
    await upkeep.round()
    rows = await allocator.sql(
        "SELECT slot_id, quota, allocated, work_date = (now() AT TIME ZONE 'UTC')::date AS today "
        "FROM daily_work_tracking"
    )
    made = {str(row["slot_id"]): (row["quota"], row["allocated"], row["today"]) for row in rows}
    assert made[eligible.slot_id] == (7, 0, True)
    assert past.slot_id not in made
    assert paused.slot_id not in made


async def test_days_long_over_are_forgotten_and_the_last_sixty_kept(allocator: Allocator, upkeep: Upkeep) -> None:
    await allocator.slot()
    organization = await allocator.service.organization_id()
    await allocator.sql(
        "INSERT INTO tracked_days (organization_id, work_date) "
        "SELECT $1, (now() AT TIME ZONE 'UTC')::date - n FROM unnest('{59, 60, 61, 400}'::integer[]) n",
        organization,
    )
    await upkeep.round()
    kept = await allocator.sql(
        "SELECT (now() AT TIME ZONE 'UTC')::date - work_date AS age FROM tracked_days WHERE organization_id = $1",
        organization,
    )
    assert {row["age"] for row in kept if row["age"] > 1} == {59, 60}


async def test_old_request_ids_are_forgotten_and_young_ones_kept(allocator: Allocator, upkeep: Upkeep) -> None:
    await allocator.slot()
    await allocator.take()
    await allocator.take()
    await allocator.sql(
        "UPDATE requests SET created_at = now() - interval '25 hours' "
        "WHERE request_id = (SELECT request_id FROM requests WHERE method = 'AllocateWork' LIMIT 1)"
    )
    before = len(await allocator.sql("SELECT 1 FROM requests"))
    await upkeep.round()
    assert len(await allocator.sql("SELECT 1 FROM requests")) == before - 1


async def test_the_gauges_read_what_the_tables_hold(allocator: Allocator, upkeep: Upkeep) -> None:
    gauges = Gauges(upkeep._database, upkeep._partitions)
    await allocator.slot()
    await allocator.slot(is_active=False)
    await allocator.slot(start_date="2098-01-01")
    await allocator.take(3)
    await allocator.take(1, client="pc-2")
    await allocator.take(1, client="pc-3")
    await allocator.sql("UPDATE clients SET last_seen_at = now() - interval '11 minutes' WHERE client_id = 'pc-2'")
    await allocator.sql("UPDATE clients SET last_seen_at = now() - interval '25 hours' WHERE client_id = 'pc-3'")
    await allocator.take(1, client="pc-4")
    await allocator.sql(
        "UPDATE clients SET last_seen_at = now() - interval '1 hour', draining = true WHERE client_id = 'pc-4'"
    )
    await gauges.measure()
    await gauges.measure_slowly()
    assert metrics.LIVE_LEASES._value.get() == 6
    assert metrics.OVERDUE_LEASES._value.get() == 0
    assert metrics.ACTIVE_SLOTS._value.get() == 1
    assert metrics.CLIENTS.labels("online")._value.get() == 1
    assert metrics.CLIENTS.labels("offline")._value.get() == 1
    assert metrics.PARTITIONS_MISSING._value.get() == 0
    await allocator.sql("UPDATE leases SET expires_at = now() - interval '1 minute'")
    await allocator.sql(
        "INSERT INTO outbox (organization_id, holder, outcome, created_at, due_at) "
        "VALUES (gen_random_uuid(), gen_random_uuid(), 1, now() - interval '90 seconds', now() + interval '1 hour')"
    )
    await gauges.measure()
    assert metrics.OVERDUE_LEASES._value.get() == 6
    assert metrics.OUTBOX_PENDING._value.get() == 1
    assert 90 <= metrics.OUTBOX_SECONDS._value.get() < 120
