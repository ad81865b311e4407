"""Units in time: pacing over the day, windows and returns of exits, and what targets let out at the reservation."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from muster.allocator.v1 import exit_pb2, slot_pb2, target_pb2, target_pb2_grpc, work_pb2

from tests.support.allocator import Allocator, lease
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def _day_begins(allocator: Allocator, seconds_ago: float) -> None:
    """Moves the midnight from which slots are paced, as time would, after the day's rows were made."""
    await allocator.slot(keyword="warm", daily_quota=1, priority=100)
    assert [unit.keyword for unit in await allocator.take()] == ["warm"]
    await allocator.sql(
        """UPDATE daily_work_tracking SET paced_seconds = 86400,
          paced_from = extract(epoch FROM now())::float8 - $1::float8 WHERE paced_from IS NOT NULL""",
        seconds_ago,
    )


async def test_an_even_slot_opens_unit_by_unit(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=24, pacing=slot_pb2.PACING_EVEN)
    # The first unit is open from midnight on, and one more each hour.
    for hours, open_units in ((0.5, 1), (2.5, 2), (12.5, 10)):
        await _day_begins(allocator, hours * 3600)
        assert len((await allocator.ask(20)).allocations) == open_units
        assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_PACED
    assert (await allocator.tracking(slot.slot_id))["allocated"] == 13
    await _day_begins(allocator, 86_400)
    # A unit that comes back is open again.
    units = (await allocator.ask(100)).allocations
    assert len(units) == 11
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await allocator.release(lease(units[0]))
    await allocator.take()
    await allocator.check_invariants()


async def test_a_paced_slot_is_never_ahead_whoever_asks_at_once(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=48, pacing=slot_pb2.PACING_EVEN, keyword="even")
    await allocator.slot(daily_quota=5, keyword="asap")
    await _day_begins(allocator, 3 * 3600 + 60)
    answers = await asyncio.gather(*(allocator.ask(2, client=f"pc-{n}") for n in range(30)))
    assert Counter(unit.keyword for answer in answers for unit in answer.allocations) == {"even": 7, "asap": 5}


async def _exit(allocator: Allocator, **values: Any) -> None:
    request = exit_pb2.ImportExitsRequest(exits=[exit_pb2.ExitSpec(endpoint="http://10.0.0.1:3128", **values)])
    await allocator.exits.ImportExits(request, metadata=allocator.operator)


async def test_a_window_that_has_ended_counts_no_more(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=100, without_exit=False)
    await _exit(allocator, cap=2, cap_mode=exit_pb2.EXIT_CAP_MODE_PER_WINDOW, window_seconds=3600)
    first = await allocator.take(2)
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED
    await allocator.sql("UPDATE exits SET window_ends_at = now()")
    await allocator.take(2)
    assert not (await allocator.ask()).allocations
    (row,) = await allocator.sql("SELECT use_count, toggle_epoch, window_ends_at > now() AS runs FROM exits")
    assert dict(row) == {"use_count": 2, "toggle_epoch": 2, "runs": True}
    # What was taken in an earlier window does not come back to this one.
    await allocator.release(*(lease(unit) for unit in first))
    assert not (await allocator.ask()).allocations


async def test_a_concurrent_exit_is_free_again_when_its_lease_ends(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=100, without_exit=False)
    await _exit(allocator, cap=2, cap_mode=exit_pb2.EXIT_CAP_MODE_CONCURRENT)
    first, _ = await allocator.take(2)
    assert not (await allocator.ask()).allocations
    assert [row["exit_returns"] for row in await allocator.sql("SELECT exit_returns FROM leases")] == [True, True]
    await allocator.release(lease(first))
    await allocator.take()
    assert not (await allocator.ask()).allocations


async def test_targets_bind_all_replicas_and_hold_back_only_themselves(start_service: StartService) -> None:
    first = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    second = await Allocator.of(await start_service("allocator", database=first.service.database))
    await first.slot(keyword="polite", target="shop", daily_quota=100)
    await first.slot(keyword="free", target="bank", daily_quota=10)
    targets: target_pb2_grpc.TargetServiceAsyncStub = target_pb2_grpc.TargetServiceStub(first.service.channel)
    policy = target_pb2.SetTargetPolicyRequest(target="shop", policy=target_pb2.TargetPolicy(max_in_flight=3))
    await targets.SetTargetPolicy(policy, metadata=first.operator)
    answers = await asyncio.gather(*(who.ask(1, client=f"pc-{n}") for n in range(20) for who in (first, second)))
    units = [unit for answer in answers for unit in answer.allocations]
    assert Counter(unit.keyword for unit in units) == {"polite": 3, "free": 10}
    assert {answer.no_work.blocker for answer in answers if answer.HasField("no_work")} == {
        work_pb2.BLOCKER_KIND_TARGET_BUSY
    }
    await first.release(lease(next(unit for unit in units if unit.keyword == "polite")))
    assert [unit.keyword for unit in await second.take()] == ["polite"]


async def test_a_paused_target_lets_one_probe_out_and_a_delay_one_unit(allocator: Allocator) -> None:
    await allocator.slot(keyword="paused", target="shop", daily_quota=100)
    await allocator.slot(keyword="slow", target="bank", daily_quota=100)
    await allocator.sql(
        """INSERT INTO targets (organization_id, target, paused_at, probe_at, min_delay_ms)
        SELECT organization_id, 'shop', now(), now() - interval '1 s', 0 FROM organizations
        UNION ALL SELECT organization_id, 'bank', NULL, NULL, 3600000 FROM organizations"""
    )
    answers = await asyncio.gather(*(allocator.ask(3, client=f"pc-{n}") for n in range(20)))
    units = [unit for answer in answers for unit in answer.allocations]
    assert Counter(unit.keyword for unit in units) == {"paused": 1, "slow": 1}
    (row,) = await allocator.sql("SELECT probe_key::text AS key FROM targets WHERE target = 'shop'")
    assert row["key"] == next(unit.allocation_key for unit in units if unit.keyword == "paused")
    # A probe that was lost makes room for the next one, and the delay passes.
    await allocator.run_out(*units)
    await allocator.sql("UPDATE targets SET next_at = now()")
    again = [unit for _ in range(5) for unit in (await allocator.ask(3)).allocations]
    assert Counter(unit.keyword for unit in again) == {"paused": 1, "slow": 1}


async def test_an_exit_that_cools_down_for_a_target_serves_others(allocator: Allocator) -> None:
    await allocator.slot(keyword="a", target="shop", without_exit=False, daily_quota=100)
    await allocator.slot(keyword="b", target="bank", without_exit=False, daily_quota=100)
    exits = await allocator.add_exits(2, cap=50)
    await allocator.take()
    await allocator.sql(
        """INSERT INTO exit_health (organization_id, exit_id, target, signal, faults, cooling_until)
        SELECT organization_id, exit_id, 'shop', 1, 1, now() + interval '1 h' FROM exits WHERE exit_id = $1""",
        exits[0].exit_id,
    )
    # As about a second would: the cool-down is read that often.
    await allocator.slot(keyword="c", is_active=False)
    units = await allocator.take(40)
    used = {keyword: {unit.exit.exit_id for unit in units if unit.keyword == keyword} for keyword in "ab"}
    assert used["a"] == {exits[1].exit_id}
    assert used["b"] == {exit_.exit_id for exit_ in exits}
