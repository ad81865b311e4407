"""What a client would get is what it then gets, and asking changes nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import exit_pb2, insight_pb2, slot_pb2, target_pb2, target_pb2_grpc, work_pb2

from tests.support.allocator import Allocator
from tests.support.exit_provider import TOKEN, Fault, ProviderServer
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One that never sweeps, with the back door open."""
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    allocator.door = await allocator.connect()
    yield allocator
    await allocator.door.close()


async def _simulate(
    allocator: Allocator, items: int = 1, client: str = "pc-1", **values: Any
) -> insight_pb2.SimulateAllocationResponse:
    request = insight_pb2.SimulateAllocationRequest(
        client=work_pb2.ClientIdentity(client_id=client), max_items=items, **values
    )
    return await allocator.insight.SimulateAllocation(request, metadata=allocator.operator)


async def _everything(allocator: Allocator) -> str:
    """Returns all rows of all tables as text; of the day's making only what is made."""
    tables = await allocator.sql(
        "SELECT relname FROM pg_class WHERE relnamespace = 'allocator'::regnamespace AND relkind IN ('r', 'p') "
        "AND NOT relispartition ORDER BY 1"
    )
    found = {}
    for table in (row["relname"] for row in tables):
        rows = await allocator.sql(f"SELECT t::text AS row FROM {table} t ORDER BY 1")
        found[table] = [row["row"] for row in rows]
    return json.dumps(found)


async def _furnish(allocator: Allocator) -> None:
    for number in range(6):
        await allocator.slot(keyword=f"k{number}", daily_quota=2, priority=number % 2, target="shop" if number else "")
    await allocator.slot(keyword="eu", daily_quota=4, without_exit=False, exit_region="eu", priority=3)
    await allocator.slot(keyword="any", daily_quota=3, without_exit=False, priority=2)
    exits = [
        exit_pb2.ExitSpec(endpoint=f"http://127.0.0.1:{port}", region=region, cap=2)
        for port, region in ((1, "eu"), (2, "us"))
    ]
    await allocator.exits.ImportExits(exit_pb2.ImportExitsRequest(exits=exits), metadata=allocator.operator)


@pytest.mark.parametrize(
    "values", [{}, {"target": "shop"}, {"region": "us"}, {"region": "eu"}, {"target": "shop", "region": "us"}], ids=str
)
async def test_what_is_told_is_what_is_given(allocator: Allocator, values: dict[str, str]) -> None:
    await _furnish(allocator)
    # Today's rows are made at the first look; what follows makes nothing.
    await _simulate(allocator, 1, **values)
    before = await _everything(allocator)
    told = (await _simulate(allocator, 7, **values)).units
    assert told == (await _simulate(allocator, 7, **values)).units
    assert await _everything(allocator) == before

    given = (await allocator.ask(7, **values)).allocations
    # Among slots that rank alike chance decides; how many of which kind does not change.
    assert len(given) == len(told)
    by_kind = [
        sorted((unit.target, bool(unit.exit_id)) for unit in told),
        sorted((unit.target, unit.HasField("exit")) for unit in given),
    ]
    assert by_kind[0] == by_kind[1]
    assert sorted(unit.exit_id for unit in told) == sorted(unit.exit.exit_id for unit in given)
    if not values:
        assert [unit.keyword for unit in told[:2]] == ["eu", "eu"]


async def test_the_very_units_are_told_when_nothing_ranks_alike(allocator: Allocator) -> None:
    for number in range(5):
        await allocator.slot(keyword=f"k{number}", daily_quota=1, priority=number)
    for _ in range(2):
        told = (await _simulate(allocator, 2)).units
        given = (await allocator.ask(2)).allocations
        assert [(unit.slot_id, unit.keyword) for unit in told] == [(unit.slot_id, unit.keyword) for unit in given]


async def test_personas_and_providers_are_named_and_not_asked(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", persona_store={"target": "127.0.0.1:1"}))
    await allocator.slot(keyword="p", persona=slot_pb2.PersonaNeed(min_aging_level=1), target="shop")
    (unit,) = (await _simulate(allocator)).units
    assert (unit.keyword, unit.target, unit.needs_persona, unit.exit_id) == ("p", "shop", True, "")
    assert not await allocator.sql("SELECT FROM leases")


async def test_a_persona_store_that_is_away_is_told_where_it_matters(allocator: Allocator) -> None:
    await allocator.slot(persona=slot_pb2.PersonaNeed(min_aging_level=1), priority=1)
    answer = (await allocator.ask()).no_work
    told = (await _simulate(allocator)).no_work
    assert told.blocker == answer.blocker == work_pb2.BLOCKER_KIND_PERSONA_STORE_UNAVAILABLE
    assert "correct persona_store.target" in told.message
    # Nothing is known of this target, and no persona would help.
    told = (await _simulate(allocator, target="other")).no_work
    assert told.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    assert told.blocker == (await allocator.ask(target="other")).no_work.blocker
    await allocator.slot(keyword="plain")
    assert [unit.keyword for unit in (await _simulate(allocator, 2)).units] == ["plain"] * 2


async def test_a_provider_that_is_away_is_told_where_it_matters(start_service: StartService, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    async with ProviderServer() as server:
        provider = {"url": server.url, "token_file": tmp_path / "token", "holder": "muster-test"}
        service = await start_service("allocator", exit_providers={"vpn": provider})
        allocator = await Allocator.of(service)
        await allocator.slot(without_exit=False, exit_provider="vpn", priority=1)
        (unit,) = (await _simulate(allocator)).units
        assert unit.exit_provider == "vpn"
        server.always = Fault.NONE_FREE
        answer = (await allocator.ask()).no_work
        assert (await _simulate(allocator)).no_work.blocker == answer.blocker == work_pb2.BLOCKER_KIND_EXIT_UNAVAILABLE
        assert (await _simulate(allocator, target="other")).no_work.blocker == work_pb2.BLOCKER_KIND_NO_SLOT
    # Configured no more: known without being tried.
    without = await Allocator.of(await start_service("allocator", database=service.database))
    assert (await _simulate(without)).no_work.blocker == work_pb2.BLOCKER_KIND_EXIT_UNAVAILABLE
    await without.slot(keyword="plain")
    assert [unit.keyword for unit in (await _simulate(without, 2)).units] == ["plain"] * 2


async def test_no_work_is_told_as_it_would_be(allocator: Allocator) -> None:
    told = (await _simulate(allocator)).no_work
    assert (told.blocker, told.retry_after) == (work_pb2.BLOCKER_KIND_NO_SLOT, Duration(seconds=15))
    await allocator.slot(daily_quota=1, target="shop")
    policy = target_pb2.SetTargetPolicyRequest(target="shop", policy=target_pb2.TargetPolicy(max_in_flight=1))
    targets: Any = target_pb2_grpc.TargetServiceStub(allocator.service.channel)
    await targets.SetTargetPolicy(policy, metadata=allocator.operator)
    assert len((await _simulate(allocator, 5)).units) == 1
    await allocator.take()
    assert (await _simulate(allocator)).no_work.blocker == (await allocator.ask()).no_work.blocker
    await allocator.heartbeat("pc-9")
    await allocator.sql("UPDATE clients SET draining = true WHERE client_id = 'pc-9'")
    await allocator.slot()
    assert (await _simulate(allocator, client="pc-9")).no_work.blocker == work_pb2.BLOCKER_KIND_CLIENT_DRAINING
    assert (await _simulate(allocator, client="pc-1")).units


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"client": ""}, "client.client_id"),
        ({"items": 257}, "max_items"),
        ({"target": "t" * 129}, "target"),
        ({"region": "r" * 65}, "region"),
    ],
)
async def test_bad_questions_are_refused(allocator: Allocator, values: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
        await _simulate(allocator, **values)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not await allocator.sql("SELECT FROM clients")
