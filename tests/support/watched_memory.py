"""The tracker's memory with a clock that only tests move, and watchers of it without a wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted
from session_tracker.feeds import Feeds, Wish
from session_tracker.filters import Filter
from session_tracker.messages import SessionMessages
from session_tracker.organizations import Organization, Organizations
from session_tracker.packing import PieceMessages
from session_tracker.sessions import Registration
from session_tracker.watching import Watching

ORGANIZATION = UUID(int=1)
WALL = datetime(2026, 1, 1, tzinfo=UTC)


class Tracker:
    """The memory, a clock that only tests move, and watchers without a wire."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        clock = Clock(lambda: self.seconds, lambda: WALL + timedelta(seconds=self.seconds - 1000.0))
        self.organizations = Organizations(SessionsConfig(finished_seconds=60.0), clock)
        self.draining = asyncio.Event()
        self.messages = SessionMessages(clock)
        self.feeds = Feeds(self.organizations, PieceMessages(clock).encoded, clock, self.draining)
        self.watching = Watching(self.feeds, clock)
        self.sequence = 0

    @property
    def organization(self) -> Organization:
        return self.organizations.of(ORGANIZATION)

    def start(self, name: str, **fields: str | tuple[str, ...]) -> None:
        with suppress(SessionAlreadyCompleted):
            self.organization.start(Registration(name, **fields))  # type: ignore[arg-type]

    def report(self, *names: str, page: int = 0, state: int = 0, stage: str = "") -> None:
        self.sequence += 1
        self.organization.report(
            [
                pb.ProgressUpdate(
                    session_id=name,
                    sequence=self.sequence,
                    current_page=page,
                    products_found=2 * page,
                    state=state,  # type: ignore[arg-type]
                    stage=stage,
                )
                for name in names
            ]
        )

    def passes(self, seconds: float) -> None:
        self.seconds += seconds
        for session in list(self.organization.sessions.values()):
            self.organization.mark_silence(session)
        self.organization.expire()

    def wish(self, filter: Filter | None = None, *, packed: bool = False, interval: float = 0.0) -> Wish:
        return Wish(ORGANIZATION, filter or Filter(), interval, packed)

    def drain(self) -> None:
        self.draining.set()
        self.organizations.wake_watchers()


@dataclass(slots=True)
class Watcher:
    """Holds what a watcher holds, reads when it is told to, and comes back to where it stood."""

    tracker: Tracker
    wish: Wish
    held: dict[str, pb.Session] = field(default_factory=dict)
    epoch: str = ""
    offset: int = 0
    rebuilding: bool = False
    answers: list[pb.WatchSessionsResponse] = field(default_factory=list)
    stream: AsyncIterator[bytes] | None = None
    reading: asyncio.Task[bytes] | None = None

    async def read(self) -> bool:
        """Takes an answer if there is one; returns whether there was."""
        if self.stream is None:
            self.stream = self.tracker.watching.answers(self.wish, self.epoch, self.offset)
        if self.reading is None:
            self.reading = asyncio.ensure_future(anext(self.stream))
        for _ in range(6):
            # Turns of the loop, not of the clock: an answer that is due comes within them.
            await asyncio.sleep(0)
        if not self.reading.done():
            return False
        reading, self.reading = self.reading, None
        self.take(reading.result())
        return True

    async def read_past(self, name: str) -> None:
        """Reads until it has been told of all that happened up to the last change of a session that it can see."""
        for _ in range(500):
            if self.offset >= self.tracker.organization.get(name).changed:
                return
            await self.read()
        raise AssertionError(f"was not told of {name}")

    def take(self, data: bytes) -> None:
        answer = pb.WatchSessionsResponse.FromString(data)
        self.answers.append(answer)
        if answer.snapshot:
            self.held.clear()
        for session in answer.sessions:
            assert session.session_id not in answer.removed
            self.held[session.session_id] = session
        for name in answer.removed:
            self.held.pop(name, None)
        by_number = {session.number: session for session in self.held.values()}
        packed = answer.packed
        for place, number in enumerate(packed.number):
            session = by_number[number]
            session.state = packed.state[place]
            session.current_page = packed.current_page[place]
            session.total_pages = packed.total_pages[place]
            session.products_found = packed.products_found[place]
            session.errors_count = packed.errors_count[place]
            session.sequence = packed.sequence[place]
            session.updated_at.FromMilliseconds(packed.updated_at_ms[place])
        self.epoch, self.offset, self.rebuilding = answer.epoch, answer.offset, answer.rebuilding

    async def leave(self) -> None:
        """Disconnects; what it holds stays with it."""
        if self.reading is not None:
            self.reading.cancel()
            await asyncio.gather(self.reading, return_exceptions=True)
            self.reading = None
        if self.stream is not None:
            await self.stream.aclose()  # type: ignore[attr-defined]
            self.stream = None

    def expected(self) -> dict[str, pb.Session]:
        matches = self.wish.filter.matches
        return {
            name: comparable(self.tracker.messages.of(session))
            for name, session in self.tracker.organization.sessions.items()
            if matches(session)
        }


def comparable(session: pb.Session) -> pb.Session:
    """Leaves out what is reckoned anew whenever it is asked for."""
    copy = pb.Session()
    copy.CopyFrom(session)
    for name in ("estimated_completion", "eta_low", "eta_high", "eta_method", "pages_per_second"):
        copy.ClearField(name)
    copy.updated_at.FromMilliseconds(round(copy.updated_at.ToMilliseconds(), -1))
    return copy
