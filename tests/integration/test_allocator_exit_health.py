"""Health per exit and target: what runs report cools an exit down for that target, and for no other."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import exit_pb2, work_pb2
from prometheus_client import REGISTRY

from allocator.config import CoolDownConfig
from allocator.exit_health import ExitHealth, Fault, Pair
from allocator.partitions import Partitions
from services.config import PostgresConfig
from services.postgres import Database
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

if TYPE_CHECKING:
    from services.postgres import Connection

RATE_LIMITED = work_pb2.EXIT_SIGNAL_RATE_LIMITED
BLOCKED = work_pb2.EXIT_SIGNAL_BLOCKED
TRANSPORT = work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR
FAILED = work_pb2.WORK_OUTCOME_FAILED
Report = Callable[[list[Fault], list[Pair]], Awaitable[None]]
# Each with a base of its own, so that one cannot be taken for another.
COOL_DOWN = {"rate_limited_seconds": 60, "blocked_seconds": 900, "transport_seconds": 120, "limit_seconds": 3600}


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}, cool_down=COOL_DOWN))


async def standings(allocator: Allocator, **values: Any) -> list[exit_pb2.ExitHealth]:
    request = exit_pb2.ListExitHealthRequest(**values)
    return list((await allocator.exits.ListExitHealth(request, metadata=allocator.operator)).health)


async def seconds_left(allocator: Allocator) -> float:
    (row,) = await allocator.sql("SELECT extract(epoch FROM cooling_until - now())::float8 AS left FROM exit_health")
    left: float = row["left"]
    return left


async def warm_up(allocator: Allocator) -> None:
    """Lets every cool-down be over."""
    await allocator.sql("UPDATE exit_health SET cooling_until = now() - interval '1 second'")


@pytest.fixture
async def store(allocator: Allocator) -> AsyncIterator[ExitHealth]:
    """The store on the allocator's database."""
    postgres = PostgresConfig.model_validate({"dsn": allocator.service.dsn})
    database = await Database.connect(postgres, "health", search_path="allocator")
    yield ExitHealth(database, Partitions(database), CoolDownConfig.model_validate(COOL_DOWN))
    await database.close()


@pytest.fixture
async def health(allocator: Allocator, store: ExitHealth) -> Report:
    """Reports faults and good runs as the results do, in a transaction of its own."""
    organization_id = await allocator.service.organization_id()

    async def report(faults: list[Fault], good: list[Pair]) -> None:
        async with store.database.transaction() as connection:
            await store.report(connection, organization_id, faults, good)

    return report


@pytest.mark.parametrize(
    ("values", "signal", "base"),
    [
        ({"outcome": FAILED, "exit_signal": RATE_LIMITED}, RATE_LIMITED, 60),
        ({"outcome": FAILED, "exit_signal": BLOCKED}, BLOCKED, 900),
        ({"outcome": FAILED, "exit_signal": TRANSPORT}, TRANSPORT, 120),
        ({"outcome": work_pb2.WORK_OUTCOME_BLOCKED}, BLOCKED, 900),
        ({"outcome": work_pb2.WORK_OUTCOME_BLOCKED, "exit_signal": TRANSPORT}, TRANSPORT, 120),
        ({"outcome": FAILED}, None, 0),
        ({}, None, 0),
    ],
)
async def test_a_result_cools_its_exit_down_by_its_signal(
    allocator: Allocator, values: dict[str, Any], signal: int | None, base: float
) -> None:
    await allocator.slot(without_exit=False, target="shop")
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.submit(result(unit, **values))
    found = await standings(allocator)
    assert [(entry.exit_id, entry.target, entry.signal, entry.faults) for entry in found] == (
        [(unit.exit.exit_id, "shop", signal, 1)] if signal else []
    )
    if signal:
        assert await seconds_left(allocator) == pytest.approx(base, abs=5)
    (row,) = await allocator.sql("SELECT exit_signal FROM work_results")
    assert row["exit_signal"] == (signal or 0)


async def test_a_slot_without_a_target_has_a_cool_down_too(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.submit(result(unit, FAILED, exit_signal=TRANSPORT))
    (entry,) = await standings(allocator)
    assert (entry.exit_id, entry.target) == (unit.exit.exit_id, "")


async def test_a_result_without_an_exit_says_nothing_of_one(allocator: Allocator) -> None:
    await allocator.slot()
    (unit,) = await allocator.take()
    await allocator.submit(result(unit, work_pb2.WORK_OUTCOME_BLOCKED))
    assert await standings(allocator) == []


async def test_faults_in_a_row_double_the_cool_down_up_to_its_limit(allocator: Allocator, health: Report) -> None:
    (exit_,) = await allocator.add_exits(1)
    pair = (uuid.UUID(exit_.exit_id), "shop")
    for fault, seconds in enumerate([900, 1800, 3600, 3600], 1):
        await health([(*pair, 2, None)], [])
        (entry,) = await standings(allocator)
        assert entry.faults == fault
        assert await seconds_left(allocator) == pytest.approx(seconds, abs=5)
        await warm_up(allocator)
    # A good run after the cool-down ends the row; the next fault begins anew.
    await health([], [pair])
    assert await standings(allocator) == []
    await health([(*pair, 1, None)], [])
    assert await seconds_left(allocator) == pytest.approx(60, abs=5)


async def test_after_many_faults_the_arithmetic_holds(allocator: Allocator, health: Report) -> None:
    (exit_,) = await allocator.add_exits(1)
    pair = (uuid.UUID(exit_.exit_id), "shop")
    await health([(*pair, 3, None)], [])
    await allocator.sql("UPDATE exit_health SET faults = 2000000000, cooling_until = now() - interval '1 second'")
    await health([(*pair, 3, None)], [])
    assert await seconds_left(allocator) == pytest.approx(3600, abs=5)


async def test_runs_that_were_out_together_tell_of_one_fault(allocator: Allocator, health: Report) -> None:
    (exit_,) = await allocator.add_exits(1)
    pair = (uuid.UUID(exit_.exit_id), "shop")
    await health([(*pair, 1, None)] * 30, [pair])
    for _ in range(3):
        await health([(*pair, 1, None)], [])
        await health([], [pair])
    (entry,) = await standings(allocator)
    assert entry.faults == 1
    assert await seconds_left(allocator) == pytest.approx(60, abs=5)
    # What is worse than what was known lengthens the cool-down, and nothing shortens it.
    await health([(*pair, 2, None)], [])
    await health([(*pair, 3, None)], [])
    (entry,) = await standings(allocator)
    assert (entry.faults, entry.signal) == (1, TRANSPORT)
    assert await seconds_left(allocator) == pytest.approx(900, abs=5)


async def test_retry_after_lengthens_the_cool_down_beyond_its_limit(allocator: Allocator, health: Report) -> None:
    (exit_,) = await allocator.add_exits(1)
    pair = (uuid.UUID(exit_.exit_id), "shop")
    await health([(*pair, 1, 7_200_000), (*pair, 1, 5_000), (*pair, 1, None)], [])
    assert await seconds_left(allocator) == pytest.approx(7200, abs=5)
    await warm_up(allocator)
    # It is a floor and is not doubled.
    await health([(*pair, 1, 100_000)], [])
    assert await seconds_left(allocator) == pytest.approx(120, abs=5)


async def test_retry_after_of_a_result_lengthens_its_exits_cool_down(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, target="shop")
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.submit(result(unit, FAILED, exit_signal=RATE_LIMITED, retry_after=Duration(seconds=600)))
    assert await seconds_left(allocator) == pytest.approx(600, abs=5)


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_late_result_tells_of_its_exit_once(start_service: StartService, has_room: bool) -> None:
    service = await start_service("allocator", leases={"sweep_seconds": 0.05}, cool_down=COOL_DOWN)
    allocator = await Allocator.of(service)
    await allocator.slot(without_exit=False, target="shop", daily_quota=1)
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.run_out(unit)
    await allocator.swept(unit)
    if not has_room:
        await allocator.take()
    (answer,) = await allocator.submit(result(unit, FAILED, exit_signal=TRANSPORT))
    assert answer.disposition == (
        work_pb2.RESULT_DISPOSITION_RECORDED_LATE if has_room else work_pb2.RESULT_DISPOSITION_QUARANTINED
    )
    (entry,) = await standings(allocator)
    assert (entry.exit_id, entry.target, entry.signal, entry.faults) == (unit.exit.exit_id, "shop", TRANSPORT, 1)
    await warm_up(allocator)
    await allocator.submit(result(unit, FAILED, exit_signal=TRANSPORT))
    assert await seconds_left(allocator) < 0


async def test_a_late_fault_counts_beside_runs_of_its_batch_that_went_well(start_service: StartService) -> None:
    service = await start_service("allocator", leases={"sweep_seconds": 0.05}, cool_down=COOL_DOWN)
    allocator = await Allocator.of(service)
    await allocator.slot(without_exit=False, target="shop")
    await allocator.add_exits(1)
    late, good = await allocator.take(2)
    await allocator.run_out(late)
    await allocator.swept(late)
    await allocator.submit(result(late, FAILED, exit_signal=TRANSPORT), result(good))
    (entry,) = await standings(allocator)
    assert (entry.signal, entry.faults) == (TRANSPORT, 1)


async def test_the_late_result_of_an_exit_that_is_gone_is_taken_all_the_same(start_service: StartService) -> None:
    service = await start_service("allocator", leases={"sweep_seconds": 0.05}, cool_down=COOL_DOWN)
    allocator = await Allocator.of(service)
    await allocator.slot(without_exit=False, target="shop")
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.run_out(unit)
    await allocator.swept(unit)
    await allocator.sql("DELETE FROM exits")
    (answer,) = await allocator.submit(result(unit, FAILED, exit_signal=TRANSPORT))
    assert answer.disposition == work_pb2.RESULT_DISPOSITION_RECORDED_LATE
    assert not await allocator.sql("SELECT FROM exit_health")


async def test_a_cooling_exit_serves_other_targets(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, target="shop")
    await allocator.slot(without_exit=False, target="mart", keyword="b")
    await allocator.add_exits(2)
    (unit,) = await allocator.take(target="shop")
    await allocator.submit(result(unit, FAILED, exit_signal=RATE_LIMITED))

    async def used(target: str) -> set[str]:
        units = await allocator.take(6, target=target)
        await allocator.release(*(lease(work) for work in units))
        return {work.exit.exit_id for work in units}

    async def spared() -> bool:
        found = await used("shop")
        return len(found) == 1 and unit.exit.exit_id not in found

    await until(spared)
    assert len(await used("mart")) == 2
    assert await spared()


async def test_when_all_exits_cool_down_the_caller_hears_so_until_they_are_cleared(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, target="shop")
    await allocator.add_exits(1)
    (unit,) = await allocator.take()
    await allocator.submit(result(unit, work_pb2.WORK_OUTCOME_BLOCKED))

    async def cooling() -> bool:
        answer = await allocator.ask()
        if answer.allocations:
            await allocator.release(*(lease(work) for work in answer.allocations))
        return answer.no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_COOLING

    # The index hears of it within a second.
    await until(cooling)
    request = exit_pb2.ClearExitHealthRequest(exit_id=unit.exit.exit_id)
    assert (await allocator.exits.ClearExitHealth(request, metadata=allocator.operator)).cleared == 1
    await allocator.take()


async def test_cool_downs_are_listed_by_page_and_cleared_by_target(allocator: Allocator, health: Report) -> None:
    exits = sorted(await allocator.add_exits(3), key=lambda exit_: exit_.exit_id)
    pairs = [(uuid.UUID(exit_.exit_id), target) for exit_ in exits for target in ("", "a", "b")]
    await health([(*pair, 1, None) for pair in reversed(pairs)], [])
    read: list[tuple[str, str]] = []
    token = ""
    for _ in range(6):
        request = exit_pb2.ListExitHealthRequest(page_size=2, page_token=token)
        page = await allocator.exits.ListExitHealth(request, metadata=allocator.operator)
        read += [(entry.exit_id, entry.target) for entry in page.health]
        token = page.next_page_token
        if not token:
            break
    assert read == [(str(exit_id), target) for exit_id, target in pairs]
    assert len(await standings(allocator, exit_id=exits[0].exit_id)) == 3
    assert len(await standings(allocator, target="a")) == 3
    assert len(await standings(allocator, exit_id=exits[0].exit_id, target="b")) == 1

    async def clear(**values: Any) -> int:
        request = exit_pb2.ClearExitHealthRequest(exit_id=exits[0].exit_id, **values)
        return (await allocator.exits.ClearExitHealth(request, metadata=allocator.operator)).cleared

    assert [await clear(target="a"), await clear(target="a"), await clear(target=""), await clear()] == [1, 0, 1, 1]
    assert len(await standings(allocator)) == 6
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocator.exits.ClearExitHealth(
            exit_pb2.ClearExitHealthRequest(exit_id=str(uuid.uuid4())), metadata=allocator.operator
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListExitHealth", exit_pb2.ListExitHealthRequest(exit_id="x"), "exit_id"),
        ("ListExitHealth", exit_pb2.ListExitHealthRequest(target="x" * 129), "target"),
        ("ListExitHealth", exit_pb2.ListExitHealthRequest(target="\x00"), "target"),
        ("ListExitHealth", exit_pb2.ListExitHealthRequest(page_size=1001), "page_size"),
        ("ListExitHealth", exit_pb2.ListExitHealthRequest(page_token="x"), "page_token"),
        ("ClearExitHealth", exit_pb2.ClearExitHealthRequest(), "exit_id"),
        ("ClearExitHealth", exit_pb2.ClearExitHealthRequest(exit_id=str(uuid.UUID(int=1)), target="x" * 129), "target"),
        ("ForecastExits", exit_pb2.ForecastExitsRequest(region="x" * 65), "region"),
    ],
)
async def test_a_request_that_is_wrong_is_refused_by_field(
    allocator: Allocator, method: str, request_: Any, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(allocator.exits, method)(request_, metadata=allocator.operator)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in (caught.value.details() or "")


async def test_the_gauge_counts_what_cools_and_old_rows_are_forgotten(
    allocator: Allocator, store: ExitHealth, health: Report
) -> None:
    exits = [uuid.UUID(exit_.exit_id) for exit_ in await allocator.add_exits(3)]

    def cooling() -> list[float | None]:
        names = ("rate_limited", "blocked", "transport")
        return [REGISTRY.get_sample_value("muster_allocator_exits_cooling", {"signal": name}) for name in names]

    await health([(exits[0], "a", 1, None), (exits[0], "b", 1, None), (exits[1], "a", 3, None)], [])
    await store.measure()
    assert cooling() == [2, 0, 1]
    await warm_up(allocator)
    await store.measure()
    assert cooling() == [0, 0, 0]
    assert len(await standings(allocator)) == 3
    await allocator.sql("UPDATE exit_health SET cooling_until = now() - interval '25 hours' WHERE target = 'a'")
    await store.measure()
    assert [entry.target for entry in await standings(allocator)] == ["b"]


async def test_reports_of_the_same_pairs_at_once_all_succeed(allocator: Allocator, store: ExitHealth) -> None:
    exits = [uuid.UUID(exit_.exit_id) for exit_ in await allocator.add_exits(8)]
    organization_id = await allocator.service.organization_id()

    async def report(number: int) -> None:
        async def work(connection: Connection) -> None:
            faults = [(exit_id, "a", 1, None) for exit_id in exits[number % 8 :]]
            await store.report(connection, organization_id, faults, [(exit_id, "a") for exit_id in exits])

        await store.atomically(work)

    for _ in range(5):
        await asyncio.gather(*(report(number) for number in range(16)))
        await warm_up(allocator)
