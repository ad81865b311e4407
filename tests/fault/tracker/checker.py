"""The proof: from what workers were told, what watchers saw and what the table holds, that nothing went wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.fault.tracker.history import Event

FINAL = frozenset((7, 8, 9))
ALREADY_COMPLETED = "SESSION_ALREADY_COMPLETED"

# State, pages, products, errors, message.
Outcome = tuple[int, int, int, int, str]
# State, sequence, page.
Sight = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be: its kind, and the particulars."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row of `crawling_results`."""

    session_id: str
    outcome: Outcome


def check(events: Sequence[Event], rows: Sequence[Row]) -> list[Violation]:
    """Returns everything that is wrong but for the end, which is `unhealed`'s; nothing when all is well."""
    return [*_results(events, rows), *_answers(events), *_backwards(events)]


def _outcome(event: Event) -> tuple[str, Outcome]:
    session_id, *outcome = event.of["result"]
    return session_id, tuple(outcome)


def _results(events: Sequence[Event], rows: Sequence[Row]) -> Iterator[Violation]:
    """Every acknowledged completion is on record exactly once and as acknowledged; nothing else is."""
    recorded: dict[str, list[Outcome]] = defaultdict(list)
    for row in rows:
        recorded[row.session_id].append(row.outcome)
    asked: dict[str, set[Outcome]] = defaultdict(set)
    for event in events:
        if event.kind == "complete":
            session_id, outcome = _outcome(event)
            asked[session_id].add(outcome)
        elif event.kind == "completed":
            session_id, outcome = _outcome(event)
            found = recorded.get(session_id, [])
            if not found:
                yield Violation("result lost", f"{session_id}: {outcome}, acknowledged at {event.at:.3f}")
            elif outcome not in found:
                yield Violation("result changed", f"{session_id}: acknowledged {outcome}, on record {found}")
    for session_id, found in recorded.items():
        if len(found) > 1:
            yield Violation("result twice", f"{session_id}: {found}")
        for outcome in found:
            if outcome not in asked[session_id]:
                yield Violation("result from nowhere", f"{session_id}: {outcome}")


def _answers(events: Sequence[Event]) -> Iterator[Violation]:
    """Only one result of a session is ever acknowledged, and that one whenever it is sent."""
    acknowledged: dict[str, set[Outcome]] = defaultdict(set)
    for event in events:
        if event.kind == "completed":
            session_id, outcome = _outcome(event)
            acknowledged[session_id].add(outcome)
    for session_id, outcomes in acknowledged.items():
        if len(outcomes) > 1:
            yield Violation("two results", f"{session_id}: {outcomes}")
    for event in events:
        if event.kind == "refused":
            if "result" in event.of and event.of["reason"] == ALREADY_COMPLETED:
                session_id, outcome = _outcome(event)
                if outcome in acknowledged[session_id]:
                    yield Violation("refused", f"{session_id}: {outcome} was acknowledged and refused")
            else:
                yield Violation("refused", f"{event.process}: {event.of}")


def _backwards(events: Sequence[Event]) -> Iterator[Violation]:
    """Within one epoch of one replica no live session goes back, in its sequence or its pages, and none from its end.

    An end may come from a replica that had not heard of the last reports, and so with an older sequence.
    """
    seen: dict[tuple[str, str, str], Sight] = {}
    for event in events:
        if event.kind != "saw":
            continue
        for session_id, *values in event.of["sessions"]:
            state, sequence, page = values
            key = event.process, event.of["epoch"], session_id
            before = seen.get(key)
            seen[key] = state, sequence, page
            if before is None:
                continue
            if before[0] in FINAL:
                # Its counters are those of its result from then on.
                if state != before[0]:
                    yield Violation("went back", f"{key}: ended in {before}, then {seen[key]}")
            elif state not in FINAL and (sequence < before[1] or page < before[2]):
                yield Violation("went back", f"{key}: from {before} to {seen[key]}")


def held(events: Iterable[Event], watcher: str) -> dict[str, Sight]:
    """Returns what a watcher holds by all that it saw."""
    holds: dict[str, Sight] = {}
    for event in events:
        if event.process == watcher and event.kind == "saw":
            if event.of["snapshot"]:
                holds.clear()
            for session_id, state, sequence, page in event.of["sessions"]:
                holds[session_id] = state, sequence, page
            for session_id in event.of["removed"]:
                holds.pop(session_id, None)
    return holds


def truth(events: Iterable[Event]) -> dict[str, Sight]:
    """Returns what the workers say of their live sessions at the end."""
    return {
        session_id: (state, sequence, page)
        for event in events
        if event.kind == "truth"
        for session_id, state, sequence, page in event.of["sessions"]
    }


def unhealed(true: Mapping[str, Sight], holds: Mapping[str, Sight], watcher: str) -> list[Violation]:
    """Returns how what a watcher holds differs from the truth, sessions that ended aside."""
    live = {session_id: sight for session_id, sight in holds.items() if sight[0] not in FINAL}
    return [
        Violation("not healed", f"{watcher}, {session_id}: sees {live.get(session_id)}, true is {true.get(session_id)}")
        for session_id in sorted(true.keys() | live.keys())
        if live.get(session_id) != true.get(session_id)
    ]
