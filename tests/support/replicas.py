"""Replicas of the session tracker's engine in the test's own process, without the service around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID

from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.clock import Clock
from session_tracker.config import EngineConfig, SessionsConfig
from session_tracker.organizations import Organization, Organizations
from session_tracker.redis_engine import RedisEngine
from session_tracker.sessions import Registration, Session

ACME = UUID(int=7)
_SECONDS = 20.0
_POLL_SECONDS = 0.005
_ABOUT_SECONDS = 0.02


async def until(done: Callable[[], object], what: str, seconds: float = _SECONDS) -> None:
    """Waits until something is so.

    Raises:
        AssertionError: it is not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(_POLL_SECONDS)


class _About(float):
    """A moment as two clocks have it that were not read at one instant."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < _ABOUT_SECONDS

    __hash__ = None  # type: ignore[assignment]


class Memory:
    """One replica's memory.

    Args:
        name: Of the replica, 8 characters.
        clock: The clock.
        sessions: Settings.
    """

    def __init__(self, name: str, clock: Clock | None = None, **sessions: float) -> None:
        self.name = name
        self.clock = clock or Clock()
        self.config = SessionsConfig(**sessions)  # type: ignore[arg-type]
        self.organizations = Organizations(self.config, self.clock)

    @property
    def acme(self) -> Organization:
        """The organization of the test."""
        return self.organizations.of(ACME)

    def session(self, session_id: str) -> Session | None:
        """A session as it stands here."""
        self.acme.settle()
        return self.acme.sessions.get(session_id)

    def start(self, *session_ids: str, **fields: object) -> None:
        """Starts sessions here."""
        for session_id in session_ids:
            self.acme.start(Registration(session_id, **fields))  # type: ignore[arg-type]

    def report(self, session_id: str, sequence: int, page: int, **fields: object) -> int:
        """Reports here; returns the verdict."""
        update = pb.ProgressUpdate(session_id=session_id, sequence=sequence, current_page=page, **fields)  # type: ignore[arg-type]
        return self.acme.report([update]).verdicts[0]

    def shown(self, session_id: str) -> tuple[object, ...]:
        """What every replica must agree on of a session."""
        session = self.acme.get(session_id)
        rarities = session.rarities
        return (
            session.sequence,
            session.revision,
            session.state,
            session.reason,
            session.current_page,
            session.total_pages,
            session.products_found,
            session.errors_count,
            session.stage,
            session.started_at,
            _About(self.clock.moment(session.reported).timestamp()),
            _About(self.clock.moment(session.since).timestamp()),
            session.slot_id,
            session.client_id,
            session.tags,
            session.config_snapshot,
            session.traceparent,
            session.lease,
            rarities.errors_by_class,
            rarities.last_errors,
            rarities.pages_per_minute_limit,
            rarities.acknowledged_command,
            rarities.lease_refused,
            # Nobody is told what is left of a finished session's.
            None if session.finished else rarities.command,
            session.owner or self.name,
        )

    def view(self) -> dict[str, tuple[object, ...]]:
        """What every replica must agree on, by session."""
        self.acme.settle()
        return {session_id: self.shown(session_id) for session_id in self.acme.sessions}


def agree(first: Memory, *others: Memory) -> bool:
    """Whether replicas show the same, in their totals too."""
    totals = first.acme.totals()
    return all(
        other.view() == first.view()
        and (theirs := other.acme.totals()).by_state == totals.by_state
        and (theirs.pages, theirs.products, theirs.errors) == (totals.pages, totals.products, totals.errors)
        for other in others
    )


class Replica(Memory):
    """One replica's memory and its engine."""

    def __init__(self, url: str, clock: Clock | None = None, *, beat_seconds: float = 0.05, **sessions: float) -> None:
        super().__init__("", clock, **sessions)
        engine = EngineConfig(
            kind="redis",
            url=url,  # type: ignore[arg-type]
            flush_seconds=0.01,
            beat_seconds=beat_seconds,
            replica_life_seconds=8 * beat_seconds,
        )
        self.engine = RedisEngine(self.organizations, engine, self.config, self.clock)
        self.name = self.engine.replica

    async def vanish(self) -> None:
        """Ends it as a killed process does: without a word."""
        task = self.engine._task
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def replicas(url: str, count: int, clock: Clock | None = None, **settings: float) -> AsyncIterator[list[Replica]]:
    """Gives replicas on one store that know of each other; ends them."""
    made = [Replica(url, clock, **settings) for _ in range(count)]
    try:
        for replica in made:
            await replica.engine.start()
        await until(lambda: all(replica.engine.whole for replica in made), "all are whole")
        yield made
    finally:
        for replica in made:
            await replica.engine.close()
