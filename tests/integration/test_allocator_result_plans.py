"""What recording results reads: the rows of the batch, however many leases, results and targets there are."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from services.postgres import queries
from tests.support.allocator import Allocator
from tests.support.services import StartService

BATCH = 100
LEASES = 50_000
RESULTS = 100_000

_RESULTS = queries("allocator", "results.sql")
_TARGETS = queries("allocator", "targets.sql")


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One with many leases and results, whose statistics know of them."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    organization_id = await allocator.service.organization_id()
    allocator.door = await allocator.connect()
    await allocator.slot(target="shop.example")
    await allocator.take()
    for statement, count in (
        (
            """INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, client_id,
              instance_number, granted_at, expires_at, renewable_until, sweep_at, target)
            SELECT lpad(to_hex(n), 32, '0')::uuid, $1, lpad(to_hex(n), 32, '0')::uuid, t.work_date, t.slot_id, 'pc', 1,
              now(), now() + interval '1 hour', now() + interval '1 hour', now() + interval '1 hour', 'shop.example'
            FROM generate_series(1, $2::bigint) n, daily_work_tracking t""",
            LEASES,
        ),
        (
            """INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, client_id,
              client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
              error_message, persona_used, product_count, late, target)
            SELECT $1, now() - n * interval '1 millisecond', gen_random_uuid(), t.work_date, t.slot_id, 'pc', '', 1, 2,
              false, '', 1, '{}', '', '', false, 0, false, CASE WHEN n % 2 = 0 THEN 'shop.example' ELSE '' END
            FROM generate_series(1, $2::bigint) n, daily_work_tracking t""",
            RESULTS,
        ),
        (
            """INSERT INTO targets (organization_id, target) SELECT $1, 'slot:' || n
            FROM generate_series(1, $2::bigint) n""",
            10_000,
        ),
    ):
        await allocator.sql(statement, organization_id, count)
    await allocator.sql("UPDATE daily_work_tracking SET quota = $1, allocated = $1", LEASES)
    await allocator.sql("ANALYZE leases, work_results, targets, daily_work_tracking")
    yield allocator
    await allocator.door.close()


async def test_a_batch_of_results_touches_its_own_leases_only(allocator: Allocator) -> None:
    keys = ",".join(uuid.UUID(int=n).hex for n in range(1, BATCH + 1))
    ones = ",".join(["1"] * BATCH)
    nothing = ["{}"] * 8
    arguments = [f"{{{keys}}}", f"{{{keys}}}", f"{{{','.join(['2'] * BATCH)}}}", f"{{{ones}}}", f"{{{ones}}}", *nothing]
    # A driver's prepared statement has either plan, by the planner's choice.
    for mode in ("force_custom_plan", "force_generic_plan"):
        nodes = await _plan(allocator, mode, _RESULTS["record_results"], *arguments, ["pc-1"], ["10.0.0.1"], [1], [1])
        _assert_index(nodes, "leases", "leases_pkey")
        _assert_index(nodes, "targets", "targets_probe", "targets_pkey")
        for node in nodes:
            if node.get("Relation Name", "").startswith(("leases", "daily", "targets")):
                looked = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
                assert looked * node["Actual Loops"] <= BATCH, node


async def test_the_block_rate_reads_the_latest_results_of_the_target(allocator: Allocator) -> None:
    slot_id = (await allocator.sql("SELECT slot_id FROM work_slots"))[0]["slot_id"]
    for mode in ("force_custom_plan", "force_generic_plan"):
        nodes = await _plan(
            allocator,
            mode,
            _TARGETS["standing_of_targets"],
            ["shop.example", f"slot:{slot_id}"],
            [None, slot_id],
            [True, True],
            [900, 900],
            600.0,
        )
        scans = [node for node in nodes if node.get("Relation Name", "").startswith("work_results")]
        read = sum(node["Actual Rows"] * node["Actual Loops"] for node in scans)
        assert read == 1800
        assert all("Index" in node["Node Type"] for node in scans if node["Actual Loops"]), scans
        _assert_index(nodes, "targets", "targets_pkey")


async def _plan(allocator: Allocator, mode: str, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    assert allocator.door is not None
    organization_id = await allocator.service.organization_id()
    async with _undone(allocator.door):
        await allocator.sql(f"SET LOCAL plan_cache_mode = {mode}")
        (row,) = await allocator.sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", organization_id, *arguments)
    plan = json.loads(row[0])[0]["Plan"]
    return list(_nodes(plan))


@asynccontextmanager
async def _undone(door: asyncpg.Connection[asyncpg.Record]) -> AsyncIterator[None]:
    """A transaction by the back door that leaves nothing."""
    transaction = door.transaction()
    await transaction.start()
    yield
    await transaction.rollback()


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def _assert_index(nodes: list[dict[str, Any]], table: str, *indexes: str) -> None:
    scans = [node for node in nodes if node.get("Relation Name") == table and "Scan" in node["Node Type"]]
    assert scans, table
    assert {node.get("Index Name") for node in scans if node["Actual Loops"]} <= set(indexes), scans
