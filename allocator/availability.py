"""What is available, in memory, and the choice among it.

The index only proposes; the database decides. It holds the classes of slots (few), of each a window of slots with room,
and the exits with head-room. All of it is read from the database, used up by its own proposals, and read again when it
is older than about a second, when a write through this replica outdated it, and when a caller would otherwise be told
that there is nothing. What is read does not grow with the number of slots. While work is asked for, what will be needed
next is read beside the batches, so that none of them waits for it.

The greatest priority goes first, but of every 16 units one goes to a lower priority, to the class that waited longest
for it: nothing starves. Classes that cannot be served now are left out whole: their target lets nothing out, no exit is
to be had, or their kind of persona or external exit failed a moment ago.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import Context
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.dealing import Basics, Dealer, Wish
from allocator.exit_pool import ExitPool
from allocator.metrics import INDEX_AGE_SECONDS, INDEX_SECONDS
from allocator.slot_windows import AvailableSlot, ClassWindow, Part, SlotClass, window_size
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.packages import Pick

_log = structlog.get_logger("allocator.availability")

# Only what other replicas did is news; what this one did it has counted itself.
FRESH_SECONDS = 1.0
# Exits are many rows that change often, and the database refuses one that is used up or switched off.
_FRESH_EXITS_SECONDS = 5.0
_FRESH_PARTS_SECONDS = 5.0
# A target that let nothing out may do so again soon.
_SHORT_SECONDS = 0.1
# A reading takes at most this share of the time.
_READING_SHARE = 0.05
_CLASSES_AT_ONCE = 256
# Read at a time beside the batches: what is read keeps them from the interpreter for a moment.
_CLASSES_AHEAD = 3
# Readings of one level for one proposal.
_ROUNDS = 64
_WISHES = 64
# One unit of so many goes to a lower priority.
_GUARANTEE = 16


class _Reading:
    """When something was read, and how long that took."""

    __slots__ = ("begun", "fresh_seconds", "seconds")

    def __init__(self, fresh_seconds: float = FRESH_SECONDS) -> None:
        self.begun = float("-inf")
        self.seconds = 0.0
        self.fresh_seconds = fresh_seconds

    def is_stale(self, since: float) -> bool:
        if self.begun < since:
            return True
        return self.begun + max(self.fresh_seconds, self.seconds / _READING_SHARE) < time.monotonic()

    def is_half_stale(self) -> bool:
        return self.begun + max(self.fresh_seconds, self.seconds / _READING_SHARE) / 2 < time.monotonic()

    def note(self, begun: float) -> None:
        self.begun = begun
        self.seconds = time.monotonic() - begun
        INDEX_SECONDS.observe(self.seconds)


class OrganizationIndex:
    """What is available to one organization.

    Args:
        organization_id: The tenant.
        store: Reads the database.

    Attributes:
        choosing: Held by the batch that chooses; the others reserve meanwhile.
        changed: Set when something was given back or added here, for those who wait for work.
    """

    def __init__(self, organization_id: UUID, store: AllocationStore) -> None:
        self._organization_id = organization_id
        self._store = store
        self._basics = Basics()
        self._basics_read = _Reading()
        self._dealer = Dealer()
        self._exits_read = _Reading(_FRESH_EXITS_SECONDS)
        self._windows: dict[int, ClassWindow] = {}
        self._window_seconds = 0.0
        self._levels: OrderedDict[Wish, list[list[ClassWindow]]] = OrderedDict()
        self._outdated = float("-inf")
        self._owed = 0.0
        self._days: asyncio.Task[None] | None = None
        self._ahead: asyncio.Task[None] | None = None
        self.choosing = asyncio.Lock()
        self.changed = asyncio.Event()

    @property
    def work_date(self) -> date | None:
        """The day that is being worked on."""
        return self._basics.work_date

    @property
    def draining(self) -> frozenset[str]:
        """Clients that get nothing."""
        return self._basics.draining

    def outdate(self, *, wake: bool = True) -> None:
        """Notes that the database has more to offer, or less, than the index knows.

        Args:
            wake: Whether those who wait for work look at once. Not when units came back that could not be completed:
                they would be tried, and come back, again and again.
        """
        self._outdated = time.monotonic()
        if wake:
            self.wake()

    def wake(self) -> None:
        """Lets those who wait for work look again, which they do in the database; nobody else reads anew for it."""
        self.changed.set()
        self.changed = asyncio.Event()

    def begin_batch(self) -> None:
        """Begins to note what is proposed, of which the database does not know yet."""
        self._dealer.begin_batch()

    def preview(self) -> OrganizationIndex:
        """Returns another index that stands as this one does: what it proposes, this one would."""
        other = OrganizationIndex(self._organization_id, self._store)
        other._owed, other._dealer.proposals = self._owed, self._dealer.proposals
        for class_id, window in self._windows.items():
            copy = other._windows[class_id] = ClassWindow(window.slots)
            copy.place, copy.served = window.place, window.served
        return other

    async def refresh(self, since: float = float("-inf")) -> None:
        """Reads what is stale, but for the windows.

        Args:
            since: A moment of `time.monotonic` that the readings must not precede.
        """
        since = max(since, self._outdated)
        self._basics_read.fresh_seconds = _SHORT_SECONDS if self._dealer.is_short else FRESH_SECONDS
        if self._basics_read.is_stale(since):
            begun = time.monotonic()
            self._take_basics(*await self._store.basics(self._organization_id), begun)
            if not self._basics.complete:
                await self._make_day()
        if self._exits_read.is_stale(since):
            begun = time.monotonic()
            exits = await self._store.exits_with_room(self._organization_id)
            for exit_ in exits:
                exit_.place = self._dealer.exits.place_of(exit_.exit_id)
                exit_.taken += self._dealer.proposed_exits[exit_.exit_id]
            self._dealer.exits = ExitPool(exits, self._basics.cooling)
            self._exits_read.note(begun)
        INDEX_AGE_SECONDS.observe(time.monotonic() - min(self._basics_read.begun, self._exits_read.begun))

    def _take_basics(self, basics: Basics, classes: Sequence[SlotClass], begun: float) -> None:
        if basics.work_date != self._basics.work_date:
            self._windows.clear()
            self._levels.clear()
        self._basics = basics
        self._dealer.limit(basics.rooms or {})
        self._dealer.exits.cool(basics.cooling or {})
        for slots in classes:
            if slots.class_id not in self._windows:
                self._windows[slots.class_id] = ClassWindow(slots)
                self._levels.clear()
        self._basics_read.note(begun)

    def look_ahead(self) -> None:
        """Begins to read what will be needed soon, unless that goes on already."""
        if self._ahead is not None and not self._ahead.done():
            return
        if self._basics_are_half_stale() or self._half_used():
            self._ahead = asyncio.create_task(self._read_ahead(), name="read ahead", context=Context())

    def _half_used(self) -> list[ClassWindow]:
        old = time.monotonic() - _FRESH_PARTS_SECONDS / 2
        return [window for window in self._windows.values() if window.ahead is None and window.is_half_used(old)]

    def _basics_are_half_stale(self) -> bool:
        # Where targets hold something back, what batches in flight take counts: the next batch looks itself.
        return not self._basics.rooms and self._basics_read.is_half_stale()

    async def _read_ahead(self) -> None:
        try:
            if self._basics_are_half_stale():
                begun = time.monotonic()
                basics, classes = await self._store.basics(self._organization_id)
                async with self.choosing:
                    if basics.complete and self._basics_read.begun < begun and not self._outdated > begun:
                        self._take_basics(basics, classes, begun)
            while (windows := self._half_used()[:_CLASSES_AHEAD]) and (day := self._basics.work_date):
                begun = time.monotonic()
                places = [window.place for window in windows]
                size = window_size(len(self._windows))
                found = await self._store.windows(
                    self._organization_id,
                    day,
                    [(window.slots.class_id, *place) for window, place in zip(windows, places, strict=True)],
                    size,
                )
                for window, place in zip(windows, places, strict=True):
                    slots, end = found.get(window.slots.class_id, ([], place))
                    # A class that has become small is read when it is needed, since its slots share exactly.
                    if len(slots) == size and window.place is place:
                        window.ahead = Part(slots, begun, end)
                if not all(window.ahead for window in windows):
                    break
        except DatabaseUnavailable as error:
            _log.warning("reading ahead waits for the database", error=error.message)

    async def choose(self, wish: Wish, units: int, turn: int, since: float = float("-inf")) -> list[Pick]:
        """Proposes up to `units`; fewer only if what the index may rely on holds no more.

        Args:
            wish: Which slots may serve.
            units: How many are asked for.
            turn: How many units a slot, or an exit, gives at a time where there are many.
            since: As in `refresh`; the windows too.
        """
        while True:
            await self.refresh(since)
            picks = await self._choose(wish, units, turn, max(since, self._outdated))
            if picks or self._basics.complete:
                return picks
            # Nothing so far, but not every slot has its row of today.
            await self._store.track_day(self._organization_id)
            since = time.monotonic()

    async def _choose(self, wish: Wish, units: int, turn: int, since: float) -> list[Pick]:
        self._dealer.proposals += 1
        levels = self._levels_of(wish)
        picks: list[Pick] = []
        if len(levels) > 1:
            self._owed += units / _GUARANTEE
            if self._owed >= 1:
                picks += await self._serve_waiting(levels[1:], wish, min(units, int(self._owed)), turn, since)
                self._owed %= 1.0
        for number, level in enumerate(levels):
            for _ in range(_ROUNDS):
                if len(picks) == units:
                    break
                read = await self._read(level, levels[number + 1 :], since)
                got = self._dealer.deal(level, wish, units - len(picks), turn)
                picks += got
                if not got and not read:
                    break
            if len(picks) == units:
                break
        return picks

    async def _serve_waiting(
        self, levels: list[list[ClassWindow]], wish: Wish, units: int, turn: int, since: float
    ) -> list[Pick]:
        waiting = sorted((window for level in levels for window in level), key=_served)
        picks: list[Pick] = []
        for number, window in enumerate(waiting):
            await self._read([window], [waiting[number + 1 :]], since)
            got = self._dealer.deal([window], wish, units - len(picks), turn)
            window.served = self._dealer.proposals
            picks += got
            if len(picks) == units:
                break
        return picks

    def _levels_of(self, wish: Wish) -> list[list[ClassWindow]]:
        """Returns the classes that may serve a wish, by priority."""
        levels = self._levels.get(wish)
        if levels is None:
            by_priority: dict[int, list[ClassWindow]] = {}
            for window in self._windows.values():
                if wish.admits(window):
                    by_priority.setdefault(-window.slots.priority, []).append(window)
            levels = self._levels[wish] = [by_priority[priority] for priority in sorted(by_priority)]
            if len(self._levels) > _WISHES:
                self._levels.popitem(last=False)
        return levels

    async def _read(self, level: Sequence[ClassWindow], lower: Sequence[Sequence[ClassWindow]], since: float) -> bool:
        """Reads windows of a level that are stale or used up, and at once those of lower ones, a bounded number.

        The classes that waited longest first, so that all are read in turns. Returns whether any was stale.
        """
        # The more classes, the longer each is relied on; whoever would get nothing looks afresh.
        age = max(FRESH_SECONDS * len(self._windows) / _CLASSES_AT_ONCE, FRESH_SECONDS)
        fresh = max(since, time.monotonic() - max(age, self._window_seconds / _READING_SHARE))
        # Part of a class that is not used up yet holds no less than any other part.
        fresh_part = max(since, fresh - _FRESH_PARTS_SECONDS)
        wanted = [
            window for window in level if window.is_used_up or window.begun < (fresh if window.is_whole else fresh_part)
        ]
        if not wanted:
            return False
        at_hand = [window for window in wanted if window.ahead and window.ahead.begun >= fresh_part]
        for window in at_hand:
            self._show_ahead(window)
        wanted = [window for window in wanted if window not in at_hand]
        if not wanted:
            return True
        if len(wanted) > _CLASSES_AT_ONCE:
            wanted.sort(key=_served)
        for others in lower:
            if len(wanted) >= _CLASSES_AT_ONCE:
                break
            wanted += [window for window in others if window.begun < fresh]
        await self._read_windows(wanted[:_CLASSES_AT_ONCE])
        return True

    async def _read_windows(self, windows: list[ClassWindow]) -> None:
        if self._basics.work_date is None:
            return
        begun = time.monotonic()
        size = window_size(len(windows))
        found = await self._store.windows(
            self._organization_id,
            self._basics.work_date,
            [(window.slots.class_id, *window.place) for window in windows],
            size,
        )
        for window in windows:
            rows, place = found.get(window.slots.class_id, ([], window.place))
            whole = len(rows) < size
            if not whole:
                window.place = place
            window.show(self._not_proposed(rows), begun, whole=whole)
        self._window_seconds = time.monotonic() - begun
        INDEX_SECONDS.observe(self._window_seconds)

    def _show_ahead(self, window: ClassWindow) -> None:
        part = window.ahead
        assert part is not None
        window.place = part.end
        window.show(self._not_proposed(part.slots), part.begun, whole=False)

    def _not_proposed(self, slots: Sequence[AvailableSlot]) -> list[AvailableSlot]:
        """Returns the slots that have room beside what this batch proposed."""
        proposed = self._dealer.proposed_slots
        for slot in slots:
            if units := proposed.get(slot.slot_id):
                slot.taken += units
                slot.room -= units
        return [slot for slot in slots if slot.room > 0]

    async def _make_day(self) -> None:
        """Makes some rows of today, so that there is work at once, and begins to make the others behind it."""
        if self._days is None or self._days.done():
            if not await self._store.track_day(self._organization_id):
                self._days = asyncio.create_task(self._make_rest_of_day(), name="days", context=Context())
            self.outdate()

    async def _make_rest_of_day(self) -> None:
        try:
            while not await self._store.track_day(self._organization_id):
                self.outdate()
        except DatabaseUnavailable as error:
            _log.warning("the day's rows wait for the database", error=error.message)
        self.outdate()

    async def close(self) -> None:
        """Ends what goes on behind it; whoever needs the day next goes on."""
        for task in (self._days, self._ahead):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


class Availability:
    """The indexes of all organizations that were served lately."""

    def __init__(self, store: AllocationStore) -> None:
        self._store = store
        self._organizations: dict[UUID, OrganizationIndex] = {}

    def of(self, organization_id: UUID) -> OrganizationIndex:
        """Returns an organization's index."""
        index = self._organizations.get(organization_id)
        if index is None:
            index = self._organizations[organization_id] = OrganizationIndex(organization_id, self._store)
        return index

    def outdate(self, organization_id: UUID, *, wake: bool = True) -> None:
        """Notes that an organization has more to offer, or less, than its index knows; `wake` as of the index."""
        if (index := self._organizations.get(organization_id)) is not None:
            index.outdate(wake=wake)

    def wake(self, organization_id: UUID) -> None:
        """Lets those who wait for an organization's work look again."""
        if (index := self._organizations.get(organization_id)) is not None:
            index.wake()

    async def close(self) -> None:
        """Ends what goes on behind the indexes."""
        for index in self._organizations.values():
            await index.close()


def _served(window: ClassWindow) -> int:
    return window.served
