"""AllocateWork: quota, caps and priorities under concurrency, retries, and "no work" only when it is true."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import exit_pb2, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def test_a_package_holds_all_a_worker_needs(allocator: Allocator) -> None:
    settings = {
        "flag": work_pb2.SettingValue(bool_value=True),
        "whole": work_pb2.SettingValue(int_value=1),
        "broken": work_pb2.SettingValue(double_value=1.0),
        "huge": work_pb2.SettingValue(double_value=1e300),
        "text": work_pb2.SettingValue(string_value="노트북"),
    }
    slot = await allocator.slot(keyword="노트북", code="12345", target="shop", without_exit=False, settings=settings)
    (exit_,) = await allocator.add_exits(1, region="kr")
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    (unit,) = await allocator.take(traceparent=trace, target="shop", region="kr")
    assert (unit.keyword, unit.code, unit.target) == ("노트북", "12345", "shop")
    assert dict(unit.settings) == settings
    assert (unit.exit.exit_id, unit.exit.endpoint, unit.exit.region) == (exit_.exit_id, "http://127.0.0.1:3128", "kr")
    assert (unit.slot_id, len(unit.lease_token), unit.lease_duration.seconds) == (slot.slot_id, 16, 300)
    assert unit.traceparent.startswith(f"00-{'a' * 32}-")
    assert unit.traceparent != trace
    assert uuid.UUID(unit.allocation_key).version == 7
    assert not unit.HasField("persona")
    assert unit.expires_at.ToMilliseconds() < unit.renewable_until.ToMilliseconds()


async def test_the_work_date_is_of_the_organizations_time_zone(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    # These two are 26 hours apart: at no moment is it the same day in both.
    days = []
    for organization, zone in (("west", "Etc/GMT+12"), ("east", "Pacific/Kiritimati")):
        for role in (Role.WORKER, Role.OPERATOR):
            await allocator.service.key(role, organization, time_zone=zone)
        allocator.worker = await allocator.service.metadata(Role.WORKER, organization)
        allocator.operator = await allocator.service.metadata(Role.OPERATOR, organization)
        await allocator.slot()
        (unit,) = await allocator.take()
        days.append(unit.work_date)
        assert [answer.disposition for answer in await allocator.submit(result(unit))] == [1]
    assert days[0] < days[1]


async def test_a_hundred_concurrent_calls_never_pass_quota_or_cap(allocator: Allocator) -> None:
    for number in range(5):
        await allocator.slot(keyword=f"k{number}", daily_quota=30, without_exit=False)
    await allocator.add_exits(10, cap=12)
    answers = await asyncio.gather(*(allocator.ask(4, client=f"pc-{n % 7}") for n in range(100)))
    units = [unit for answer in answers for unit in answer.allocations]
    # 150 units of quota, but 120 uses of exits.
    assert len(units) == 120
    assert set(Counter(unit.exit.exit_id for unit in units).values()) == {12}
    assert all(answer.HasField("no_work") != bool(answer.allocations) for answer in answers)
    assert {answer.no_work.blocker for answer in answers if answer.HasField("no_work")} == {
        work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED
    }
    await allocator.check_invariants()


async def test_work_is_not_denied_while_another_transaction_holds_its_rows(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=5, without_exit=False)
    await allocator.add_exits(1)
    await allocator.take()
    for table in ("daily_work_tracking", "exits"):
        holder = await allocator.connect()
        try:
            transaction = holder.transaction()
            await transaction.start()
            await holder.fetch(f"SELECT FROM {table} FOR UPDATE")
            asked = asyncio.create_task(allocator.ask())
            await until(allocator.waits_for_a_lock)
            assert not asked.done()
            await transaction.commit()
            assert len((await asked).allocations) == 1
        finally:
            await holder.close()


async def test_a_row_that_stays_locked_is_unavailable_and_not_no_work(allocator: Allocator) -> None:
    await allocator.slot()
    await allocator.take()
    holder = await allocator.connect()
    try:
        transaction = holder.transaction()
        await transaction.start()
        await holder.fetch("SELECT FROM daily_work_tracking FOR UPDATE")
        # The service's own time limit is seconds; this statement's role of it is the same.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await allocator.ask()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await transaction.rollback()
    finally:
        await holder.close()
    await allocator.take()


async def test_room_that_the_index_does_not_know_is_found(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=1)
    (unit,) = await allocator.take()
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    # As another replica would: this one hears nothing of it.
    await allocator.sql("UPDATE daily_work_tracking SET quota = 3")
    assert len((await allocator.ask(5)).allocations) == 2
    await allocator.sql("UPDATE work_slots SET is_active = false")
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_SLOT_INACTIVE
    assert slot.slot_id == unit.slot_id


async def test_a_retry_gets_the_same_leases(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(2)
    request_id = str(uuid.uuid4())
    answers = await asyncio.gather(*(allocator.ask(5, request_id=request_id) for _ in range(10)))
    keys = {unit.allocation_key for answer in answers for unit in answer.allocations}
    assert len(keys) == 5
    assert all(len(answer.allocations) == 5 for answer in answers)
    by_key = {unit.allocation_key: unit for unit in answers[0].allocations}
    again = await allocator.ask(5, request_id=request_id, wait=Duration(seconds=1))
    assert {unit.allocation_key: unit for unit in again.allocations} == by_key
    with pytest.raises(grpc.aio.AioRpcError, match="request_id") as refused:
        await allocator.ask(6, request_id=request_id)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    units = list(by_key.values())
    await allocator.submit(*(result(unit) for unit in units[:4]))
    assert [unit.allocation_key for unit in (await allocator.ask(5, request_id=request_id)).allocations] == [
        units[4].allocation_key
    ]
    await allocator.release(lease(units[4]))
    with pytest.raises(grpc.aio.AioRpcError, match="leases have ended"):
        await allocator.ask(5, request_id=request_id)
    await allocator.check_invariants()


async def test_a_request_that_got_nothing_can_be_repeated(allocator: Allocator) -> None:
    request_id = str(uuid.uuid4())
    assert (await allocator.ask(request_id=request_id)).no_work.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    await allocator.slot()
    assert len((await allocator.ask(request_id=request_id)).allocations) == 1


async def test_a_waiting_call_gets_work_as_soon_as_there_is_some(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=1)
    (unit,) = await allocator.take()
    waiting = asyncio.create_task(allocator.ask(wait=Duration(seconds=20)))
    await asyncio.sleep(0)
    await allocator.release(lease(unit))
    assert len((await asyncio.wait_for(waiting, 10)).allocations) == 1


async def test_priority_goes_first_and_weights_share(allocator: Allocator) -> None:
    await allocator.slot(keyword="low", daily_quota=1000)
    await allocator.slot(keyword="light", daily_quota=1000, priority=1, weight=1)
    await allocator.slot(keyword="heavy", daily_quota=1000, priority=1, weight=3)
    units = await allocator.take(200)
    shares = Counter(unit.keyword for unit in units)
    # One unit of 16 goes to the lower priority, so that it never starves.
    assert shares["low"] == 200 // 16
    assert abs(shares["heavy"] - (200 - shares["low"]) * 3 / 4) <= 1


async def test_a_slot_without_exit_is_served_when_exits_are_used_up(allocator: Allocator) -> None:
    await allocator.slot(keyword="needs", without_exit=False, priority=10)
    await allocator.slot(keyword="free", without_exit=True, daily_quota=3)
    await allocator.add_exits(1, cap=2)
    units = await allocator.take(5)
    assert Counter(unit.keyword for unit in units) == {"needs": 2, "free": 3}
    assert [unit.HasField("exit") for unit in units] == [True, True, False, False, False]
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED
    await allocator.check_invariants()


async def test_regions_and_targets_are_kept_to(allocator: Allocator) -> None:
    await allocator.slot(keyword="a", target="shop", without_exit=False)
    await allocator.exits.ImportExits(
        exit_pb2.ImportExitsRequest(
            exits=[
                exit_pb2.ExitSpec(endpoint="http://10.0.0.1:1", region="kr", cap=1),
                exit_pb2.ExitSpec(endpoint="socks5://[::1]:2", region="jp", cap=5),
            ]
        ),
        metadata=allocator.operator,
    )
    assert [unit.exit.region for unit in (await allocator.ask(3, region="kr")).allocations] == ["kr"]
    assert (await allocator.ask(region="kr")).no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED
    assert (await allocator.ask(region="us")).no_work.blocker == work_pb2.BLOCKER_KIND_NO_EXIT
    assert (await allocator.ask(target="bank")).no_work.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    assert len((await allocator.ask(9)).allocations) == 5


async def test_each_blocker_is_named_by_the_call_and_by_the_explanation(allocator: Allocator) -> None:
    async def agree(kind: work_pb2.BlockerKind.ValueType) -> None:
        answer = await allocator.ask()
        explained = await allocator.explain()
        assert answer.no_work.blocker == explained.blockers[0].kind == kind, (answer, explained)
        assert answer.no_work.retry_after.ToMilliseconds() >= 100
        assert explained.available_units == 0
        assert explained.blockers[0].message
        assert explained.blockers[0].remedy

    await agree(work_pb2.BLOCKER_KIND_NO_SLOT)
    slot = await allocator.slot(is_active=False, without_exit=False, daily_quota=2)
    await agree(work_pb2.BLOCKER_KIND_SLOT_INACTIVE)
    await allocator.update(slot.slot_id, is_active=True, end_date="2020-01-02")
    await agree(work_pb2.BLOCKER_KIND_SLOT_OUT_OF_DATE)
    await allocator.update(slot.slot_id, end_date="2099-01-01")
    await agree(work_pb2.BLOCKER_KIND_NO_EXIT)
    (exit_,) = await allocator.add_exits(1, cap=1)
    assert not (await allocator.explain()).blockers
    assert (await allocator.explain()).available_units == 1
    await allocator.take()
    await agree(work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED)
    assert (await allocator.explain()).blockers[0].example_ids == [exit_.exit_id]
    await allocator.update(slot.slot_id, daily_quota=1)
    await agree(work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED)
    kinds = [blocker.kind for blocker in (await allocator.explain(slot_id=slot.slot_id)).blockers]
    assert kinds == [work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED, work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED]


async def test_a_missing_partition_is_made_when_it_is_met(allocator: Allocator) -> None:
    await allocator.slot()
    (unit,) = await allocator.take()
    for table in ("work_results", "work_allocations"):
        partitions = await allocator.sql(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::regclass", table
        )
        for partition in partitions:
            await allocator.sql(f"DROP TABLE {partition['name']}")
    assert [answer.disposition for answer in await allocator.submit(result(unit))] == [1]
    await allocator.check_invariants()


async def test_the_stream_carries_every_call_and_ends_at_a_malformed_one(allocator: Allocator) -> None:
    await allocator.slot()
    client = work_pb2.ClientIdentity(client_id="pc-1")
    stream = allocator.work.WorkStream(metadata=allocator.worker)

    async def call(sequence: int, **values: object) -> work_pb2.WorkStreamResponse:
        await stream.write(work_pb2.WorkStreamRequest(sequence=sequence, **values))  # type: ignore[arg-type]
        response = await stream.read()
        assert isinstance(response, work_pb2.WorkStreamResponse)
        assert response.sequence == sequence
        return response

    request = work_pb2.AllocateWorkRequest(request_id=str(uuid.uuid4()), client=client, max_items=3)
    units = (await call(1, allocate=request)).allocate.allocations
    assert len(units) == 3
    renewed = await call(2, renew=work_pb2.RenewLeasesRequest(leases=[lease(units[0])]))
    assert renewed.renew.leases[0].HasField("expires_at")
    await call(3, release=work_pb2.ReleaseLeasesRequest(leases=[lease(units[1])]))
    submitted = await call(
        4, submit=work_pb2.SubmitResultsRequest(client=client, results=[result(units[0]), result(units[2])])
    )
    assert [answer.disposition for answer in submitted.submit.results] == [1, 1]
    reused = work_pb2.AllocateWorkRequest(request_id=request.request_id, client=client, max_items=4)
    assert (await call(5, allocate=reused)).error.reason == "REQUEST_ID_REUSED"
    # Many in flight, answered in any order.
    for sequence in range(10, 110):
        fresh = work_pb2.AllocateWorkRequest(request_id=str(uuid.uuid4()), client=client)
        await stream.write(work_pb2.WorkStreamRequest(sequence=sequence, allocate=fresh))
    answers = [await stream.read() for _ in range(100)]
    assert {answer.sequence for answer in answers if isinstance(answer, work_pb2.WorkStreamResponse)} == set(
        range(10, 110)
    )
    await stream.write(work_pb2.WorkStreamRequest(sequence=200))
    with pytest.raises(grpc.aio.AioRpcError, match="call"):
        await stream.read()
    assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
    await allocator.check_invariants()


async def test_a_stream_of_a_service_that_drains_answers_what_was_begun_and_says_why_it_ends(
    start_service: StartService,
) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    await allocator.slot()
    stream = allocator.work.WorkStream(metadata=allocator.worker)
    request = work_pb2.AllocateWorkRequest(
        request_id=str(uuid.uuid4()), client=work_pb2.ClientIdentity(client_id="pc-1")
    )
    await stream.write(work_pb2.WorkStreamRequest(sequence=1, allocate=request))
    response = await stream.read()
    assert isinstance(response, work_pb2.WorkStreamResponse)
    assert len(response.allocate.allocations) == 1
    request.request_id = str(uuid.uuid4())
    holder = await allocator.connect()
    try:
        transaction = holder.transaction()
        await transaction.start()
        await holder.fetch("SELECT FROM daily_work_tracking FOR UPDATE")
        await stream.write(work_pb2.WorkStreamRequest(sequence=2, allocate=request))
        await until(allocator.waits_for_a_lock)
        allocator.service.chassis.draining.set()
        await transaction.commit()
    finally:
        await holder.close()
    response = await asyncio.wait_for(stream.read(), 5)
    assert isinstance(response, work_pb2.WorkStreamResponse)
    assert (response.sequence, len(response.allocate.allocations)) == (2, 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asyncio.wait_for(stream.read(), 5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the service is stopping" in str(refused.value.details())
