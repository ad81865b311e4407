"""The hot statements rely on the indexes they name, and what is updated often stays within its page."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from muster.allocator.v1 import work_pb2

from allocator.leases import work_dates
from services.postgres import queries
from tests.support.allocator import Allocator, lease, until
from tests.support.services import StartService

_SLOTS = 3000
_ROWS = 20_000


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One with thousands of slots, live leases and ended allocations."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    slot = await allocator.slot(daily_quota=1_000_000)
    organization_id = await allocator.service.organization_id()
    await allocator.take(1)
    door = allocator.door = await allocator.connect()
    await door.execute(
        f"""INSERT INTO work_slots SELECT gen_random_uuid(), organization_id, 'e' || g, keyword, code, target,
          start_date, end_date, daily_quota, settings, is_active, priority, weight, without_exit, persona_need,
          spec_sha256
        FROM work_slots, generate_series(1, {_SLOTS}) g;
        INSERT INTO daily_work_tracking (organization_id, work_date, slot_id, quota)
        SELECT organization_id, (now() AT TIME ZONE 'UTC')::date, slot_id, daily_quota FROM work_slots
        ON CONFLICT DO NOTHING"""
    )
    await door.execute(
        f"""INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, client_id,
          instance_number, granted_at, expires_at, renewable_until, sweep_at)
        SELECT gen_random_uuid(), $1, gen_random_uuid(), now()::date, $2, 'pc-' || g % 100, g % 4, now(),
          now() + interval '5 min', now() + interval '6 h', now() + interval '5 min'
        FROM generate_series(1, {_ROWS}) g""",
        organization_id,
        uuid.UUID(slot.slot_id),
    )
    await door.execute(
        """INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, client_id,
          instance_number, lease_token, status, allocated_at, expires_at, ended_at)
        SELECT organization_id, work_date, gen_random_uuid(), slot_id, client_id, instance_number, lease_token, 5,
          granted_at, expires_at, now() FROM leases"""
    )
    await door.execute("ANALYZE")
    yield allocator
    await door.close()


async def _plan(door: asyncpg.Connection[asyncpg.Record], statement: str, *arguments: Any) -> list[dict[str, Any]]:
    """Runs a statement, takes it back, and returns the nodes of its plan that were run."""
    transaction = door.transaction()
    await transaction.start()
    try:
        text = await door.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}", *arguments)
    finally:
        await transaction.rollback()

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if node.get("Actual Loops", 1):
            yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    return list(nodes(json.loads(text)[0]["Plan"]))


def _scanned(nodes: list[dict[str, Any]], table: str) -> set[str]:
    """Returns how a table, or a partition of it, was read: the indexes used, and "Seq Scan" when it was read whole."""
    whole = {node["Node Type"] for node in nodes if node.get("Relation Name", "").startswith(table)} & {"Seq Scan"}
    return whole | {node["Index Name"] for node in nodes if node.get("Index Name", "").startswith(table)}


async def test_hot_statements_use_their_indexes(allocator: Allocator) -> None:
    door = allocator.door
    assert door is not None
    organization_id = await allocator.service.organization_id()
    allocation, leases = queries("allocator", "allocation.sql"), queries("allocator", "leases.sql")
    slots = [row["slot_id"] for row in await door.fetch("SELECT slot_id FROM work_slots ORDER BY 1 LIMIT 64")]
    rows = await door.fetch("SELECT allocation_key, lease_token FROM leases LIMIT 64")
    keys, tokens = [row["allocation_key"] for row in rows], [row["lease_token"] for row in rows]

    nodes = await _plan(door, allocation["reserve_slots"], organization_id, slots, [1] * 64)
    # Partitions' indexes are named after the partition; none is read whole.
    assert "Seq Scan" not in _scanned(nodes, "daily_work_tracking")

    nodes = await _plan(door, leases["renew_leases"], organization_id, keys, tokens, 300.0)
    assert _scanned(nodes, "leases") == {"leases_pkey"}
    nodes = await _plan(door, leases["lock_leases"], organization_id, keys)
    assert _scanned(nodes, "leases") == {"leases_pkey"}
    nodes = await _plan(door, leases["lock_expired"], organization_id, 1000)
    assert _scanned(nodes, "leases") == {"leases_sweep_at"}
    nodes = await _plan(door, leases["organizations_to_sweep"])
    assert _scanned(nodes, "leases") == {"leases_sweep_at"}
    nodes = await _plan(door, leases["leases_of_instance"], organization_id, "pc-7", 3)
    assert "leases_holder" in _scanned(nodes, "leases") | {node["Index Name"] for node in nodes if "Index Name" in node}

    fresh = (await allocator.take(1))[0]
    key = uuid.UUID(fresh.allocation_key)
    nodes = await _plan(door, leases["find_ended"], organization_id, [key], work_dates([key]))
    assert "Seq Scan" not in _scanned(nodes, "work_allocations")


async def test_counters_and_renewals_stay_within_their_page(allocator: Allocator) -> None:
    await allocator.add_exits(20, cap=1000)
    await allocator.slot(without_exit=False, priority=9, daily_quota=5000)
    for _ in range(5):
        await asyncio.gather(*(allocator.take(20) for _ in range(8)))
    units = [unit for batch in await asyncio.gather(*(allocator.take(20) for _ in range(8))) for unit in batch]
    for _ in range(3):
        renewed = await allocator.renew(*(lease(unit) for unit in units))
        assert all(isinstance(answer, work_pb2.RenewedLease) and answer.HasField("expires_at") for answer in renewed)

    async def counted() -> bool:
        (row,) = await allocator.sql(
            "SELECT sum(n_tup_upd) AS updated, sum(n_tup_hot_upd) AS hot FROM pg_stat_user_tables "
            "WHERE relname LIKE 'daily_work_tracking_2%' OR relname IN ('exits', 'leases')"
        )
        # A page that is full moves a row now and then; a page has room for one more version of each of its rows.
        return bool(row["updated"] > 500 and 10 * row["hot"] > 9 * row["updated"])

    await until(counted)
