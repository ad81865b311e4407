"""At a million rows the hot statements read what they need by their indexes; counters stay within their page."""

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

_ROWS = 1_000_000
_SLOT = "('00000000-0000-7000-8000-' || lpad(to_hex(g), 12, '0'))::uuid"
# Another part of the key space than the slots', in ascending order too.
_KEY = "('018bcfe5-6800-7000-8000-' || lpad(to_hex(g), 12, '0'))::uuid"


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One whose sweep does not come within the test, with the back door open."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    allocator.door = await allocator.connect()
    yield allocator
    await allocator.door.close()


async def _fill(allocator: Allocator) -> None:
    """Makes a million days of slots, of live leases and of ended allocations."""
    door = allocator.door
    assert door is not None
    slot = uuid.UUID((await allocator.slot(daily_quota=1000)).slot_id)
    await allocator.take(1)
    await door.execute(
        f"""INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT {_SLOT}, organization_id, keyword, code, target, start_date, end_date, daily_quota, settings, is_active,
          priority, weight, without_exit, spec_sha256, class_id
        FROM work_slots, generate_series(1, {_ROWS // 10}) g WHERE slot_id = '{slot}';
        INSERT INTO daily_work_tracking (organization_id, work_date, slot_id, quota, class_id, allocated)
        SELECT organization_id, (now() AT TIME ZONE 'UTC')::date, {_SLOT}, 1000, class_id, g % 1000
        FROM work_slots, generate_series(1, {_ROWS}) g WHERE slot_id = '{slot}';
        INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, client_id,
          instance_number, granted_at, expires_at, renewable_until, sweep_at)
        SELECT {_KEY}, organization_id, {_KEY}, now()::date, slot_id, 'pc-' || g % 10000, g % 4, now(),
          e.at, now() + interval '6 h', e.at
        FROM work_slots, generate_series(1, {_ROWS}) g
        CROSS JOIN LATERAL (SELECT now() + CASE WHEN g % 1000 = 0 THEN -1 ELSE 3600 END * interval '1 s' AS at) e
        WHERE slot_id = '{slot}';
        INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, client_id, instance_number,
          lease_token, status, allocated_at, expires_at, ended_at)
        SELECT organization_id, now()::date, {_KEY}, slot_id, 'pc', 0, {_KEY}, 5, now(), now(), now()
        FROM work_slots, generate_series({_ROWS + 1}, {2 * _ROWS}) g WHERE slot_id = '{slot}'"""
    )
    await door.execute("ANALYZE")


async def _plan(
    door: asyncpg.Connection[asyncpg.Record], statement: str, *arguments: Any, before: str = "SELECT"
) -> list[dict[str, Any]]:
    """Runs a statement by the plan that serves any arguments, takes it back, and returns the nodes that were run."""
    transaction = door.transaction()
    await transaction.start()
    try:
        # The first as the service's own sessions have it: whether a partition is empty depends on the day of the week.
        await door.execute("SET LOCAL enable_seqscan = off; SET LOCAL plan_cache_mode = force_generic_plan")
        await door.execute(before)
        text = await door.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}", *arguments)
    finally:
        await transaction.rollback()

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if node.get("Actual Loops", 1):
            yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    return list(nodes(json.loads(text)[0]["Plan"]))


def _read(nodes: list[dict[str, Any]], table: str) -> tuple[set[str], float]:
    """Returns how a table, or a partition of it, was read, and how many rows its scans have looked at."""
    scans = [node for node in nodes if node.get("Relation Name", node.get("Index Name", "")).startswith(table)]
    scans = [node for node in scans if "Scan" in node["Node Type"]]
    ways = {node.get("Index Name", node["Node Type"]) for node in scans if node["Node Type"] != "Bitmap Heap Scan"}
    looked = sum(
        node["Actual Loops"]
        * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0))
        for node in scans
    )
    return ways, looked


async def test_hot_statements_read_what_they_need_at_a_million_rows(allocator: Allocator) -> None:
    await _fill(allocator)
    door = allocator.door
    assert door is not None
    organization_id = await allocator.service.organization_id()
    allocation, leases = queries("allocator", "allocation.sql"), queries("allocator", "leases.sql")
    (row,) = await door.fetch("SELECT work_date, class_id FROM daily_work_tracking LIMIT 1")
    day, class_id = row["work_date"], row["class_id"]
    slots = [row["slot_id"] for row in await door.fetch("SELECT slot_id FROM work_slots ORDER BY 1 LIMIT 64")]
    rows = await door.fetch("SELECT allocation_key, lease_token FROM leases LIMIT 64")
    keys, tokens = [row["allocation_key"] for row in rows], [row["lease_token"] for row in rows]

    # A window from the middle, and one that goes round at the end, cost as much as they show.
    for place in (uuid.UUID(int=slots[0].int + _ROWS // 2), uuid.UUID(int=2**128 - 1)):
        arguments = (organization_id, day, [class_id], [float("-inf")], [place], 1024)
        nodes = await _plan(door, allocation["windows"], *arguments, before=allocation["plan_windows"])
        ways, looked = _read(nodes, "daily_work_tracking")
        assert all(way.endswith("organization_id_work_date_class_idx") for way in ways), ways
        assert looked <= 1100
        assert _read(nodes, "work_slots")[0] == {"work_slots_pkey"}

    found = await door.fetch("SELECT slot_id, ctid FROM daily_work_tracking WHERE slot_id = ANY ($1)", slots)
    known = {row["slot_id"]: row["ctid"] for row in found}
    reserve = (organization_id, day, slots, [class_id] * 64, [1] * 64)
    nodes = await _plan(door, allocation["reserve_slots"], *reserve, [None] * 64)
    ways, looked = _read(nodes, "daily_work_tracking")
    assert all(way.endswith("_slot__idx") or way == "Tid Scan" for way in ways), ways
    assert looked <= 2 * 64
    assert _read(nodes, "work_slots") == ({"work_slots_pkey"}, 64)
    nodes = await _plan(door, allocation["reserve_slots"], *reserve, [known[slot] for slot in slots])
    ways, looked = _read(nodes, "daily_work_tracking")
    assert ways == {"Tid Scan"}
    assert looked <= 2 * 64
    nodes = await _plan(door, allocation["next_slots"], organization_id, slots[0], 5000)
    ways, looked = _read(nodes, "work_slots")
    # With one organization either gives the order.
    assert ways <= {"work_slots_active", "work_slots_pkey"}
    assert looked <= 5000

    held: dict[str, tuple[Any, ...]] = {"renew_leases": (keys, tokens, 300.0), "lock_leases": (keys,)}
    for name, values in held.items():
        ways, looked = _read(await _plan(door, leases[name], organization_id, *values), "leases")
        assert ways <= {"leases_pkey", "Tid Scan"}, (name, ways)
        assert looked <= 3 * 64, name
    ways, looked = _read(await _plan(door, leases["lock_expired"], organization_id, 1000), "leases")
    assert ways == {"leases_sweep_at"}
    assert looked <= 3 * _ROWS / 1000

    fresh = (await allocator.take(1))[0]
    key = uuid.UUID(fresh.allocation_key)
    for name in ("find_ended", "lock_ended"):
        nodes = await _plan(door, leases[name], organization_id, [key], work_dates([key]))
        ways, looked = _read(nodes, "work_allocations")
        assert all(way.endswith("_pkey") for way in ways), ways
        assert looked <= 1


async def test_an_exit_is_found_where_it_was_last_seen_and_else_by_its_key(allocator: Allocator) -> None:
    door = allocator.door
    assert door is not None
    organization_id = await allocator.service.organization_id()
    exits = await allocator.add_exits(200, cap=100)
    await door.execute("ANALYZE exits")
    statement = queries("allocator", "allocation.sql")["reserve_exits"]
    rows = await door.fetch("SELECT exit_id, ctid FROM exits ORDER BY exit_id LIMIT 64")
    ids, places = [row["exit_id"] for row in rows], [row["ctid"] for row in rows]
    nodes = await _plan(door, statement, organization_id, ids, [2] * 64, places, [""] * 64)
    assert _read(nodes, "exits")[0] == {"Tid Scan"}
    # One has moved, of one nothing is known, and one place is another exit's by now.
    await door.execute("UPDATE exits SET region = 'kr' WHERE exit_id = $1", ids[0])
    asked, regions = [ids[0], ids[1], ids[2]], ["kr", "", ""]
    reserved = await door.fetch(statement, organization_id, asked, [2, 3, 4], [places[0], None, places[5]], regions)
    assert {row["exit_id"]: row["uses"] for row in reserved} == {ids[0]: 2, ids[1]: 3, ids[2]: 4}
    again = {row["exit_id"]: row["ctid"] for row in reserved}
    places = [again[exit_id] for exit_id in asked]
    reserved = await door.fetch(statement, organization_id, asked, [1, 1, 99], places, regions)
    assert {row["exit_id"]: row["uses"] for row in reserved} == {ids[0]: 1, ids[1]: 1, ids[2]: 96}
    counts = await door.fetch("SELECT exit_id, use_count FROM exits WHERE exit_id = ANY ($1)", asked)
    assert {row["exit_id"]: row["use_count"] for row in counts} == {ids[0]: 3, ids[1]: 4, ids[2]: 100}
    assert len(exits) == 200


async def test_a_day_is_found_where_it_was_last_seen_and_else_by_its_key(allocator: Allocator) -> None:
    door = allocator.door
    assert door is not None
    organization_id = await allocator.service.organization_id()
    for _ in range(3):
        await allocator.slot(daily_quota=10)
    await allocator.take(1)
    statement = queries("allocator", "allocation.sql")["reserve_slots"]
    rows = await door.fetch("SELECT slot_id, work_date, class_id, ctid FROM daily_work_tracking ORDER BY slot_id")
    ids, places = [row["slot_id"] for row in rows], [row["ctid"] for row in rows]
    await door.execute("UPDATE daily_work_tracking SET allocated = 0")
    asked = (organization_id, rows[0]["work_date"], ids, [row["class_id"] for row in rows])
    # All have moved; of one nothing is known, and one place is another slot's by now.
    (there,) = await door.fetch("SELECT ctid FROM daily_work_tracking WHERE slot_id = $1", ids[0])
    reserved = await door.fetch(statement, *asked, [2, 3, 4], [places[0], None, there["ctid"]])
    assert {row["slot_id"]: row["units"] for row in reserved} == {ids[0]: 2, ids[1]: 3, ids[2]: 4}
    found = await door.fetch("SELECT ctid FROM daily_work_tracking ORDER BY slot_id")
    reserved = await door.fetch(statement, *asked, [1, 1, 99], [row["ctid"] for row in found])
    assert {row["slot_id"]: row["units"] for row in reserved} == {ids[0]: 1, ids[1]: 1, ids[2]: 6}
    counts = await door.fetch("SELECT allocated FROM daily_work_tracking ORDER BY slot_id")
    assert [row["allocated"] for row in counts] == [3, 4, 10]


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
