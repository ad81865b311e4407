"""Personas in packages, against a persona store that speaks the real contract."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import slot_pb2, work_pb2
from muster.persona_store.v1 import checkout_pb2, checkout_pb2_grpc, persona_pb2

from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService


@dataclass
class FakePersonaStore(checkout_pb2_grpc.CheckOutServiceServicer):
    """Holds check-outs in memory, exactly as the contract says and no more."""

    idle: list[str] = field(default_factory=list)
    held: dict[str, checkout_pb2.CheckOut] = field(default_factory=dict)
    check_ins: list[tuple[str, int]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    organizations: set[str] = field(default_factory=set)
    away: bool = False
    # Set to hold check-outs back until it is released.
    gate: asyncio.Event | None = None
    # Set to fail check-outs, after the gate; their holders are kept, since they may yet take effect.
    fails: bool = False
    failed: list[str] = field(default_factory=list)

    async def CheckOutPersonas(self, request: checkout_pb2.CheckOutPersonasRequest, context: Any) -> Any:
        await self._admit(context)
        self.calls.append(len(request.items))
        fails = self.fails
        if self.gate is not None:
            await self.gate.wait()
        if fails:
            self.failed += [item.holder for item in request.items]
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        response = checkout_pb2.CheckOutPersonasResponse()
        for item in request.items:
            assert 1 <= item.duration.seconds <= 24 * 3600
            answer = response.results.add()
            if item.holder not in self.held and (not self.idle or "rare" in item.criteria.tags):
                answer.error.code, answer.error.reason = 5, "NO_PERSONA_MATCHES"
                continue
            if item.holder not in self.held:
                self.hold(item.holder)
            answer.check_out.CopyFrom(self.held[item.holder])
        return response

    def hold(self, holder: str) -> None:
        """Checks an idle persona out."""
        persona = persona_pb2.Persona(persona_id=self.idle.pop(0), generation=7)
        self.held[holder] = checkout_pb2.CheckOut(persona=persona, holder=holder, lease_token=uuid.uuid4().bytes)

    async def CheckInPersonas(self, request: checkout_pb2.CheckInPersonasRequest, context: Any) -> Any:
        await self._admit(context)
        response = checkout_pb2.CheckInPersonasResponse()
        for item in request.items:
            known = self.held.pop(item.holder, None)
            response.checked_in.append(known is not None)
            self.check_ins.append((item.holder, item.outcome))
            if known is not None:
                self.idle.append(known.persona.persona_id)
        return response

    async def RenewCheckOuts(self, request: checkout_pb2.RenewCheckOutsRequest, context: Any) -> Any:
        raise AssertionError("a check-out is taken for the lease's whole life")

    async def _admit(self, context: Any) -> None:
        self.organizations |= {
            str(value) for key, value in context.invocation_metadata() if key == "muster-organization"
        }
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")


@pytest.fixture
async def store() -> AsyncIterator[FakePersonaStore]:
    """The fake; its address is `store.address`."""
    fake = FakePersonaStore(idle=[str(uuid.uuid4()) for _ in range(3)])
    server = grpc.aio.server()
    checkout_pb2_grpc.add_CheckOutServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    fake.address = f"127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield fake
    await server.stop(None)


@pytest.fixture
async def allocator(start_service: StartService, store: FakePersonaStore) -> Allocator:
    """One that knows the fake and sweeps at once."""
    address: str = store.address  # type: ignore[attr-defined]
    return await Allocator.of(
        await start_service("allocator", leases={"sweep_seconds": 0.02}, persona_store={"target": address})
    )


NEED = slot_pb2.PersonaNeed(tags=["shopper"], region="kr", min_aging_level=2, cool_down_seconds=60)
RARE = slot_pb2.PersonaNeed(tags=["rare"])


async def test_a_package_carries_the_persona_checked_out_under_its_key(
    allocator: Allocator, store: FakePersonaStore
) -> None:
    await allocator.slot(persona=NEED)
    request_id = str(uuid.uuid4())
    answer = await allocator.ask(2, request_id=request_id)
    for unit in answer.allocations:
        held = store.held[unit.allocation_key]
        assert unit.persona.persona_id == held.persona.persona_id
        assert (unit.persona.lease_token, unit.persona.generation) == (held.lease_token, 7)
    assert store.calls == [2]
    assert store.organizations == {str(await allocator.service.organization_id())}
    again = await allocator.ask(2, request_id=request_id)
    assert {unit.persona.persona_id for unit in again.allocations} == {
        unit.persona.persona_id for unit in answer.allocations
    }
    assert store.calls == [2]


async def test_every_end_of_a_lease_checks_the_persona_in(allocator: Allocator, store: FakePersonaStore) -> None:
    store.idle.extend(str(uuid.uuid4()) for _ in range(3))
    await allocator.slot(persona=NEED)
    used, unused, blocked, released, expired = await allocator.take(5)
    await allocator.submit(result(used, persona_used=True), result(unused), result(blocked, 3, persona_used=True))
    await allocator.release(lease(released))
    await allocator.run_out(expired)

    async def told() -> bool:
        return len(store.check_ins) == 5 and not (await allocator.totals()).check_ins_pending

    await until(told)
    assert dict(store.check_ins) == {
        used.allocation_key: checkout_pb2.USE_OUTCOME_SUCCEEDED,
        unused.allocation_key: checkout_pb2.USE_OUTCOME_NOT_USED,
        blocked.allocation_key: checkout_pb2.USE_OUTCOME_BLOCKED,
        released.allocation_key: checkout_pb2.USE_OUTCOME_NOT_USED,
        expired.allocation_key: checkout_pb2.USE_OUTCOME_NOT_USED,
    }
    assert not store.held
    await allocator.check_invariants()


async def test_units_without_a_persona_are_given_back_and_the_rest_is_answered(
    allocator: Allocator, store: FakePersonaStore
) -> None:
    slot = await allocator.slot(persona=NEED, without_exit=False)
    await allocator.add_exits(1)
    assert len((await allocator.ask(5)).allocations) == 3
    answer = await allocator.ask()
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_NO_PERSONA
    counters = await allocator.tracking(slot.slot_id)
    # What nobody was told of leaves no trace, or a fleet that waits for a persona would fill the tables.
    assert (counters["allocated"], counters["released"]) == (3, 0)
    assert await allocator.sql("SELECT * FROM work_allocations") == []
    assert (await allocator.sql("SELECT use_count FROM exits"))[0]["use_count"] == 3
    await allocator.check_invariants()


async def test_other_work_is_given_where_a_persona_is_missing(allocator: Allocator, store: FakePersonaStore) -> None:
    await allocator.slot(keyword="rare", persona=RARE, priority=100)
    await allocator.slot(keyword="common", persona=NEED, priority=50)
    await allocator.slot(keyword="plain")
    keywords = [(await allocator.take())[0].keyword for _ in range(4)]
    assert keywords == ["common", "common", "common", "plain"]
    store.away = True
    assert [unit.keyword for unit in await allocator.take(2)] == ["plain"] * 2
    await allocator.check_invariants()


async def test_an_absent_store_is_named_and_check_ins_wait_for_it(
    allocator: Allocator, store: FakePersonaStore
) -> None:
    await allocator.slot(persona=NEED)
    (unit,) = await allocator.take()
    store.away = True
    request_id = str(uuid.uuid4())
    answer = await allocator.ask(request_id=request_id)
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_PERSONA_STORE_UNAVAILABLE
    assert answer.no_work.HasField("retry_after")
    assert (await allocator.submit(result(unit, persona_used=True)))[0].disposition == 1

    async def tried() -> bool:
        return bool(await allocator.sql("SELECT FROM outbox WHERE holder = $1 AND attempts > 0", unit_key))

    unit_key = uuid.UUID(unit.allocation_key)
    await until(tried)
    assert (await allocator.totals()).check_ins_pending >= 1
    store.away = False
    await allocator.sql("UPDATE outbox SET due_at = now()")

    async def told() -> bool:
        return not await allocator.sql("SELECT FROM outbox")

    await until(told)
    assert (unit.allocation_key, checkout_pb2.USE_OUTCOME_SUCCEEDED) in store.check_ins
    # The request left no trace, so it can be repeated.
    assert len((await allocator.ask(request_id=request_id)).allocations) == 1
    await allocator.check_invariants()


async def test_without_a_store_only_work_that_needs_none_is_given(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    await allocator.slot(persona=NEED, priority=1)
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_PERSONA_STORE_UNAVAILABLE
    # There is nobody to tell.
    assert await allocator.sql("SELECT FROM outbox") == []
    await allocator.slot(keyword="plain")
    assert [unit.keyword for unit in await allocator.take(2)] == ["plain"] * 2


async def test_who_waits_does_not_ask_for_a_persona_all_the_time(allocator: Allocator, store: FakePersonaStore) -> None:
    await allocator.slot(persona=NEED)
    store.idle.clear()
    answer = await allocator.ask(wait=Duration(seconds=3))
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_NO_PERSONA
    # About once a second.
    assert 2 <= len(store.calls) <= 5
    # What was never checked out is not checked in.
    assert await allocator.sql("SELECT FROM outbox") == []
    assert store.check_ins == []


async def test_a_unit_that_a_repeat_of_the_request_completed_stands(
    start_service: StartService, allocator: Allocator, store: FakePersonaStore
) -> None:
    address: str = store.address  # type: ignore[attr-defined]
    # On one replica the calls would wait for one another.
    other = await Allocator.of(
        await start_service("allocator", database=allocator.service.database, persona_store={"target": address})
    )
    other.worker = allocator.worker
    await allocator.slot(persona=NEED)
    store.fails, store.gate = True, (gate := asyncio.Event())
    request_id = str(uuid.uuid4())
    first = asyncio.create_task(allocator.ask(request_id=request_id))

    async def called() -> bool:
        return bool(store.calls)

    await until(called)
    store.fails, store.gate = False, None
    (unit,) = (await other.ask(request_id=request_id)).allocations
    gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert list(store.held) == [unit.allocation_key]
    (again,) = (await allocator.ask(request_id=request_id)).allocations
    assert again == unit
    (submitted,) = await other.submit(result(unit, persona_used=True))
    assert submitted.disposition == work_pb2.RESULT_DISPOSITION_RECORDED
    await allocator.check_invariants()


async def test_a_check_out_that_lands_after_its_check_in_is_ended_by_another(
    allocator: Allocator, store: FakePersonaStore
) -> None:
    await allocator.slot(persona=NEED)
    store.fails = True
    answer = await allocator.ask()
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_PERSONA_STORE_UNAVAILABLE
    (holder,) = store.failed

    async def told() -> bool:
        return (holder, checkout_pb2.USE_OUTCOME_NOT_USED) in store.check_ins

    await until(told)
    store.hold(holder)
    # Its time comes.
    await allocator.sql("UPDATE outbox SET due_at = now()")

    async def returned() -> bool:
        return not store.held and not await allocator.sql("SELECT FROM outbox")

    await until(returned)


async def test_a_retry_completes_what_a_lost_answer_left_without_persona(
    allocator: Allocator, store: FakePersonaStore
) -> None:
    await allocator.slot(persona=NEED)
    request_id = str(uuid.uuid4())
    (unit,) = (await allocator.ask(request_id=request_id)).allocations
    # As if the process had ended between the reservation and the note of its persona.
    await allocator.sql("UPDATE leases SET persona_id = NULL, persona_token = NULL, persona_generation = NULL")
    (again,) = (await allocator.ask(request_id=request_id)).allocations
    assert again == unit


async def test_a_check_out_that_outlasts_its_lease_is_checked_in(allocator: Allocator, store: FakePersonaStore) -> None:
    await allocator.slot(persona=NEED)
    store.gate = asyncio.Event()
    asked = asyncio.create_task(allocator.ask())

    async def called() -> bool:
        return bool(store.calls)

    await until(called)
    await allocator.sql("UPDATE leases SET expires_at = now() - interval '1 s', sweep_at = now() - interval '1 s'")

    async def swept() -> bool:
        return not await allocator.sql("SELECT FROM leases") and bool(store.check_ins)

    await until(swept)
    store.gate.set()
    assert (await asked).no_work.blocker == work_pb2.BLOCKER_KIND_NO_PERSONA

    async def returned() -> bool:
        return not store.held

    await until(returned)
    await allocator.check_invariants()
