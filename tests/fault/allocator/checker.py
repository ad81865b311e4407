"""The proof: from what clients were told and what the tables hold, that nothing went wrong.

What is claimed is only what is certain. A unit counts from its acknowledgement until somebody began to end it, or until
it ran out as its holder was last told; so sums of such spans never exceed what was really taken, and one that passes a
quota or a cap proves that it was passed. For "no work" it is the other way round: every allocation on record that may
have been there counts as taken, but for those whose release was acknowledged before the call, so that what is left was
certainly free during the whole of the call.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.fault.allocator.evidence import FOREVER, Evidence, ExitFacts, SteadySlot, Tables, Unit
from tests.fault.allocator.history import Attempt, End

_STATUS = {"succeeded": 2, "failed": 3, "blocked": 4}
_RELEASED = 6
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be: its kind, and the particulars."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the fleet was given: exits by id, and how many units of a target may be in flight at once."""

    exits: Mapping[str, ExitFacts]
    most_in_flight: Mapping[str, int]


def check(evidence: Evidence, tables: Tables, facts: Facts) -> list[Violation]:
    """Returns everything that is wrong; nothing when all is well."""
    return [
        *_quotas(evidence),
        *_caps(evidence, facts),
        *_in_flight(evidence, facts),
        *_one_lease(evidence),
        *_one_answer(evidence, tables),
        *_grants_on_record(evidence, tables),
        *_results(evidence, tables),
        *_unasked(evidence, tables),
        *_no_work(evidence, tables),
        *_internal(evidence),
        *(Violation("table", f"{name}: {rows} rows") for name, rows in tables.broken.items() if rows),
    ]


def _passed(spans: Iterable[Span], limit: Callable[[float], int]) -> tuple[float, int] | None:
    """Returns when more spans than allowed cover a moment, and how many; None when never."""
    steps = sorted((moment, step) for begin, end in spans if begin < end for moment, step in ((begin, 1), (end, -1)))
    count = 0
    for moment, step in steps:
        count += step
        if step > 0 and count > limit(moment):
            return moment, count
    return None


def _always(most: int) -> Callable[[float], int]:
    return lambda _: most


def _quotas(evidence: Evidence) -> Iterator[Violation]:
    spans: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for unit in evidence.units.values():
        spans[unit.slot, unit.work_date].extend(unit.taken())
    for (slot, day), taken in spans.items():
        quotas = evidence.quotas.get(slot, [])
        if not quotas:
            continue  # nobody was told of its creation, and so nobody knows its quota

        # A day keeps room for what counts against it when its quota shrinks: only the greatest of before is certain.
        def limit(moment: float, quotas: list[tuple[float, int]] = quotas) -> int:
            return max((quota for begun_at, quota in quotas if begun_at <= moment), default=0)

        if (passed := _passed(taken, limit)) is not None:
            yield Violation(
                "quota", f"slot {slot} on {day}: {passed[1]} of {limit(passed[0])} taken at {passed[0]:.3f}"
            )


def _until_toggle(unit: Unit, span: Span, evidence: Evidence) -> Span:
    """Cuts a span where a toggle may have begun the count afresh."""
    begin, end = span
    for toggle in evidence.toggles.get(unit.exit, []):
        if toggle.ended_at > unit.begun_at:
            end = min(end, toggle.begun_at)
    return begin, end


def _caps(evidence: Evidence, facts: Facts) -> Iterator[Violation]:
    users: dict[str, list[Unit]] = defaultdict(list)
    for unit in evidence.units.values():
        if unit.exit:
            users[unit.exit].append(unit)
    for exit_id, units in users.items():
        exit_ = facts.exits.get(exit_id)
        if exit_ is None:
            yield Violation("cap", f"exit {exit_id} was handed out and is none of the fleet's")
        elif exit_.mode == 3:
            yield from _windows(exit_id, exit_, units)
        else:
            spans = [_until_toggle(unit, unit.in_use(exit_.mode), evidence) for unit in units]
            if (passed := _passed(spans, _always(exit_.cap))) is not None:
                yield Violation("cap", f"exit {exit_id}: {passed[1]} uses of {exit_.cap} at {passed[0]:.3f}")


def _windows(exit_id: str, exit_: ExitFacts, units: list[Unit]) -> Iterator[Violation]:
    """A span as long as a window touches two of them at most, so twice the cap bounds the uses that were kept."""
    kept = sorted((unit for unit in units if unit.recorded_at < FOREVER), key=lambda unit: unit.begun_at)
    for number, first in enumerate(kept):
        end = first.begun_at + exit_.window_seconds
        uses = sum(unit.told_at <= end for unit in kept[number:])
        if uses > 2 * exit_.cap:
            yield Violation("cap", f"exit {exit_id}: {uses} uses in one window from {first.begun_at:.3f} on")
            return


def _in_flight(evidence: Evidence, facts: Facts) -> Iterator[Violation]:
    for target, most in facts.most_in_flight.items():
        spans = [unit.in_use(2) for unit in evidence.units.values() if unit.target == target]
        if (passed := _passed(spans, _always(most))) is not None:
            yield Violation("in flight", f"target {target}: {passed[1]} of {most} at {passed[0]:.3f}")


def _one_lease(evidence: Evidence) -> Iterator[Violation]:
    tokens: dict[str, str] = {}
    for attempt in evidence.of_kind("allocate"):
        for told in attempt.told.get("units", ()):
            unit = evidence.units[told["key"]]
            if unit.request_id != attempt.asked["request_id"] or unit.token != told["token"]:
                yield Violation("two leases", f"{unit.key} was handed to {unit.request_id} and {attempt.name}")
            if tokens.setdefault(told["token"], unit.key) != unit.key:
                yield Violation("two leases", f"{unit.key} and {tokens[told['token']]} have one token")


def _one_answer(evidence: Evidence, tables: Tables) -> Iterator[Violation]:
    answers: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in evidence.of_kind("allocate"):
        if attempt.end is End.OK:
            answers[attempt.asked["request_id"]].append(attempt)
    for request_id, attempts in answers.items():
        first: set[str] | None = None
        for attempt in attempts:
            keys = {unit["key"] for unit in attempt.told["units"]}
            if len(keys) > attempt.asked["items"]:
                yield Violation("two answers", f"{request_id} asked for {attempt.asked['items']} and got {len(keys)}")
            if first is None:
                # "No work" is forgotten, and the id may be used again.
                first = keys or None
            elif not keys or not keys <= first:
                yield Violation("two answers", f"{request_id} was answered with {len(first)} units, then with others")
        if first is not None and not first <= tables.requests.get(request_id, set()):
            yield Violation("two answers", f"{request_id} is not on record with the units of its answer")


def _grants_on_record(evidence: Evidence, tables: Tables) -> Iterator[Violation]:
    for unit in evidence.units.values():
        row = tables.allocations.get(unit.key)
        if row is None:
            yield Violation("lost", f"allocation {unit.key} was acknowledged and is not on record")
        elif (row.slot, row.exit, row.token, row.work_date) != (unit.slot, unit.exit, unit.token, unit.work_date):
            yield Violation("lost", f"allocation {unit.key} is on record as another than was acknowledged")
    for key in evidence.released_at:
        row = tables.allocations.get(key)
        if row is not None and row.status != _RELEASED:
            yield Violation("lost", f"allocation {key} was released and has status {row.status}")


def _results(evidence: Evidence, tables: Tables) -> Iterator[Violation]:
    stored = {row.key: row for row in tables.results}
    for key, count in Counter(row.key for row in tables.results).items():
        if count > 1:
            yield Violation("counted twice", f"{key} has {count} results")
    answers: dict[str, set[tuple[str, int]]] = defaultdict(set)
    submitted: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for attempt in evidence.of_kind("submit"):
        for key in attempt.asked["keys"]:
            submitted[key].add((_STATUS[attempt.asked["outcome"]], attempt.asked["products"]))
            if attempt.told.get("disposition", "UNSPECIFIED") != "UNSPECIFIED":
                answers[key].add((attempt.told["disposition"], attempt.told["recorded_at"]))
    for key, told in answers.items():
        if len(told) > 1:
            yield Violation("counted twice", f"{key} was acknowledged in {len(told)} ways: {sorted(told)}")
        row, allocation = stored.get(key), tables.allocations.get(key)
        for disposition, _ in told:
            if disposition == "QUARANTINED":
                if key not in tables.quarantined:
                    yield Violation("result lost", f"{key} was acknowledged as in quarantine and is not there")
            elif row is None or allocation is None or allocation.status != row.outcome:
                yield Violation("result lost", f"{key} was acknowledged as {disposition} and is not recorded")
            elif row.late != (disposition == "RECORDED_LATE") or (row.outcome, row.products) not in submitted[key]:
                yield Violation("result lost", f"{key} is recorded otherwise than as it was submitted")


def _unasked(evidence: Evidence, tables: Tables) -> Iterator[Violation]:
    asked = {key for attempt in evidence.of_kind("submit") for key in attempt.asked["keys"]}
    for key in {row.key for row in tables.results} | tables.quarantined:
        if key not in asked:
            yield Violation("result from nowhere", f"{key} has a result that nobody submitted")


def _no_work(evidence: Evidence, tables: Tables) -> Iterator[Violation]:
    granted: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for key, row in tables.allocations.items():
        told = min(evidence.released_at.get(key, FOREVER), evidence.left_at.get(key, FOREVER))
        granted[row.slot, row.work_date].append((row.allocated_at, told if row.status == _RELEASED else FOREVER))
    for attempt, day, slot, steady in judged(evidence):
        begun, ended = attempt.begun_at, attempt.ended_at
        taken = sum(at <= ended and back > begun for at, back in granted[slot, day])
        if taken < steady.quota:
            yield Violation(
                "false no work",
                f"{attempt.name} was told {attempt.told['no_work']} while slot {slot} had at most "
                f"{taken} of {steady.quota} units taken",
            )


def judged(evidence: Evidence) -> Iterator[tuple[Attempt, str, str, SteadySlot]]:
    """Yields the calls that were told "no work", each with the day and every slot by which it is judged."""
    for attempt in evidence.of_kind("allocate"):
        if attempt.end is not End.OK or attempt.told["units"]:
            continue
        moments = (attempt.begun_at, attempt.ended_at)
        day, last = (datetime.fromtimestamp(moment, UTC).date().isoformat() for moment in moments)
        for slot, steady in evidence.steady.items():
            if day == last and steady.from_at <= attempt.begun_at and _wanted(steady, attempt.asked["target"]):
                yield attempt, day, slot, steady


def _wanted(slot: SteadySlot, target: str) -> bool:
    return not target or slot.target == target


def _internal(evidence: Evidence) -> Iterator[Violation]:
    for attempt in evidence.attempts:
        if attempt.told.get("code") in ("INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "INVALID_ARGUMENT"):
            yield Violation("fault", f"{attempt.name} ({attempt.kind}) was answered {attempt.told}")
