"""The invariants as gauges: 0 for a service that works, and not 0 for each kind of damage to its tables."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from allocator import metrics, no_work_watch
from allocator.audit_store import AuditStore
from allocator.blockers import BlockerKind, NoWork
from allocator.explanation import Explanation
from allocator.invariants import ROUND_SECONDS, Invariants
from allocator.no_work_watch import WatchedExplanation
from allocator.partitions import Partitions
from services.postgres import Database
from tests.support.acts import Office, act
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

NAMES = ("quota", "exit_cap", "one_lease", "counters", "result_kept", "acknowledged_kept", "audit_chain")


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))


@pytest.fixture
async def database(allocator: Allocator) -> AsyncIterator[Database]:
    database = await Database.connect(allocator.service.chassis.config.postgres, "invariants", search_path="allocator")
    yield database
    await database.close()


@pytest.fixture
def invariants(database: Database) -> Invariants:
    """The same checks as the service's, to be run when a test wants them."""
    return Invariants(database, AuditStore(database, Partitions(database)))


async def a_busy_day(allocator: Allocator) -> str:
    """Every end that an allocation can come to, and some that live; returns the slot's id."""
    slot = await allocator.slot(daily_quota=12, without_exit=False)
    await allocator.add_exits(2, cap=20)
    units = await allocator.take(8)
    await allocator.submit(*(result(unit, 1 + number) for number, unit in enumerate(units[:3])))
    await allocator.release(lease(units[3]))
    await allocator.run_out(*units[4:6])
    await allocator.swept(*units[4:6])
    await allocator.take(5)
    # Room for one of both: the other goes into quarantine.
    await allocator.take(1)
    await allocator.submit(*map(result, units[4:6]))
    office = await Office.of(allocator)
    await office.reopen(act(), slot.slot_id, units=1)
    await allocator.check_invariants()
    return slot.slot_id


DOUBLED = (
    "INSERT INTO daily_work_tracking (organization_id, work_date, slot_id, quota) "
    "SELECT organization_id, work_date, slot_id, quota FROM daily_work_tracking"
)


async def test_all_invariants_hold_while_all_is_well(allocator: Allocator, invariants: Invariants) -> None:
    await a_busy_day(allocator)
    assert len(await allocator.sql("SELECT FROM quarantined_results")) == 1
    found = await invariants.check_all()
    assert found == dict.fromkeys(NAMES, 0)
    for name in found:
        assert metrics.VIOLATIONS.labels(name)._value.get() == 0
        assert metrics.CHECKED_AT.labels(name)._value.get() > 0


@pytest.mark.parametrize(
    ("invariant", "damage"),
    [
        (
            "quota",
            "ALTER TABLE daily_work_tracking DROP CONSTRAINT within_quota; UPDATE daily_work_tracking SET quota = 3",
        ),
        ("quota", DOUBLED),
        ("exit_cap", "ALTER TABLE exits DROP CONSTRAINT within_cap; UPDATE exits SET cap = 1 WHERE use_count > 1"),
        ("exit_cap", "UPDATE exits SET use_count = 0"),
        ("exit_cap", "UPDATE exits SET cap_mode = 2, use_count = use_count + 1"),
        (
            "one_lease",
            "INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, client_id, "
            "instance_number, lease_token, status, allocated_at, expires_at, ended_at) "
            "SELECT organization_id, work_date, allocation_key, slot_id, client_id, instance_number, lease_token, 6, "
            "now(), now(), now() FROM leases",
        ),
        ("one_lease", "UPDATE leases SET persona_id = '00000000-0000-0000-0000-000000000001'"),
        ("counters", "UPDATE daily_work_tracking SET succeeded = succeeded + 1"),
        ("counters", "DELETE FROM leases"),
        ("counters", "UPDATE work_allocations SET status = 6 WHERE status = 2"),
        ("counters", "DELETE FROM daily_work_tracking"),
        ("result_kept", "DELETE FROM work_results WHERE outcome = 3"),
        ("result_kept", "DELETE FROM quarantined_results"),
        ("acknowledged_kept", "DELETE FROM leases; DELETE FROM work_allocations"),
        ("audit_chain", "DELETE FROM audit_log"),
    ],
)
async def test_each_kind_of_damage_is_seen(
    allocator: Allocator, invariants: Invariants, invariant: str, damage: str
) -> None:
    await a_busy_day(allocator)
    assert await invariants.check(invariant) == 0
    connection = await allocator.connect()
    await connection.execute(damage)
    await connection.close()
    assert await invariants.check(invariant) > 0
    assert metrics.VIOLATIONS.labels(invariant)._value.get() > 0
    metrics.VIOLATIONS.labels(invariant).set(0)


async def test_no_check_raises_a_false_alarm_while_everything_moves(
    start_service: StartService, allocator: Allocator, invariants: Invariants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas allocate, submit, release, lose and revoke on a tight quota while the checks run again and again."""
    monkeypatch.setattr(no_work_watch, "_WATCH_SECONDS", 0.0)
    peer = await Allocator.of(
        await start_service("allocator", database=allocator.service.database, leases={"sweep_seconds": 0.02})
    )
    slot = await allocator.slot(daily_quota=4, without_exit=False)
    await allocator.slot(daily_quota=1)
    await allocator.add_exits(4, cap=1000)
    office = await Office.of(allocator)
    watched = metrics.NO_WORK_WATCHED._value.get()
    ended = asyncio.Event()
    counts = {"rounds": 0, "units": 0, "refused": 0}

    async def work(replica: Allocator, number: int) -> None:
        while not ended.is_set():
            units = list((await replica.ask(4, client=f"pc-{number}")).allocations)
            counts["units"] += len(units)
            counts["refused"] += not units
            for place, unit in enumerate(units):
                if place == 0 and number == 0:
                    await replica.submit(result(unit))
                elif place == 1:
                    await replica.run_out(unit)
                elif place == 2:
                    await office.revoke(act(), unit.allocation_key)
                else:
                    await replica.release(lease(unit))

    async def check() -> None:
        begun = time.monotonic()

        def is_enough() -> bool:
            """Whether much has happened, for however long that takes on a busy machine."""
            if time.monotonic() - begun > 60:
                return True
            return time.monotonic() - begun > 4 and counts["units"] > 100 and counts["refused"] > 0

        while not is_enough():
            assert await invariants.check_all() == dict.fromkeys(NAMES, 0)
            counts["rounds"] += 1
            await office.reopen(act(), slot.slot_id, units=1)
        ended.set()

    workers = [work((allocator, peer)[number % 2], number) for number in range(16)]
    await asyncio.gather(check(), *workers)
    assert counts["rounds"] > 2
    assert counts["units"] > 100
    assert counts["refused"] > 0
    assert metrics.NO_WORK_WATCHED._value.get() > watched
    assert metrics.VIOLATIONS.labels("false_no_work")._value.get() == 0
    await allocator.check_invariants()


async def test_a_discarded_result_breaks_nothing(allocator: Allocator, invariants: Invariants) -> None:
    await a_busy_day(allocator)
    office = await Office.of(allocator)
    (kept,) = (await office.quarantined()).results
    assert await office.discard(act(), kept.allocation_key) == [""]
    assert not any((await invariants.check_all()).values())


class SaysNo:
    """Stands where the reading of slots would, in a case where the answer is given."""


async def watched(monkeypatch: pytest.MonkeyPatch, database: Database, answer: NoWork | None) -> WatchedExplanation:
    """An explanation that always answers alike, watched."""

    async def no_work(self: Explanation, organization_id: uuid.UUID, target: str | None, region: str | None) -> object:
        return answer

    monkeypatch.setattr(Explanation, "no_work", no_work)
    return WatchedExplanation(SaysNo(), SaysNo(), SaysNo(), database)  # type: ignore[arg-type]


FALSE = NoWork(BlockerKind.QUOTA_EXHAUSTED, "today's quota is taken", 1.0)


async def test_a_false_no_work_is_proven(
    allocator: Allocator, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = await allocator.slot(target="shop")
    await allocator.take(1)
    organization_id = await allocator.service.organization_id()
    explanation = await watched(monkeypatch, database, FALSE)
    gauge = metrics.VIOLATIONS.labels("false_no_work")._value
    # A peer holds the slot's row, which is no excuse.
    peer = await allocator.connect()
    async with peer.transaction():
        await peer.execute("SELECT FROM daily_work_tracking WHERE slot_id = $1 FOR UPDATE", uuid.UUID(slot.slot_id))
        assert await explanation.no_work(organization_id, "shop", None) == FALSE
    await peer.close()
    assert gauge.get() == 1
    # The next one within the same second is not watched.
    await explanation.no_work(organization_id, "shop", None)
    assert gauge.get() == 1
    gauge.set(0)


async def test_a_true_no_work_is_not_accused(
    allocator: Allocator, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await allocator.slot(target="taken", daily_quota=1)
    await allocator.take(1)
    await allocator.slot(target="paused", is_active=False)
    organization_id = await allocator.service.organization_id()
    gauge = metrics.VIOLATIONS.labels("false_no_work")._value
    before = metrics.NO_WORK_WATCHED._value.get()
    for target in ("taken", "paused", "unheard of"):
        explanation = await watched(monkeypatch, database, FALSE)
        await explanation.no_work(organization_id, target, None)
    # A unit that comes back while the answer is made was not there all the while.
    explanation = await watched(monkeypatch, database, FALSE)

    async def given_back(self: Explanation, *arguments: object) -> NoWork:
        await allocator.sql(
            "UPDATE daily_work_tracking SET quota = quota + 1 WHERE slot_id = $1", uuid.UUID(taken.slot_id)
        )
        return FALSE

    monkeypatch.setattr(Explanation, "no_work", given_back)
    await explanation.no_work(organization_id, "taken", None)
    assert metrics.NO_WORK_WATCHED._value.get() == before + 4
    assert gauge.get() == 0


async def test_the_service_checks_by_itself(start_service: StartService) -> None:
    for name in NAMES:
        # A restarted service checks at once, so that its gauges say something from the start.
        metrics.VIOLATIONS.labels(name).set(-1)
    await start_service("allocator")

    async def checked() -> bool:
        return all(metrics.VIOLATIONS.labels(name)._value.get() == 0 for name in NAMES)

    await until(checked)


NOTHING: Any = None


def test_a_check_that_never_comes_to_its_end_has_a_time_to_be_missed_since() -> None:
    begun = time.time()
    metrics.CHECKED_AT.clear()
    Invariants(NOTHING, NOTHING)
    samples = {sample.labels["invariant"]: sample.value for sample in next(iter(metrics.CHECKED_AT.collect())).samples}
    assert set(samples) == set(NAMES)
    assert min(samples.values()) >= begun


async def test_a_dear_check_takes_a_small_share_of_the_time_but_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("allocator.invariants.time.monotonic", lambda: now[0])
    invariants = Invariants(NOTHING, NOTHING)
    for seconds, wait_seconds in ((0.01, ROUND_SECONDS[0]), (2.0, 400.0), (25.0, ROUND_SECONDS[1])):

        async def dear(seconds: float = seconds) -> int:
            now[0] += seconds
            return 0

        invariants._checks["quota"] = dear, ROUND_SECONDS
        begun = now[0]
        await invariants.check("quota")
        assert invariants._due["quota"] == pytest.approx(begun + wait_seconds)


async def test_the_service_watches_its_own_answers(allocator: Allocator) -> None:
    before = metrics.NO_WORK_WATCHED._value.get()
    await allocator.slot(daily_quota=1)
    await allocator.take(1)
    assert not (await allocator.ask()).allocations
    assert metrics.NO_WORK_WATCHED._value.get() == before + 1
    assert metrics.VIOLATIONS.labels("false_no_work")._value.get() == 0
