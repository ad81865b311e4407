"""External exits: taken with the lease, given back with its end, and nothing leaks whatever the provider does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
import uuid_utils.compat as uuids
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import exit_pb2, work_pb2
from prometheus_client import REGISTRY

from tests.support.allocator import Allocator, lease, result, until
from tests.support.exit_provider import TOKEN, Fault, ProviderServer
from tests.support.services import StartService

Start = Callable[..., Awaitable[Allocator]]

EXIT_UNAVAILABLE = work_pb2.BLOCKER_KIND_EXIT_UNAVAILABLE
# Nothing but allocation calls the provider, and what is passed over stays so.
ALONE = {"reconcile_seconds": 60, "grace_seconds": 60.0, "pause_seconds": 60}


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    async with ProviderServer() as server:
        yield server


@pytest.fixture
def start(start_service: StartService, server: ProviderServer, tmp_path: Path) -> Start:
    """Starts allocators that know the provider as "vpn", with everything that has a pace made fast."""
    (tmp_path / "token").write_text(TOKEN)

    async def start(database: str | None = None, timeout_seconds: float = 0.3, **tables: Any) -> Allocator:
        provider = {
            "url": server.url,
            "token_file": tmp_path / "token",
            "holder": "muster-test",
            "timeout_seconds": timeout_seconds,
        }
        given: dict[str, Any] = {
            "leases": {"sweep_seconds": 0.02},
            "exit_providers": {"vpn": provider},
            "external_exits": {"reconcile_seconds": 0.05, "grace_seconds": 0.0, "pause_seconds": 0.1},
            **tables,
        }
        return await Allocator.of(await start_service("allocator", database=database, **given))

    return start


@pytest.fixture
async def allocator(start: Start) -> Allocator:
    return await start()


async def vpn_slot(allocator: Allocator, **values: Any) -> str:
    slot = await allocator.slot(without_exit=False, exit_provider="vpn", **values)
    return slot.slot_id


def keys(allocations: list[work_pb2.Allocation]) -> set[UUID]:
    return {UUID(allocation.allocation_key) for allocation in allocations}


async def state(allocator: Allocator) -> exit_pb2.ExitProviderState:
    response = await allocator.exits.ListExitProviders(exit_pb2.ListExitProvidersRequest(), metadata=allocator.operator)
    (provider,) = response.providers
    return provider


def calls(call: str, outcome: str) -> float:
    """Returns how many calls had this outcome, in this process."""
    labels = {"provider": "vpn", "call": call, "outcome": outcome}
    return REGISTRY.get_sample_value("muster_allocator_exit_provider_calls_total", labels) or 0.0


async def passed_over(server: ProviderServer) -> None:
    """Lets the provider fail, without an exit being asked for, until it is passed over; the reconciliation is fast."""
    before = calls("health", "passed_over")
    server.always = Fault.BROKEN

    async def is_passed_over() -> bool:
        return calls("health", "passed_over") > before

    await until(is_passed_over)


async def settled(allocator: Allocator, server: ProviderServer) -> None:
    """Waits until the provider holds exactly our live leases, and then checks that nothing is owed on either side."""

    async def alike() -> bool:
        # Releases of a provider that failed wait for some seconds.
        await allocator.sql("UPDATE exit_releases SET due_at = now()")
        # A lease that ran out lives no more, although it stands until it is swept.
        live = await allocator.sql(
            "SELECT allocation_key FROM leases WHERE exit_provider <> '' AND exit_ip <> '' AND expires_at > now()"
        )
        pending = await allocator.sql("SELECT FROM exit_releases")
        return set(server.leases) == {row["allocation_key"] for row in live} and not pending

    await until(alike, seconds=20)
    await allocator.check_invariants()


async def test_a_package_carries_the_exit_that_the_provider_gave(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator, exit_region="kr")
    (unit,) = await allocator.take()
    key = UUID(unit.allocation_key)
    assert server.leases[key]["exit_ip"] == unit.exit.exit_ip == "203.0.113.1"
    assert (unit.exit.exit_id, unit.exit.provider, unit.exit.region) == ("", "vpn", "kr")
    assert unit.exit.endpoint.startswith("socks5://exits.example:")
    # Asked once, for the greatest age that the lease can reach, so that it needs no renewal.
    (put,) = (call for call in server.calls if call.method == "PUT")
    assert put.body == {
        "holder": "muster-test",
        "organization": str(await allocator.service.organization_id()),
        "region": "kr",
        "duration_seconds": 6 * 3600,
    }
    await allocator.renew(lease(unit))
    assert server.counted("PUT") == 1


async def test_the_end_of_a_lease_gives_its_exit_back(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    submitted, released, expired, left, kept = await allocator.take(4) + await allocator.take(client="pc-2")
    assert len(server.leases) == 5
    await allocator.submit(result(submitted))
    await allocator.release(lease(released))
    await allocator.run_out(expired)
    await allocator.swept(expired)
    await settled(allocator, server)
    assert set(server.leases) == keys([left, kept])
    await allocator.heartbeat(goodbye=True)
    await settled(allocator, server)
    assert set(server.leases) == keys([kept])


async def test_only_the_address_is_recorded(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    unit, other = await allocator.take(2)
    await allocator.submit(result(unit), result(other, exit_ip="198.51.100.9"))
    rows = await allocator.sql(
        "SELECT exit_ip FROM work_results ORDER BY allocation_key = $1 DESC", UUID(unit.allocation_key)
    )
    # What the worker saw with its own eyes wins.
    assert [row["exit_ip"] for row in rows] == [unit.exit.exit_ip, "198.51.100.9"]
    rows = await allocator.sql(
        "SELECT exit_ip FROM work_allocations WHERE allocation_key = $1", UUID(unit.allocation_key)
    )
    assert [row["exit_ip"] for row in rows] == [unit.exit.exit_ip]
    assert await allocator.sql("SELECT FROM exits") == []
    # Nothing else the provider said stands in any table.
    port = unit.exit.endpoint.rpartition(":")[2]
    for row in await allocator.sql("SELECT table_name FROM information_schema.tables WHERE table_schema = 'allocator'"):
        texts = await allocator.sql(f"SELECT t::text AS text FROM allocator.{row['table_name']} t")
        for text in texts:
            assert "exits.example" not in text["text"]
            assert not re.search(rf"socks5.*{port}", text["text"])
    await settled(allocator, server)
    assert server.leases == {}


async def test_a_lost_answer_takes_one_exit(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    server.victims = {"PUT"}
    server.faults.extend([Fault.CUT, Fault.CUT])
    (unit,) = await allocator.take()
    assert (server.counted("PUT"), server.taken, set(server.leases)) == (3, 1, keys([unit]))
    await settled(allocator, server)


# Every fault that an adapter can meet is in its own tests; here are those that differ for the lease.
@pytest.mark.parametrize(
    "fault", [Fault.HANG, Fault.BROKEN, Fault.CUT, Fault.GARBAGE, Fault.NONE_FREE], ids=lambda fault: fault.name
)
async def test_a_provider_that_fails_costs_its_units_only(
    allocator: Allocator, server: ProviderServer, fault: Fault
) -> None:
    slot_id = await vpn_slot(allocator)
    await allocator.slot(keyword="pooled", without_exit=False)
    await allocator.add_exits(1)
    server.always = fault
    answer = await allocator.ask(5)
    assert answer.allocations
    assert {unit.keyword for unit in answer.allocations} == {"pooled"}
    assert (await allocator.tracking(slot_id))["allocated"] == 0
    server.always = None
    await settled(allocator, server)


async def test_when_there_is_no_other_work_the_caller_hears_of_the_provider(
    allocator: Allocator, server: ProviderServer
) -> None:
    await vpn_slot(allocator, daily_quota=5)
    server.always = Fault.BROKEN
    answer = await allocator.ask(5)
    assert answer.no_work.blocker == EXIT_UNAVAILABLE
    assert answer.no_work.retry_after.ToMilliseconds() >= 100
    assert await allocator.sql("SELECT FROM leases") == []
    # Its day is as if nothing had been handed out, and the same caller is served as soon as the provider is.
    server.always = None

    async def served() -> bool:
        return bool((await allocator.ask(5)).allocations)

    await until(served)
    await settled(allocator, server)


async def test_pooled_exits_serve_while_the_provider_is_down(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator, priority=10)
    await allocator.slot(keyword="pooled", without_exit=False)
    await allocator.add_exits(2)
    await server.stop()
    for _ in range(5):
        (unit,) = await allocator.take()
        assert unit.keyword == "pooled"
    await server.start()

    async def external() -> bool:
        units = (await allocator.ask()).allocations
        return bool(units and units[0].exit.provider)

    await until(external)
    await settled(allocator, server)


async def test_a_retry_of_the_request_gets_the_same_exit(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    request_id = str(uuids.uuid4())
    (first,) = (await allocator.ask(request_id=request_id)).allocations
    (again,) = (await allocator.ask(request_id=request_id)).allocations
    assert (again.allocation_key, again.exit.exit_ip) == (first.allocation_key, first.exit.exit_ip)
    assert again.exit.endpoint == first.exit.endpoint
    assert server.taken == 1
    # While the provider is away the lease stands, since the first answer may be at work.
    server.always = Fault.BROKEN
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocator.ask(request_id=request_id)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (renewed,) = await allocator.renew(lease(first))
    assert renewed.HasField("expires_at")
    server.always = None

    async def answered() -> bool:
        try:
            return bool((await allocator.ask(request_id=request_id)).allocations)
        except grpc.aio.AioRpcError:
            return False

    await until(answered)
    assert server.taken == 1
    await settled(allocator, server)


async def test_a_wait_goes_on_while_a_lease_that_stands_gets_no_exit(
    allocator: Allocator, server: ProviderServer
) -> None:
    await vpn_slot(allocator)
    request_id = str(uuids.uuid4())
    (first,) = (await allocator.ask(request_id=request_id)).allocations
    server.victims = {"PUT"}
    server.faults.extend([Fault.BROKEN] * 3)
    (again,) = (await allocator.ask(request_id=request_id, wait=Duration(seconds=20))).allocations
    assert (again.allocation_key, again.exit.endpoint) == (first.allocation_key, first.exit.endpoint)
    assert not server.faults


async def test_a_unit_that_a_repeat_of_the_request_completed_stands(start: Start, server: ProviderServer) -> None:
    allocator = await start(timeout_seconds=10)
    await vpn_slot(allocator)
    server.victims = {"PUT"}
    server.faults.append(Fault.NONE_FREE)
    server.gate = gate = asyncio.Event()
    request_id = str(uuids.uuid4())
    first = asyncio.ensure_future(allocator.ask(request_id=request_id))

    async def taking() -> bool:
        return server.counted("PUT") > 0

    await until(taking)
    server.gate = None
    (unit,) = (await allocator.ask(request_id=request_id)).allocations
    gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (again,) = (await allocator.ask(request_id=request_id)).allocations
    assert again.allocation_key == unit.allocation_key
    (submitted,) = await allocator.submit(result(unit))
    assert submitted.disposition == work_pb2.RESULT_DISPOSITION_RECORDED
    await settled(allocator, server)
    assert server.leases == {}


async def test_who_waits_does_not_ask_for_an_exit_all_the_time(start: Start, server: ProviderServer) -> None:
    allocator = await start(external_exits=ALONE)
    await vpn_slot(allocator)
    server.always = Fault.NONE_FREE
    answer = await allocator.ask(wait=Duration(seconds=3))
    assert answer.no_work.blocker == EXIT_UNAVAILABLE
    # About once a second.
    assert 2 <= server.counted("PUT") <= 5


async def test_what_was_never_taken_is_not_given_back(start: Start, server: ProviderServer) -> None:
    allocator = await start(external_exits=ALONE)
    await vpn_slot(allocator)
    server.always = Fault.NONE_FREE
    for _ in range(10):
        assert (await allocator.ask(3)).no_work.blocker == EXIT_UNAVAILABLE
    assert server.counted("PUT") >= 10
    assert await allocator.sql("SELECT FROM exit_releases") == []
    assert server.counted("DELETE") == 0


async def test_what_a_provider_was_not_asked_for_is_not_given_back(start: Start, server: ProviderServer) -> None:
    allocator = await start(external_exits={**ALONE, "reconcile_seconds": 0.05})
    await vpn_slot(allocator)
    await passed_over(server)
    before = calls("take", "passed_over")
    for _ in range(10):
        assert (await allocator.ask(3)).no_work.blocker == EXIT_UNAVAILABLE
    assert calls("take", "passed_over") > before
    assert (server.counted("PUT"), server.counted("DELETE")) == (0, 0)
    assert await allocator.sql("SELECT FROM exit_releases") == []
    assert await allocator.sql("SELECT FROM leases") == []


async def test_the_units_of_a_provider_that_is_passed_over_go_last(
    start: Start, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else it would for this long in any case.
    monkeypatch.setattr("allocator.failures._AVOIDED_SECONDS", 0.0)
    allocator = await start(external_exits={**ALONE, "reconcile_seconds": 0.05})
    await vpn_slot(allocator, priority=10)
    await allocator.slot(keyword="pooled", without_exit=False)
    await allocator.add_exits(1)
    await passed_over(server)
    before = calls("take", "passed_over")
    for _ in range(5):
        (unit,) = await allocator.take()
        assert unit.keyword == "pooled"
    assert calls("take", "passed_over") == before + 1


async def test_an_exit_that_is_not_as_asked_is_given_back(start: Start, server: ProviderServer) -> None:
    allocator = await start(external_exits=ALONE)
    await vpn_slot(allocator)
    server.victims = {"PUT"}
    server.faults.append(Fault.EARLY)
    assert (await allocator.ask()).no_work.blocker == EXIT_UNAVAILABLE
    assert server.taken == 1
    await settled(allocator, server)
    assert server.leases == {}


async def with_delay(allocator: Allocator) -> None:
    """Makes a slot of the provider, of one unit, and one of the pool, both of a target that takes one unit a minute."""
    await allocator.sql(
        "INSERT INTO targets (organization_id, target, min_delay_ms) VALUES ($1, 'shop', 60000)",
        await allocator.service.organization_id(),
    )
    await vpn_slot(allocator, target="shop", priority=10, daily_quota=1)
    await allocator.slot(keyword="pooled", target="shop", without_exit=False)
    await allocator.add_exits(1)


async def test_a_unit_that_is_withdrawn_leaves_its_targets_turn_to_another(
    start: Start, server: ProviderServer
) -> None:
    allocator = await start(external_exits=ALONE)
    await with_delay(allocator)
    server.always = Fault.NONE_FREE
    (unit,) = await allocator.take()
    assert unit.keyword == "pooled"
    assert server.counted("PUT") == 1
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_TARGET_BUSY
    await allocator.check_invariants()


async def test_a_unit_that_is_withdrawn_late_leaves_the_delay_of_a_younger_one(
    start: Start, server: ProviderServer
) -> None:
    allocator = await start(external_exits=ALONE, timeout_seconds=10)
    await with_delay(allocator)
    server.always = Fault.NONE_FREE
    server.gate = asyncio.Event()
    asked = asyncio.ensure_future(allocator.ask())

    async def taking() -> bool:
        return server.counted("PUT") > 0

    await until(taking)
    # A minute passes.
    await allocator.sql("UPDATE leases SET granted_at = granted_at - interval '60 s'")
    await allocator.sql("UPDATE targets SET next_at = next_at - interval '60 s'")
    (younger,) = await allocator.take()
    assert younger.keyword == "pooled"
    server.gate.set()
    assert (await asked).no_work.blocker == EXIT_UNAVAILABLE
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_TARGET_BUSY


async def test_orphans_are_released_and_what_lives_is_not(start: Start, server: ProviderServer) -> None:
    allocator = await start(external_exits={"reconcile_seconds": 0.05, "grace_seconds": 60})
    await vpn_slot(allocator)
    (unit,) = await allocator.take()
    long_ago = UUID(int=(uuids.uuid7().int & (2**80 - 1)) | (1_600_000_000_000 << 80))
    fresh, strange = uuids.uuid7(), uuids.uuid7()
    server.hold(long_ago)
    server.hold(fresh)
    server.hold(strange, holder="another-installation")

    async def released() -> bool:
        return (await state(allocator)).orphans_released == 1

    await until(released)
    assert set(server.leases) == {*keys([unit]), fresh, strange}
    provider = await state(allocator)
    assert (provider.name, provider.available, provider.held) == ("vpn", True, 1)
    assert provider.answered_at.ToSeconds() > 0


async def test_a_take_that_lands_after_its_release_is_found(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    (unit,) = await allocator.take()
    await allocator.release(lease(unit))
    await settled(allocator, server)
    # The call of before arrives once more, out of the network.
    server.hold(UUID(unit.allocation_key))
    await settled(allocator, server)
    assert server.leases == {}


async def test_a_lease_that_ends_while_its_exit_is_taken_leaves_nothing(
    allocator: Allocator, server: ProviderServer
) -> None:
    await vpn_slot(allocator, daily_quota=1)
    server.gate = asyncio.Event()
    asked = asyncio.ensure_future(allocator.ask())

    async def taking() -> bool:
        return server.counted("PUT") > 0

    await until(taking)
    await allocator.sql("UPDATE leases SET expires_at = now() - interval '1 s', sweep_at = now() - interval '1 s'")

    async def ended() -> bool:
        return not await allocator.sql("SELECT FROM leases")

    await until(ended)
    server.gate.set()
    server.gate = None
    await asked
    await settled(allocator, server)


async def test_two_replicas_leave_no_leak_whatever_the_provider_does(start: Start, server: ProviderServer) -> None:
    one = await start()
    two = await start(database=one.service.database)
    two.worker, two.operator = one.worker, one.operator
    await vpn_slot(one, daily_quota=100_000)
    await one.slot(keyword="pooled", without_exit=False, daily_quota=100_000)
    await one.add_exits(3, cap_mode=exit_pb2.EXIT_CAP_MODE_CONCURRENT)
    bad = [Fault.BROKEN, Fault.LOST, Fault.CUT, Fault.GARBAGE, Fault.SCHEMA, Fault.PROTOCOL, None, None, None, None]
    got = {"vpn": 0, "": 0}

    async def work(allocator: Allocator, number: int) -> None:
        for turn in range(9):
            server.faults.extend(bad[(number + turn) % len(bad) :][:2])
            units = list((await allocator.ask(3, client=f"pc-{number}")).allocations)
            for place, unit in enumerate(units):
                got[unit.exit.provider] += 1
                if (turn + place) % 3 == 0:
                    await allocator.release(lease(unit))
                elif (turn + place) % 3 == 1:
                    await allocator.submit(result(unit), client=f"pc-{number}")

    await asyncio.gather(*(work(allocator, number) for number, allocator in enumerate((one, two) * 4)))
    server.faults.clear()
    await settled(one, server)
    assert got["vpn"] > 0
    assert got[""] > 0
    await one.sql("UPDATE leases SET expires_at = now() - interval '1 s', sweep_at = now() - interval '1 s'")
    await settled(one, server)
    assert server.leases == {}


async def test_releases_wait_for_a_provider_that_is_down(allocator: Allocator, server: ProviderServer) -> None:
    await vpn_slot(allocator)
    units = await allocator.take(3)
    await server.stop()
    await allocator.release(*(lease(unit) for unit in units))

    async def owed() -> bool:
        provider = await state(allocator)
        return provider.releases_pending == 3 and not provider.available and bool(provider.last_error)

    await until(owed)
    await server.start()
    await settled(allocator, server)
    assert server.leases == {}
    assert (await state(allocator)).releases_pending == 0


async def test_a_provider_that_is_no_longer_configured_is_owed_its_releases(
    start: Start, server: ProviderServer
) -> None:
    first = await start()
    await vpn_slot(first)
    (unit,) = await first.take()
    second = await start(database=first.service.database, exit_providers={})
    await first.service.chassis.drain()
    second.worker, second.operator = first.worker, first.operator
    answer = await second.ask()
    assert answer.no_work.blocker == EXIT_UNAVAILABLE
    await second.release(lease(unit))
    assert not (
        await second.exits.ListExitProviders(exit_pb2.ListExitProvidersRequest(), metadata=second.operator)
    ).providers
    # That of the lease that ended, and none of what it was not asked for.
    owed = await second.sql("SELECT allocation_key FROM exit_releases")
    assert [row["allocation_key"] for row in owed] == [UUID(unit.allocation_key)]
    third = await start(database=first.service.database)
    await settled(third, server)
    assert server.leases == {}


async def test_calls_are_counted_by_their_outcome(allocator: Allocator, server: ProviderServer) -> None:
    before = {outcome: calls("take", outcome) for outcome in ("answered", "none", "failed")}
    await vpn_slot(allocator)
    await allocator.take(2)
    server.victims = {"PUT"}
    server.faults.append(Fault.NONE_FREE)
    await allocator.ask()
    assert calls("take", "answered") == before["answered"] + 2
    assert calls("take", "none") == before["none"] + 1
    assert calls("take", "failed") == before["failed"]
    assert calls("held", "answered") > 0
    await settled(allocator, server)


async def test_a_slot_cannot_ask_for_a_provider_that_is_not_configured(allocator: Allocator) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocator.slot(without_exit=False, exit_provider="elsewhere")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "exit_provider" in (caught.value.details() or "")
