"""Pooled exits: their three cap modes, what a toggle and a change of mode do to live leases, and the forecast."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Any
from uuid import UUID

import grpc
import pytest
from muster.allocator.v1 import exit_pb2, work_pb2
from prometheus_client import REGISTRY

from services.call import Role
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

UNTIL_TOGGLE = exit_pb2.EXIT_CAP_MODE_UNTIL_TOGGLE
CONCURRENT = exit_pb2.EXIT_CAP_MODE_CONCURRENT
PER_WINDOW = exit_pb2.EXIT_CAP_MODE_PER_WINDOW
MODES: dict[str, dict[str, Any]] = {
    "until_toggle": {"cap_mode": UNTIL_TOGGLE},
    "concurrent": {"cap_mode": CONCURRENT},
    "per_window": {"cap_mode": PER_WINDOW, "window_seconds": 3600},
}


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep comes at once, and whose forecast looks often."""
    service = await start_service("allocator", leases={"sweep_seconds": 0.02}, exits={"sample_seconds": 0.05})
    return await Allocator.of(service)


async def toggle(allocator: Allocator, exit_id: str, request_id: str = "") -> exit_pb2.Exit:
    request = exit_pb2.ToggleExitRequest(
        request_id=request_id or str(uuid.uuid4()), exit_id=exit_id, reason="new address"
    )
    return (await allocator.exits.ToggleExit(request, metadata=allocator.operator)).exit


async def only_exit(allocator: Allocator) -> exit_pb2.Exit:
    (exit_,) = (await allocator.exits.ListExits(exit_pb2.ListExitsRequest(), metadata=allocator.operator)).exits
    return exit_


async def check_exits(allocator: Allocator) -> None:
    """The invariants, and that a concurrent exit counts exactly its leases."""
    await allocator.check_invariants()
    wrong = await allocator.sql(
        """SELECT e.exit_id, e.use_count, e.cap FROM exits e
        WHERE e.cap_mode = 2 AND e.use_count <> (SELECT count(*) FROM leases l WHERE l.exit_id = e.exit_id)
          OR EXISTS (SELECT FROM leases l WHERE l.exit_id = e.exit_id AND l.exit_returns <> (e.cap_mode = 2)
            AND l.exit_epoch = e.toggle_epoch)"""
    )
    assert not wrong, wrong


async def afresh(allocator: Allocator) -> None:
    """Ends every lease and forgets every exit."""
    await allocator.heartbeat(goodbye=True)
    await allocator.sql("DELETE FROM exits")


async def test_an_exit_that_moved_meanwhile_serves_nobody_who_wants_its_old_region(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, exit_region="kr", daily_quota=10)
    (exit_,) = await allocator.add_exits(1, region="kr")
    (unit,) = await allocator.take()
    assert unit.exit.region == "kr"
    # As another replica imports it, of which this one does not know for some seconds.
    await allocator.sql("UPDATE exits SET region = 'jp'")
    answer = await allocator.ask()
    assert (len(answer.allocations), answer.no_work.blocker) == (0, work_pb2.BLOCKER_KIND_NO_EXIT)
    assert (await only_exit(allocator)).use_count == 1
    await allocator.slot(without_exit=False, exit_region="jp")
    (unit,) = await allocator.take()
    assert (unit.exit.exit_id, unit.exit.region) == (exit_.exit_id, "jp")
    await check_exits(allocator)


async def test_an_exit_out_of_use_makes_room_for_another(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", exits={"limit": 2}))
    await allocator.slot(without_exit=False)
    first, second = await allocator.add_exits(2)

    async def delete(exit_id: str) -> bool:
        request = exit_pb2.DeleteExitRequest(exit_id=exit_id)
        return (await allocator.exits.DeleteExit(request, metadata=allocator.operator)).deleted

    async def refusal() -> str:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await delete(unit.exit.exit_id)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        return str(refused.value.details())

    (unit,) = await allocator.take()
    assert "disable it first" in await refusal()
    for exit_ in (first, second):
        disabled = exit_pb2.SetExitEnabledRequest(exit_id=exit_.exit_id, enabled=False)
        await allocator.exits.SetExitEnabled(disabled, metadata=allocator.operator)
    assert "1 live lease(s)" in await refusal()
    await toggle(allocator, unit.exit.exit_id)
    assert [answer.disposition for answer in await allocator.submit(result(unit))] == [1]
    assert await delete(unit.exit.exit_id)
    assert not await delete(unit.exit.exit_id)
    import_ = exit_pb2.ImportExitsRequest(exits=[exit_pb2.ExitSpec(endpoint="http://127.0.0.1:9")])
    (other,) = (await allocator.exits.ImportExits(import_, metadata=allocator.operator)).exits
    (fresh,) = await allocator.take()
    assert fresh.exit.exit_id == other.exit_id
    # Of the one that is gone its toggles and results stay.
    assert len(await allocator.sql("SELECT FROM exit_toggle_logs WHERE exit_id = $1", UUID(unit.exit.exit_id))) == 1
    assert len(await allocator.sql("SELECT FROM work_results WHERE exit_id = $1", UUID(unit.exit.exit_id))) == 1
    await check_exits(allocator)


async def test_a_spec_comes_back_as_it_was_given(allocator: Allocator) -> None:
    for mode in MODES.values():
        (exit_,) = await allocator.add_exits(1, cap=7, region="kr", **mode)
        assert exit_.spec == exit_pb2.ExitSpec(endpoint="http://127.0.0.1:3128", region="kr", cap=7, **mode)
        assert await only_exit(allocator) == exit_
        assert not exit_.HasField("window_ends_at")
        (row,) = await allocator.sql("SELECT * FROM exits_now($1)", await allocator.service.organization_id())
        assert (row["room"], row["cap_mode"]) == (7, mode["cap_mode"])
        await afresh(allocator)


async def test_imports_at_the_same_time_make_no_endpoint_twice(allocator: Allocator) -> None:
    imports = await asyncio.gather(*(allocator.add_exits(count, cap=10) for count in (5, 8, 3, 8, 5, 8)))
    rows = await allocator.sql("SELECT endpoint, exit_id::text FROM exits")
    assert len(rows) == len({row["endpoint"] for row in rows}) == len({row["exit_id"] for row in rows}) == 8
    known = {row["endpoint"]: row["exit_id"] for row in rows}
    assert all(known[exit_.spec.endpoint] == exit_.exit_id for exits in imports for exit_ in exits)


async def test_a_spec_that_says_nothing_sensible_is_refused(allocator: Allocator) -> None:
    faults: list[tuple[str, dict[str, Any]]] = [
        ("window_seconds", {"cap_mode": PER_WINDOW}),
        ("window_seconds", {"cap_mode": PER_WINDOW, "window_seconds": 86_401}),
        ("window_seconds", {"cap_mode": UNTIL_TOGGLE, "window_seconds": 1}),
        ("window_seconds", {"cap_mode": CONCURRENT, "window_seconds": 1}),
        ("window_seconds", {"window_seconds": 1}),
        ("cap_mode", {"cap_mode": 4}),
        ("cap", {"cap": 100_001}),
    ]
    for field, values in faults:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await allocator.add_exits(1, **values)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"exits[0].{field}:" in (caught.value.details() or ""), values
    assert await allocator.sql("SELECT FROM exits") == []


@pytest.mark.parametrize("mode", MODES, ids=str)
async def test_a_use_comes_back_as_its_mode_says(allocator: Allocator, mode: str) -> None:
    await allocator.slot(without_exit=False)
    for ending in ("release", "expire", "submit"):
        await allocator.add_exits(1, cap=2, **MODES[mode])
        first, second = await allocator.take(2)
        assert (await only_exit(allocator)).use_count == 2
        assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED
        if ending == "release":
            await allocator.release(lease(first))
        elif ending == "expire":
            await allocator.run_out(first)
            await allocator.swept(first)
        else:
            await allocator.submit(result(first))
        returned = ending != "submit" or mode == "concurrent"
        assert (await only_exit(allocator)).use_count == 2 - returned, ending
        assert len((await allocator.ask()).allocations) == returned, ending
        await check_exits(allocator)
        await allocator.submit(result(second))
        await check_exits(allocator)
        await afresh(allocator)


async def test_a_concurrent_exit_serves_without_end_but_never_more_at_once(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, daily_quota=1000)
    await allocator.add_exits(2, cap=3, cap_mode=CONCURRENT)

    async def work(client: str) -> int:
        done = 0
        for _ in range(8):
            for unit in (await allocator.ask(2, client=client)).allocations:
                (row,) = await allocator.sql(
                    "SELECT max(n) AS most FROM (SELECT count(*) AS n FROM leases GROUP BY exit_id) l"
                )
                assert row["most"] is None or row["most"] <= 3
                await allocator.submit(result(unit), client=client)
                done += 1
        return done

    done = await asyncio.gather(*(work(f"pc-{number}") for number in range(5)))
    assert sum(done) > 2 * 3
    await check_exits(allocator)
    assert {row["use_count"] for row in await allocator.sql("SELECT use_count FROM exits")} == {0}


async def test_a_window_begins_with_its_first_use_and_starts_afresh_after_its_end(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1, cap=2, **MODES["per_window"])
    old, _ = await allocator.take(2)
    first = await only_exit(allocator)
    (row,) = await allocator.sql("SELECT extract(epoch FROM window_ends_at - now()) AS left FROM exits")
    assert 3590 < row["left"] <= 3600
    assert first.HasField("window_ends_at")
    assert not (await allocator.ask()).allocations
    await allocator.sql("UPDATE exits SET window_ends_at = now() - interval '1 second'")
    assert (await only_exit(allocator)).use_count == 0

    async def handed_out() -> bool:
        return bool((await allocator.ask()).allocations)

    await until(handed_out)
    exit_ = await only_exit(allocator)
    assert (exit_.use_count, exit_.toggle_epoch) == (1, first.toggle_epoch + 1)
    # What was taken in the window before gives nothing back to this one.
    await allocator.release(lease(old))
    assert (await only_exit(allocator)).use_count == 1
    await check_exits(allocator)


@pytest.mark.parametrize("mode", MODES, ids=str)
async def test_a_toggle_is_logged_and_leaves_no_exit_above_its_cap(allocator: Allocator, mode: str) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1, cap=2, **MODES[mode])
    first, second = await allocator.take(2)
    before = await only_exit(allocator)
    request_id = str(uuid.uuid4())
    for _ in range(2):
        toggled = await toggle(allocator, before.exit_id, request_id)
        # Leases that live keep their connections through a concurrent exit, and so their places.
        assert (toggled.use_count, toggled.toggle_epoch) == (
            2 if mode == "concurrent" else 0,
            before.toggle_epoch + 1,
        )
        assert not toggled.HasField("window_ends_at")
    logged = await allocator.exits.ListExitToggles(exit_pb2.ListExitTogglesRequest(), metadata=allocator.operator)
    (entry,) = logged.toggles
    assert (entry.use_count_before, entry.reason) == (2, "new address")
    await check_exits(allocator)
    assert len((await allocator.ask(5)).allocations) == (0 if mode == "concurrent" else 2)
    await allocator.submit(result(first))
    await allocator.release(lease(second))
    assert (await only_exit(allocator)).use_count == (0 if mode == "concurrent" else 2)
    await check_exits(allocator)


async def test_a_change_of_mode_forgets_no_use(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    for old, new in itertools.product(MODES, MODES):
        await allocator.add_exits(1, cap=3, **MODES[old])
        done, live, _ = await allocator.take(3)
        await allocator.submit(result(done))
        before = await only_exit(allocator)
        (exit_,) = await allocator.add_exits(1, cap=1, **MODES[new])
        # Two leases live; the third use still counts unless one of the modes gives it back with its result.
        counted = 2 if "concurrent" in (old, new) else 3
        found = (exit_.use_count, exit_.spec.cap, exit_.spec.cap_mode)
        assert found == (counted, counted, MODES[new]["cap_mode"]), (old, new)
        assert exit_.toggle_epoch == before.toggle_epoch + (old != new), (old, new)
        assert exit_.HasField("window_ends_at") == (new == "per_window"), (old, new)
        await check_exits(allocator)
        await allocator.submit(result(live))
        assert (await only_exit(allocator)).use_count == counted - (new == "concurrent"), (old, new)
        await check_exits(allocator)
        await afresh(allocator)


async def test_importing_again_in_the_same_mode_keeps_epoch_and_window(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1, cap=3, **MODES["per_window"])
    await allocator.take(2)
    before = await only_exit(allocator)
    (after,) = await allocator.add_exits(1, cap=5, region="kr", cap_mode=PER_WINDOW, window_seconds=60)
    assert (after.use_count, after.toggle_epoch, after.window_ends_at) == (
        2,
        before.toggle_epoch,
        before.window_ends_at,
    )
    assert (after.spec.cap, after.spec.region, after.spec.window_seconds) == (5, "kr", 60)
    # A window that has ended holds no cap up.
    await allocator.sql("UPDATE exits SET window_ends_at = now() - interval '1 second'")
    (after,) = await allocator.add_exits(1, cap=1, cap_mode=PER_WINDOW, window_seconds=60)
    assert (after.use_count, after.spec.cap) == (0, 1)


async def test_no_use_is_lost_while_modes_change_under_load(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, daily_quota=100_000)
    await allocator.add_exits(3, cap=50, cap_mode=CONCURRENT)
    over = asyncio.Event()

    async def work(client: str) -> None:
        while not over.is_set():
            units = (await allocator.ask(4, client=client)).allocations
            if len(units) > 1:
                await allocator.release(lease(units[0]))
            if units[1:]:
                await allocator.submit(*(result(unit) for unit in units[1:]), client=client)

    workers = [asyncio.ensure_future(work(f"pc-{number}")) for number in range(4)]
    try:
        for number in range(12):
            await allocator.add_exits(3, cap=50 + number, **list(MODES.values())[number % 3])
            for exit_ in (
                await allocator.exits.ListExits(exit_pb2.ListExitsRequest(), metadata=allocator.operator)
            ).exits:
                await toggle(allocator, exit_.exit_id)
        await allocator.add_exits(3, cap=50, cap_mode=CONCURRENT)
    finally:
        over.set()
        await asyncio.gather(*workers)
    await check_exits(allocator)


async def test_the_forecast_says_when_the_pool_will_be_empty(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.slot(keyword="b", without_exit=False, exit_region="jp")
    await allocator.add_exits(2, cap=20)
    read = allocator.exits.ForecastExits

    async def forecast(region: str = "") -> exit_pb2.ForecastExitsResponse:
        return await read(exit_pb2.ForecastExitsRequest(region=region), metadata=allocator.operator)

    async def observed() -> bool:
        return (await forecast()).observed_seconds > 0

    await until(observed)
    idle = await forecast()
    assert (idle.room, idle.capacity, idle.uses_per_minute, idle.HasField("empty_at")) == (40, 40, 0, False)
    assert REGISTRY.get_sample_value("muster_allocator_exit_seconds_to_empty") == float("inf")
    await allocator.take(10)

    async def counted() -> bool:
        return (await forecast()).uses_per_minute > 0

    await until(counted)
    busy = await forecast()
    assert busy.room == 30
    (row,) = await allocator.sql("SELECT extract(epoch FROM now())::float8 AS now")
    left = busy.empty_at.ToMicroseconds() / 1e6 - row["now"]
    assert left == pytest.approx(30 * 60 / busy.uses_per_minute, abs=1.0)
    ratio = REGISTRY.get_sample_value("muster_allocator_exit_use_ratio")
    assert ratio == pytest.approx(0.25)
    seconds = REGISTRY.get_sample_value("muster_allocator_exit_seconds_to_empty")
    assert seconds is not None
    assert 0 < seconds < 3600
    assert (await forecast("nowhere")).capacity == 0
    await allocator.sql("UPDATE exits SET use_count = cap")
    assert (await forecast()).room == 0
    assert (await forecast()).HasField("empty_at")


async def test_another_organization_sees_and_changes_nothing(allocator: Allocator) -> None:
    (exit_,) = await allocator.add_exits(1)
    await allocator.sql(
        "INSERT INTO exit_health (organization_id, exit_id, target, signal, faults, cooling_until)"
        " VALUES ($1, $2, 'shop', 1, 1, now() + interval '1 hour')",
        await allocator.service.organization_id(),
        UUID(exit_.exit_id),
    )
    stranger = await allocator.service.metadata(Role.OPERATOR, "other")
    assert not (await allocator.exits.ListExits(exit_pb2.ListExitsRequest(), metadata=stranger)).exits
    assert not (await allocator.exits.ListExitHealth(exit_pb2.ListExitHealthRequest(), metadata=stranger)).health
    assert not (await allocator.exits.ForecastExits(exit_pb2.ForecastExitsRequest(), metadata=stranger)).capacity
    acts: list[tuple[Any, Any]] = [
        (allocator.exits.ToggleExit, exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id)),
        (allocator.exits.SetExitEnabled, exit_pb2.SetExitEnabledRequest(exit_id=exit_.exit_id)),
        (allocator.exits.ClearExitHealth, exit_pb2.ClearExitHealthRequest(exit_id=exit_.exit_id)),
    ]
    for call, request in acts:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request, metadata=stranger)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(await allocator.sql("SELECT FROM exit_health")) == 1
    assert (await only_exit(allocator)).enabled
