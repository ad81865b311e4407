"""Leases and results of the allocator: renewed, released, run out, submitted once, late and too late."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

from services.call import Role
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

RECORDED = work_pb2.RESULT_DISPOSITION_RECORDED
LATE = work_pb2.RESULT_DISPOSITION_RECORDED_LATE
QUARANTINED = work_pb2.RESULT_DISPOSITION_QUARANTINED


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep comes at once."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))


@pytest.fixture
async def unswept(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def test_renewal_moves_the_expiry_to_now_plus_the_duration(unswept: Allocator) -> None:
    await unswept.slot()
    (unit,) = await unswept.take()
    await unswept.sql("UPDATE leases SET expires_at = now() + interval '7 seconds'")
    (renewed,) = await unswept.renew(lease(unit))
    assert renewed.expires_at.ToMilliseconds() >= unit.expires_at.ToMilliseconds()
    (row,) = await unswept.sql("SELECT extract(epoch FROM expires_at - now()) AS left FROM leases")
    assert 295 < row["left"] <= 300


async def test_renewal_stops_at_the_greatest_age(unswept: Allocator) -> None:
    await unswept.slot()
    (unit,) = await unswept.take()
    await unswept.sql(
        "UPDATE leases SET expires_at = now() + interval '5 seconds', renewable_until = now() + interval '20 seconds'"
    )
    (first,) = await unswept.renew(lease(unit))
    assert first.HasField("expires_at")
    (row,) = await unswept.sql("SELECT expires_at = renewable_until AS at_end FROM leases")
    assert row["at_end"]
    (second,) = await unswept.renew(lease(unit))
    assert (second.error.reason, second.error.code) == ("LEASE_AGE_EXCEEDED", 9)


async def test_each_lease_of_a_batch_is_answered_for_itself(unswept: Allocator) -> None:
    await unswept.slot()
    good, lapsed, released, done = await unswept.take(4)
    await unswept.run_out(lapsed)
    await unswept.release(lease(released))
    await unswept.submit(result(done))
    wrong = work_pb2.Lease(allocation_key=good.allocation_key, lease_token=bytes(16))
    unknown = work_pb2.Lease(allocation_key=str(uuid.uuid4()), lease_token=bytes(16))
    early = work_pb2.Lease(allocation_key=str(uuid.UUID(int=0)), lease_token=bytes(16))
    far = work_pb2.Lease(allocation_key=str(uuid.UUID(int=2**128 - 1)), lease_token=bytes(16))
    leases = [wrong, lease(good), lease(lapsed), lease(released), lease(done), unknown, early, far, lease(good)]
    renewed = await unswept.renew(*leases)
    assert [answer.allocation_key for answer in renewed] == [entry.allocation_key for entry in leases]
    assert [(answer.error.reason, answer.error.metadata.get("status", "")) for answer in renewed] == [
        ("LEASE_TOKEN_MISMATCH", ""),
        ("", ""),
        ("LEASE_LOST", "expired"),
        ("LEASE_LOST", "released"),
        ("LEASE_LOST", "succeeded"),
        ("ALLOCATION_NOT_FOUND", ""),
        ("ALLOCATION_NOT_FOUND", ""),
        ("ALLOCATION_NOT_FOUND", ""),
        ("", ""),
    ]
    given_back = await unswept.release(*leases)
    assert [answer.error.reason for answer in given_back] == [
        "LEASE_TOKEN_MISMATCH",
        "",
        "LEASE_LOST",
        "",
        "LEASE_LOST",
        "ALLOCATION_NOT_FOUND",
        "ALLOCATION_NOT_FOUND",
        "ALLOCATION_NOT_FOUND",
        "",
    ]
    await unswept.check_invariants()


async def test_a_release_returns_quota_and_exit_use_once(unswept: Allocator) -> None:
    slot = await unswept.slot(daily_quota=1, without_exit=False)
    await unswept.add_exits(1, cap=1)
    for _ in range(2):
        (unit,) = await unswept.take()
        for _ in range(2):
            (answer,) = await unswept.release(lease(unit))
            assert not answer.HasField("error")
    assert await unswept.tracking(slot.slot_id) == {
        "quota": 1,
        "allocated": 2,
        "succeeded": 0,
        "failed": 0,
        "blocked": 0,
        "expired": 0,
        "released": 2,
    }
    assert (await unswept.sql("SELECT use_count FROM exits"))[0]["use_count"] == 0
    await unswept.check_invariants()


async def test_an_expired_lease_is_swept_and_its_unit_handed_out_again(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=1, without_exit=False)
    await allocator.add_exits(1, cap=1)
    (first,) = await allocator.take()
    await allocator.run_out(first)
    await allocator.swept(first)
    (second,) = await allocator.take()
    assert second.allocation_key != first.allocation_key
    assert (await allocator.tracking(slot.slot_id))["expired"] == 1
    await allocator.check_invariants()


async def test_the_sweep_spares_what_was_renewed(allocator: Allocator) -> None:
    await allocator.slot()
    (unit,) = await allocator.take()
    await allocator.sql("UPDATE leases SET sweep_at = now() - interval '1 second'")

    async def moved() -> bool:
        (row,) = await allocator.sql("SELECT sweep_at = expires_at AS moved FROM leases")
        return bool(row["moved"])

    await until(moved)
    (renewed,) = await allocator.renew(lease(unit))
    assert renewed.HasField("expires_at")


async def test_goodbye_releases_the_leases_of_that_instance_only(unswept: Allocator) -> None:
    await unswept.slot()
    await unswept.take(3)
    await unswept.take(2, client="pc-2")
    answer = await unswept.heartbeat(goodbye=True)
    assert answer.released_leases == 3
    assert (await unswept.totals()).leased == 2
    assert (await unswept.heartbeat(goodbye=True)).released_leases == 0
    await unswept.check_invariants()


async def test_a_client_told_to_drain_gets_no_work(unswept: Allocator) -> None:
    await unswept.slot()
    assert not (await unswept.heartbeat()).drain
    await unswept.sql("UPDATE clients SET draining = true")
    assert (await unswept.heartbeat()).drain
    answer = await unswept.ask()
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_CLIENT_DRAINING
    assert len((await unswept.ask(client="pc-2")).allocations) == 1


async def test_a_result_writes_all_its_rows_in_one_transaction(unswept: Allocator) -> None:
    slot = await unswept.slot()
    units = await unswept.take(3)
    product = work_pb2.Product(product_id="p1", title="하나", url="http://x/1", rank=1)
    product.attributes["price"].int_value = 10
    full = result(units[0], products=[product, product], exit_ip="10.0.0.1", retry_after=Duration(seconds=5))
    full.applied_settings["block_mercury"].bool_value = True
    answers = await unswept.submit(full, result(units[1], 2, error_message="no route"), result(units[2], 3))
    assert [answer.disposition for answer in answers] == [RECORDED] * 3
    assert {name: count for name, count in (await unswept.tracking(slot.slot_id)).items() if count} == {
        "quota": 100,
        "allocated": 3,
        "succeeded": 1,
        "failed": 1,
        "blocked": 1,
    }
    rows = await unswept.sql("SELECT * FROM work_results ORDER BY outcome")
    assert [row["outcome"] for row in rows] == [2, 3, 4]
    assert [row["is_blocked"] for row in rows] == [False, False, True]
    assert (rows[0]["execution_time_ms"], rows[0]["exit_ip"], rows[0]["retry_after_ms"]) == (2000, "10.0.0.1", 5000)
    assert rows[0]["applied_settings"] == '{"block_mercury": true}'
    assert rows[0]["client_ip"] == "127.0.0.1"
    assert len(await unswept.sql("SELECT FROM product_results")) == 2
    assert len(await unswept.sql("SELECT FROM client_activity_logs")) == 3
    await unswept.check_invariants()


async def test_the_same_result_twice_counts_once_and_is_acknowledged_alike(unswept: Allocator) -> None:
    slot = await unswept.slot()
    (unit,) = await unswept.take()
    first, second = await unswept.submit(result(unit), result(unit, 2))
    (third,) = await unswept.submit(result(unit, 3))
    assert first == second == third
    concurrent = await asyncio.gather(*(unswept.submit(result(unit)) for _ in range(20)))
    assert all(answer == [first] for answer in concurrent)
    assert (await unswept.tracking(slot.slot_id))["succeeded"] == 1
    await unswept.check_invariants()


async def test_a_lapsed_lease_that_was_not_swept_is_recorded_late(unswept: Allocator) -> None:
    slot = await unswept.slot(daily_quota=1)
    (unit,) = await unswept.take()
    await unswept.run_out(unit)
    (answer,) = await unswept.submit(result(unit))
    (again,) = await unswept.submit(result(unit))
    assert answer.disposition == LATE
    assert again == answer
    assert (await unswept.tracking(slot.slot_id))["succeeded"] == 1
    await unswept.check_invariants()


async def test_a_late_result_counts_while_its_slot_has_room(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=2)
    units = await allocator.take(2)
    await allocator.run_out(*units)
    await allocator.swept(*units)
    await allocator.take()
    # One unit of room is left: the first late result takes it, the second is kept apart.
    answers = await allocator.submit(*(result(unit) for unit in units))
    assert [answer.disposition for answer in answers] == [LATE, QUARANTINED]
    assert await allocator.submit(*(result(unit) for unit in units)) == answers
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["allocated"], counters["succeeded"], counters["expired"]) == (3, 1, 1)
    (kept,) = await allocator.sql("SELECT result::text FROM quarantined_results")
    assert units[1].lease_token.hex() not in kept["result"].replace("-", "")
    assert (await allocator.totals()).quarantined == 1
    await allocator.check_invariants()


async def test_results_that_cannot_be_taken_are_refused_for_themselves(unswept: Allocator) -> None:
    await unswept.slot()
    released, good = await unswept.take(2)
    await unswept.release(lease(released))
    wrong = result(good)
    wrong.lease.lease_token = bytes(16)
    unknown = result(good)
    unknown.lease.allocation_key = str(uuid.uuid4())
    answers = await unswept.submit(result(released), wrong, unknown)
    assert [answer.error.reason for answer in answers] == ["LEASE_LOST", "LEASE_TOKEN_MISMATCH", "ALLOCATION_NOT_FOUND"]
    assert not await unswept.sql("SELECT FROM work_results")
    assert [answer.disposition for answer in await unswept.submit(result(good))] == [RECORDED]
    await unswept.check_invariants()


async def test_another_organization_sees_nothing_of_it(unswept: Allocator) -> None:
    slot = await unswept.slot()
    (unit,) = await unswept.take()
    stranger = await Allocator.of(unswept.service)
    stranger.worker = await unswept.service.metadata(Role.WORKER, "rival")
    stranger.operator = await unswept.service.metadata(Role.OPERATOR, "rival")
    assert (await stranger.renew(lease(unit)))[0].error.reason == "ALLOCATION_NOT_FOUND"
    assert (await stranger.release(lease(unit)))[0].error.reason == "ALLOCATION_NOT_FOUND"
    assert (await stranger.submit(result(unit)))[0].error.reason == "ALLOCATION_NOT_FOUND"
    with pytest.raises(grpc.aio.AioRpcError, match="there is no slot"):
        await stranger.update(slot.slot_id, daily_quota=1)
    assert (await stranger.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    assert (await stranger.totals()).leased == 0
    assert (await unswept.renew(lease(unit)))[0].HasField("expires_at")


async def test_two_replicas_share_leases_and_results(start_service: StartService) -> None:
    first = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))
    other = await start_service("allocator", database=first.service.database, leases={"sweep_seconds": 0.02})
    second = await Allocator.of(other)
    await first.slot(daily_quota=400)
    taken = await asyncio.gather(*((first, second)[n % 2].take(10) for n in range(40)))
    units = [unit for batch in taken for unit in batch]
    assert len({unit.allocation_key for unit in units}) == 400
    assert (await second.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await first.run_out(*units[:100])
    both = [(first, second)[n % 2].submit(*map(result, units[n * 10 : n * 10 + 20])) for n in range(40)]
    answers = await asyncio.gather(*both)
    assert all(answer.disposition in (RECORDED, LATE) for batch in answers for answer in batch)
    assert len(await first.sql("SELECT FROM work_results")) == 400
    await first.check_invariants()
