"""Leases against a small model: whatever happens in whatever order, every answer and all counters are the model's.

The machine drives a real service over gRPC on a real PostgreSQL, each example as an organization of its own. Time is
moved in the database: leases run out, windows and holds end; midnight comes by moving the organization to a zone where
it is tomorrow already. Which unit is handed out is not modelled, only how many may be.

`MUSTER_PROPERTY_EXAMPLES` is how many examples are tried; `make fault-allocator` tries many.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from muster.allocator.v1 import admin_pb2, client_pb2, exit_pb2, slot_pb2, target_pb2, work_pb2

from tests.support.allocator import lease, result
from tests.support.allocator_model import Unit, pick
from tests.support.allocator_stage import CLIENTS, TARGETS, Company, Loop, Stage, start_stage
from tests.support.postgres import PostgresServer

EXAMPLES = int(os.environ.get("MUSTER_PROPERTY_EXAMPLES", "60"))
STEPS = 40
NUMBER = st.integers(0, 99)
_SLOT = st.tuples(st.integers(1, 4), st.sampled_from(TARGETS), st.sampled_from(["", "", "kr"]), st.booleans())
_EXIT = st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 4), st.sampled_from(["kr", "kr", ""]))
# What stops everything is tried less often than what sets it going again.
_MOSTLY = st.sampled_from([True, True, True, False])


class LeaseMachine(RuleBasedStateMachine):
    """Drives one company; `act` does what an operator may, as an admin."""

    stage: Stage

    @initialize(
        slots=st.lists(_SLOT, min_size=1, max_size=3),
        exits=st.lists(_EXIT, min_size=1, max_size=3),
        items=st.integers(1, 6),
    )
    def begin(self, slots: list[Any], exits: list[Any], items: int) -> None:
        self.run = self.stage.loop.run
        self.company = self.run(Company.of(self.stage, slots, exits))
        self.model = self.company.model
        self.asked: list[tuple[work_pb2.AllocateWorkRequest, list[str]]] = []
        # Most of what can go wrong needs a unit to go wrong with.
        self.allocate(items, "", "", 0)

    def call(self, method: str, request: Any) -> Any:
        return self.run(self.company.call(method, request))

    def refused(self, method: str, request: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            self.call(method, request)
        return str(self.company.reason(error.value))

    @rule(
        items=st.integers(1, 6),
        place=st.sampled_from(["", "", *TARGETS]),
        region=st.sampled_from(["", "", "", "kr", "us"]),
        number=NUMBER,
    )
    def allocate(self, items: int, place: str, region: str, number: int) -> None:
        client = CLIENTS[number % len(CLIENTS)]
        most = 0 if client in self.model.draining else self.model.most_units(place, region)
        request = work_pb2.AllocateWorkRequest(
            request_id=str(uuid.uuid4()),
            client=work_pb2.ClientIdentity(client_id=client),
            max_items=items,
            target=place,
            region=region,
        )
        answer = self.call("WorkService/AllocateWork", request)
        self.model.known.add(client)
        assert len(answer.allocations) <= min(items, most)
        assert bool(answer.allocations) == (most > 0), (most, answer)
        if answer.allocations:
            self.asked.append((request, [allocation.allocation_key for allocation in answer.allocations]))
        else:
            blocker = work_pb2.BlockerKind.Name(answer.no_work.blocker).removeprefix("BLOCKER_KIND_")
            assert region or blocker in self.model.blockers(client, place)
        for allocation in answer.allocations:
            self.model.grant(allocation, client, region)

    @precondition(lambda self: self.asked)
    @rule(number=NUMBER)
    def ask_again(self, number: int) -> None:
        """The same leases, as far as they still live."""
        request, keys = self.asked[number % len(self.asked)]
        live = {unit.key: unit.allocation.lease_token for unit in self.model.of("live") if unit.key in keys}
        self.model.known.add(request.client.client_id)
        if not live:
            assert self.refused("WorkService/AllocateWork", request) == "REQUEST_ID_REUSED"
            return
        answer = self.call("WorkService/AllocateWork", request)
        assert {unit.allocation_key: unit.lease_token for unit in answer.allocations} == live

    @precondition(lambda self: self.model.units)
    @rule(number=NUMBER, wrong=st.booleans())
    def renew(self, number: int, wrong: bool) -> None:
        self._renew(self.model.units[number % len(self.model.units)], wrong)

    def _renew(self, unit: Unit, wrong: bool = False) -> None:
        name = lease(unit.allocation)
        if wrong:
            name.lease_token = bytes(16)
        (answer,) = self.run(self.company.allocator.renew(name))
        if wrong:
            assert answer.error.reason == "LEASE_TOKEN_MISMATCH"
        elif unit.state != "live":
            assert answer.error.reason == "LEASE_LOST"
        else:
            assert answer.error.reason == ("LEASE_AGE_EXCEEDED" if unit.oldest else "")

    @rule(number=NUMBER)
    def grow_old(self, number: int) -> None:
        if (unit := pick(number, self.model.of("live"))) is not None:
            self.run(self.company.age(unit.key))
            unit.oldest = True
            self._renew(unit)

    @precondition(lambda self: self.model.units)
    @rule(number=NUMBER)
    def release(self, number: int) -> None:
        unit = self.model.units[number % len(self.model.units)]
        (answer,) = self.run(self.company.allocator.release(lease(unit.allocation)))
        assert answer.error.reason == ("" if unit.state in ("live", "released") else "LEASE_LOST")
        if unit.state == "live":
            self.model.give_back(unit, "released")

    @precondition(lambda self: self.model.units)
    @rule(
        numbers=st.lists(NUMBER, min_size=1, max_size=4),
        outcome=st.integers(1, 3),
        products=st.integers(0, 2),
        hold=st.sampled_from([False, False, False, True]),
    )
    def submit(self, numbers: list[int], outcome: int, products: int, hold: bool) -> None:
        """Several at once, perhaps the same twice, perhaps from before."""
        self._submit([self.model.units[number % len(self.model.units)] for number in numbers], outcome, products, hold)

    @rule(number=NUMBER, outcome=st.integers(1, 3))
    def come_late(self, number: int, outcome: int) -> None:
        if (unit := pick(number, self.model.of("lapsed", "expired"))) is not None:
            self._submit([unit], outcome, 1)

    def _submit(self, units: list[Unit], outcome: int, products: int, hold: bool = False) -> None:
        values: dict[str, Any] = {"products": [work_pb2.Product(product_id=f"p{n}") for n in range(products)]}
        if hold and outcome == work_pb2.WORK_OUTCOME_FAILED:
            values["retry_after"] = Duration(seconds=3600)
        answers = self.run(
            self.company.allocator.submit(*(result(unit.allocation, outcome, **values) for unit in units))
        )
        self.model.known.add(CLIENTS[0])
        # Which of several late results gets the last room of a day is the service's choice.
        for unit, answer in sorted(zip(units, answers, strict=True), key=lambda pair: pair[1].disposition == 3):
            if unit.state == "released":
                assert answer.error.reason == "LEASE_LOST"
            elif unit.acknowledged is not None:
                assert answer == unit.acknowledged
            else:
                assert answer.disposition == self.model.submit(unit, outcome, products)
                unit.acknowledged = answer
                self.company.submitted[unit.key] = outcome
                # What the target asked for holds, whatever becomes of the result.
                if "retry_after" in values:
                    self.company.target_of(unit).held = True

    @rule(number=NUMBER)
    def run_out(self, number: int) -> None:
        if (unit := pick(number, self.model.of("live"))) is not None:
            self.run(self.company.run_out(unit.key))
            unit.state = "lapsed"

    @rule()
    def sweep(self) -> None:
        self.run(self.company.sweep())
        for unit in self.model.of("lapsed"):
            self.model.give_back(unit, "expired")

    @rule(items=st.integers(1, 6))
    def hand_out_again(self, items: int) -> None:
        """Everybody vanishes, and others take over: what makes late results too late."""
        while self.model.of("live"):
            self.run_out(0)
        self.sweep()
        self.allocate(items, "", "", 0)

    @rule(number=NUMBER, accepted=st.booleans(), tried=st.booleans())
    def settle(self, number: int, accepted: bool, tried: bool) -> None:
        """Accepts or discards a result in quarantine, or tries to with a result that is in none."""
        unit = pick(number, self.model.of("quarantined")) or pick(number, self.model.units)
        if unit is None:
            return
        name = "AcceptQuarantinedResults" if accepted else "DiscardQuarantinedResults"
        request = getattr(admin_pb2, f"{name}Request")(act=_act(tried), allocation_keys=[unit.key])
        # A retry is answered as the first time; a dry run uses no request id up.
        for _ in range(2):
            (answer,) = self.call(f"AdminService/{name}", request).results
            assert answer.error.reason == ("" if unit.state == "quarantined" else "QUARANTINED_RESULT_NOT_FOUND")
        if unit.state == "quarantined" and not tried:
            if accepted:
                self.model.accept(unit, self.company.submitted[unit.key])
            else:
                unit.state = "discarded"

    @rule(number=NUMBER, accepted=st.booleans())
    def be_too_late(self, number: int, accepted: bool) -> None:
        self.hand_out_again(6)
        self.come_late(number, work_pb2.WORK_OUTCOME_SUCCEEDED)
        self.settle(number, accepted, tried=False)

    @precondition(lambda self: self.model.units)
    @rule(number=NUMBER, tried=st.booleans())
    def revoke(self, number: int, tried: bool) -> None:
        unit = self.model.units[number % len(self.model.units)]
        request = admin_pb2.RevokeLeasesRequest(act=_act(tried), allocation_keys=[unit.key])
        (answer,) = self.call("AdminService/RevokeLeases", request).leases
        assert answer.error.reason == ("" if unit.state == "live" else "LEASE_LOST")
        if unit.state == "live" and not tried:
            self.model.give_back(unit, "expired")

    @rule(number=NUMBER)
    def goodbye(self, number: int) -> None:
        client = CLIENTS[number % len(CLIENTS)]
        held = [unit for unit in self.model.of("live") if unit.client == client]
        answer = self.run(self.company.allocator.heartbeat(client, goodbye=True))
        assert answer.released_leases == len(held)
        self.model.known.discard(client)
        for unit in held:
            self.model.give_back(unit, "released")

    @rule(number=NUMBER, tried=st.booleans())
    def declare_dead(self, number: int, tried: bool) -> None:
        client = CLIENTS[number % len(CLIENTS)]
        request = client_pb2.DeclareInstanceDeadRequest(act=_act(tried), client_id=client)
        if client not in self.model.known:
            assert self.refused("ClientService/DeclareInstanceDead", request) == "CLIENT_NOT_FOUND"
            return
        held = [unit for unit in self.model.of("live") if unit.client == client]
        for _ in range(2):
            assert self.call("ClientService/DeclareInstanceDead", request).released_leases == len(held)
        if not tried:
            for unit in held:
                self.model.give_back(unit, "expired")

    @rule(number=NUMBER, draining=_MOSTLY.map(lambda working: not working))
    def drain(self, number: int, draining: bool) -> None:
        client = CLIENTS[number % len(CLIENTS)]
        request = client_pb2.SetClientDrainingRequest(client_id=client, draining=draining)
        answer = self.call("ClientService/SetClientDraining", request).client
        assert (answer.draining, answer.leases) == (
            draining,
            sum(unit.client == client for unit in self.model.of("live")),
        )
        (self.model.draining.add if draining else self.model.draining.discard)(client)
        assert self.run(self.company.allocator.heartbeat(client)).drain == draining
        self.model.known.add(client)

    @rule(number=NUMBER)
    def toggle(self, number: int) -> None:
        exit_ = self.company.exit(number)
        request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id)
        for _ in range(2):
            answer = self.call("ExitService/ToggleExit", request)
        self.model.toggle(exit_)
        assert answer.exit.use_count == self.model.uses(exit_)

    @rule(number=NUMBER, enabled=_MOSTLY)
    def switch_exit(self, number: int, enabled: bool) -> None:
        exit_ = self.company.exit(number)
        request = exit_pb2.SetExitEnabledRequest(exit_id=exit_.exit_id, enabled=enabled)
        assert self.call("ExitService/SetExitEnabled", request).exit.enabled == enabled
        exit_.enabled = enabled

    @rule(number=NUMBER)
    def end_window(self, number: int) -> None:
        exit_ = self.company.exit(number)
        self.run(self.company.end_window(exit_))
        exit_.window = False

    @rule(number=NUMBER, active=_MOSTLY)
    def switch(self, number: int, active: bool) -> None:
        slot = self.company.slot(number)
        request = (slot_pb2.ResumeSlotRequest if active else slot_pb2.PauseSlotRequest)(slot_id=slot.slot_id)
        changed = self.call(f"SlotService/{'ResumeSlot' if active else 'PauseSlot'}", request).slot
        assert changed.spec.is_active == active
        if slot.active != active:
            slot.active = active
            self.model.follow(slot)

    @rule(number=NUMBER, quota=st.integers(1, 5))
    def change_quota(self, number: int, quota: int) -> None:
        slot = self.company.slot(number)
        changed = self.run(self.company.allocator.update(slot.slot_id, daily_quota=quota))
        if quota != slot.daily:
            slot.daily = quota
            self.model.follow(slot)
        if changed.HasField("today"):
            assert changed.today.quota == self.model.quota(slot.slot_id, self.model.day)

    @rule(number=NUMBER, units=st.integers(1, 3), tried=st.booleans())
    def reopen_quota(self, number: int, units: int, tried: bool) -> None:
        slot = self.company.slot(number)
        request = admin_pb2.ReopenQuotaRequest(act=_act(tried), slot_id=slot.slot_id, units=units)
        if not slot.active and not self.run(self.company.has_day(slot)):
            assert self.refused("AdminService/ReopenQuota", request) == "SLOT_DAY_NOT_FOUND"
            return
        taken = self.model.taken(slot.slot_id, self.model.day)
        # The day follows its slot first.
        before = max(slot.daily + slot.reopened[self.model.day], taken)
        for _ in range(2):
            answer = self.call("AdminService/ReopenQuota", request)
            assert (answer.quota_before, answer.quota, answer.room) == (before, before + units, before + units - taken)
        if not tried:
            self.model.follow(slot)
            self.model.reopen(slot, units)

    @rule(name=st.sampled_from(TARGETS[1:]), most=st.sampled_from([0, 0, 1, 2, 3]))
    def set_policy(self, name: str, most: int) -> None:
        policy = target_pb2.TargetPolicy(max_in_flight=most, min_delay=Duration(), auto_pause=False)
        request = target_pb2.SetTargetPolicyRequest(target=name, policy=policy)
        assert self.call("TargetService/SetTargetPolicy", request).target.policy == policy
        self.company.target(name).most = most or None

    @rule(number=NUMBER, idle=_MOSTLY)
    def hold(self, number: int, idle: bool) -> None:
        if idle:
            return
        target = self.company.target_name(self.company.slot(number))
        request = target_pb2.HoldTargetRequest(target=target, duration=Duration(seconds=3600), reason="maintenance")
        assert self.call("TargetService/HoldTarget", request).target.HasField("held_until")
        self.company.target(target).held = True

    @rule(number=NUMBER, by_operator=st.booleans())
    def end_hold(self, number: int, by_operator: bool) -> None:
        target = self.company.target_name(self.company.slot(number))
        if target not in self.model.targets:
            return
        if by_operator:
            request = target_pb2.ResumeTargetRequest(target=target)
            assert not self.call("TargetService/ResumeTarget", request).target.HasField("held_until")
        else:
            self.run(self.company.pass_hold(target))
        self.model.targets[target].held = False

    @precondition(lambda self: not self.company.is_tomorrow)
    @rule(rarely=st.integers(0, 5))
    def midnight(self, rarely: int) -> None:
        if rarely == 0:
            self.run(self.company.turn_the_day())

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "company"):
            self.run(self.company.compare())

    def teardown(self) -> None:
        if hasattr(self, "company"):
            self.run(self.company.allocator.check_invariants())


def _act(tried: bool) -> admin_pb2.Act:
    return admin_pb2.Act(request_id=str(uuid.uuid4()), reason="because", dry_run=tried)


@pytest.fixture
def stage(
    postgres_server: PostgresServer, migrated_database: Callable[[str], AbstractContextManager[str]]
) -> Iterator[Stage]:
    """A service in a loop of its own, whose own sweep does not come."""
    loop = Loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        database = stack.enter_context(migrated_database("allocator"))
        made = loop.run(start_stage(loop, postgres_server, database))
        stack.callback(lambda: loop.run(made.stop()))
        yield made


def test_leases_hold_their_invariants_in_any_order(stage: Stage) -> None:
    class Machine(LeaseMachine):
        pass

    Machine.stage = stage
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            # Not shrunk: against a real service that takes minutes, and the steps say enough.
            phases=[Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
