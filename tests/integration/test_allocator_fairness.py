"""Who gets work first: classes of many slots go round, nothing starves, days are made in pieces, replicas differ."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter

import grpc
import pytest
from muster.allocator.v1 import insight_pb2, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, until
from tests.support.services import StartService

_MANY = 3000


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def _copy(allocator: Allocator, slot_id: str, count: int, *, day: bool) -> None:
    """Makes slots like one that stands; without their rows of today unless `day`."""
    await allocator.sql(
        """INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), organization_id, keyword, code, target, start_date, end_date, daily_quota, settings,
          is_active, priority, weight, without_exit, spec_sha256, class_id
        FROM work_slots, generate_series(1, $2::integer) WHERE slot_id = $1""",
        uuid.UUID(slot_id),
        count,
    )
    if day:
        await allocator.sql(
            """SELECT track_slots(organization_id, (now() AT TIME ZONE 'UTC')::date, array_agg(slot_id))
            FROM work_slots GROUP BY organization_id"""
        )


async def test_every_slot_of_thousands_gets_its_turn(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=2)
    await _copy(allocator, slot.slot_id, _MANY - 1, day=True)
    counts: Counter[str] = Counter()
    while sum(counts.values()) < 2000:
        counts.update(unit.slot_id for unit in await allocator.take(60))
    # No slot had a second turn before all had their first.
    assert set(counts.values()) == {1}
    while (answer := await allocator.ask(256)).allocations:
        counts.update(unit.slot_id for unit in answer.allocations)
    assert set(counts.values()) == {2}
    assert len(counts) == _MANY
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await allocator.check_invariants()


async def test_one_clients_units_come_from_many_slots_and_exits(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=1000, without_exit=False)
    await _copy(allocator, slot.slot_id, 299, day=True)
    await allocator.add_exits(200, cap=100)
    answers = await asyncio.gather(*(allocator.take(32, client=f"pc-{number}") for number in range(30)))
    for units in answers:
        # Also of a large batch, which takes all its units from sixteen of each.
        assert len({unit.slot_id for unit in units}) >= 16
        assert len({unit.exit.exit_id for unit in units}) >= 15
    few = await allocator.take(32, client="pc-30")
    assert len({unit.slot_id for unit in few}) == 32
    assert len({unit.exit.exit_id for unit in few}) == 32


async def test_lower_priorities_get_one_unit_of_sixteen_in_turns(allocator: Allocator) -> None:
    await allocator.slot(keyword="first", daily_quota=1000, priority=9)
    for number in range(4):
        await allocator.slot(keyword=f"low-{number}", daily_quota=1000, priority=-number)
    counts: Counter[str] = Counter()
    for _ in range(128):
        (unit,) = await allocator.take()
        counts[unit.keyword] += 1
    assert counts == {"first": 120, "low-0": 2, "low-1": 2, "low-2": 2, "low-3": 2}


async def test_a_day_is_made_in_pieces_and_no_work_waits_for_the_last(allocator: Allocator) -> None:
    """There is work after the first piece; only the last of them says that there is none."""
    slot = await allocator.slot(keyword="early", daily_quota=1)
    await _copy(allocator, slot.slot_id, 11_000, day=False)
    await allocator.sql(
        """UPDATE work_slots SET target = 'rare', slot_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff',
          class_id = class_of(organization_id, 'rare', priority, without_exit, '', '', NULL)
        WHERE slot_id = (SELECT slot_id FROM work_slots ORDER BY slot_id DESC LIMIT 1)"""
    )
    await allocator.sql("UPDATE tracked_days SET tracked_to = NULL, complete = false")
    await allocator.sql("DELETE FROM daily_work_tracking")
    # The one of its target is in the last piece.
    (unit,) = await allocator.take(target="rare")
    assert unit.slot_id == "ffffffff-ffff-ffff-ffff-ffffffffffff"
    (row,) = await allocator.sql("SELECT count(*) AS days FROM daily_work_tracking")
    assert row["days"] == 11_001
    assert (await allocator.ask(target="rare")).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await allocator.take(256)


async def test_a_day_follows_its_slots_one_by_one_however_little_is_known_of_it(allocator: Allocator) -> None:
    """A piece of a new day, made and then changed before anything has been analyzed."""
    slot = await allocator.slot(daily_quota=1)
    await _copy(allocator, slot.slot_id, 1_999, day=False)
    door = await allocator.connect()
    try:
        await door.execute("SET enable_seqscan = off")
        for quota in (1, 2):
            await door.execute("UPDATE work_slots SET daily_quota = $1", quota)
            async with door.transaction():
                await door.execute(
                    """SELECT track_slots(organization_id, (now() AT TIME ZONE 'UTC')::date, array_agg(slot_id))
                    FROM work_slots GROUP BY organization_id"""
                )
                read = await door.fetchval(
                    """SELECT sum(idx_tup_fetch + seq_tup_read) FROM pg_stat_xact_user_tables
                    WHERE relname LIKE 'daily_work_tracking%'"""
                )
                # To lock it, to change it, and to see that it stands; each with the index entries of older versions.
                assert read <= 6 * 2_000
            rows = await door.fetch("SELECT quota, count(*) AS days FROM daily_work_tracking GROUP BY quota")
            assert [tuple(row) for row in rows] == [(quota, 2_000)]
    finally:
        await door.close()


async def test_a_busy_organization_does_not_hold_up_another(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", share={"lanes": 1}))
    other = await Allocator.of(allocator.service)
    other.worker = await allocator.service.metadata(Role.WORKER, "other")
    other.operator = await allocator.service.metadata(Role.OPERATOR, "other")
    slot = await allocator.slot(daily_quota=1_000_000)
    await other.slot(daily_quota=100)
    await asyncio.gather(allocator.take(), other.take())
    holder = await allocator.connect()
    try:
        transaction = holder.transaction()
        await transaction.start()
        await holder.fetch("SELECT FROM daily_work_tracking WHERE slot_id = $1 FOR UPDATE", uuid.UUID(slot.slot_id))
        backlog = [asyncio.create_task(allocator.take(256)) for _ in range(60)]
        await until(allocator.waits_for_a_lock)
        asked = asyncio.create_task(other.take(client="pc-2"))

        async def was_met() -> bool:
            return bool(await allocator.sql("SELECT FROM clients WHERE client_id = 'pc-2'"))

        await until(was_met)
        # It asks for its turn a moment after it is known.
        await asyncio.sleep(0.2)
        await transaction.rollback()
    finally:
        await holder.close()
    (unit,) = await asked
    await asyncio.gather(*backlog)
    # Not behind the backlog, but behind no more than the batch that was at work, and the unit from before.
    (before,) = await allocator.sql(
        """SELECT count(*) AS units FROM leases l
        JOIN leases o ON o.allocation_key = $1 AND o.organization_id <> l.organization_id
        WHERE l.granted_at < o.granted_at""",
        uuid.UUID(unit.allocation_key),
    )
    assert before["units"] <= 1024 + 1


async def test_what_a_simulation_shows_is_what_comes_next(allocator: Allocator) -> None:
    for number in range(20):
        exitless = bool(number % 2)
        await allocator.slot(keyword=f"k{number}", daily_quota=3 + number, priority=number % 3, without_exit=exitless)
    await allocator.add_exits(5)
    await allocator.take(7)
    before = await allocator.sql("SELECT * FROM leases ORDER BY 1")
    simulated = await allocator.insight.SimulateAllocation(
        insight_pb2.SimulateAllocationRequest(client=work_pb2.ClientIdentity(client_id="pc-1"), max_items=30),
        metadata=allocator.operator,
    )
    assert await allocator.sql("SELECT * FROM leases ORDER BY 1") == before
    units = await allocator.take(30)
    assert [(unit.slot_id, unit.keyword) for unit in simulated.units] == [
        (unit.slot_id, unit.keyword) for unit in units
    ]
    assert [bool(unit.exit_id) for unit in simulated.units] == [unit.HasField("exit") for unit in units]


async def test_two_replicas_hand_out_everything_once_and_deny_nothing(start_service: StartService) -> None:
    first = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    second = await Allocator.of(await start_service("allocator", database=first.service.database))
    slot = await first.slot(daily_quota=3, without_exit=False)
    await _copy(first, slot.slot_id, 999, day=True)
    await first.add_exits(40, cap=100)
    units: list[work_pb2.Allocation] = []

    async def work(who: Allocator, client: str) -> None:
        while True:
            try:
                answer = await who.ask(32, client=client)
            except grpc.aio.AioRpcError as refused:
                # The last units are fought over: whoever was beaten each time is told to come again.
                if refused.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                continue
            if answer.HasField("no_work"):
                # Said only when it is true: by now every unit is out.
                assert (await first.sql("SELECT sum(allocated) AS units FROM daily_work_tracking"))[0]["units"] == 3000
                return
            units.extend(answer.allocations)

    await asyncio.gather(*(work(who, f"pc-{n}") for n in range(8) for who in (first, second)))
    assert len({unit.allocation_key for unit in units}) == len(units) == 3000
    assert set(Counter(unit.slot_id for unit in units).values()) == {3}
    (row,) = await first.sql("SELECT max(use_count) AS most, sum(use_count) AS uses FROM exits")
    assert (row["uses"], row["most"] <= 100) == (3000, True)
    await first.check_invariants()
