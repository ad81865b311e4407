"""Leases against a small model: whatever happens in whatever order, the invariants hold and "no work" is true.

The machine drives a real service over gRPC on a real PostgreSQL, each example as an organization of its own. Time is
moved in the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg
import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from muster.allocator.v1 import exit_pb2, work_pb2

from allocator import app
from allocator.allocation_store import AllocationStore
from allocator.availability import Availability
from allocator.config import LeasesConfig
from allocator.lease_store import LeaseStore
from allocator.leases import Leases
from allocator.partitions import Partitions
from services.call import Role
from services.chassis import Chassis
from services.config import DrainConfig, GrpcConfig, PostgresConfig
from services.identity.keys import KeyStore
from services.postgres import Database
from tests.support.allocator import Allocator, lease, result
from tests.support.postgres import PostgresServer
from tests.support.services import RunningService

Result = TypeVar("Result")
_organizations = itertools.count()


class Loop:
    """An event loop in a thread, for a machine that is not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Stage:
    """What all examples share."""

    loop: Loop
    service: RunningService
    leases: Leases
    door: asyncpg.Connection[asyncpg.Record]


@dataclass
class Unit:
    """What the model knows of an allocation."""

    allocation: work_pb2.Allocation
    epoch: int
    # live, lapsed (run out, not swept), expired, released, recorded, late, quarantined
    state: str = "live"
    status: int = 0
    acknowledged: work_pb2.SubmittedResult | None = None

    @property
    def slot(self) -> str:
        return self.allocation.slot_id

    @property
    def exit(self) -> str:
        return self.allocation.exit.exit_id


class LeaseMachine(RuleBasedStateMachine):
    """The model: quotas, caps and what became of every unit."""

    stage: Stage

    @initialize(
        quotas=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        caps=st.lists(st.integers(1, 5), min_size=1, max_size=2),
        items=st.integers(1, 6),
    )
    def begin(self, quotas: list[int], caps: list[int], items: int) -> None:
        self.run = self.stage.loop.run
        self.units: list[Unit] = []
        self.run(self._begin(quotas, caps))
        # Most of what can go wrong needs a unit to go wrong with.
        self.allocate(items)

    async def _begin(self, quotas: list[int], caps: list[int]) -> None:
        service = self.stage.service
        name = f"organization {next(_organizations)}"
        self.allocator = await Allocator.of(service)
        self.allocator.door = self.stage.door
        self.allocator.worker = await service.metadata(Role.WORKER, name)
        self.allocator.operator = await service.metadata(Role.OPERATOR, name)
        self.organization_id = await service.organization_id(name)
        self.quota: dict[str, int] = {}
        for number, quota in enumerate(quotas):
            slot = await self.allocator.slot(keyword=f"k{number}", daily_quota=quota, without_exit=False)
            self.quota[slot.slot_id] = quota
        self.daily = dict(self.quota)
        self.active = dict.fromkeys(self.quota, True)
        request = exit_pb2.ImportExitsRequest(
            exits=[exit_pb2.ExitSpec(endpoint=f"http://10.0.0.{number}:1", cap=cap) for number, cap in enumerate(caps)]
        )
        exits = (await self.allocator.exits.ImportExits(request, metadata=self.allocator.operator)).exits
        self.cap = {exit_.exit_id: exit_.spec.cap for exit_ in exits}
        self.uses = dict.fromkeys(self.cap, 0)
        self.epoch = dict.fromkeys(self.cap, 0)

    def taken(self, slot: str) -> int:
        return sum(
            unit.slot == slot and unit.state not in ("expired", "released", "quarantined") for unit in self.units
        )

    def give_back(self, unit: Unit, state: str) -> None:
        unit.state = state
        if unit.epoch == self.epoch[unit.exit]:
            self.uses[unit.exit] -= 1

    def pick(self, number: int, *states: str) -> Unit | None:
        units = [unit for unit in self.units if unit.state in states]
        return units[number % len(units)] if units else None

    @rule(items=st.integers(1, 6))
    def allocate(self, items: int) -> None:
        room = sum(self.quota[slot] - self.taken(slot) for slot, active in self.active.items() if active)
        available = min(room, sum(self.cap[exit_] - self.uses[exit_] for exit_ in self.cap))
        answer = self.run(self.allocator.ask(items))
        assert len(answer.allocations) <= min(items, available)
        assert bool(answer.allocations) == (available > 0), (available, answer)
        for allocation in answer.allocations:
            assert self.active[allocation.slot_id]
            exit_id = allocation.exit.exit_id
            self.uses[exit_id] += 1
            self.units.append(Unit(allocation, self.epoch[exit_id]))

    @precondition(lambda self: self.units)
    @rule(number=st.integers(0, 99), wrong=st.booleans())
    def renew(self, number: int, wrong: bool) -> None:
        unit = self.units[number % len(self.units)]
        name = lease(unit.allocation)
        if wrong:
            name.lease_token = bytes(16)
        (answer,) = self.run(self.allocator.renew(name))
        expected = "LEASE_TOKEN_MISMATCH" if wrong else "" if unit.state == "live" else "LEASE_LOST"
        assert answer.error.reason == expected

    @precondition(lambda self: self.units)
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        unit = self.units[number % len(self.units)]
        (answer,) = self.run(self.allocator.release(lease(unit.allocation)))
        assert answer.error.reason == ("" if unit.state in ("live", "released") else "LEASE_LOST")
        if unit.state == "live":
            self.give_back(unit, "released")

    @precondition(lambda self: self.units)
    @rule(number=st.integers(0, 99), outcome=st.integers(1, 3))
    def submit(self, number: int, outcome: int) -> None:
        unit = self.units[number % len(self.units)]
        (answer,) = self.run(self.allocator.submit(result(unit.allocation, outcome)))
        if unit.state == "released":
            assert answer.error.reason == "LEASE_LOST"
        elif unit.acknowledged is not None:
            assert answer == unit.acknowledged
        else:
            expected = {"live": 1, "lapsed": 2, "expired": 2}[unit.state]
            if unit.state == "expired" and self.taken(unit.slot) >= self.quota[unit.slot]:
                expected = 3
            assert answer.disposition == expected
            unit.acknowledged = answer
            unit.state = {1: "recorded", 2: "late", 3: "quarantined"}[expected]
            unit.status = outcome + 1 if expected < 3 else 5

    @rule(number=st.integers(0, 99))
    def run_out(self, number: int) -> None:
        if (unit := self.pick(number, "live")) is not None:
            self.run(self.allocator.run_out(unit.allocation))
            unit.state = "lapsed"

    @rule()
    def sweep(self) -> None:
        self.run(self.stage.leases.sweep())
        for unit in self.units:
            if unit.state == "lapsed":
                self.give_back(unit, "expired")

    @rule(items=st.integers(1, 6))
    def hand_out_again(self, items: int) -> None:
        """Everybody vanishes, and others take over: what makes late results too late."""
        while any(unit.state == "live" for unit in self.units):
            self.run_out(0)
        self.sweep()
        self.allocate(items)

    @rule(number=st.integers(0, 99))
    def toggle(self, number: int) -> None:
        exit_id = list(self.cap)[number % len(self.cap)]
        request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_id)
        for _ in range(2):
            self.run(self._toggle(request))
        self.uses[exit_id] = 0
        self.epoch[exit_id] += 1

    async def _toggle(self, request: exit_pb2.ToggleExitRequest) -> None:
        await self.allocator.exits.ToggleExit(request, metadata=self.allocator.operator)

    @rule(number=st.integers(0, 99), active=st.booleans())
    def switch(self, number: int, active: bool) -> None:
        slot = list(self.quota)[number % len(self.quota)]
        self.run(self.allocator.update(slot, is_active=active))
        self.active[slot] = active

    @rule(number=st.integers(0, 99), quota=st.integers(1, 5))
    def change_quota(self, number: int, quota: int) -> None:
        slot = list(self.quota)[number % len(self.quota)]
        changed = self.run(self.allocator.update(slot, daily_quota=quota))
        if quota != self.daily[slot]:
            # The day follows, but not below what counts against it.
            self.quota[slot] = max(quota, self.taken(slot))
        self.daily[slot] = quota
        assert changed.today.quota in ((self.quota[slot],) if changed.HasField("today") else (0,))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "cap"):
            self.run(self._holds())

    async def _holds(self) -> None:
        await self.allocator.check_invariants()
        rows = await self.allocator.sql(
            "SELECT exit_id, use_count FROM exits WHERE organization_id = $1", self.organization_id
        )
        assert {str(row["exit_id"]): row["use_count"] for row in rows} == self.uses
        rows = await self.allocator.sql(
            """SELECT slot_id, quota, allocated - expired - released AS taken
            FROM daily_work_tracking WHERE organization_id = $1""",
            self.organization_id,
        )
        for row in rows:
            slot = str(row["slot_id"])
            assert (row["quota"], row["taken"]) == (self.quota[slot], self.taken(slot))
        rows = await self.allocator.sql(
            """SELECT allocation_key, 1 AS status FROM leases WHERE organization_id = $1
            UNION ALL SELECT allocation_key, status FROM work_allocations WHERE organization_id = $1""",
            self.organization_id,
        )
        states = {"live": 1, "lapsed": 1, "expired": 5, "released": 6}
        assert {str(row["allocation_key"]): row["status"] for row in rows} == {
            unit.allocation.allocation_key: unit.status or states[unit.state] for unit in self.units
        }


@pytest.fixture
def stage(
    postgres_server: PostgresServer, migrated_database: Callable[[str], AbstractContextManager[str]]
) -> Iterator[Stage]:
    """A service in a loop of its own, whose own sweep does not come."""
    loop = Loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        database = stack.enter_context(migrated_database("allocator"))
        identity = PostgresConfig.model_validate({"dsn": postgres_server.dsn(database, "muster_identity")})
        own = PostgresConfig.model_validate({"dsn": postgres_server.dsn(database, "muster_allocator")})

        async def start() -> Stage:
            config = app.CONFIG(
                grpc=GrpcConfig(listen="127.0.0.1:0"),
                postgres=own,
                identity=identity,
                leases=LeasesConfig(sweep_seconds=60),
                drain=DrainConfig(grace_seconds=1),
            )
            chassis = Chassis("allocator", config)
            address = await chassis.start(app.bind)
            keys = await Database.connect(identity, "keys")
            swept = await Database.connect(own, "sweep", search_path="allocator")
            partitions = Partitions(swept)
            availability = Availability(AllocationStore(swept, partitions))
            leases = Leases(LeaseStore(swept, partitions), availability, duration_seconds=300, sweep_seconds=60)
            channel = grpc.aio.insecure_channel(address)
            door = await asyncpg.connect(postgres_server.dsn(database), server_settings={"search_path": "allocator"})

            async def stop() -> None:
                await channel.close()
                await door.close()
                await chassis.drain()
                await keys.close()
                await swept.close()

            stack.callback(lambda: loop.run(stop()))
            service = RunningService(
                "allocator", chassis, address, channel, database, postgres_server.dsn(database), KeyStore(keys)
            )
            return Stage(loop, service, leases, door)

        yield loop.run(start())


def test_leases_hold_their_invariants_in_any_order(stage: Stage) -> None:
    class Machine(LeaseMachine):
        pass

    Machine.stage = stage
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
