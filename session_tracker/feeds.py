"""Feeds: what all watchers with the same wishes share, so that a change is encoded once and not once for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from uuid import UUID
from weakref import ref

from session_tracker.clock import Clock
from session_tracker.filters import Filter
from session_tracker.organizations import Organization, Organizations
from session_tracker.pieces import Encode, Piece, Span, View

# How old a large snapshot may be that is handed to another watcher, who learns at once of what happened since. To
# encode one of 100,000 sessions takes a second or two, in which many may come; a small one is made anew.
_SNAPSHOT_SECONDS = 5.0
_LARGE_SNAPSHOT = 1000
# Who missed so many changes, or fewer, is led from exactly where he stands.
_EXACTLY = 256
# What is kept encoded for watchers that are late, in each feed. Beyond it, who is the latest has his rest encoded anew.
_KEPT_BYTES = 32 * 1024 * 1024

# Encodes a piece of an epoch.
EncodeIn = Callable[[str, Piece], bytes]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a watcher wants to see, and how.

    Attributes:
        organization_id: Whose sessions.
        filter: Which.
        interval_seconds: The least time between two answers; changes in between are merged.
        packed: Changes of counters may come packed.
    """

    organization_id: UUID
    filter: Filter
    interval_seconds: float
    packed: bool


class Feed:
    """The watchers of one wish, and the turns at which they are told of changes.

    A watcher is an offset here and nothing else. One that missed turns is led from its own offset to the latest state
    when it comes back, by the same span as all others that stand where it stands.

    Attributes:
        turn: Counts the turns.
        told: How many states all turns so far had to tell.
        members: How many watchers use the feed.
    """

    def __init__(
        self, organization: Organization, wish: Wish, encode: Encode, clock: Clock, draining: asyncio.Event
    ) -> None:
        self._organization = organization
        self._changes = organization.changes
        self._interval_seconds = wish.interval_seconds
        self._clock = clock
        self._draining = draining
        self._view = View(organization, wish.filter, encode, clock, packed=wish.packed)
        self._pending = self._changes.subscribe()
        self._rebuilding = organization.rebuilding
        self._latest = Span(self._view, self._changes.offset, self._changes.offset, 0, [])
        self._others: dict[int, Span] = {}
        self._snapshot: tuple[float, Span] | None = None
        # Weakly: a span that nobody is led by any more needs not be kept.
        self._kept: list[ref[Span]] = []
        self._wanted = asyncio.Event()
        self._turned = asyncio.Event()
        self.turn = 0
        self.told = 0
        self.members = 0
        self._task = asyncio.create_task(self._turns(), name="watch feed")
        self._task.add_done_callback(lambda _: self._turned.set())

    @property
    def kept_bytes(self) -> int:
        """How much is kept encoded for watchers who are some turns late."""
        return sum(span.kept_bytes for span in self._late())

    def close(self) -> None:
        """Ends the turns; for when nobody watches any more."""
        self._changes.unsubscribe(self._pending)
        self._task.cancel()

    def begin(self, epoch: str, offset: int) -> Span:
        """Returns what leads a watcher to the present: from its epoch and offset on where that is possible."""
        if epoch == self._changes.epoch:
            # What matches and did not change since is held by this watcher, but perhaps by no other.
            self._view.matching()
            return self._since(offset)
        return self._whole()

    async def next(self, span: Span) -> Span | None:
        """Waits for a turn, unless some were missed, and returns what leads on from the end of `span`.

        Returns:
            None when the service drains.

        Raises:
            Exception: the turns ended with it.
        """
        while self.turn <= span.turn:
            if self._draining.is_set():
                return None
            if self._task.done():
                self._task.result()
            self._wanted.set()
            await self._turned.wait()
        before = self._latest.before
        return self._latest if before is not None and span.after >= before else self._since(span.after)

    def _since(self, offset: int) -> Span:
        behind = self._changes.offset - offset
        if behind > _EXACTLY:
            # From up to an eighth further back, where others begin who stand elsewhere: when all are late, each at a
            # place of his own, they would otherwise cost the more the later they are.
            grid = behind.bit_length() - 4
            offset = offset >> grid << grid or offset
        span = self._others.get(offset)
        if span is None:
            changed = self._changes.after(offset, self._organization.sessions.values())
            if changed is None:
                return self._whole()
            ids = self._view.concerned_since(changed, offset)
            span = self._others[offset] = Span(self._view, offset, self._changes.offset, self.turn, ids)
        return span

    def _whole(self) -> Span:
        self._organization.settle()
        now, offset = self._clock.monotonic(), self._changes.offset
        if self._snapshot is not None:
            made, span = self._snapshot
            if span.after == offset or (span.length >= _LARGE_SNAPSHOT and now - made <= _SNAPSHOT_SECONDS):
                return span
            self._drop_snapshot()
        span = Span(self._view, None, offset, self.turn, self._view.matching())
        self._snapshot = now, span
        return span

    def _drop_snapshot(self) -> None:
        if self._snapshot is not None:
            self._kept.append(ref(self._snapshot[1]))
            self._snapshot = None

    async def _turns(self) -> None:
        while not self._draining.is_set():
            if self._interval_seconds:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._draining.wait(), self._interval_seconds)
            # While all watchers are busy with what they have, there is nobody to tell.
            await self._wanted.wait()
            while not self._draining.is_set() and not self._take_turn():
                # Draining sets this too: see Organizations.wake_watchers.
                await self._changes.stirred.wait()

    def _take_turn(self) -> bool:
        """Leads those who wait to the present; returns whether there is anything to tell them."""
        self._changes.distribute()
        ids = self._view.concerned(self._pending, self._changes.offset)
        self._pending.clear()
        rebuilding = self._organization.rebuilding
        if not ids and rebuilding == self._rebuilding:
            return False
        self._rebuilding = rebuilding
        self._kept.append(ref(self._latest))
        self._kept.extend(map(ref, self._others.values()))
        self._others.clear()
        if self._snapshot is not None and self._clock.monotonic() - self._snapshot[0] > _SNAPSHOT_SECONDS:
            self._drop_snapshot()
        self.turn += 1
        self._latest = Span(self._view, self._latest.after, self._changes.offset, self.turn, ids)
        self.told += len(ids)
        self._keep_within_bounds()
        self._wanted.clear()
        turned, self._turned = self._turned, asyncio.Event()
        turned.set()
        return True

    def _late(self) -> list[Span]:
        return [span for kept in self._kept if (span := kept()) is not None]

    def _keep_within_bounds(self) -> None:
        late = self._late()
        excess = sum(span.kept_bytes for span in late) - _KEPT_BYTES
        for span in late:
            if excess <= 0:
                break
            excess -= span.kept_bytes
            span.retire()
        self._kept = [ref(span) for span in late]


class Feeds:
    """The feeds that somebody watches.

    Attributes:
        open: These, by what their watchers wish.
    """

    def __init__(self, organizations: Organizations, encode: EncodeIn, clock: Clock, draining: asyncio.Event) -> None:
        self._organizations = organizations
        self._encode = encode
        self._clock = clock
        self._draining = draining
        self.open: dict[Wish, Feed] = {}

    @contextmanager
    def join(self, wish: Wish) -> Iterator[Feed]:
        """Gives the feed of a wish for as long as it is watched."""
        feed = self.open.get(wish)
        if feed is None:
            organization = self._organizations.of(wish.organization_id)
            encode = partial(self._encode, organization.changes.epoch)
            feed = self.open[wish] = Feed(organization, wish, encode, self._clock, self._draining)
        feed.members += 1
        try:
            yield feed
        finally:
            feed.members -= 1
            if feed.members == 0:
                del self.open[wish]
                feed.close()
