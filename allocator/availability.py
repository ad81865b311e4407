"""What is available, in memory: slots with room and exits with head-room, by organization.

The index only proposes; the database decides. It is read from the database, used up by its own proposals, and read
again when it is older than `FRESH_SECONDS`, when a write through this replica outdated it, and when a caller would
otherwise be told that there is nothing. It holds the best `_SLOTS` slots of each selection that is asked for, so its
cost does not grow with the number of slots.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.metrics import INDEX_SECONDS

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore

# Only what other replicas did is news; what this one did it has counted itself.
FRESH_SECONDS = 1.0
# A refresh takes at most this share of the time, however many slots there are.
_REFRESH_SHARE = 0.05
_SLOTS = 1024
_SELECTIONS = 64


@dataclass(frozen=True, slots=True)
class Selection:
    """Which slots a demand may be served from.

    Attributes:
        target: Only this one; None for any.
        exitless: Only slots that use no exit, since there is none.
        avoid: Persona needs, as canonical texts, that cannot be met.
    """

    target: str | None = None
    exitless: bool = False
    avoid: frozenset[str] = frozenset()


@dataclass(slots=True)
class AvailableSlot:
    """A slot with room; `taken` grows as the index proposes it."""

    slot_id: UUID
    priority: int
    weight: int
    quota: int
    taken: int
    tracked: bool
    without_exit: bool
    persona_need: str

    def rank(self) -> tuple[int, float]:
        """Priority first; among equals the slot that got the least of its share."""
        return -self.priority, self.taken / self.quota / self.weight

    def room(self) -> int:
        """Units left."""
        return self.quota - self.taken


@dataclass(slots=True)
class AvailableExit:
    """An exit with head-room; `taken` grows as the index proposes it."""

    exit_id: UUID
    region: str
    cap: int
    taken: int

    def rank(self) -> tuple[int, float]:
        """The least used first."""
        return 0, self.taken / self.cap

    def room(self) -> int:
        """Uses left."""
        return self.cap - self.taken


class Spread:
    """Takes units from several sources, always from the one that ranks first by now: O(log n) a unit."""

    __slots__ = ("_heap",)

    def __init__(self, sources: Iterable[AvailableSlot | AvailableExit]) -> None:
        self._heap = [(source.rank(), number, source) for number, source in enumerate(sources)]
        heapq.heapify(self._heap)

    def has_room(self) -> bool:
        """Whether any source has room."""
        while self._heap and self._heap[0][2].room() <= 0:
            heapq.heappop(self._heap)
        return bool(self._heap)

    def take(self) -> AvailableSlot | AvailableExit | None:
        """Returns the source of one unit, None when none has room."""
        heap = self._heap
        while heap:
            rank, number, source = heap[0]
            if source.room() <= 0:
                heapq.heappop(heap)
                continue
            if rank != (now := source.rank()):
                # Another region's heap used it.
                heapq.heapreplace(heap, (now, number, source))
                continue
            source.taken += 1
            heapq.heapreplace(heap, (source.rank(), number, source))
            return source
        return None


@dataclass(slots=True)
class _Held:
    """Something read from the database: when the reading began, how long it took, and whether it is outdated."""

    spread: Spread
    begun: float
    seconds: float
    outdated: bool = False

    def is_stale(self, since: float | None) -> bool:
        if self.outdated or (since is not None and self.begun < since):
            return True
        return self.begun + max(FRESH_SECONDS, self.seconds / _REFRESH_SHARE) < time.monotonic()


class OrganizationIndex:
    """What is available to one organization.

    Used from one batch at a time, as its coalescer sees to.

    Args:
        organization_id: The tenant.
        store: Reads the database.
    """

    def __init__(self, organization_id: UUID, store: AllocationStore) -> None:
        self._organization_id = organization_id
        self._store = store
        self._slots: OrderedDict[Selection, _Held] = OrderedDict()
        self._exits: dict[str | None, Spread] = {}
        self._exits_held: _Held | None = None
        self.draining_clients: frozenset[str] = frozenset()
        # Set when something was given back or added here, for those who wait for work.
        self.changed = asyncio.Event()

    def outdate(self) -> None:
        """Notes that the database has more to offer than the index knows."""
        for held in self._slots.values():
            held.outdated = True
        if self._exits_held is not None:
            self._exits_held.outdated = True
        self.changed.set()
        self.changed = asyncio.Event()

    async def refresh_exits(self, since: float | None = None) -> None:
        """Reads the exits and the draining clients if need be.

        Args:
            since: A moment of `time.monotonic` that the reading must not precede.
        """
        held = self._exits_held
        if held is not None and not held.is_stale(since):
            return
        begun = time.monotonic()
        exits, self.draining_clients = await self._store.exits_with_room(self._organization_id)
        by_region: dict[str | None, list[AvailableExit]] = {None: exits}
        for exit_ in exits:
            by_region.setdefault(exit_.region, []).append(exit_)
        # Regions share the exits themselves, so what one takes the other misses.
        self._exits = {region: Spread(members) for region, members in by_region.items()}
        self._exits_held = self._read(self._exits[None], begun)

    async def refresh_slots(self, selection: Selection, since: float | None = None) -> None:
        """Reads the slots of a selection if need be; `since` as in `refresh_exits`."""
        held = self._slots.get(selection)
        if held is not None and not held.is_stale(since):
            self._slots.move_to_end(selection)
            return
        begun = time.monotonic()
        slots = await self._store.slots_with_room(self._organization_id, selection, _SLOTS)
        self._slots[selection] = self._read(Spread(slots), begun)
        self._slots.move_to_end(selection)
        if len(self._slots) > _SELECTIONS:
            self._slots.popitem(last=False)

    def slots(self, selection: Selection) -> Iterator[AvailableSlot]:
        """Takes units of slots, without end while there is room."""
        spread = self._slots[selection].spread
        while (slot := spread.take()) is not None:
            assert isinstance(slot, AvailableSlot)
            yield slot

    def has_exit(self, region: str | None) -> bool:
        """Whether any exit has head-room."""
        spread = self._exits.get(region)
        return spread is not None and spread.has_room()

    def take_exit(self, region: str | None) -> AvailableExit | None:
        """Takes one use of the least used exit, None when none has head-room."""
        spread = self._exits.get(region)
        taken = spread.take() if spread else None
        assert taken is None or isinstance(taken, AvailableExit)
        return taken

    @staticmethod
    def _read(spread: Spread, begun: float) -> _Held:
        seconds = time.monotonic() - begun
        INDEX_SECONDS.observe(seconds)
        return _Held(spread, begun, seconds)


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

    def outdate(self, organization_id: UUID) -> None:
        """Notes that an organization has more to offer, or less, than its index knows."""
        if (index := self._organizations.get(organization_id)) is not None:
            index.outdate()
