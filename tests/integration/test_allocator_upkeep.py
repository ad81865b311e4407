"""What the allocator does by the clock: sweeps, the rows of a new day, old request ids, gauges."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from allocator import app, metrics
from allocator.allocation_store import AllocationStore
from allocator.gauges import Gauges
from allocator.lease_store import LeaseStore
from allocator.partitions import Partitions
from allocator.upkeep import Upkeep
from services.call import Role
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


async def test_an_organization_whose_rows_are_locked_does_not_keep_the_others_from_being_swept(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app._SETTINGS, "lock_timeout", "300")
    listed = LeaseStore.organizations_to_sweep
    locked: list[uuid.UUID] = []

    async def locked_first(store: LeaseStore) -> list[uuid.UUID]:
        return sorted(await listed(store), key=lambda organization_id: organization_id not in locked)

    monkeypatch.setattr(LeaseStore, "organizations_to_sweep", locked_first)
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.1}))
    other = await Allocator.of(allocator.service)
    other.operator = await allocator.service.metadata(Role.OPERATOR, "other")
    other.worker = await allocator.service.metadata(Role.WORKER, "other")
    units = []
    for one in (allocator, other):
        await one.slot()
        units += await one.take()
    locked.append(await allocator.service.organization_id())
    mine, theirs = units
    door = await allocator.connect()
    async with door.transaction():
        await door.execute("SELECT FROM daily_work_tracking WHERE organization_id = $1 FOR UPDATE", *locked)
        await allocator.run_out(mine, theirs)
        await other.swept(theirs)
        assert [row["organization_id"] for row in await allocator.sql("SELECT organization_id FROM leases")] == locked
    await door.close()
    await allocator.swept(mine)
    await allocator.check_invariants()


async def test_an_organization_with_many_overdue_leases_does_not_hide_the_others(
    allocator: Allocator, upkeep: Upkeep
) -> None:
    many, few = uuid.uuid4(), uuid.uuid4()
    for organization, leases, hours in ((many, 1500, 2), (few, 1, 1)):
        await allocator.sql(
            "INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, client_id, "
            "instance_number, granted_at, expires_at, renewable_until, sweep_at) "
            "SELECT gen_random_uuid(), $1, gen_random_uuid(), now()::date, gen_random_uuid(), 'pc', 0, at, at, at, at "
            "FROM generate_series(1, $2::integer), (SELECT now() - $3::integer * interval '1 hour' AS at) a",
            organization,
            leases,
            hours,
        )
    store = LeaseStore(upkeep._database, upkeep._partitions)
    assert sorted(await store.organizations_to_sweep()) == sorted([many, few])


async def test_the_rows_of_a_new_day_are_made_for_slots_that_may_work(allocator: Allocator, upkeep: Upkeep) -> None:
    eligible = await allocator.slot(daily_quota=7)
    await allocator.slot(is_active=False)
    await allocator.slot(start_date="2024-01-01", end_date="2024-01-31")
    await allocator.sql("DELETE FROM daily_work_tracking")
    await allocator.sql("DELETE FROM tracked_days")
    await upkeep.round()
    await upkeep.round()
    rows = await allocator.sql("SELECT slot_id, work_date, quota, allocated FROM daily_work_tracking")
    [[today]] = await allocator.sql("SELECT (now() AT TIME ZONE 'UTC')::date")
    # Shortly before midnight those of tomorrow are made as well.
    assert (uuid.UUID(eligible.slot_id), today, 7, 0) in {tuple(row) for row in rows}
    assert {row["slot_id"] for row in rows} == {uuid.UUID(eligible.slot_id)}


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
    await gauges.measure_clients()
    await gauges.measure_slots()
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


async def test_a_client_that_said_goodbye_is_not_missed_until_it_speaks_again(
    allocator: Allocator, upkeep: Upkeep
) -> None:
    gauges = Gauges(upkeep._database, upkeep._partitions)

    async def missed() -> float:
        for table in ("clients", "client_instances"):
            await allocator.sql(f"UPDATE {table} SET last_seen_at = now() - interval '11 minutes'")
        await gauges.measure_clients()
        return float(metrics.CLIENTS.labels("offline")._value.get())

    await allocator.heartbeat("pc-1")
    assert await missed() == 1
    await allocator.heartbeat("pc-1", goodbye=True)
    assert await missed() == 0
    await allocator.heartbeat("pc-1")
    assert await missed() == 1
