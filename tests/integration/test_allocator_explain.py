"""Explain says what AllocateWork does: each blocker made in turn, told by both, and ended by the remedy."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import (
    client_pb2,
    client_pb2_grpc,
    exit_pb2,
    insight_pb2,
    slot_pb2,
    target_pb2,
    target_pb2_grpc,
    work_pb2,
)

from services.call import Role
from tests.support.allocator import Allocator, until
from tests.support.exit_provider import TOKEN, Fault, ProviderServer
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One that never sweeps, with the back door open."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    allocator.door = await allocator.connect()
    yield allocator
    await allocator.door.close()


def _targets(allocator: Allocator) -> Any:
    return target_pb2_grpc.TargetServiceStub(allocator.service.channel)


async def _resume(allocator: Allocator, target: str = "shop") -> None:
    request = target_pb2.ResumeTargetRequest(target=target)
    await _targets(allocator).ResumeTarget(request, metadata=allocator.operator)


async def _policy(allocator: Allocator, **values: Any) -> None:
    request = target_pb2.SetTargetPolicyRequest(target="shop", policy=target_pb2.TargetPolicy(**values))
    await _targets(allocator).SetTargetPolicy(request, metadata=allocator.operator)


async def _drain(allocator: Allocator, draining: bool) -> None:
    request = client_pb2.SetClientDrainingRequest(client_id="pc-1", draining=draining)
    await client_pb2_grpc.ClientServiceStub(allocator.service.channel).SetClientDraining(
        request, metadata=allocator.operator
    )


Remedy = Callable[[], Awaitable[Any]]
Situation = Callable[[Allocator], Awaitable[Remedy]]


async def _no_slot(allocator: Allocator) -> Remedy:
    await allocator.heartbeat()
    return lambda: allocator.slot()


async def _inactive(allocator: Allocator) -> Remedy:
    slot = await allocator.slot(is_active=False)
    return lambda: allocator.update(slot.slot_id, is_active=True)


async def _out_of_date(allocator: Allocator) -> Remedy:
    slot = await allocator.slot(end_date="2020-02-02")
    return lambda: allocator.update(slot.slot_id, end_date="2099-02-02")


async def _exhausted(allocator: Allocator) -> Remedy:
    slot = await allocator.slot(daily_quota=1)
    await allocator.take()
    return lambda: allocator.update(slot.slot_id, daily_quota=2)


async def _paced(allocator: Allocator) -> Remedy:
    slot = await allocator.slot(daily_quota=1000, pacing=slot_pb2.PACING_EVEN)
    await allocator.take()
    await until(lambda: _day_is_made(allocator))
    # As if the day had just begun.
    await allocator.sql("UPDATE daily_work_tracking SET paced_from = extract(epoch FROM now())")
    return lambda: allocator.update(slot.slot_id, pacing=slot_pb2.PACING_ASAP)


async def _day_is_made(allocator: Allocator) -> bool:
    day = "(now() AT TIME ZONE 'UTC')::date"
    return bool(await allocator.sql(f"SELECT FROM tracked_days WHERE work_date = {day} AND complete"))


async def _held(allocator: Allocator) -> Remedy:
    await allocator.slot(target="shop")
    request = target_pb2.HoldTargetRequest(target="shop", duration=Duration(seconds=3600), reason="maintenance")
    await _targets(allocator).HoldTarget(request, metadata=allocator.operator)
    return lambda: _resume(allocator)


async def _held_slot(allocator: Allocator) -> Remedy:
    slot = await allocator.slot()
    request = target_pb2.HoldTargetRequest(target=f"slot:{slot.slot_id}", duration=Duration(seconds=3600))
    await _targets(allocator).HoldTarget(request, metadata=allocator.operator)
    return lambda: _resume(allocator, f"slot:{slot.slot_id}")


async def _paused(allocator: Allocator) -> Remedy:
    await allocator.slot(target="shop")
    await allocator.sql(
        """INSERT INTO targets (organization_id, target, paused_at, pauses, probe_at)
        VALUES ($1, 'shop', now(), 1, now() + interval '1 hour')""",
        await allocator.service.organization_id(),
    )
    return lambda: _resume(allocator)


async def _full(allocator: Allocator) -> Remedy:
    await allocator.slot(target="shop")
    await _policy(allocator, max_in_flight=1)
    await allocator.take()
    return lambda: _policy(allocator, max_in_flight=2)


async def _delayed(allocator: Allocator) -> Remedy:
    await allocator.slot(target="shop")
    await _policy(allocator, min_delay=Duration(seconds=3600))
    await allocator.take()

    async def remedy() -> None:
        await _policy(allocator)
        await _resume(allocator)

    return remedy


async def _no_exit(allocator: Allocator) -> Remedy:
    await allocator.slot(without_exit=False)
    return lambda: allocator.add_exits(1)


async def _no_exit_of_region(allocator: Allocator) -> Remedy:
    await allocator.slot(without_exit=False, exit_region="eu")
    await allocator.add_exits(1, region="us")
    return lambda: allocator.add_exits(1, region="eu")


async def _used_up(allocator: Allocator) -> Remedy:
    await allocator.slot(without_exit=False)
    (exit_,) = await allocator.add_exits(1, cap=1)
    await allocator.take()
    request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id)
    return lambda: allocator.exits.ToggleExit(request, metadata=allocator.operator)


async def _cooling(allocator: Allocator) -> Remedy:
    await allocator.slot(target="shop", without_exit=False)
    (exit_,) = await allocator.add_exits(1)
    await allocator.sql(
        """INSERT INTO exit_health (organization_id, exit_id, target, signal, faults, cooling_until)
        VALUES ($1, $2, 'shop', 2, 1, now() + interval '1 hour')""",
        await allocator.service.organization_id(),
        uuid.UUID(exit_.exit_id),
    )
    request = exit_pb2.ClearExitHealthRequest(exit_id=exit_.exit_id)
    return lambda: allocator.exits.ClearExitHealth(request, metadata=allocator.operator)


async def _draining(allocator: Allocator) -> Remedy:
    await allocator.slot()
    await allocator.heartbeat()
    await _drain(allocator, True)
    return lambda: _drain(allocator, False)


_SITUATIONS: dict[str, tuple[Situation, str]] = {
    "there is no slot": (_no_slot, "NO_SLOT"),
    "no slot is active": (_inactive, "SLOT_INACTIVE"),
    "no slot is in its dates": (_out_of_date, "SLOT_OUT_OF_DATE"),
    "the quota is taken": (_exhausted, "QUOTA_EXHAUSTED"),
    "the quota is paced": (_paced, "PACED"),
    "the target is held": (_held, "TARGET_HELD"),
    "a slot without target is held": (_held_slot, "TARGET_HELD"),
    "the target is paused": (_paused, "TARGET_PAUSED"),
    "the target has enough in flight": (_full, "TARGET_BUSY"),
    "the target's delay has not passed": (_delayed, "TARGET_BUSY"),
    "there is no exit": (_no_exit, "NO_EXIT"),
    "there is no exit of the region": (_no_exit_of_region, "NO_EXIT"),
    "the exits are used up": (_used_up, "EXIT_EXHAUSTED"),
    "the exits cool down": (_cooling, "EXIT_COOLING"),
    "the client drains": (_draining, "CLIENT_DRAINING"),
}


def _name(kind: work_pb2.BlockerKind.ValueType) -> str:
    return work_pb2.BlockerKind.Name(kind).removeprefix("BLOCKER_KIND_")


@pytest.mark.parametrize("name", _SITUATIONS)
async def test_explain_and_allocation_agree(allocator: Allocator, name: str) -> None:
    build, kind = _SITUATIONS[name]
    remedy = await build(allocator)
    answer = (await allocator.ask()).no_work
    assert _name(answer.blocker) == kind, answer
    wait = answer.retry_after.seconds + answer.retry_after.nanos / 1e9
    assert 0.1 <= wait <= 60
    explained = await allocator.explain(client_id="pc-1")
    assert [_name(blocker.kind) for blocker in explained.blockers][:1] == [kind]
    first = explained.blockers[0]
    assert first.message
    assert first.remedy in answer.message or kind == "CLIENT_DRAINING"
    assert first.count <= first.of
    assert explained.available_units == 0
    for row in await allocator.sql("SELECT slot_id FROM work_slots"):
        alone = await allocator.explain(slot_id=str(row["slot_id"]), client_id="pc-1")
        assert _name(alone.blockers[0].kind) == kind
        assert alone.available_units == 0
    await remedy()
    mended = await allocator.explain(client_id="pc-1")
    assert not mended.blockers
    assert mended.available_units >= 1
    assert mended.available_units == (await allocator.totals()).available_units
    await allocator.take(wait=Duration(seconds=5))


async def _later() -> None:
    """Waits until what failed is no longer avoided when work is chosen, as an operator does who comes to look."""
    await asyncio.sleep(1.2)


async def _both_say(allocator: Allocator, kind: str, slot: slot_pb2.Slot) -> insight_pb2.Blocker:
    """Checks what alone stands in the way of the only slot, and returns it."""
    for scope in ("", slot.slot_id):
        explained = await allocator.explain(slot_id=scope)
        (blocker,) = explained.blockers
        assert _name(blocker.kind) == kind
        assert list(blocker.example_ids) == [slot.slot_id]
        assert explained.available_units == 0
    return blocker


async def test_a_persona_store_that_is_away_is_told(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", persona_store={"target": "127.0.0.1:1"}))
    slot = await allocator.slot(persona=slot_pb2.PersonaNeed(min_aging_level=1))
    # Nobody has tried.
    assert not (await allocator.explain()).blockers
    answer = (await allocator.ask()).no_work
    assert _name(answer.blocker) == "PERSONA_STORE_UNAVAILABLE"
    await _later()
    await _both_say(allocator, "PERSONA_STORE_UNAVAILABLE", slot)


async def test_without_a_persona_store_it_is_told_before_anybody_asks(allocator: Allocator) -> None:
    slot = await allocator.slot(persona=slot_pb2.PersonaNeed(min_aging_level=1))
    await _both_say(allocator, "PERSONA_STORE_UNAVAILABLE", slot)
    # A slot that needs none goes out.
    await allocator.slot(daily_quota=3)
    assert (await allocator.explain()).available_units == 3


async def test_a_provider_that_is_away_is_told(start_service: StartService, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    async with ProviderServer() as server:
        provider = {"url": server.url, "token_file": tmp_path / "token", "holder": "muster-test"}
        service = await start_service("allocator", exit_providers={"vpn": provider})
        allocator = await Allocator.of(service)
        slot = await allocator.slot(without_exit=False, exit_provider="vpn", exit_region="eu")
        assert (await allocator.explain()).available_units == 100
        server.always = Fault.NONE_FREE
        answer = (await allocator.ask()).no_work
        assert _name(answer.blocker) == "EXIT_UNAVAILABLE"
        await _later()
        assert "vpn" in (await _both_say(allocator, "EXIT_UNAVAILABLE", slot)).message
        server.always = None

        async def given() -> bool:
            return bool((await allocator.ask()).allocations)

        async def told() -> bool:
            return not (await allocator.explain()).blockers

        await until(given)
        await until(told)


async def test_a_provider_that_is_passed_over_or_gone_is_told_before_anybody_asks(
    start_service: StartService, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    async with ProviderServer() as server:
        provider = {"url": server.url, "token_file": tmp_path / "token", "holder": "muster-test"}
        service = await start_service(
            "allocator", exit_providers={"vpn": provider}, external_exits={"pause_seconds": 600}
        )
        allocator = await Allocator.of(service)
        europe = await allocator.slot(without_exit=False, exit_provider="vpn", exit_region="eu")
        server.always = Fault.BROKEN

        async def passed_over() -> bool:
            before = server.counted("PUT")
            assert not (await allocator.ask()).allocations
            return server.counted("PUT") == before

        await until(passed_over)
        # Nobody has asked for this region yet.
        await allocator.update(europe.slot_id, is_active=False)
        asia = await allocator.slot(without_exit=False, exit_provider="vpn", exit_region="asia")
        (blocker,) = (await allocator.explain(slot_id=asia.slot_id)).blockers
        assert _name(blocker.kind) == "EXIT_UNAVAILABLE"
    without = await Allocator.of(await start_service("allocator", database=service.database))
    for scope in ("", asia.slot_id):
        assert _name((await without.explain(slot_id=scope)).blockers[0].kind) == "EXIT_UNAVAILABLE"


async def test_an_organization_hears_of_every_step_the_nearest_first(allocator: Allocator) -> None:
    for _ in range(7):
        await allocator.slot(is_active=False)
    late = await allocator.slot(end_date="2020-02-02")
    taken = [await allocator.slot(daily_quota=1) for _ in range(2)]
    await allocator.take(2)
    blockers = (await allocator.explain()).blockers
    assert [(_name(one.kind), one.count, one.of) for one in blockers] == [
        ("QUOTA_EXHAUSTED", 2, 10),
        ("SLOT_OUT_OF_DATE", 1, 10),
        ("SLOT_INACTIVE", 7, 10),
    ]
    assert [len(one.example_ids) for one in blockers] == [2, 1, 5]
    assert set(blockers[0].example_ids) == {slot.slot_id for slot in taken}
    assert list(blockers[1].example_ids) == [late.slot_id]
    assert "2 of 10 slots" in blockers[0].message
    # One slot with work, and nothing stands in the way of the organization; the others still hear what holds them.
    await allocator.slot(daily_quota=3)
    explained = await allocator.explain()
    assert (list(explained.blockers), explained.available_units) == ([], 3)
    assert [_name(one.kind) for one in (await allocator.explain(slot_id=late.slot_id)).blockers] == ["SLOT_OUT_OF_DATE"]


async def test_a_slot_hears_of_every_step_that_holds(allocator: Allocator) -> None:
    slot = await allocator.slot(
        is_active=False, end_date="2020-02-02", target="shop", without_exit=False, exit_region="eu"
    )
    await allocator.add_exits(2, region="us")
    await allocator.sql(
        """INSERT INTO targets (organization_id, target, blocked_until, paused_at, probe_at, reason)
        VALUES ($1, 'shop', now() + interval '1 hour', now(), now() + interval '2 hours', '5 of 10 blocked')""",
        await allocator.service.organization_id(),
    )
    blockers = (await allocator.explain(slot_id=slot.slot_id)).blockers
    assert [_name(one.kind) for one in blockers] == [
        "SLOT_INACTIVE",
        "SLOT_OUT_OF_DATE",
        "TARGET_HELD",
        "TARGET_PAUSED",
        "NO_EXIT",
    ]
    assert "5 of 10 blocked" in blockers[2].message
    assert "shop" in blockers[2].message
    assert "of region eu" in blockers[4].message


async def test_a_slot_hears_that_its_targets_probe_is_out(allocator: Allocator) -> None:
    slot = await allocator.slot(target="shop")
    await _policy(allocator, max_in_flight=1, min_delay=Duration(seconds=3600))
    await allocator.sql("UPDATE targets SET paused_at = now(), pauses = 1, probe_at = now()")
    (probe,) = await allocator.take()
    assert _name((await allocator.ask()).no_work.blocker) == "TARGET_PAUSED"
    blockers = (await allocator.explain(slot_id=slot.slot_id)).blockers
    assert [_name(one.kind) for one in blockers] == ["TARGET_PAUSED", "TARGET_BUSY"]
    # The lease has run out: the next probe may go out, but for the delay.
    await allocator.run_out(probe)
    blockers = (await allocator.explain(slot_id=slot.slot_id)).blockers
    assert [_name(one.kind) for one in blockers] == ["TARGET_BUSY"]


async def test_filters_say_what_is_looked_at(allocator: Allocator) -> None:
    await allocator.slot(target="shop", daily_quota=2)
    europe = await allocator.slot(target="shop", daily_quota=3, without_exit=False, exit_region="eu")
    await allocator.add_exits(1, region="eu", cap=2)
    cases: tuple[tuple[dict[str, str], int, list[str]], ...] = (
        ({}, 4, []),
        ({"target": "shop", "region": "eu"}, 4, []),
        # A slot of another region's exits is not looked at; one without exits goes out anywhere.
        ({"region": "us"}, 2, []),
        ({"target": "other"}, 0, ["NO_SLOT"]),
        ({"slot_id": europe.slot_id}, 2, []),
        ({"slot_id": europe.slot_id, "region": "us"}, 0, ["NO_SLOT"]),
        ({"slot_id": europe.slot_id, "target": "other"}, 0, ["NO_SLOT"]),
    )
    for values, units, kinds in cases:
        explained = await allocator.explain(**values)
        assert explained.available_units == units, values
        assert [_name(blocker.kind) for blocker in explained.blockers] == kinds, values
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.explain(slot_id=str(uuid.uuid4()))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_another_organization_sees_nothing(allocator: Allocator) -> None:
    slot = await allocator.slot()
    stranger = await allocator.service.metadata(Role.OPERATOR, "rival")
    for slot_id in ("", slot.slot_id):
        request = insight_pb2.ExplainAllocationRequest(slot_id=slot_id)
        call = allocator.insight.ExplainAllocation(request, metadata=stranger)
        if slot_id:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        else:
            assert [_name(blocker.kind) for blocker in (await call).blockers] == ["NO_SLOT"]


async def test_units_are_bound_by_exits_of_each_region_together(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=50, without_exit=False)
    await allocator.slot(daily_quota=10, without_exit=False, exit_region="eu")
    await allocator.slot(daily_quota=7)
    exits = [exit_pb2.ExitSpec(endpoint=f"http://127.0.0.1:{n}", region="eu" if n < 3 else "us", cap=4) for n in (1, 3)]
    await allocator.exits.ImportExits(exit_pb2.ImportExitsRequest(exits=exits), metadata=allocator.operator)
    assert (await allocator.explain()).available_units == 4 + 4 + 7
    assert (await allocator.explain(region="us")).available_units == 4 + 7


async def test_a_wait_ends_when_the_database_knows_it_does(allocator: Allocator) -> None:
    await allocator.slot(target="shop")
    for seconds, least, most in ((30, 25, 30), (3600, 60, 60), (0.05, 0.1, 0.1)):
        await allocator.sql(
            """INSERT INTO targets (organization_id, target, blocked_until)
            VALUES ($1, 'shop', now() + $2 * interval '1 second')
            ON CONFLICT (organization_id, target) DO UPDATE SET blocked_until = excluded.blocked_until""",
            await allocator.service.organization_id(),
            seconds,
        )
        if seconds >= 1:
            answer = (await allocator.ask()).no_work
            assert least <= answer.retry_after.seconds <= most


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"slot_id": "no"}, "slot_id"),
        ({"target": "t" * 129}, "target"),
        ({"region": "r" * 65}, "region"),
        ({"client_id": "a b"}, "client_id"),
    ],
)
async def test_bad_questions_are_refused(allocator: Allocator, values: dict[str, str], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field):
        await allocator.insight.ExplainAllocation(
            insight_pb2.ExplainAllocationRequest(**values), metadata=allocator.operator
        )
