"""Check-outs, saves, check-ins, expiry and forced release against a small model, on the real service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from muster.persona_store.v1 import checkout_pb2, persona_pb2

from tests.support.personas import (
    EXCLUSIVE,
    READ_ONLY,
    PersonaClient,
    duration,
    new_id,
    refusal_of,
    start_personas,
)
from tests.support.services import StartService

HOLDERS = st.sampled_from(["h1", "h2", "h3", "h4"])
INDEX = st.integers(0, 2)
MODES = st.sampled_from([EXCLUSIVE, READ_ONLY])
OUTCOMES = st.sampled_from([1, 2, 3, 4])
DATA = st.sampled_from([b"a", b"b", b"c"])
KEPT = 3


@dataclass(slots=True)
class Model:
    """A persona as it should be."""

    uses: int = 0
    successes: int = 0
    blocks: int = 0
    generation: int = 1
    # The state part of each kept generation.
    states: dict[int, bytes] = field(default_factory=lambda: {1: b""})


@dataclass(slots=True)
class Held:
    """A check-out as it should be."""

    persona_id: str
    mode: int
    check_out: checkout_pb2.CheckOut


class Machine(RuleBasedStateMachine):
    """Drives the service; `run` and `client` are set for each test."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    client: PersonaClient
    round = 0

    def __init__(self) -> None:
        super().__init__()
        # Each example has an organization of its own, so that it begins with nothing.
        Machine.round += 1
        organization = f"round {Machine.round}"
        self.mine: PersonaClient = self.do(PersonaClient.of(type(self).client.service, organization))
        self.personas: dict[str, Model] = {}
        for _ in range(3):
            self.personas[self.do(self.mine.create()).persona_id] = Model()
        self.ids = list(self.personas)
        self.held: dict[str, Held] = {}
        self.gone: list[Held] = []

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return type(self).run(work)

    def exclusive(self, persona_id: str) -> bool:
        return any(held.persona_id == persona_id and held.mode == EXCLUSIVE for held in self.held.values())

    @rule(holder=HOLDERS, index=INDEX, mode=MODES)
    def check_out_named(self, holder: str, index: int, mode: int) -> None:
        persona_id = self.ids[index]
        result = self.do(self.mine.take_one(holder, persona_id, mode=mode))
        existing = self.held.get(holder)
        if existing is not None:
            if (existing.persona_id, existing.mode) == (persona_id, mode):
                assert result.check_out.lease_token == existing.check_out.lease_token
            else:
                assert result.error.reason == "PERSONA_CHECKED_OUT"
        elif mode == EXCLUSIVE and self.exclusive(persona_id):
            assert result.error.reason == "PERSONA_CHECKED_OUT"
        else:
            self.held[holder] = Held(persona_id, mode, result.check_out)
            assert result.check_out.persona.persona_id == persona_id

    @rule(holder=HOLDERS)
    def pick(self, holder: str) -> None:
        result = self.do(self.mine.take_one(holder))
        existing = self.held.get(holder)
        if existing is not None:
            if existing.mode == EXCLUSIVE:
                assert result.check_out.lease_token == existing.check_out.lease_token
            else:
                assert result.error.reason == "PERSONA_CHECKED_OUT"
            return
        free = [persona_id for persona_id in self.ids if not self.exclusive(persona_id)]
        if not free:
            assert result.error.reason == "NO_PERSONA_MATCHES"
            assert result.error.metadata == {"held": "3", "cooling": "0"}
            return
        assert result.check_out.persona.persona_id in free
        self.held[holder] = Held(result.check_out.persona.persona_id, EXCLUSIVE, result.check_out)

    @rule(holder=HOLDERS, outcome=OUTCOMES)
    def check_in(self, holder: str, outcome: int) -> None:
        existing = self.held.pop(holder, None)
        assert self.do(self.mine.bring_back(holder, outcome)) is (existing is not None)
        if existing is not None:
            self.gone.append(existing)
            model = self.personas[existing.persona_id]
            model.uses += outcome != checkout_pb2.USE_OUTCOME_NOT_USED
            model.successes += outcome == checkout_pb2.USE_OUTCOME_SUCCEEDED
            model.blocks += outcome == checkout_pb2.USE_OUTCOME_BLOCKED

    @precondition(lambda self: self.held)
    @rule(holder=HOLDERS)
    def expire(self, holder: str) -> None:
        existing = self.held.pop(holder, None)
        if existing is not None:
            self.gone.append(existing)
            organization = self.do(self.mine.service.organization_id(self.mine.organization))
            self.do(
                self.mine.sql(
                    "UPDATE check_outs SET expires_at = now() - interval '1 second'"
                    " WHERE organization_id = $1 AND holder = $2",
                    organization,
                    holder,
                )
            )

    @rule(holder=HOLDERS)
    def renew(self, holder: str) -> None:
        existing = self.held.get(holder)
        token = existing.check_out.lease_token if existing else b"x" * 16
        request = checkout_pb2.RenewCheckOutsRequest(
            items=[checkout_pb2.RenewCheckOutItem(holder=holder, lease_token=token, duration=duration(600))]
        )
        call = self.mine.check_outs.RenewCheckOuts

        async def renewed() -> checkout_pb2.RenewCheckOutsResponse:
            return await call(request, metadata=self.mine.worker)

        result = self.do(renewed()).results[0]
        assert result.HasField("expires_at") is (existing is not None)

    @precondition(lambda self: self.held)
    @rule(holder=HOLDERS, data=DATA)
    def save(self, holder: str, data: bytes) -> None:
        existing = self.held.get(holder)
        if existing is None:
            return
        if existing.mode == READ_ONLY:
            assert self.refused(self.mine.save(existing.check_out, {"state.json": data})) == "CHECK_OUT_READ_ONLY"
            return
        made = self.do(self.mine.save(existing.check_out, {"state.json": data}))
        self.committed(existing.persona_id, made.generation, data)

    def committed(self, persona_id: str, generation: int, data: bytes) -> None:
        model = self.personas[persona_id]
        assert generation > model.generation
        model.generation = generation
        model.states[generation] = data
        model.states = {number: model.states[number] for number in sorted(model.states)[-KEPT:]}

    @precondition(lambda self: self.gone)
    @rule(choose=st.randoms(use_true_random=False), data=DATA)
    def save_with_a_stale_token(self, choose: Any, data: bytes) -> None:
        stale = choose.choice(self.gone)
        assert self.refused(self.mine.save(stale.check_out, {"state.json": data})) == "CHECK_OUT_LOST"

    @rule(index=INDEX)
    def force_release(self, index: int) -> None:
        persona_id = self.ids[index]
        request = persona_pb2.ForceReleaseRequest(persona_id=persona_id, reason="model")

        async def released() -> int:
            answer = await self.mine.personas.ForceRelease(request, metadata=self.mine.operator)
            return answer.released

        ended = [holder for holder, held in self.held.items() if held.persona_id == persona_id]
        assert self.do(released()) == len(ended)
        for holder in ended:
            self.gone.append(self.held.pop(holder))

    @rule(index=INDEX, back=st.integers(0, KEPT - 1))
    def roll_back(self, index: int, back: int) -> None:
        persona_id = self.ids[index]
        model = self.personas[persona_id]
        target = sorted(model.states)[-1 - min(back, len(model.states) - 1)]
        request = persona_pb2.RollbackBundleRequest(request_id=new_id(), persona_id=persona_id, generation=target)

        async def rolled_back() -> int:
            answer = await self.mine.personas.RollbackBundle(request, metadata=self.mine.operator)
            return answer.generation.generation

        if self.exclusive(persona_id):
            assert self.refused(rolled_back()) == "PERSONA_CHECKED_OUT"
        else:
            self.committed(persona_id, self.do(rolled_back()), model.states[target])

    def refused(self, work: Coroutine[Any, Any, Any]) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            self.do(work)
        return refusal_of(caught.value).reason

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.do(self.compare())

    async def compare(self) -> None:
        for persona_id, model in self.personas.items():
            persona = await self.mine.get(persona_id)
            assert (persona.total_uses, persona.success_count, persona.blocked_count, persona.generation) == (
                model.uses,
                model.successes,
                model.blocks,
                model.generation,
            )
            holders = [
                holder for holder, held in self.held.items() if (held.persona_id, held.mode) == (persona_id, EXCLUSIVE)
            ]
            assert [persona.held_by] == (holders or [""])
            assert await self.mine.generations(persona_id) == sorted(model.states, reverse=True)
            for generation, state in model.states.items():
                assert (await self.mine.load(persona_id, generation)).get("state.json", b"") == state


async def test_the_service_does_as_the_model(start_service: StartService, tmp_path: Path) -> None:
    client = await start_personas(start_service, tmp_path, bundles={"generations_kept": KEPT, "collect_seconds": 86400})
    loop = asyncio.get_running_loop()
    Machine.client = client
    Machine.run = staticmethod(lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(timeout=30))
    limits = settings(
        max_examples=15,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    # The service lives in this loop; the machine, which waits for it, in a thread.
    await asyncio.to_thread(run_state_machine_as_test, Machine, settings=limits)
