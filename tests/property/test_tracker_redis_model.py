"""Two replicas of the Redis engine against the same small model: whatever is done at either is so at both.

Reports, starts, commands and ends at either replica; replicas that vanish and come back without their memory, and a
store that loses everything. After each step both replicas must come to show what the model predicts.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.commands import CommandKind
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached
from session_tracker.organizations import STALE, TAKEN, UNKNOWN
from session_tracker.sessions import Registration, State
from tests.support.redis import RedisServer
from tests.support.replicas import Replica, until
from tests.support.tracker_model import Known, shown

NAMES = st.sampled_from("abc")
COUNTS = st.integers(0, 50)
TEXTS = st.sampled_from(["", "", "list", "detail"])
PLACES = st.integers(0, 1)
LIMIT = 2
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
EXAMPLES = max(40, int(os.environ.get("MUSTER_PROPERTY_EXAMPLES", "0")) // 10)


def _update(name: str, sequence: int, state: int, stage: str, reason: str, page: int, products: int) -> Any:
    return pb.ProgressUpdate(
        session_id=name,
        sequence=sequence,
        state=state,  # type: ignore[arg-type]
        stage=stage,
        reason=reason,
        current_page=page,
        total_pages=50,
        products_found=products,
    )


UPDATES = st.builds(_update, NAMES, st.integers(1, 15), st.sampled_from([0, 2, 2, 3, 4]), TEXTS, TEXTS, COUNTS, COUNTS)


class ReplicasMachine(RuleBasedStateMachine):
    """Every rule does something at one replica, and waits until both show it."""

    server: RedisServer

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.server.call("FLUSHALL")
        self.model: dict[str, Known] = {}
        self.places = [self.replica(), self.replica()]
        self.agree()

    def replica(self) -> Replica:
        # Silence is the other machine's: here nothing is silent for long enough.
        made = Replica(self.server.url, max_per_organization=LIMIT)
        self.loop.run_until_complete(made.engine.start())
        return made

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for replica in self.places:
                self.loop.run_until_complete(asyncio.wait_for(replica.engine.close(), 10))
            self.loop.close()

    def agree(self) -> None:
        wanted = {name: known.view() for name, known in self.model.items()}

        def agreed() -> bool:
            for replica in self.places:
                replica.acme.settle()
            return all(
                replica.engine.whole and {name: shown(one) for name, one in replica.acme.sessions.items()} == wanted
                for replica in self.places
            )

        try:
            self.loop.run_until_complete(until(agreed, "both replicas show what is so"))
        except AssertionError as error:
            views = [{n: shown(one) for n, one in replica.acme.sessions.items()} for replica in self.places]
            raise AssertionError(f"wanted {wanted}, have {views}") from error
        live = [known for known in self.model.values() if known.leaves is None]
        for replica in self.places:
            totals = replica.acme.totals()
            assert (totals.live, totals.pages) == (len(live), sum(known.page for known in live))
            counted = {state: count for state, count in totals.by_state.items() if count}
            assert counted == Counter(known.state for known in live)

    @rule(place=PLACES, name=NAMES)
    def start(self, place: int, name: str) -> None:
        acme = self.places[place].acme
        registration = Registration(name, stage="begin", started_at=BEGUN)
        known = self.model.get(name)
        if known is not None and known.leaves is not None:
            with pytest.raises(SessionAlreadyCompleted):
                acme.start(registration)
        elif known is None and sum(one.leaves is None for one in self.model.values()) == LIMIT:
            with pytest.raises(SessionLimitReached):
                acme.start(registration)
        else:
            acme.start(registration)
            if known is None:
                self.model[name] = Known(BEGUN, 0.0, 0.0, stage="begin")
        self.agree()

    @rule(place=PLACES, updates=st.lists(UPDATES, min_size=1, max_size=4))
    def report(self, place: int, updates: list[Any]) -> None:
        verdicts = []
        for update in updates:
            known = self.model.get(update.session_id)
            taken = known is not None and known.take(update, 0.0, None)
            verdicts.append(UNKNOWN if known is None else TAKEN if taken else STALE)
        assert self.places[place].acme.report(updates).verdicts == verdicts
        self.agree()

    @rule(place=PLACES, name=NAMES, kind=st.sampled_from([2, 4]))
    def command(self, place: int, name: str, kind: int) -> None:
        known = self.model.get(name)
        session = self.places[place].session(name)
        if known is None or session is None:
            return
        told = self.places[place].acme.command(session, CommandKind(kind), "because")
        assert told == (known.leaves is None)
        # Its number is by the time of day.
        known.command = session.command
        self.agree()

    @rule(place=PLACES, name=NAMES, state=st.sampled_from([State.COMPLETED, State.FAILED, State.STOPPED]))
    def complete(self, place: int, name: str, state: State) -> None:
        known = self.model.get(name)
        if known is None or known.leaves is not None:
            return
        if sum(one.leaves is not None for one in self.model.values()) == LIMIT:
            # The first of them would leave, as test_tracker_model.py has it; which one that is, a replica that came
            # back does not know.
            return
        self.places[place].acme.complete(name, 60, state, products=7, errors=1, reason="done")
        known.state, known.reason, known.page, known.products, known.errors = state, "done", 60, 7, 1
        known.leaves = 60.0
        self.agree()

    @rule(place=PLACES)
    def vanish_and_come_back(self, place: int) -> None:
        # Bounded: an engine that does not end when it is told to is a fault of its own.
        self.loop.run_until_complete(asyncio.wait_for(self.places[place].vanish(), 10))
        self.places[place] = self.replica()
        self.agree()

    @rule()
    def lose_the_store(self) -> None:
        self.server.restart()
        self.agree()


def test_replicas_are_as_one(redis_server: RedisServer) -> None:
    machine = type("Machine", (ReplicasMachine,), {"server": redis_server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
