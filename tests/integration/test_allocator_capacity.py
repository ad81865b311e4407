"""What explain counts is what goes out, and neither explaining nor refusing grows dear with the slots."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from muster.allocator.v1 import exit_pb2, work_pb2

from services.postgres import queries
from tests.support.allocator import Allocator
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One that never sweeps, with the back door open."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    allocator.door = await allocator.connect()
    yield allocator
    await allocator.door.close()


async def _world(allocator: Allocator, chance: random.Random) -> None:
    """Makes slots, exits and targets in any state, but no regions, so that no choice of exits is worse than another."""
    organization_id = await allocator.service.organization_id()
    for _ in range(chance.randrange(1, 7)):
        await allocator.slot(
            target=chance.choice(("", "shop", "news")),
            without_exit=chance.random() < 0.5,
            daily_quota=chance.randrange(1, 4),
            is_active=chance.random() < 0.8,
            end_date=chance.choice(("2099-01-01", "2099-01-01", "2020-02-02")),
        )
    number = chance.randrange(4)
    for exit_ in await allocator.add_exits(number, cap=chance.randrange(1, 4)) if number else ():
        if chance.random() < 0.2:
            request = exit_pb2.SetExitEnabledRequest(exit_id=exit_.exit_id, enabled=False)
            await allocator.exits.SetExitEnabled(request, metadata=allocator.operator)
    cooling = chance.choice(("", "shop", "none"))
    await allocator.sql(
        """INSERT INTO exit_health (organization_id, exit_id, target, signal, faults, cooling_until)
        SELECT $1, exit_id, $2, 1, 1, now() + interval '1 hour' FROM exits WHERE $2 <> 'none'""",
        organization_id,
        cooling,
    )
    for target in ("shop", "news"):
        state = chance.choice(("", "", "blocked_until", "paused_at", "probe", "max_in_flight", "min_delay_ms"))
        value = {
            "blocked_until": "now() + interval '1 hour'",
            "paused_at": "now()",
            "probe": "now()",
            "max_in_flight": "2",
            "min_delay_ms": "3600000",
        }.get(state)
        if value is not None:
            column = "paused_at" if state == "probe" else state
            probe = ", probe_at" if column == "paused_at" else ""
            probe_value = {"paused_at": ", now() + interval '1 hour'", "probe": ", now()"}.get(state, "")
            await allocator.sql(
                f"INSERT INTO targets (organization_id, target, {column}{probe}) VALUES ($1, $2, {value}{probe_value})",
                organization_id,
                target,
            )


@pytest.mark.parametrize("seed", range(12))
async def test_what_explain_counts_is_what_goes_out(allocator: Allocator, seed: int) -> None:
    await _world(allocator, random.Random(seed))
    explained = await allocator.explain()
    assert (not explained.blockers) == bool(explained.available_units)
    assert (await allocator.totals()).available_units == explained.available_units
    given = 0
    answer = await allocator.ask(100)
    while answer.allocations:
        given += len(answer.allocations)
        answer = await allocator.ask(100)
    assert given == explained.available_units
    assert answer.no_work.blocker == (await allocator.explain()).blockers[0].kind


_MANY = 30_000


async def _fill(door: asyncpg.Connection[asyncpg.Record]) -> None:
    """Multiplies the slots to 30,000, of which none has work left: inactive, out of date, taken, paced."""
    await door.execute(
        f"""INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id, pacing)
        SELECT gen_random_uuid(), organization_id, 'k' || g, '', '', start_date,
          CASE WHEN g % 10 = 1 THEN '2021-01-01' ELSE end_date END, 10, settings, g % 10 > 0, priority, weight,
          without_exit, spec_sha256, class_id, 1 + (g % 10 = 2)::integer
        FROM (SELECT * FROM work_slots LIMIT 1) s, generate_series(1, {_MANY}) g;
        SELECT track_slots(organization_id, (now() AT TIME ZONE 'UTC')::date, slots)
        FROM (SELECT organization_id, array_agg(slot_id) AS slots FROM work_slots GROUP BY organization_id) s;
        UPDATE daily_work_tracking SET paced_from = extract(epoch FROM now()) WHERE paced_from IS NOT NULL;
        UPDATE daily_work_tracking SET allocated = CASE WHEN paced_from IS NULL THEN quota ELSE 1 END;
        INSERT INTO tracked_days (organization_id, work_date, complete)
        SELECT DISTINCT organization_id, (now() AT TIME ZONE 'UTC')::date, true FROM work_slots
        ON CONFLICT (organization_id, work_date) DO UPDATE SET complete = true"""
    )
    await door.execute("VACUUM ANALYZE work_slots, daily_work_tracking")


async def test_thousands_of_slots_are_explained_fast_and_refused_faster(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=10)
    door = allocator.door
    assert door is not None
    await _fill(door)
    begun = time.perf_counter()
    explained = await allocator.explain()
    seconds = time.perf_counter() - begun
    tenth = _MANY // 10
    assert [(one.kind, one.count, one.of) for one in explained.blockers] == [
        (work_pb2.BLOCKER_KIND_PACED, tenth, _MANY + 1),
        (work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED, 7 * tenth + 1, _MANY + 1),
        (work_pb2.BLOCKER_KIND_SLOT_OUT_OF_DATE, tenth, _MANY + 1),
        (work_pb2.BLOCKER_KIND_SLOT_INACTIVE, tenth, _MANY + 1),
    ]
    # About 0.15 s on a quiet machine.
    assert seconds < 3
    answer = (await allocator.ask()).no_work
    assert answer.blocker == work_pb2.BLOCKER_KIND_PACED

    # The refusal looks at one slot of each class: its cost does not grow with the slots.
    nodes = await _plan(door, queries("allocator", "standing.sql")["groups_of_classes"], allocator)
    for table in ("work_slots", "daily_work_tracking"):
        read = [node for node in nodes if node.get("Relation Name", "").startswith(table)]
        assert all(node["Node Type"] != "Seq Scan" for node in read)
        assert sum((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) for node in read) < 10


async def test_the_free_capacity_is_counted_within_bounds(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=10)
    door = allocator.door
    assert door is not None
    await _fill(door)
    await door.execute("UPDATE daily_work_tracking SET allocated = 0")
    # The first 20,000 slots, of one class.
    assert (await allocator.totals()).available_units == 20_001 * 10
    nodes = await _plan(door, queries("allocator", "standing.sql")["open_units_of_classes"], allocator, 1000)
    read = [node for node in nodes if node.get("Relation Name", "").startswith("daily_work_tracking")]
    # To see that there is one, to see how much of its share it fills, and to count.
    assert sum(node["Actual Rows"] for node in read) <= 1 + 2 * 1001


# A slot of its own in each of 300 classes, and 200 more of one class, all with one unit.
_CLASSES, _ALIKE = 300, 200


@pytest.mark.parametrize("active", [False, True])
async def test_what_small_classes_leave_is_counted_in_others(allocator: Allocator, active: bool) -> None:
    await allocator.slot(daily_quota=1)
    await allocator.sql(
        f"""INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), organization_id, 'k' || g, '', '', start_date, end_date, 1, settings,
          g > {_CLASSES} OR $1, CASE WHEN g > {_CLASSES} THEN 0 ELSE g END, weight, true, spec_sha256,
          CASE WHEN g > {_CLASSES} THEN class_id ELSE class_of(organization_id, '', g, true, '', '', NULL) END
        FROM (SELECT * FROM work_slots LIMIT 1) s, generate_series(1, {_CLASSES + _ALIKE - 1}) g""",
        active,
    )
    await allocator.sql(
        """SELECT track_slots(organization_id, (now() AT TIME ZONE 'UTC')::date, array_agg(slot_id)) FROM work_slots
        GROUP BY organization_id"""
    )
    units = _ALIKE + (_CLASSES if active else 0)
    assert (await allocator.explain()).available_units == units
    assert (await allocator.totals()).available_units == units


_HELD = 20_000


async def test_a_refusal_does_not_compare_every_slot_that_is_held_for_itself_with_every_other(
    allocator: Allocator,
) -> None:
    await allocator.slot(daily_quota=10)
    door = allocator.door
    assert door is not None
    await door.execute(
        f"""INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), organization_id, 'k' || g, '', '', start_date, end_date, 10, settings, true, priority,
          weight, without_exit, spec_sha256, class_id
        FROM (SELECT * FROM work_slots LIMIT 1) s, generate_series(2, {_HELD}) g;
        SELECT track_slots(organization_id, (now() AT TIME ZONE 'UTC')::date, slots)
        FROM (SELECT organization_id, array_agg(slot_id) AS slots FROM work_slots GROUP BY organization_id) s;
        INSERT INTO targets (organization_id, target, blocked_until)
        SELECT organization_id, 'slot:' || slot_id, now() + interval '1 hour' FROM work_slots"""
    )
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_TARGET_HELD
    # With statistics and without.
    for _ in range(2):
        nodes = await _plan(door, queries("allocator", "standing.sql")["groups_of_classes"], allocator)
        (scan,) = [node for node in nodes if "hashed SubPlan" in node.get("Filter", "") and "Index Name" in node]
        assert scan["Rows Removed by Filter"] == _HELD
        assert max(map(_handled, nodes)) <= 2 * _HELD
        await door.execute("ANALYZE work_slots, daily_work_tracking, targets")


def _handled(node: dict[str, Any]) -> int:
    """Returns how many rows a node of a plan has looked at or compared, over all its loops."""
    filtered = ("Rows Removed by Filter", "Rows Removed by Join Filter")
    return int(node["Actual Loops"] * (node["Actual Rows"] + sum(node.get(name, 0) for name in filtered)))


async def _plan(
    door: asyncpg.Connection[asyncpg.Record], statement: str, allocator: Allocator, *arguments: Any
) -> list[dict[str, Any]]:
    """Returns the nodes of a statement's plan that were run."""
    given = arguments or (None, None)
    text = await door.fetchval(
        f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}", await allocator.service.organization_id(), *given
    )

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if node.get("Actual Loops", 1):
            yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    return list(nodes(json.loads(text)[0]["Plan"]))
