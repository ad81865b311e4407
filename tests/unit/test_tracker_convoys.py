"""Batches that wait: whatever is done meanwhile, all is as if each had been applied at once.

Every case is played twice on one clock, with the same batches: once as they are, so that those which repeat the batch
before wait, and once with a field that the contract does not know, so that each is taken by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.errors import InvalidField
from session_tracker.commands import CommandKind
from session_tracker.convoys import LEAST_SESSIONS
from session_tracker.organizations import Organization
from session_tracker.reception import Reception
from session_tracker.records import Record
from session_tracker.sessions import CheckpointPolicy, Lease, Registration, Session, State
from session_tracker.silence import Silence
from tests.support.tracker_memory import Hands, Report, organization
from tests.support.tracker_model import Ear, Table

# More than one convoy needs, so that a batch of some of them is one too.
SESSIONS = 4 * LEAST_SESSIONS
NAMES = [f"s{number:03}" for number in range(SESSIONS)]
# Sequences begin here, where all of them have as many bytes.
BASE = 1000
_COUNTERS = "current_page", "products_found", "errors_count"
_UNKNOWN_FIELD = b"\xa0\x06\x01"
LEASE = Lease("00000000-0000-7000-8000-000000000001", b"1" * 16)


class Stream:
    """A report stream of one organization."""

    def __init__(self, stage: Stage, names: list[str]) -> None:
        self.stage = stage
        self.reception = Reception(stage.tracker)
        self.ear = Ear()
        self.names = names
        self.batch = 0

    def send(self, *, updates: tuple[Any, ...] = (), **arrays: Any) -> Any:
        self.batch += 1
        packed = pb.PackedUpdates(**arrays) if arrays else None
        names = self.names if self.batch == 1 else []
        request = pb.ReportStreamRequest(batch=self.batch, names=names, updates=updates, packed=packed)
        data = request.SerializeToString() + (b"" if self.stage.waits else _UNKNOWN_FIELD)
        try:
            return self.reception.take(data, self.ear)
        except InvalidField as error:
            return str(error)

    def report(self, step: int, handles: list[int] | None = None, **arrays: Any) -> Any:
        """Reports sessions, all of them if not said otherwise, with a page for every step."""
        handles = list(range(len(self.names))) if handles is None else handles
        size = len(handles)
        given = {
            "sequence": [BASE + step + handle for handle in handles], "current_page": [step] * size,
            "total_pages": [500] * size, "products_found": [3 * step] * size, "errors_count": [1] * size,
        }  # fmt: skip
        return self.send(handle=handles, **(given | arrays))


class Stage:
    """One organization whose sessions were reported until batches wait, if they ever do."""

    def __init__(self, hands: Hands, *, waits: bool) -> None:
        self.hands = hands
        self.waits = waits
        self.tracker: Organization = organization(hands, stalled_after_seconds=30, lost_after_seconds=120)
        self.pending = self.tracker.changes.subscribe()
        for number, name in enumerate(NAMES):
            self.tracker.start(
                Registration(
                    name, slot_id=f"slot {number % 3}", total_pages=500, lease=LEASE if number == 1 else None,
                    checkpoint=CheckpointPolicy(5, 30.0) if number == 2 else None,
                )
            )  # fmt: skip
        self.stream = Stream(self, NAMES)
        self.other = Stream(self, NAMES[::-1])
        self.answers: list[Any] = []
        self.record = self.tracker.export(self.session(1))

    def session(self, number: int) -> Session:
        return self.tracker.sessions[NAMES[number]]

    @property
    def waiting(self) -> int:
        return sum(bool(convoy.sessions) for convoy in self.tracker.live.waiting)

    def seen(self) -> dict[str, Any]:
        """Everything that can be seen of it."""
        tracker = self.tracker
        tracker.changes.distribute()
        live = tracker.live
        now = self.hands.seconds
        sessions = {
            name: [getattr(session, slot) for slot in Session.__slots__ if slot not in _NOT_COMPARED]
            + [tracker.export(session), session.listener is self.stream.ear, session.listener is self.other.ear]
            for name, session in tracker.sessions.items()
        }
        return {
            "sessions": sessions,
            "totals": tracker.totals(),
            "slots": {name: figures.totals(now, rebuilding=False) for name, figures in live.slots.items()},
            "moved": sorted(session.session_id for session in live.moved),
            "unsaved": sorted(live.unsaved),
            "dropped": live.dropped,
            "commanded": live.commanded,
            "pending": self.pending,
            "offset": tracker.changes.offset,
            "heard": [self.stream.ear.heard, self.other.ear.heard],
            "answers": self.answers,
        }


_NOT_COMPARED = {"convoy", "listener", "slot", "save", "_rarities"}


def update(number: int, sequence: int, **fields: Any) -> Any:
    return Report(session_id=NAMES[number], sequence=BASE + sequence, current_page=sequence, total_pages=500, **fields)


def message(number: int, sequence: int, **fields: Any) -> pb.ProgressUpdate:
    return pb.ProgressUpdate(session_id=NAMES[number], sequence=BASE + sequence, total_pages=500, **fields)


def remote(stage: Stage, sequence: int, state: int = 2) -> Record:
    """A record of another replica with a sequence before, between or after those of the batches."""
    counters = replace(
        stage.record.counters, sequence=BASE + sequence, revision=9, state=state, current_page=77, total_pages=500
    )
    return replace(stage.record, counters=counters, reason="elsewhere")


def apply_counters(stage: Stage, sequence: int, state: int = 2) -> bool | None:
    return stage.tracker.apply_counters(NAMES[1], "other", remote(stage, sequence, state).counters)


def take_over(stage: Stage) -> str:
    """Takes over a mirror that is reported here already, which has not been counted."""
    stage.tracker.apply_remote(remote(stage, 75), "other")
    for step in (80, 90):
        stage.stream.report(step)
    assert stage.waiting == stage.waits
    session = stage.session(1)
    assert session.owner
    stage.tracker.take_over(session)
    return session.owner


def mark_silence(stage: Stage, seconds: float) -> bool:
    stage.hands.seconds += seconds
    return stage.tracker.mark_silence(stage.session(1))


async def look(stage: Stage, seconds: float, looks: int) -> None:
    stage.hands.seconds += seconds
    for _ in range(looks):
        await Silence([stage.tracker], Table(stage.hands.clock())).look()  # type: ignore[arg-type]


# The last batch that waits has the sequences BASE + 70 + handle, the one that was applied BASE + 30 + handle.
CASES: dict[str, Callable[[Stage], Any]] = {
    "nothing": lambda stage: None,
    "a newer report": lambda stage: stage.tracker.report([update(1, 90)]),
    "a report older than what waits": lambda stage: stage.tracker.report([update(1, 60)]),
    "a report equal to what waits": lambda stage: stage.tracker.report([update(1, 71), update(1, 72)]),
    "a report that pauses": lambda stage: stage.tracker.report([update(1, 90, state=3, reason="asked to")]),
    "a report with errors": lambda stage: stage.tracker.report([update(1, 90, errors_by_class=())], stage.other.ear),
    "another stream": lambda stage: stage.other.report(90),
    "another stream that is behind": lambda stage: stage.other.report(1),
    "another stream that overlaps": lambda stage: stage.other.report(40, list(range(100))),
    "updates on the same stream": lambda stage: stage.stream.send(updates=(message(1, 72), message(1, 71))),
    "updates and packed ones": lambda stage: stage.stream.send(
        updates=(message(2, 99),), handle=[2, 3], sequence=[BASE + 99] * 2, current_page=[1, 1]
    ),
    "a batch like the last": lambda stage: stage.stream.report(90),
    "a batch without some arrays": lambda stage: stage.stream.report(90, current_page=[], total_pages=[]),
    "a batch with sequences alone": lambda stage: stage.stream.send(
        handle=range(SESSIONS), sequence=range(BASE + 90, BASE + 90 + SESSIONS)
    ),
    "a batch of longer sequences": lambda stage: stage.stream.report(20_000),
    "a batch of longer counters": lambda stage: stage.stream.report(90, current_page=range(80, 80 + SESSIONS)),
    "the same batch again": lambda stage: stage.stream.report(70),
    "an older batch": lambda stage: stage.stream.report(60),
    "a batch with one stale": lambda stage: stage.stream.report(
        90, sequence=[BASE + 90 + place if place != 5 else BASE + 75 for place in range(SESSIONS)]
    ),
    "a batch with another total": lambda stage: stage.stream.report(90, total_pages=[500] * (SESSIONS - 1) + [501]),
    "a batch with a state": lambda stage: stage.stream.report(90, state=[2] * (SESSIONS - 1) + [4]),
    "a batch with states that say the same": lambda stage: stage.stream.report(90, state=[2] * SESSIONS),
    "a batch of some": lambda stage: stage.stream.report(90, list(range(50))),
    "a batch in another order": lambda stage: stage.stream.report(90, list(reversed(range(SESSIONS)))),
    "a malformed batch": lambda stage: stage.stream.report(90, current_page=[1]),
    "a malformed batch with the same handles": lambda stage: stage.stream.report(90, sequence=[BASE + 100]),
    "a wrong state": lambda stage: stage.stream.report(90, state=[7] * SESSIONS),
    "a start with newer progress": lambda stage: (
        stage.tracker.start(Registration(NAMES[1], progress=update(1, 90))).session_id
    ),
    "a start with older progress": lambda stage: (
        stage.tracker.start(Registration(NAMES[1], progress=update(1, 60))).session_id
    ),
    "a start with another lease": lambda stage: (
        stage.tracker.start(
            Registration(NAMES[1], lease=replace(LEASE, lease_token=b"2" * 16), checkpoint=CheckpointPolicy(1, 0.0))
        ).session_id
    ),
    "a completion": lambda stage: stage.tracker.complete(NAMES[1], 75, State.FAILED, reason="broke"),
    "a completion with fewer pages": lambda stage: stage.tracker.complete(NAMES[1], 9, products=1, errors=0),
    "a lost lease": lambda stage: stage.tracker.lose_lease(stage.session(1), "expired"),
    "a command": lambda stage: stage.tracker.command(stage.session(1), CommandKind.PAUSE, "wait"),
    "a drop": lambda stage: stage.tracker.drop(NAMES[2]),
    "newer counters of a mirror": lambda stage: (
        stage.tracker.apply_remote(remote(stage, 75), "other"),
        apply_counters(stage, 90),
    ),
    "newer counters from elsewhere": lambda stage: apply_counters(stage, 90),
    "counters from elsewhere that are behind": lambda stage: apply_counters(stage, 60),
    "another state from elsewhere": lambda stage: apply_counters(stage, 90, 3),
    "a newer record from elsewhere": lambda stage: stage.tracker.apply_remote(remote(stage, 90, 3), "other"),
    "a record from elsewhere that is behind": lambda stage: stage.tracker.apply_remote(remote(stage, 60), "other"),
    "an end from elsewhere": lambda stage: stage.tracker.apply_remote(remote(stage, 60, 7), "other"),
    "a take-over": take_over,
    "a stall of one": lambda stage: mark_silence(stage, 31.0),
    "a silence of one": lambda stage: mark_silence(stage, 121.0),
    "a look": lambda stage: stage.tracker.get(NAMES[1]).current_page,
    "a list": lambda stage: [session.current_page for session in stage.tracker.after(NAMES[5])],
    "an export": lambda stage: stage.tracker.export(stage.session(1)),
    "counters": lambda stage: stage.tracker.counters(stage.session(1)),
    "totals": lambda stage: (stage.tracker.totals(), stage.tracker.totals("slot 1")),
    "changes": lambda stage: stage.tracker.changes.after(0, stage.tracker.sessions.values()),
    "the end of the stream": lambda stage: stage.stream.reception.close(),
    "some seconds": lambda stage: look(stage, 5.0, 1),
    "a stall": lambda stage: look(stage, 31.0, 1),
    "a silence": lambda stage: look(stage, 121.0, 1),
    "a silence that is too long": lambda stage: look(stage, 4000.0, 2),
}


async def play(case: Callable[[Stage], Any], *, waits: bool) -> dict[str, Any]:
    stage = Stage(Hands(), waits=waits)
    for sequence in (10, 20, 30, 40, 55, 70):
        stage.hands.seconds += 0.03
        stage.answers.append(stage.stream.report(sequence))
    assert stage.waiting == waits
    assert (stage.session(1).sequence == BASE + 31) == waits, "the others wait in one batch"
    answer = case(stage)
    if hasattr(answer, "__await__"):
        answer = await answer
    stage.answers.append(answer)
    for sequence in (100, 110, 120, 130):
        stage.hands.seconds += 0.03
        stage.answers.append(stage.stream.report(sequence))
    stage.answers.append(stage.other.report(150))
    return stage.seen()


@pytest.mark.parametrize("case", CASES)
async def test_it_is_as_if_each_batch_had_been_applied_at_once(case: str) -> None:
    waited = await play(CASES[case], waits=True)
    at_once = await play(CASES[case], waits=False)
    for part, of_each in at_once.items():
        assert waited[part] == of_each, part


def stage_that_waits() -> Stage:
    stage = Stage(Hands(), waits=True)
    for sequence in (10, 20, 30, 40):
        stage.stream.report(sequence)
    assert stage.waiting == 1
    return stage


def test_a_session_is_written_once_for_many_batches() -> None:
    stage = stage_that_waits()
    for sequence in range(50, 1050, 10):
        assert stage.stream.report(sequence).taken == SESSIONS
    assert stage.session(0).sequence == BASE + 30
    assert stage.tracker.get(NAMES[0]).sequence == BASE + 1040
    assert len(stage.tracker.live.waiting) == 0


def test_what_waits_is_applied_in_passing() -> None:
    stage = stage_that_waits()
    for turn in range(10):
        stage.hands.seconds += 0.05
        stage.stream.report(50 + 10 * turn)
    assert 0 <= BASE + 140 - stage.session(0).sequence <= 40, "within 0.2 s"


def test_a_session_is_in_one_convoy_at_most_and_a_smaller_one_takes_it_out() -> None:
    stage = stage_that_waits()
    convoy = stage.session(0).convoy
    assert convoy is not None
    half = list(range(SESSIONS // 2))
    for sequence in (50, 60, 70):
        stage.stream.report(sequence, half)
    smaller = stage.session(0).convoy
    assert smaller is not None
    assert smaller is not convoy
    assert len(smaller.sessions) == len(half)
    assert convoy.sessions == ()
    assert stage.session(SESSIONS - 1).convoy is None
    assert stage.session(SESSIONS - 1).sequence == BASE + 40 + SESSIONS - 1, "what waited for it was applied"
    assert set(stage.stream.reception._handles.convoys.values()) == {smaller}


def test_arrays_that_are_left_out_keep_what_waits() -> None:
    stage = stage_that_waits()
    for step, left_out in ((50, "current_page"), (60, "products_found"), (70, "errors_count"), (80, "current_page")):
        arrays = {name: [] if name == left_out else [step] * SESSIONS for name in _COUNTERS}
        assert stage.stream.report(step, **arrays).taken == SESSIONS
    assert stage.session(0).sequence == BASE + 30, "all of them wait"
    session = stage.tracker.get(NAMES[0])
    counters = session.sequence, session.current_page, session.products_found, session.errors_count
    assert counters == (BASE + 80, 70, 80, 80)


def test_a_session_that_began_again_is_taken_out_of_its_new_stream() -> None:
    stage = stage_that_waits()
    stage.tracker.drop(NAMES[1])
    stage.tracker.start(Registration(NAMES[1], total_pages=500))
    for step in (300, 310, 320, 330, 340):
        stage.other.report(step)
    session = stage.session(1)
    assert session.convoy is not None
    assert session.sequence < BASE + 340 + SESSIONS - 2, "a batch waits at the other stream"
    # The other stream names the sessions from the last to the first, and so is ahead with this one.
    answer = stage.stream.report(340, [1])
    assert (answer.taken, answer.stale) == (0, 1)
    assert stage.session(1).sequence == BASE + 340 + SESSIONS - 2


@pytest.mark.parametrize("commanded", [1, SESSIONS - 1, SESSIONS])
def test_the_commands_of_its_sessions_come_with_each_answer(commanded: int) -> None:
    stage = stage_that_waits()
    half = list(range(SESSIONS // 2))
    for number in range(commanded):
        # From the last on, so that the first are of the convoy only when all are commanded.
        stage.tracker.command(stage.session(SESSIONS - 1 - number), CommandKind.PAUSE, "wait")
    expected = NAMES[max(0, SESSIONS - commanded) : SESSIONS // 2]
    for step in (50, 60, 70, 80):
        answer = stage.stream.report(step, half)
        assert [command.session_id for command in answer.commands] == expected
    assert stage.waiting == 1


def test_what_ended_is_not_kept() -> None:
    stage = stage_that_waits()
    stage.stream.reception.close()
    assert not stage.stream.reception._handles.convoys
    assert {session.convoy for session in stage.tracker.sessions.values()} == {None}
    assert stage.session(0).sequence == BASE + 40


def test_few_sessions_are_no_convoy_and_neither_are_changing_ones() -> None:
    stage = Stage(Hands(), waits=True)
    for turn in range(1, 10):
        stage.stream.report(10 * turn, list(range(LEAST_SESSIONS - 1)))
    assert not stage.stream.reception._handles.convoys
    for turn in range(10, 30):
        stage.stream.report(10 * turn, list(range(LEAST_SESSIONS + turn)))
    assert not stage.stream.reception._handles.convoys
    assert stage.waiting == 0


def test_whoever_changes_a_session_without_taking_it_out_fails() -> None:
    stage = stage_that_waits()
    with pytest.raises(AssertionError):
        stage.tracker.live.mark(stage.session(0))
    with pytest.raises(AssertionError):
        stage.tracker.live.enter(stage.session(0), State.PAUSED, "", 0.0)


def test_a_batch_that_cannot_be_read_is_refused() -> None:
    reception = Reception(organization(Hands()))
    with pytest.raises(InvalidField):
        reception.take(b"\xff\xff", None)
