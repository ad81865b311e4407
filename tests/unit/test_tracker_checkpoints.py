"""When important sessions are saved, on an injected clock and a store that fails and waits when told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from uuid import UUID

import pytest
from prometheus_client import Gauge

from services.errors import DatabaseUnavailable
from session_tracker.checkpoint_store import Checkpoint
from session_tracker.checkpoints import Checkpoints
from session_tracker.config import SessionsConfig
from session_tracker.metrics import CHECKPOINT_AGE, CHECKPOINT_OVERDUE
from session_tracker.organizations import Organizations
from session_tracker.records import Record
from session_tracker.sessions import CheckpointPolicy, Registration, State
from tests.support.tracker_memory import ORGANIZATION, Hands, Report


class Store:
    """Keeps what is saved; `down` makes it fail, `meanwhile` is called while it saves."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Checkpoint]] = []
        self.forgotten: list[str] = []
        self.down = False
        self.meanwhile: Callable[[], None] = lambda: None

    async def save(self, checkpoints: Sequence[Checkpoint]) -> None:
        if self.down:
            raise DatabaseUnavailable("down", retry_after_seconds=1.0)
        self.meanwhile()
        self.saved.append({checkpoint.session_id: checkpoint for checkpoint in checkpoints})

    async def forget(self, sessions: Sequence[tuple[UUID, str]]) -> None:
        self.forgotten += [session_id for _, session_id in sessions]

    async def read(self) -> AsyncIterator[tuple[UUID, Record]]:
        nothing: list[tuple[UUID, Record]] = []
        for record in nothing:
            yield record


class Tracker:
    def __init__(self) -> None:
        self.hands = Hands()
        self.organizations = Organizations(SessionsConfig(forget_lost_after_seconds=60), self.hands.clock())
        self.organization = self.organizations.of(ORGANIZATION)
        self.store = Store()
        self.checkpoints = Checkpoints(self.organizations, self.store, self.hands.clock(), 1.0)

    def start(self, session_id: str, pages: int = 0, seconds: float = 0.0) -> None:
        self.organization.start(Registration(session_id, checkpoint=CheckpointPolicy(pages, seconds)))

    def report(self, session_id: str, page: int) -> None:
        self.organization.report([Report(session_id, page, current_page=page)])

    async def round(self, seconds: float) -> dict[str, int]:
        """Lets time pass and a round be made; returns the pages that were saved."""
        self.hands.seconds += seconds
        before = len(self.store.saved)
        await self.checkpoints.round()
        return {
            name: checkpoint.counters.current_page
            for batch in self.store.saved[before:]
            for name, checkpoint in batch.items()
        }


def reading(gauge: Gauge) -> float:
    (metric,) = gauge.collect()
    return metric.samples[0].value


def age() -> float:
    return reading(CHECKPOINT_AGE)


def overdue() -> float:
    return reading(CHECKPOINT_OVERDUE)


async def test_sessions_are_saved_by_their_policies() -> None:
    tracker = Tracker()
    tracker.start("pages", pages=10)
    tracker.start("seconds", seconds=20.0)
    tracker.organization.start(Registration("not important"))
    assert await tracker.round(1) == {"pages": 0, "seconds": 0}, "at once, so that their start is on record"
    for name in ("pages", "seconds", "not important"):
        tracker.report(name, 9)
    assert await tracker.round(10) == {}
    assert age() == pytest.approx(10)
    assert overdue() == 0.0
    tracker.report("pages", 10)
    assert await tracker.round(1) == {"pages": 10}
    assert await tracker.round(9) == {"seconds": 9}
    assert await tracker.round(100) == {}, "nothing changed"
    assert age() == 0.0


async def test_what_describes_a_session_is_written_when_it_changed() -> None:
    tracker = Tracker()
    tracker.start("s", pages=1)
    described = []
    for page, state in ((1, State.RUNNING), (2, State.RUNNING), (3, State.PAUSED)):
        tracker.organization.report([Report("s", page, state, current_page=page)])
        await tracker.round(1)
        described.append(bool(tracker.store.saved[-1]["s"].described))
    assert described == [True, False, True]


async def test_what_could_not_be_saved_is_saved_by_a_later_round() -> None:
    tracker = Tracker()
    tracker.start("s", seconds=5.0)
    await tracker.round(1)
    tracker.store.down = True
    tracker.report("s", 1)
    assert await tracker.round(6) == {}
    assert overdue() == pytest.approx(1)
    tracker.report("s", 2)
    tracker.store.down = False
    assert await tracker.round(1) == {"s": 2}
    assert overdue() == 0.0


async def test_what_comes_while_a_session_is_saved_is_saved_next() -> None:
    tracker = Tracker()
    tracker.start("s", pages=1)
    await tracker.round(1)
    tracker.report("s", 1)
    tracker.store.meanwhile = lambda: tracker.report("s", 2)
    assert await tracker.round(1) == {"s": 1}
    tracker.store.meanwhile = lambda: None
    assert await tracker.round(1) == {"s": 2}
    assert await tracker.round(1) == {}


async def test_no_checkpoint_outlives_its_session() -> None:
    tracker = Tracker()
    tracker.start("completed", pages=1)
    tracker.start("forgotten", pages=1)
    tracker.store.meanwhile = lambda: tracker.organization.complete("completed", 3)
    await tracker.round(1)
    assert tracker.store.forgotten == ["completed"], "its result may have been committed before"
    tracker.hands.seconds += 1000
    for _ in range(2):
        tracker.organization.mark_silence(tracker.organization.sessions["forgotten"])
    assert "forgotten" not in tracker.organization.sessions
    await tracker.round(1)
    assert tracker.store.forgotten == ["completed", "forgotten"]
    assert await tracker.round(100) == {}


async def test_at_the_end_everything_is_saved() -> None:
    tracker = Tracker()
    tracker.start("s", seconds=3600.0)
    await tracker.round(1)
    tracker.report("s", 5)
    await tracker.checkpoints.close()
    assert tracker.store.saved[-1]["s"].counters.current_page == 5
