"""Report streams against the same model: packed batches as bytes, between everything else that changes sessions.

Most batches repeat the handles of one before with greater sequences, so that they are taken as a convoy's and wait;
some of them are stale in part, lack arrays, name other sessions, another state or total, or overlap another stream's.
Whatever happens then, each answer and each state must be as if every batch had been applied at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.commands import Command
from session_tracker.messages import command_messages
from session_tracker.organizations import TAKEN, UNKNOWN
from session_tracker.reception import Reception
from tests.property.test_tracker_model import (
    COUNTS,
    LIMIT,
    NAME_LIST,
    NAMES,
    REPORTED,
    UPDATES,
    TrackerMachine,
    _update,
)
from tests.support.tracker_model import Ear, shown

STREAMS = st.integers(0, 2)
TOTALS = st.sampled_from([0, 40, 40])
# Some need another number of bytes than the sequence before.
STEPS = st.lists(st.sampled_from([1, 1, 2, 3, 90, 20_000]), min_size=4, max_size=4)
OTHERS = st.sampled_from(["", "", "", "", "", "", "stale", "states", "total", "fewer"])


@dataclass(slots=True)
class Arrays:
    """What one batch says of each session it names, and which arrays it leaves out."""

    handles: list[int]
    sequences: list[int]
    pages: list[int]
    totals: list[int]
    products: list[int]
    errors: list[int]
    states: list[int]
    left_out: frozenset[str] = frozenset()

    def message(self) -> pb.PackedUpdates:
        arrays = {
            "current_page": self.pages, "total_pages": self.totals, "products_found": self.products,
            "errors_count": self.errors, "state": self.states,
        }  # fmt: skip
        given: Any = {name: values for name, values in arrays.items() if name not in self.left_out}
        return pb.PackedUpdates(handle=self.handles, sequence=self.sequences, **given)


@dataclass(slots=True)
class Stream:
    """One open stream, and the last batch that it sent."""

    reception: Reception
    ear: Ear = field(default_factory=Ear)
    names: list[str] = field(default_factory=list)
    batch: int = 0
    last: Arrays | None = None


class StreamsMachine(TrackerMachine):
    """Adds streams to what the tracker is held against."""

    convoyed = 0

    def fresh(self) -> None:
        super().fresh()
        self.streams = {which: self.opened() for which in range(3)}
        for name in NAME_LIST[:LIMIT]:
            self.start(name, None, 40, b"")

    def opened(self) -> Stream:
        return Stream(Reception(self.tracker))

    def send(self, stream: Stream, arrays: Arrays, names: list[str]) -> None:
        """Sends a batch, and holds its answer against the model's."""
        stream.names += names
        stream.batch += 1
        stream.last = arrays
        request = pb.ReportStreamRequest(batch=stream.batch, names=names, packed=arrays.message())
        waiting = len(self.tracker.live.waiting)
        answer = stream.reception.take(request.SerializeToString(), stream.ear)
        type(self).convoyed += len(self.tracker.live.waiting) > waiting
        verdicts = []
        for place, handle in enumerate(arrays.handles):
            name = stream.names[handle]
            known = self.model.get(name)
            said = {"page": arrays.pages, "total": arrays.totals, "products": arrays.products, "errors": arrays.errors}
            fields = {"page": "current_page", "total": "total_pages", "products": "products_found"}
            counts = [
                getattr(known, one, 0) if fields.get(one, "errors_count") in arrays.left_out else values[place]
                for one, values in said.items()
            ]
            state = 0 if "state" in arrays.left_out else arrays.states[place]
            update = _update(name, arrays.sequences[place], state, "", "", *counts, acknowledged=0, classes={})
            verdicts.append(self.verdict(update, stream.ear))
            if known is not None:
                # Several batches of one moment are counted together: whether that was a page the model cannot say.
                known.paged = None
        named = [stream.names[handle] for handle in arrays.handles]
        unknown = [name for name, verdict in zip(named, verdicts, strict=True) if verdict == UNKNOWN]
        stale = len(named) - verdicts.count(TAKEN) - len(unknown)
        assert (answer.batch, answer.taken, answer.stale) == (stream.batch, verdicts.count(TAKEN), stale)
        assert list(answer.unknown_sessions) == unknown
        commands: list[Command] = self.waiting(set(named))
        assert list(answer.commands) == command_messages(commands)

    @rule(
        which=STREAMS, order=st.permutations(range(len(NAME_LIST))), size=st.integers(1, len(NAME_LIST)),
        sequence=st.integers(1, 15), counts=st.tuples(COUNTS, COUNTS, COUNTS), total=TOTALS, state=REPORTED,
        left_out=st.frozensets(
            st.sampled_from(["current_page", "total_pages", "products_found", "errors_count", "state"]), max_size=2
        ),
    )  # fmt: skip
    def new_batch(
        self,
        which: int,
        order: list[int],
        size: int,
        sequence: int,
        counts: tuple[int, int, int],
        total: int,
        state: int,
        left_out: frozenset[str],
    ) -> None:
        stream = self.streams[which]
        names = [] if stream.names else list(NAME_LIST)
        pages, products, errors = ([one] * size for one in counts)
        arrays = Arrays(
            list(order[:size]), [sequence] * size, pages, [total] * size, products, errors, [state] * size, left_out
        )
        self.send(stream, arrays, names)

    @rule(
        which=STREAMS, times=st.integers(1, 5), steps=STEPS,
        gains=st.lists(st.integers(-3, 5), min_size=4, max_size=4), other=OTHERS, place=st.integers(0, 3),
        left_out=st.none() | st.frozensets(st.sampled_from(["current_page", "products_found", "errors_count"])),
    )  # fmt: skip
    def batch_like_the_last(
        self,
        which: int,
        times: int,
        steps: list[int],
        gains: list[int],
        other: str,
        place: int,
        left_out: frozenset[str] | None,
    ) -> None:
        stream = self.streams[which]
        for turn in range(times):
            last = stream.last
            if last is None:
                return
            size = len(last.handles)
            new = Arrays(
                last.handles,
                [number + step for number, step in zip(last.sequences, steps, strict=False)],
                [max(0, page + gain) for page, gain in zip(last.pages, gains, strict=False)],
                last.totals,
                [max(0, count + gain) for count, gain in zip(last.products, gains, strict=False)],
                last.errors,
                last.states,
                last.left_out if left_out is None else (last.left_out & {"total_pages", "state"}) | left_out,
            )
            if turn == times - 1:
                self.change(new, other, place % size)
            self.send(stream, new, [])

    def change(self, arrays: Arrays, other: str, place: int) -> None:
        """Makes a batch differ from those before it at one place."""
        if other == "stale":
            arrays.sequences[place] = max(1, arrays.sequences[place] - 4)
        elif other == "states":
            arrays.states = [*arrays.states]
            arrays.states[place] = 3
        elif other == "total":
            arrays.totals = [*arrays.totals]
            arrays.totals[place] += 1
        elif other == "fewer" and len(arrays.handles) > 1:
            for name in ("handles", "sequences", "pages", "totals", "products", "errors", "states"):
                setattr(arrays, name, getattr(arrays, name)[1:])

    @precondition(lambda self: any(not known.refused for known in self.live().values()))
    @rule(
        which=STREAMS, turned=st.booleans(), fewer=st.booleans(), states=st.sampled_from([0, 2, 3]),
        times=st.integers(1, 4), steps=STEPS,
    )  # fmt: skip
    def set_off(self, which: int, turned: bool, fewer: bool, states: int, times: int, steps: list[int]) -> None:
        """Reports sessions that are live until only their counters change."""
        stream = self.streams[which]
        live = sorted(name for name, known in self.live().items() if not known.refused)
        chosen = live[1:] if fewer and len(live) > 1 else live
        if turned:
            chosen.reverse()
        names = [] if stream.names else list(NAME_LIST)
        handles = [NAME_LIST.index(name) for name in chosen]
        of = [self.model[name] for name in chosen]
        arrays = Arrays(
            handles, [known.sequence + 1 for known in of], [known.page + 1 for known in of],
            [known.total for known in of], [known.products for known in of], [known.errors for known in of],
            [states] * len(of),
        )  # fmt: skip
        self.send(stream, arrays, names)
        self.batch_like_the_last(which, times, steps, [1, 2, 3, 0], "", 0, None)

    @rule(name=NAMES, update=UPDATES, step=st.integers(0, 2), heard=st.booleans())
    def newer_report(self, name: str, update: Any, step: int, heard: bool) -> None:
        """A report in full with just the next sequences; `UPDATES` alone is soon behind the streams."""
        if (known := self.model.get(name)) is not None:
            update.session_id, update.sequence = name, known.sequence + step
            self.report([update], heard=heard, again=False)

    @precondition(lambda self: any(stream.last for stream in self.streams.values()))
    @rule(which=STREAMS)
    def stream_ends(self, which: int) -> None:
        self.streams[which].reception.close()
        self.streams[which] = self.opened()

    @rule(name=NAMES)
    def one_is_forgotten(self, name: str) -> None:
        known = self.model.get(name)
        if known is not None and known.leaves is None:
            self.tracker.drop(name)
            del self.model[name]

    def catch_up(self, held: dict[str, tuple[Any, ...]], ids: set[str]) -> None:
        # As whoever reads sessions does.
        self.tracker.settle()
        super().catch_up(held, ids)

    @invariant()
    def every_session_is_as_predicted(self) -> None:
        live = self.tracker.live
        if not self.lazy:
            self.tracker.settle()
        event(f"convoys that wait: {sum(bool(convoy.sessions) for convoy in live.waiting)}")
        waiting = {id(session) for convoy in live.waiting for session in convoy.sessions}
        # What waits shows with the next look at it, and not before.
        assert {name: shown(one) for name, one in self.tracker.sessions.items() if id(one) not in waiting} == {
            name: known.view()
            for name, known in self.model.items()
            if name not in self.tracker.sessions or id(self.tracker.sessions[name]) not in waiting
        }

    @invariant()
    def a_session_is_in_one_convoy_that_is_its_streams(self) -> None:
        of = [
            (session.session_id, id(convoy))
            for stream in self.streams.values()
            for convoy in stream.reception._handles.convoys.values()
            for session in convoy.sessions
        ]
        assert sorted(of) == sorted(
            (session.session_id, id(session.convoy))
            for session in self.tracker.sessions.values()
            if session.convoy is not None
        )

    def teardown(self) -> None:
        try:
            if hasattr(self, "tracker"):
                self.lazy = False
                self.every_session_is_as_predicted()
        finally:
            super().teardown()


def test_streams_and_all_else_come_to_what_the_model_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("session_tracker.intake.LEAST_SESSIONS", 1)
    StreamsMachine.convoyed = 0
    examples = int(os.environ.get("MUSTER_PROPERTY_EXAMPLES", "400"))
    run_state_machine_as_test(
        StreamsMachine, settings=settings(max_examples=examples, stateful_step_count=50, deadline=None)
    )
    # About one for each example; how many there are is up to chance.
    assert StreamsMachine.convoyed > examples // 10, "batches did wait"
