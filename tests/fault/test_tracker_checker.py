"""The checker itself: a sound history passes, and every kind of violation that is planted in one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fault.tracker.checker import Row, check, held, truth, unhealed
from tests.fault.tracker.history import Event, Journal, read

DONE = ("a", 7, 5, 15, 1, "done")
OTHER = ("a", 8, 5, 15, 1, "done")


class Story:
    """A history in the making, with the table that goes with it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rows = [Row("a", DONE[1:])]
        self.note("complete", result=DONE)
        self.note("completed", result=DONE)
        self.see("a", 2, 3, 4)
        self.see("a", 6, 3, 4)
        self.see("a", 2, 4, 5)
        self.see("a", 7, 4, 5)

    def note(self, kind: str, process: str = "worker-1", **of: Any) -> None:
        self.events.append(Event(process, kind, float(len(self.events)), of))

    def see(self, session_id: str, *sight: int, epoch: str = "e1", snapshot: bool = False, watcher: str = "w") -> None:
        sessions = [[session_id, *sight]]
        self.note("saw", watcher, epoch=epoch, offset=1, snapshot=snapshot, sessions=sessions, removed=[])

    def kinds(self) -> set[str]:
        return {violation.kind for violation in check(self.events, self.rows)}


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_sound_history_has_no_violation(story: Story) -> None:
    # The same again, another one, and one whose answer never came.
    story.note("complete", result=DONE)
    story.note("completed", result=DONE)
    story.note("complete", result=OTHER)
    story.note("refused", result=OTHER, reason="SESSION_ALREADY_COMPLETED")
    story.note("complete", result=("b", 9, 1, 3, 0, "done"))
    story.rows.append(Row("b", (9, 1, 3, 0, "done")))
    story.note("complete", result=("c", 9, 1, 3, 0, "done"))
    # Another life of the replica, or another replica, may know less.
    story.see("a", 2, 1, 1, epoch="e2")
    story.see("a", 2, 1, 1, watcher="w2")
    # A result may say of fewer pages than were reported, and come from where the last reports were not heard of.
    story.see("d", 2, 9, 9)
    story.see("d", 8, 8, 1)
    assert story.kinds() == set()


def _lost(story: Story) -> None:
    story.rows.clear()


def _changed(story: Story) -> None:
    story.rows[0] = Row("a", OTHER[1:])
    story.note("complete", result=OTHER)


def _twice(story: Story) -> None:
    story.rows.append(story.rows[0])


def _nowhere(story: Story) -> None:
    story.rows.append(Row("x", DONE[1:]))


def _two_results(story: Story) -> None:
    story.note("complete", result=OTHER)
    story.note("completed", result=OTHER)


def _refused_though_acknowledged(story: Story) -> None:
    story.note("refused", result=DONE, reason="SESSION_ALREADY_COMPLETED")


def _refused_otherwise(story: Story) -> None:
    story.note("refused", session="b", reason="INTERNAL")


def _sequence_back(story: Story) -> None:
    story.see("b", 2, 5, 5)
    story.see("b", 2, 4, 5)


def _page_back_in_a_snapshot(story: Story) -> None:
    story.see("b", 2, 5, 5)
    story.see("b", 2, 6, 4, snapshot=True)


def _alive_again(story: Story) -> None:
    story.see("a", 2, 9, 9)


def _another_end(story: Story) -> None:
    story.see("a", 8, 4, 5)


PLANTED: list[tuple[Callable[[Story], None], set[str]]] = [
    (_lost, {"result lost"}),
    (_changed, {"result changed"}),
    (_twice, {"result twice"}),
    (_nowhere, {"result from nowhere"}),
    (_two_results, {"two results", "result changed"}),
    (_refused_though_acknowledged, {"refused"}),
    (_refused_otherwise, {"refused"}),
    (_sequence_back, {"went back"}),
    (_page_back_in_a_snapshot, {"went back"}),
    (_alive_again, {"went back"}),
    (_another_end, {"went back"}),
]


@pytest.mark.parametrize(("plant", "kinds"), PLANTED, ids=[plant.__name__.strip("_") for plant, _ in PLANTED])
def test_a_planted_violation_is_found(story: Story, plant: Callable[[Story], None], kinds: set[str]) -> None:
    plant(story)
    assert story.kinds() == kinds


def test_what_a_watcher_holds_is_compared_with_the_truth(story: Story) -> None:
    story.note("truth", sessions=[["b", 2, 5, 5], ["c", 3, 1, 1]])
    story.see("b", 2, 5, 5)
    story.see("c", 2, 1, 1)
    story.see("gone", 2, 1, 1)
    true, holds = truth(story.events), held(story.events, "w")
    found = [violation.text for violation in unhealed(true, holds, "w")]
    assert [text.partition(":")[0] for text in found] == ["w, c", "w, gone"]
    story.note("saw", "w", epoch="e1", offset=2, snapshot=False, sessions=[["c", 3, 1, 1]], removed=["gone"])
    assert unhealed(true, held(story.events, "w"), "w") == []
    story.see("b", 2, 5, 5, snapshot=True)
    assert [violation.kind for violation in unhealed(true, held(story.events, "w"), "w")] == ["not healed"]


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Any) -> None:
    journal = Journal(tmp_path, "worker-1")
    journal.note("complete", result=DONE)
    journal.close()
    with (tmp_path / "worker-1.jsonl").open("ab") as file:
        file.write(b'\n{"kind": "comp')
    journal = Journal(tmp_path, "worker-1")
    journal.note("completed", result=DONE)
    journal.close()
    assert [event.kind for event in read(tmp_path)] == ["complete", "completed"]
