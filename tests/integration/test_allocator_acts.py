"""Operators' acts: tried or done, once for a request id, each with its reason in the audit chain."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import admin_pb2, work_pb2

from services.call import Role
from tests.support.acts import Office, act
from tests.support.allocator import Allocator, lease, result
from tests.support.services import StartService

TABLES = (
    "leases",
    "work_allocations",
    "daily_work_tracking",
    "exits",
    "quarantined_results",
    "work_results",
    "requests",
)


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


@pytest.fixture
async def office(allocator: Allocator) -> Office:
    return await Office.of(allocator)


async def everything(allocator: Allocator) -> dict[str, Any]:
    """All rows that an act could change."""
    tables = (*TABLES, "audit_log", "audit_heads", "outbox", "product_results", "client_activity_logs")
    return {table: sorted(str(dict(row)) for row in await allocator.sql(f"SELECT * FROM {table}")) for table in tables}


async def age(allocator: Allocator, unit: work_pb2.Allocation, hours: float) -> None:
    await allocator.sql(
        "UPDATE leases SET granted_at = now() - $1::float8 * interval '1 hour' WHERE allocation_key = $2",
        hours,
        uuid.UUID(unit.allocation_key),
    )


async def test_revoked_leases_give_their_units_back_and_their_holder_learns_of_it(
    allocator: Allocator, office: Office
) -> None:
    slot = await allocator.slot(daily_quota=4, without_exit=False)
    await allocator.add_exits(1, cap=4)
    held, done, released, lapsed = await allocator.take(4)
    await allocator.submit(result(done))
    await allocator.release(lease(released))
    await allocator.run_out(lapsed)
    unknown = str(uuid.uuid4())
    units = (held, done, released, lapsed)
    answers = await office.revoke(act(), *(unit.allocation_key for unit in units), unknown)
    assert answers == ["", "LEASE_LOST", "LEASE_LOST", "LEASE_LOST", "ALLOCATION_NOT_FOUND"]
    assert (await allocator.renew(lease(held)))[0].error.reason == "LEASE_LOST"
    counters = await allocator.tracking(slot.slot_id)
    assert [counters[name] for name in ("allocated", "succeeded", "released", "expired")] == [4, 1, 1, 1]
    (exit_,) = await allocator.sql("SELECT use_count FROM exits")
    assert exit_["use_count"] == 2
    # At once: the index of this replica was told.
    assert len((await allocator.ask(2)).allocations) == 2
    await allocator.check_invariants()


@pytest.mark.parametrize("way", ["revoked", "released by age", "holder declared dead"])
async def test_a_result_whose_lease_an_operator_ended_is_late_and_not_lost(
    allocator: Allocator, office: Office, way: str
) -> None:
    slot = await allocator.slot(daily_quota=2)

    async def end(unit: work_pb2.Allocation) -> None:
        if way == "revoked":
            assert await office.revoke(act(), unit.allocation_key) == [""]
        elif way == "released by age":
            assert (await office.release_by_age(act(), 0)).released == 1
        else:
            assert await office.declare_dead(act(), "pc-1") == 1

    (first,) = await allocator.take()
    await end(first)
    (released,) = await allocator.release(lease(first))
    assert released.error.reason == "LEASE_LOST"
    (recorded,) = await allocator.submit(result(first))
    assert recorded.disposition == work_pb2.RESULT_DISPOSITION_RECORDED_LATE
    (second,) = await allocator.take()
    await end(second)
    (third,) = await allocator.take()
    # Its unit was handed out again.
    (kept,) = await allocator.submit(result(second))
    assert kept.disposition == work_pb2.RESULT_DISPOSITION_QUARANTINED
    assert await allocator.submit(result(first), result(second)) == [recorded, kept]
    await allocator.submit(result(third))
    counters = await allocator.tracking(slot.slot_id)
    assert [counters[name] for name in ("allocated", "succeeded", "released", "expired")] == [3, 2, 0, 1]
    await allocator.check_invariants()


async def test_an_act_that_is_only_tried_answers_alike_and_changes_nothing(
    allocator: Allocator, office: Office
) -> None:
    slot = await allocator.slot(daily_quota=5)
    first, second, failed = await allocator.take(3)
    await allocator.submit(result(failed, 2))
    for unit in (first, second):
        await age(allocator, unit, 2)
    before = await everything(allocator)
    request_id = str(uuid.uuid4())
    tried = act(dry_run=True, request_id=request_id)
    revoked = await office.revoke(tried, first.allocation_key, failed.allocation_key)
    released = await office.release_by_age(tried, 3600, at_most=1)
    reopened = await office.reopen(tried, slot.slot_id)
    assert await everything(allocator) == before
    # The same request ids do it now.
    real = act(request_id=request_id)
    assert await office.reopen(real, slot.slot_id) == reopened
    done = await office.release_by_age(real, 3600, at_most=1)
    assert done == released
    assert (done.released, done.remaining, list(done.example_keys)) == (1, 1, [first.allocation_key])
    assert revoked == ["", "LEASE_LOST"]
    assert (reopened.quota_before, reopened.quota, reopened.room) == (5, 6, 3)
    await allocator.check_invariants()


async def test_a_retry_is_answered_as_the_first_time_and_another_request_is_refused(
    allocator: Allocator, office: Office
) -> None:
    slot = await allocator.slot(daily_quota=10)
    units = await allocator.take(3)
    acts = {name: act() for name in ("revoke", "age", "reopen")}
    keys = [unit.allocation_key for unit in units[:2]]

    async def all_of_them() -> list[Any]:
        return [
            await office.revoke(acts["revoke"], *keys),
            await office.release_by_age(acts["age"], 0),
            await office.reopen(acts["reopen"], slot.slot_id, units=7),
        ]

    first = await all_of_them()
    assert first[0] == ["", ""]
    assert first[1].released == 1
    after = await everything(allocator)
    await allocator.take(1)
    assert await all_of_them() == first
    concurrent = await asyncio.gather(*(office.reopen(acts["reopen"], slot.slot_id, units=7) for _ in range(10)))
    assert all(answer == first[2] for answer in concurrent)
    assert (await everything(allocator))["audit_log"] == after["audit_log"]
    assert (await allocator.tracking(slot.slot_id))["quota"] == 17
    for attempt in (
        office.revoke(acts["revoke"], keys[0]),
        office.release_by_age(acts["age"], 1),
        office.reopen(acts["reopen"], slot.slot_id, units=8),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="request_id stands for another request") as refused:
            await attempt
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await allocator.check_invariants()


async def test_leases_are_released_by_age_the_oldest_first_and_only_those_that_match(
    allocator: Allocator, office: Office
) -> None:
    slot, other = await allocator.slot(target="a"), await allocator.slot(target="b")
    mine = [(await allocator.take(target="a"))[0] for _ in range(4)]
    (foreign,) = await allocator.take(target="b")
    (theirs,) = await allocator.take(target="a", client="pc-2")
    for hours, unit in zip((3, 5, 4, 0.5, 6, 7), (*mine, foreign, theirs), strict=True):
        await age(allocator, unit, hours)
    answer = await office.release_by_age(act(), 3600, slot_id=slot.slot_id, client_id="pc-1", at_most=2)
    assert (answer.released, answer.remaining) == (2, 1)
    assert sorted(answer.example_keys) == sorted(unit.allocation_key for unit in mine[1:3])
    answer = await office.release_by_age(act(), 3600, slot_id=other.slot_id)
    assert list(answer.example_keys) == [foreign.allocation_key]
    answer = await office.release_by_age(act(), 3600)
    assert (answer.released, answer.remaining) == (2, 0)
    assert (await office.release_by_age(act(), 3600)).released == 0
    left = await allocator.sql("SELECT allocation_key FROM leases")
    assert [str(row["allocation_key"]) for row in left] == [mine[3].allocation_key]
    await allocator.check_invariants()


async def test_a_reopened_day_hands_out_more_and_stays_so_when_its_slot_changes(
    allocator: Allocator, office: Office
) -> None:
    slot = await allocator.slot(daily_quota=2)
    failed, blocked = await allocator.take(2)
    await allocator.submit(result(failed, 2), result(blocked, 3))
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    # As many as failed or were blocked.
    answer = await office.reopen(act(), slot.slot_id)
    assert (answer.quota_before, answer.quota, answer.room) == (2, 4, 2)
    # The same ones are not added again.
    answer = await office.reopen(act(), slot.slot_id)
    assert (answer.quota_before, answer.quota, answer.room) == (4, 4, 2)
    await allocator.take(2)
    assert not (await allocator.ask()).allocations
    answer = await office.reopen(act(), slot.slot_id, units=1)
    assert (answer.quota_before, answer.quota, answer.room) == (4, 5, 1)
    await allocator.update(slot.slot_id, keyword="tablet")
    assert (await allocator.tracking(slot.slot_id))["quota"] == 5
    await allocator.update(slot.slot_id, daily_quota=3)
    assert (await allocator.tracking(slot.slot_id))["quota"] == 6
    await allocator.take(2)
    assert (await office.reopen(act(), slot.slot_id, units=1_000_000)).quota == 1_000_000
    await allocator.check_invariants()


async def test_what_cannot_be_reopened(allocator: Allocator, office: Office) -> None:
    slot = await allocator.slot()
    unmade = await allocator.slot(start_date="2098-01-01")
    for attempt, code, text in (
        (office.reopen(act(), str(uuid.uuid4())), grpc.StatusCode.NOT_FOUND, "there is no slot"),
        (office.reopen(act(), unmade.slot_id), grpc.StatusCode.NOT_FOUND, "has no counters on"),
        (office.reopen(act(), slot.slot_id, work_date="2099-01-01"), grpc.StatusCode.NOT_FOUND, "no counters on 2099"),
        (office.reopen(act(), slot.slot_id, work_date="2024-01-01"), grpc.StatusCode.INVALID_ARGUMENT, "work_date"),
        (office.reopen(act(), slot.slot_id, work_date="tomorrow"), grpc.StatusCode.INVALID_ARGUMENT, "work_date"),
        (office.reopen(act(), slot.slot_id, units=1_000_001), grpc.StatusCode.INVALID_ARGUMENT, "units"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=text) as refused:
            await attempt
        assert refused.value.code() is code
    assert await office.entries() == []
    assert not await allocator.sql("SELECT FROM requests WHERE method = 'ReopenQuota'")


async def test_results_in_quarantine_are_accepted_or_discarded(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))
    office = await Office.of(allocator)
    slot = await allocator.slot(daily_quota=3)
    late = await allocator.take(3)
    await allocator.run_out(*late)
    await allocator.swept(*late)
    await allocator.take(3)
    await allocator.submit(*(result(unit, 1 + number % 3) for number, unit in enumerate(late)))
    page = await office.quarantined(page_size=2)
    rest = await office.quarantined(page_size=2, page_token=page.next_page_token)
    kept = {item.allocation_key: item for item in (*page.results, *rest.results)}
    assert list(kept) == [unit.allocation_key for unit in late]
    assert [kept[unit.allocation_key].outcome for unit in late] == [1, 2, 3]
    assert all(item.slot_id == slot.slot_id and item.client_id == "pc-1" for item in kept.values())
    first, second, third = kept
    tried, accepted, discarded = act(dry_run=True), act(), act()
    before = await everything(allocator)
    assert await office.accept(tried, first, second) == ["", ""]
    assert await office.discard(tried, first) == [""]
    assert await everything(allocator) == before
    for _ in range(2):
        assert await office.accept(accepted, first, second) == ["", ""]
        assert await office.discard(discarded, third, first) == ["", "QUARANTINED_RESULT_NOT_FOUND"]
    assert await office.accept(act(), first, third) == ["QUARANTINED_RESULT_NOT_FOUND"] * 2
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["succeeded"], counters["failed"], counters["expired"], counters["quota"]) == (1, 1, 1, 5)
    assert not (await office.quarantined()).results
    assert [(entry.action, entry.resource) for entry in await office.entries()] == [
        ("AcceptQuarantinedResults", "0 quarantined results"),
        ("DiscardQuarantinedResults", f"1 quarantined results: {third}"),
        ("AcceptQuarantinedResults", f"2 quarantined results: {first}, {second}"),
    ]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("act", {"act": None}),
        ("act.request_id", {"act": admin_pb2.Act(request_id="x", reason="r")}),
        ("act.reason", {"act": admin_pb2.Act(request_id=str(uuid.uuid4()))}),
        ("act.reason", {"act": admin_pb2.Act(request_id=str(uuid.uuid4()), reason="r" * 257)}),
        ("older_than", {"older_than": None}),
        ("older_than", {"older_than": Duration(seconds=86401)}),
        ("older_than", {"older_than": Duration(seconds=-1)}),
        ("slot_id", {"slot_id": "x"}),
        ("client_id", {"client_id": "x" * 129}),
        ("at_most", {"at_most": 10_001}),
    ],
)
async def test_every_field_of_an_act_is_checked(
    allocator: Allocator, office: Office, field: str, values: dict[str, Any]
) -> None:
    request = admin_pb2.ReleaseByAgeRequest(**{"act": act(), "older_than": Duration(seconds=1), **values})
    with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
        await office.admin.ReleaseByAge(request, metadata=office.administrator)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_lists_of_keys_are_bounded_and_hold_each_once(allocator: Allocator, office: Office) -> None:
    key = str(uuid.uuid4())
    for keys, text in (
        ([], "must have 1 to 1000"),
        ([key] * 2, "twice"),
        ([key, key.upper()], "twice"),
        (["x"], r"allocation_keys\[0\]"),
        ([str(uuid.uuid4()) for _ in range(1001)], "must have 1 to 1000"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=text) as refused:
            await office.revoke(act(), *keys)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError, match="must have 1 to 256"):
        await office.accept(act(), *(str(uuid.uuid4()) for _ in range(257)))


async def test_only_administrators_act(allocator: Allocator, office: Office) -> None:
    office.administrator = allocator.operator
    for attempt in (office.revoke(act(), str(uuid.uuid4())), office.entries()):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_another_organization_cannot_be_acted_on(allocator: Allocator, office: Office) -> None:
    slot = await allocator.slot()
    (unit,) = await allocator.take()
    await age(allocator, unit, 2)
    stranger = await Allocator.of(allocator.service)
    stranger.worker = await allocator.service.metadata(Role.WORKER, "rival")
    rival = await Office.of(stranger, "rival")
    assert await rival.revoke(act(), unit.allocation_key) == ["ALLOCATION_NOT_FOUND"]
    assert (await rival.release_by_age(act(), 0)).released == 0
    with pytest.raises(grpc.aio.AioRpcError, match="there is no slot"):
        await rival.reopen(act(), slot.slot_id)
    assert (await allocator.renew(lease(unit)))[0].HasField("expires_at")
    assert await office.entries() == []
