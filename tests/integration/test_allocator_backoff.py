"""How the fleet treats a target: held, paused, probed and resumed, its limits kept, over two replicas."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import target_pb2, target_pb2_grpc, work_pb2

from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

SUCCEEDED = work_pb2.WORK_OUTCOME_SUCCEEDED
FAILED = work_pb2.WORK_OUTCOME_FAILED
BLOCKED = work_pb2.WORK_OUTCOME_BLOCKED
HELD = work_pb2.BLOCKER_KIND_TARGET_HELD
PAUSED = work_pb2.BLOCKER_KIND_TARGET_PAUSED
BUSY = work_pb2.BLOCKER_KIND_TARGET_BUSY

SHOP = "shop.example"


class Fleet:
    """Two replicas of the allocator on one database."""

    def __init__(self, first: Allocator, second: Allocator) -> None:
        self.replicas = (first, second)
        self.first = first
        self.targets = target_pb2_grpc.TargetServiceStub(first.service.channel)

    async def policy(self, target: str, **values: Any) -> None:
        """Sets a policy."""
        request = target_pb2.SetTargetPolicyRequest(target=target, policy=target_pb2.TargetPolicy(**values))
        await self.targets.SetTargetPolicy(request, metadata=self.first.operator)

    async def hold(self, seconds: int) -> None:
        """Holds the shop, as an operator."""
        request = target_pb2.HoldTargetRequest(target=SHOP, duration=Duration(seconds=seconds))
        await self.targets.HoldTarget(request, metadata=self.first.operator)

    async def resume(self, target: str = SHOP) -> None:
        """Resumes a target, as an operator."""
        await self.targets.ResumeTarget(target_pb2.ResumeTargetRequest(target=target), metadata=self.first.operator)

    async def state(self, target: str = SHOP) -> target_pb2.TargetState:
        """Reads a target."""
        page = await self.targets.ListTargets(target_pb2.ListTargetsRequest(), metadata=self.first.operator)
        (state,) = [state for state in page.targets if state.target == target]
        return state

    async def submit(self, units: Sequence[work_pb2.Allocation], blocked: int = 0, **values: Any) -> None:
        """Submits results of units, the last so many blocked, by one replica after the other."""
        for number, unit in enumerate(units):
            outcome = BLOCKED if number >= len(units) - blocked else SUCCEEDED
            await self.replicas[number % 2].submit(result(unit, outcome, **values))

    async def stopped(self, blocker: int, target: str = SHOP) -> None:
        """Waits until both replicas say so; the one that did not see it happen learns of it within a second."""
        for replica in self.replicas:
            answer = await replica.ask(target=target)
            assert (len(answer.allocations), answer.no_work.blocker) == (0, blocker), answer

    async def pass_time(self, seconds: float, target: str = SHOP) -> None:
        """Moves everything about a target into the past."""
        await self.first.sql(
            """UPDATE targets SET blocked_until = blocked_until - $2 * interval '1 second',
              next_at = next_at - $2 * interval '1 second', paused_at = paused_at - $2 * interval '1 second',
              probe_at = probe_at - $2 * interval '1 second'
            WHERE target = $1""",
            target,
            seconds,
        )

    async def wait_seconds(self, target: str = SHOP) -> float:
        """How long until the next probe of a paused target."""
        (row,) = await self.first.sql(
            "SELECT extract(epoch FROM probe_at - now())::float8 AS seconds FROM targets WHERE target = $1", target
        )
        return float(row["seconds"])


@pytest.fixture
async def fleet(start_service: StartService) -> Fleet:
    """Whose sweeps come at once."""
    first = await start_service("allocator", leases={"sweep_seconds": 0.05})
    second = await start_service("allocator", database=first.database, leases={"sweep_seconds": 0.05})
    return Fleet(await Allocator.of(first), await Allocator.of(second))


async def test_a_retry_after_stops_the_target_for_the_whole_fleet_and_no_other(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.first.slot(target="other.example", daily_quota=1000)
    taken = await asyncio.gather(*(fleet.replicas[n % 2].take(2, client=f"pc-{n}", target=SHOP) for n in range(6)))
    first, *others = [unit for batch in taken for unit in batch]
    await fleet.first.submit(
        result(first, BLOCKED, exit_signal=work_pb2.EXIT_SIGNAL_RATE_LIMITED, retry_after=Duration(seconds=90))
    )
    await fleet.stopped(HELD)
    state = await fleet.state()
    assert (state.held_until, state.HasField("paused_at"), state.pauses) == (state.probe_at, True, 1)
    assert state.reason == "the target asked to be left alone for 90 s"
    for replica in fleet.replicas:
        assert (await replica.take(target="other.example"))[0].target == "other.example"
        assert {unit.target for unit in await replica.take(20)} == {"other.example"}
    # A shorter one does not shorten it, and runs that are out may end well: the target's word stands.
    await fleet.submit(others[:4], retry_after=Duration(seconds=1))
    assert (await fleet.state()) == state
    await fleet.stopped(HELD)


async def test_after_a_retry_after_one_unit_goes_out_until_its_result(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    asking, longer, *_ = await fleet.first.take(6)
    await fleet.first.submit(result(asking, FAILED, retry_after=Duration(seconds=90)))
    # A longer one from a run that was out already lengthens it.
    await fleet.replicas[1].submit(result(longer, FAILED, retry_after=Duration(seconds=300)))
    state = await fleet.state()
    assert (state.held_until, state.pauses) == (state.probe_at, 1)
    assert state.reason == "the target asked to be left alone for 300 s"
    await fleet.pass_time(91)
    await fleet.stopped(HELD)
    await fleet.pass_time(210)
    probe = await _probe(fleet)
    await fleet.stopped(PAUSED)
    await fleet.replicas[1].submit(result(probe))
    state = await fleet.state()
    assert (state.HasField("paused_at"), state.pauses, state.reason) == (False, 0, "")
    for replica in fleet.replicas:
        await until(lambda replica=replica: _has_work(replica))  # type: ignore[misc]


async def test_a_retry_after_only_holds_a_target_that_is_not_to_be_paused(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.policy(SHOP, auto_pause=False)
    (unit,) = await fleet.first.take()
    await fleet.first.submit(result(unit, BLOCKED, retry_after=Duration(seconds=90)))
    state = await fleet.state()
    assert (state.HasField("held_until"), state.HasField("paused_at"), state.HasField("probe_at")) == (
        True,
        False,
        False,
    )
    await fleet.stopped(HELD)
    await fleet.pass_time(91)
    for replica in fleet.replicas:
        await until(lambda replica=replica: _has_work(replica))  # type: ignore[misc]


async def test_an_operators_hold_ends_without_a_probe_and_ends_no_pause(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    (unit,) = await fleet.first.take()
    await fleet.hold(60)
    await fleet.stopped(HELD)
    assert not (await fleet.state()).HasField("paused_at")
    await fleet.pass_time(61)
    for replica in fleet.replicas:
        await until(lambda replica=replica: _has_work(replica))  # type: ignore[misc]
    await fleet.first.submit(result(unit, FAILED, retry_after=Duration(seconds=90)))
    # An earlier end than that of the Retry-After.
    await fleet.hold(10)
    await fleet.pass_time(11)
    await fleet.stopped(PAUSED)
    await fleet.pass_time(80)
    probe = await _probe(fleet)
    # A good probe ends the pause, and not what the operator said since.
    await fleet.hold(60)
    await fleet.first.submit(result(probe))
    state = await fleet.state()
    assert (state.HasField("paused_at"), state.HasField("held_until")) == (False, True)


async def test_a_block_rate_and_a_retry_after_at_once_wait_for_the_longer(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    units = await fleet.first.take(12)
    await fleet.first.submit(*(result(unit, BLOCKED, retry_after=Duration(seconds=600)) for unit in units))
    state = await fleet.state()
    assert (state.held_until, state.pauses) == (state.probe_at, 1)
    assert state.reason == "12 of the last 12 results within 10 minutes were blocked"
    await fleet.resume()
    units = await fleet.first.take(12)
    await fleet.first.submit(*(result(unit, BLOCKED, retry_after=Duration(seconds=5)) for unit in units))
    assert 50 < await fleet.wait_seconds() <= 60


@pytest.mark.parametrize(
    ("results", "blocked", "pauses"),
    [(9, 9, 0), (10, 1, 0), (10, 2, 1), (30, 3, 0), (31, 4, 1), (11, 1, 0)],
)
async def test_a_target_is_paused_above_a_tenth_of_at_least_ten_results(
    fleet: Fleet, results: int, blocked: int, pauses: int
) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    units = await fleet.first.take(results)
    # The good ones first, so that the last result decides; 9 of 9 would be a rate of 100 %.
    await fleet.submit(units, blocked)
    rows = await fleet.first.sql("SELECT pauses, reason FROM targets WHERE paused_at IS NOT NULL")
    assert [row["pauses"] for row in rows] == [1] * pauses
    if pauses:
        assert rows[0]["reason"] == f"{blocked} of the last {results} results within 10 minutes were blocked"
        await fleet.stopped(PAUSED)
        assert 50 < await fleet.wait_seconds() <= 60
    else:
        assert not await fleet.first.sql("SELECT FROM targets")
        assert len((await fleet.replicas[1].ask(target=SHOP)).allocations) == 1


async def test_a_batch_is_judged_as_a_whole_and_once(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    units = await fleet.first.take(40)
    given = [result(unit, BLOCKED if number < 20 else SUCCEEDED) for number, unit in enumerate(units)]
    await fleet.first.submit(*given)
    state = await fleet.state()
    assert (state.pauses, state.reason) == (1, "20 of the last 40 results within 10 minutes were blocked")
    (row,) = await fleet.first.sql("SELECT count(*) FROM work_results WHERE is_blocked")
    assert row["count"] == 20


async def test_results_count_only_within_the_window_and_since_the_last_resumption(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    units = await fleet.first.take(30)
    await fleet.submit(units[:9], 9)
    await fleet.first.sql("UPDATE work_results SET created_at = created_at - interval '601 seconds'")
    await fleet.submit(units[9:18], 9)
    assert not await fleet.first.sql("SELECT FROM targets WHERE paused_at IS NOT NULL")
    await fleet.hold(1)
    await fleet.resume()
    await fleet.submit(units[18:27], 9)
    assert not (await fleet.state()).HasField("paused_at")
    await fleet.submit(units[27:28], 1)
    assert (await fleet.state()).reason == "10 of the last 10 results within 10 minutes were blocked"


async def test_a_policy_can_forbid_the_pause(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.policy(SHOP, auto_pause=False)
    await fleet.submit(await fleet.first.take(20), 20)
    assert not (await fleet.state()).HasField("paused_at")
    assert len((await fleet.first.ask(target=SHOP)).allocations) == 1


async def test_one_probe_goes_out_and_its_good_result_resumes_the_target(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    in_flight = await fleet.first.take(3)
    await fleet.submit(await fleet.first.take(12), 6)
    await fleet.stopped(PAUSED)
    await fleet.pass_time(61)
    probe = await _probe(fleet)
    # What was out before the pause neither ends nor prolongs it.
    await fleet.submit(in_flight, 1)
    state = await fleet.state()
    assert (state.HasField("paused_at"), state.pauses) == (True, 1)
    await fleet.stopped(PAUSED)
    await fleet.replicas[1].submit(result(probe))
    state = await fleet.state()
    assert (state.HasField("paused_at"), state.HasField("probe_at"), state.pauses, state.reason) == (
        False,
        False,
        0,
        "",
    )
    for replica in fleet.replicas:
        await until(lambda replica=replica: _has_work(replica))  # type: ignore[misc]
    # The blocks from before are forgotten.
    await fleet.submit(await fleet.first.take(4), 4)
    assert not (await fleet.state()).HasField("paused_at")


async def test_each_probe_that_is_blocked_doubles_the_wait_up_to_the_limit(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.submit(await fleet.first.take(10), 10)
    for pauses, wait in ((2, 120), (3, 240), (4, 480), (5, 960), (6, 1800), (7, 1800)):
        await fleet.pass_time(1801)
        probe = await _probe(fleet)
        await fleet.replicas[pauses % 2].submit(result(probe, BLOCKED))
        state = await fleet.state()
        assert (state.pauses, state.reason) == (pauses, "the probe was refused")
        assert wait - 10 < await fleet.wait_seconds() <= wait
        await fleet.stopped(PAUSED)


@pytest.mark.parametrize(
    ("outcome", "values", "wait"),
    [
        (FAILED, {"exit_signal": work_pb2.EXIT_SIGNAL_RATE_LIMITED}, 120),
        (FAILED, {"exit_signal": work_pb2.EXIT_SIGNAL_BLOCKED}, 120),
        (FAILED, {"exit_signal": work_pb2.EXIT_SIGNAL_RATE_LIMITED, "retry_after": Duration(seconds=600)}, 600),
        (FAILED, {"retry_after": Duration(seconds=1)}, 120),
        (SUCCEEDED, {"retry_after": Duration(seconds=1)}, 120),
        (BLOCKED, {"exit_signal": work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR}, 120),
    ],
)
async def test_a_probe_that_the_target_refuses_leaves_it_paused(
    fleet: Fleet, outcome: int, values: dict[str, Any], wait: int
) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.submit(await fleet.first.take(10), 10)
    await fleet.pass_time(61)
    probe = await _probe(fleet)
    await fleet.replicas[1].submit(result(probe, outcome, **values))
    state = await fleet.state()
    assert (state.HasField("paused_at"), state.pauses) == (True, 2)
    assert wait - 10 < await fleet.wait_seconds() <= wait
    assert not await _rush(fleet, 3)


@pytest.mark.parametrize("values", [{}, {"exit_signal": work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR}])
async def test_a_probe_that_fails_by_itself_is_followed_by_another_at_once(
    fleet: Fleet, values: dict[str, Any]
) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.submit(await fleet.first.take(10), 10)
    await fleet.pass_time(61)
    paused = await fleet.state()
    for number in range(3):
        await fleet.replicas[number % 2].submit(result(await _probe(fleet), FAILED, **values))
        assert await fleet.state() == paused
    await fleet.first.submit(result(await _probe(fleet)))
    assert not (await fleet.state()).HasField("paused_at")


async def test_a_good_probe_does_not_outweigh_a_retry_after_that_came_since(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    in_flight = await fleet.first.take(2)
    await fleet.submit(await fleet.first.take(10), 10)
    await fleet.pass_time(61)
    probe = await _probe(fleet)
    await fleet.replicas[1].submit(result(in_flight[0], FAILED, retry_after=Duration(seconds=90)))
    await fleet.first.submit(result(probe))
    state = await fleet.state()
    assert (state.held_until, state.HasField("paused_at"), state.pauses) == (state.probe_at, True, 1)
    await fleet.pass_time(91)
    probe = await _probe(fleet)
    # Nor one that comes with it.
    await fleet.first.submit(result(probe), result(in_flight[1], FAILED, retry_after=Duration(seconds=90)))
    await fleet.pass_time(91)
    await fleet.first.submit(result(await _probe(fleet)))
    assert not (await fleet.state()).HasField("paused_at")


async def test_a_probe_that_is_lost_is_followed_by_another(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.submit(await fleet.first.take(10), 10)
    await fleet.pass_time(61)
    lost = await _probe(fleet)
    await fleet.first.run_out(lost)
    await fleet.first.swept(lost)
    given_back = await _probe(fleet)
    await fleet.first.release(lease(given_back))
    probe = await _probe(fleet)
    # The result of the lost one comes after all: it is no longer the probe that the target waits for.
    await fleet.first.submit(result(lost))
    assert (await fleet.state()).HasField("paused_at")
    await fleet.first.submit(result(probe))
    assert not (await fleet.state()).HasField("paused_at")


async def test_a_crawl_delay_is_kept_and_spaces_units_over_the_fleet(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    (unit,) = await fleet.first.take()
    await fleet.first.submit(result(unit, crawl_delay=Duration(seconds=3600)))
    assert (await fleet.state()).crawl_delay.seconds == 3600
    taken = await _rush(fleet, 6)
    assert len(taken) <= 1
    await fleet.stopped(BUSY)
    await fleet.pass_time(3601)
    await until(lambda: _has_work(fleet.replicas[1]))
    await fleet.stopped(BUSY)
    # The next result that says one changes it; one that says none does not.
    await fleet.first.submit(*map(result, taken))
    assert (await fleet.state()).crawl_delay.seconds == 3600
    await fleet.first.sql("UPDATE targets SET next_at = '-infinity'")
    await until(lambda: _takes(fleet.first, taken))
    await fleet.first.submit(result(taken[-1], crawl_delay=Duration(seconds=0)))
    assert not (await fleet.state()).HasField("crawl_delay")
    await until(lambda: _has_work(fleet.first))


async def test_the_most_in_flight_is_never_passed_over_two_replicas(fleet: Fleet) -> None:
    for _ in range(3):
        await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.policy(SHOP, max_in_flight=5)
    door = await fleet.first.connect()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            live = await door.fetchval("SELECT count(*) FROM leases WHERE target = $1 AND expires_at > now()", SHOP)
            most = max(most, live)
            assert live <= 5

    watcher = asyncio.create_task(watch())
    try:
        for _ in range(4):
            taken = await _rush(fleet, 12)
            assert 1 <= len(taken) <= 5
            live = await fleet.first.sql("SELECT count(*) FROM leases WHERE target = $1", SHOP)
            assert live[0]["count"] == len(taken)
            await asyncio.gather(*(fleet.replicas[n % 2].submit(result(unit)) for n, unit in enumerate(taken)))
        assert not watcher.done()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await door.close()
    assert most == 5
    await fleet.first.check_invariants()


async def test_the_least_delay_lies_between_any_two_units_of_the_fleet(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.policy(SHOP, min_delay=Duration(nanos=200_000_000))
    taken: list[work_pb2.Allocation] = []

    async def enough() -> bool:
        taken.extend(await _rush(fleet, 4))
        return len(taken) >= 6

    await until(enough)
    rows = await fleet.first.sql("SELECT granted_at FROM leases ORDER BY granted_at")
    gaps = [(b["granted_at"] - a["granted_at"]).total_seconds() for a, b in pairwise(rows)]
    assert len(gaps) == len(taken) - 1
    assert min(gaps) >= 0.2


async def test_a_shorter_delay_holds_from_now_on(fleet: Fleet) -> None:
    await fleet.first.slot(target=SHOP, daily_quota=1000)
    await fleet.policy(SHOP, min_delay=Duration(seconds=3600))
    (unit,) = await fleet.first.take()
    await fleet.stopped(BUSY)
    await fleet.policy(SHOP, min_delay=Duration(nanos=1_000_000))
    await until(lambda: _has_work(fleet.replicas[1]))
    # Whoever says it.
    await fleet.first.submit(result(unit, crawl_delay=Duration(seconds=3600)))
    taken: list[work_pb2.Allocation] = []
    await until(lambda: _takes(fleet.first, taken))
    await fleet.stopped(BUSY)
    await fleet.first.submit(result(taken[0], crawl_delay=Duration(nanos=1_000_000)))
    await until(lambda: _has_work(fleet.replicas[1]))


@pytest.mark.parametrize("target", [SHOP, ""])
async def test_a_resumption_forgets_a_delay_that_the_target_never_asked_for(fleet: Fleet, target: str) -> None:
    slot = await fleet.first.slot(target=target, daily_quota=1000)
    name = target or f"slot:{slot.slot_id}"
    (unit,) = await fleet.first.take()
    await fleet.first.submit(result(unit, crawl_delay=Duration(seconds=3600)))
    await fleet.first.take()
    await fleet.stopped(BUSY, target)
    await fleet.resume(name)
    state = await fleet.state(name)
    assert not state.HasField("crawl_delay")
    for replica in fleet.replicas:
        await until(lambda replica=replica: _has_work(replica, target))  # type: ignore[misc]


async def test_a_slot_without_a_target_is_a_target_of_its_own(fleet: Fleet) -> None:
    bad = await fleet.first.slot(daily_quota=1000)
    units = await fleet.first.take(12)
    good = await fleet.first.slot(daily_quota=1000)
    await fleet.submit(units[:10], 3)
    state = await fleet.state(f"slot:{bad.slot_id}")
    assert (state.HasField("paused_at"), state.reason) == (
        True,
        "3 of the last 10 results within 10 minutes were blocked",
    )
    for replica in fleet.replicas:
        answer = await replica.ask(40)
        assert {unit.slot_id for unit in answer.allocations} == {good.slot_id}
    await fleet.pass_time(61, state.target)
    await fleet.first.update(good.slot_id, is_active=False)
    probes: list[work_pb2.Allocation] = []
    await until(lambda: _takes(fleet.replicas[1], probes))
    assert probes[0].slot_id == bad.slot_id
    await fleet.first.submit(result(probes[0]))
    assert not (await fleet.state(state.target)).HasField("paused_at")
    await fleet.first.submit(result(units[11], retry_after=Duration(seconds=60)))
    assert (await fleet.state(state.target)).HasField("held_until")


async def _probe(fleet: Fleet) -> work_pb2.Allocation:
    """Takes the probe: whoever is asked, exactly one goes out."""
    taken: list[work_pb2.Allocation] = []

    async def came() -> bool:
        taken.extend(await _rush(fleet, 3))
        return bool(taken)

    await until(came)
    assert len(taken) == 1
    assert not await _rush(fleet, 3)
    (row,) = await fleet.first.sql("SELECT probe_key FROM targets WHERE target = $1", SHOP)
    assert row["probe_key"] == uuid.UUID(taken[0].allocation_key)
    return taken[0]


async def _rush(fleet: Fleet, calls: int) -> list[work_pb2.Allocation]:
    """Asks both replicas at once for more than there is."""
    answers = await asyncio.gather(*(fleet.replicas[n % 2].ask(4, client=f"pc-{n}", target=SHOP) for n in range(calls)))
    return [unit for answer in answers for unit in answer.allocations]


async def _has_work(replica: Allocator, target: str = SHOP) -> bool:
    return bool((await replica.ask(target=target)).allocations)


async def _takes(replica: Allocator, taken: list[work_pb2.Allocation]) -> bool:
    taken.extend((await replica.ask()).allocations)
    return bool(taken)
