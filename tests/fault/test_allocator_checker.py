"""The checker itself: a sound history passes, and every kind of violation that is planted in one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fault.allocator.checker import Facts, check
from tests.fault.allocator.evidence import Evidence, ExitFacts, ResultRow, Row, Tables
from tests.fault.allocator.history import Attempt, End

DAY = "2026-03-01"
NOON = 1772366400.0
FACTS = Facts({"until": ExitFacts(1, 2), "at-once": ExitFacts(2, 1), "window": ExitFacts(3, 1, 10.0)}, {"narrow": 1})


class Story:
    """A history in the making, with the tables that go with it; every call takes a second, one after the other."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.tables = Tables()
        self.now = NOON
        self._number = 0

    def attempt(self, kind: str, told: dict[str, Any] | None, **asked: Any) -> Attempt:
        """Adds an attempt; one without an answer has an unknown end."""
        self._number += 1
        made = Attempt(f"p/{self._number}", "p", kind, self.now, asked)
        self.now += 1
        if told is not None:
            made.end, made.ended_at, made.told = End.OK, self.now, told
        self.attempts.append(made)
        return made

    def slot(self, name: str = "slot", quota: int = 2, *, steady: bool = False) -> None:
        self.attempt(
            "create",
            {"slot": name},
            request_id=f"create {name}",
            quota=quota,
            target="",
            steady=steady,
            with_exit=False,
        )

    def grant(self, *keys: str, request: str = "", slot: str = "slot", lasts: float = 100, **unit: Any) -> Attempt:
        """Grants units; the tables have them as expired until something else is said."""
        values = {"slot": slot, "exit": "", "target": "", "work_date": DAY, **unit}
        request = request or f"request {self._number}"
        units = [{"key": key, "token": f"token of {key}", "expires_at": self.now + lasts, **values} for key in keys]
        for key in keys:
            row = Row(values["slot"], values["exit"], f"token of {key}", DAY, 5, False, False, self.now + 0.5)
            self.tables.allocations[key] = row
        self.tables.requests[request] = self.tables.requests.get(request, set()) | set(keys)
        told = {"units": units, "no_work": "" if units else "QUOTA_EXHAUSTED"}
        return self.attempt("allocate", told, request_id=request, items=4, target="", client="pc", instance=0)

    def submit(self, key: str, disposition: str = "RECORDED", at: int = 1, outcome: str = "succeeded") -> None:
        told = {"disposition": disposition, "recorded_at": at, "errors": [""]}
        self.attempt("submit", told, keys=[key], outcome=outcome, products=1)
        late = disposition == "RECORDED_LATE"
        if disposition == "QUARANTINED":
            self.tables.quarantined.add(key)
        elif all(row.key != key for row in self.tables.results):
            self.tables.results.append(ResultRow(key, 2, late, 1))
            self._end(key, 2, late)

    def release(self, key: str) -> None:
        self.attempt("release", {"errors": [""]}, keys=[key])
        self._end(key, 6)

    def toggle(self, exit_id: str, *, answered: bool = True) -> None:
        self.attempt("toggle", {} if answered else None, exit=exit_id, request_id=f"toggle {self._number}")

    def kinds(self) -> set[str]:
        return {violation.kind for violation in check(Evidence.of(self.attempts), self.tables, FACTS)}

    def _end(self, key: str, status: int, late: bool = False) -> None:
        row = self.tables.allocations[key]
        self.tables.allocations[key] = Row(
            row.slot, row.exit, row.token, row.work_date, status, late, False, row.allocated_at
        )


@pytest.fixture
def story() -> Story:
    made = Story()
    made.slot()
    return made


def test_a_sound_history_has_no_violation(story: Story) -> None:
    story.slot("steady", 1, steady=True)
    story.grant("a", slot="steady")
    story.grant("b", "c", exit="until", request="twice")
    story.submit("b")
    story.submit("b")
    story.grant("c", exit="until", request="twice")
    story.toggle("until", answered=False)
    story.release("c")
    story.grant("d", exit="until")
    story.submit("d", "RECORDED_LATE")
    story.grant()
    story.submit("a", "QUARANTINED")
    story.slot("other", 3)
    story.grant("e", lasts=5, exit="at-once", slot="other")
    # It runs out, so that its exit may serve the next one; its holder is told so, and says goodbye as well.
    story.now += 10
    story.attempt("release", {"errors": ["LEASE_LOST"]}, keys=["e"])
    story.attempt("goodbye", {"released": 0}, client="pc", instance=0)
    story.grant("f", exit="at-once", slot="other")
    assert story.kinds() == set()


def _quota(story: Story) -> None:
    for key in "abc":
        story.grant(key)
        story.submit(key)


def _quota_of_live_leases(story: Story) -> None:
    story.grant("a", "b", "c")


def _quota_after_a_late_result(story: Story) -> None:
    story.grant("a", lasts=2)
    story.now += 5
    story.grant("b", "c")
    story.submit("a", "RECORDED_LATE")


def _cap_until_toggle(story: Story) -> None:
    story.slot("wide", 9)
    story.toggle("until")
    for key in "abc":
        story.grant(key, slot="wide", exit="until")
        story.submit(key)


def _cap_at_once(story: Story) -> None:
    story.grant("a", exit="at-once")
    story.grant("b", exit="at-once")


def _cap_of_a_window(story: Story) -> None:
    story.slot("wide", 9)
    story.grant("a", "b", "c", slot="wide", exit="window")
    for key in "abc":
        story.submit(key)


def _in_flight(story: Story) -> None:
    story.grant("a", "b", target="narrow")


def _handed_out_twice(story: Story) -> None:
    story.grant("a", request="one")
    story.grant("a", request="two")


def _another_token(story: Story) -> None:
    story.grant("a", request="one")
    story.grant("a", request="one", token="another")


def _another_answer(story: Story) -> None:
    story.grant("a", request="one")
    story.grant("b", request="one")


def _answer_forgotten(story: Story) -> None:
    story.grant("a", request="one")
    story.tables.requests.clear()


def _grant_lost(story: Story) -> None:
    story.grant("a")
    story.tables.allocations.clear()


def _release_lost(story: Story) -> None:
    story.grant("a")
    story.attempt("release", {"errors": [""]}, keys=["a"])


def _result_lost(story: Story) -> None:
    story.grant("a")
    story.submit("a")
    story.tables.results.clear()


def _result_changed(story: Story) -> None:
    story.grant("a")
    story.submit("a", outcome="failed")


def _quarantine_lost(story: Story) -> None:
    story.grant("a")
    story.submit("a", "QUARANTINED")
    story.tables.quarantined.clear()


def _stored_twice(story: Story) -> None:
    story.grant("a")
    story.submit("a")
    story.tables.results.append(ResultRow("a", 2, False, 1))


def _acknowledged_in_two_ways(story: Story) -> None:
    story.grant("a")
    story.submit("a")
    story.submit("a", at=2)


def _result_from_nowhere(story: Story) -> None:
    story.tables.results.append(ResultRow("x", 2, False, 0))


def _false_no_work(story: Story) -> None:
    story.slot("steady", 2, steady=True)
    story.grant("a", "b", slot="steady")
    story.release("b")
    story.grant()


def _counters(story: Story) -> None:
    story.tables.broken["counters differ from rows"] = 1


def _internal(story: Story) -> None:
    story.attempt("submit", None, keys=[]).told = {"code": "INTERNAL", "reason": "INTERNAL"}


PLANTED: list[tuple[Callable[[Story], None], str]] = [
    (_quota, "quota"),
    (_quota_of_live_leases, "quota"),
    (_quota_after_a_late_result, "quota"),
    (_cap_until_toggle, "cap"),
    (_cap_at_once, "cap"),
    (_cap_of_a_window, "cap"),
    (_in_flight, "in flight"),
    (_handed_out_twice, "two leases"),
    (_another_token, "two leases"),
    (_another_answer, "two answers"),
    (_answer_forgotten, "two answers"),
    (_grant_lost, "lost"),
    (_release_lost, "lost"),
    (_result_lost, "result lost"),
    (_result_changed, "result lost"),
    (_quarantine_lost, "result lost"),
    (_stored_twice, "counted twice"),
    (_acknowledged_in_two_ways, "counted twice"),
    (_result_from_nowhere, "result from nowhere"),
    (_false_no_work, "false no work"),
    (_counters, "table"),
    (_internal, "fault"),
]


@pytest.mark.parametrize(("plant", "kind"), PLANTED, ids=[plant.__name__.strip("_") for plant, _ in PLANTED])
def test_a_planted_violation_is_found(story: Story, plant: Callable[[Story], None], kind: str) -> None:
    plant(story)
    assert story.kinds() == {kind}


def test_what_is_not_certain_is_not_claimed(story: Story) -> None:
    # A release that was begun may have been done, though nobody was told.
    story.grant("a", "b")
    story.attempt("release", None, keys=["a"])
    story.grant("c")
    # A toggle nobody was told of may have happened.
    story.slot("wide", 9)
    story.grant("d", "e", slot="wide", exit="until")
    story.submit("d")
    story.submit("e")
    story.toggle("until", answered=False)
    story.grant("f", slot="wide", exit="until")
    # What was granted during the call may be what it missed.
    story.slot("steady", 1, steady=True)
    missed = story.grant()
    story.grant("g", slot="steady")
    missed.ended_at = story.now
    assert story.kinds() == set()
