"""Slots with room, in memory: of each class a window that is small however many slots the class has.

A class that fits into its window is *whole*: its slots share exactly, the one that got the least of its share (quota
times weight) first. Of a greater class the window shows a part, and each slot of it gives one turn; then the next part
is read, round and round, so that every slot gets its turns.
"""

from __future__ import annotations

import heapq
import random
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from allocator.slots import PersonaNeed

# Slots of a window that are asked for at most, and all windows that are read together.
_MOST_SLOTS = 1024
_ALL_SLOTS = 4096
_LEAST_SLOTS = 16


@dataclass(frozen=True, slots=True, eq=False)
class SlotClass:
    """What slots have in common that are served alike. Never changes.

    Attributes:
        class_id: In the database.
        target: '' when each slot is a target of its own.
        priority: The greater first.
        without_exit: Whether it needs no exit.
        exit_region: Only exits of this region; '' for any.
        exit_provider: Of external exits; '' for the pool.
        persona_need: Canonical text; '' for none.
        need: The same.
    """

    class_id: int
    target: str
    priority: int
    without_exit: bool
    exit_region: str
    exit_provider: str
    persona_need: str
    need: PersonaNeed | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "need", PersonaNeed.from_json(self.persona_need or None))

    @property
    def is_pooled(self) -> bool:
        """Whether it needs an exit of the pool."""
        return not self.without_exit and not self.exit_provider


@dataclass(slots=True, eq=False)
class AvailableSlot:
    """A slot with room; `taken` grows and `room` falls as the index proposes it.

    `share` is quota times weight; `place` is where its row of the day was seen, block and offset: a hint that spares
    the index.
    """

    slot_id: UUID
    share: float
    taken: int
    room: int
    place: tuple[int, int] | None = None

    def rank(self) -> float:
        """The one that got the least of its share first."""
        return self.taken / self.share


@dataclass(frozen=True, slots=True)
class Part:
    """Slots of a class that were read from `place` on: `begun` is when, `end` where the next part begins."""

    slots: list[AvailableSlot]
    begun: float
    end: tuple[float, UUID]


def window_size(classes: int) -> int:
    """Returns how many slots of each class are read when so many classes are read at once."""
    return max(_LEAST_SLOTS, min(_MOST_SLOTS, _ALL_SLOTS // classes))


class ClassWindow:
    """The window of one class.

    Attributes:
        slots: The class.
        begun: When the last reading began, by `time.monotonic`; -inf before the first.
        is_whole: Whether the class has no slots with room but these.
        served: When a unit of the class was last proposed, counted in proposals.
        place: Where the next reading begins: open_at and slot. At first anywhere, so that replicas do not meet.
        ahead: The next part, if it was read before it is needed.
    """

    __slots__ = ("_heap", "_mean", "_numbers", "_shown", "ahead", "begun", "is_whole", "place", "served", "slots")

    def __init__(self, slots: SlotClass) -> None:
        self.slots = slots
        self.begun = float("-inf")
        self.served = 0
        self.place: tuple[float, UUID] = (float("-inf"), uuid.uuid4())
        self.ahead: Part | None = None
        self._heap: list[tuple[float, int, AvailableSlot]] = []
        self._shown = 0
        self.is_whole = True
        self._mean = 1.0
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def is_used_up(self) -> bool:
        """Whether there may be more to read: a part of the class was read, and each of its slots had its turn."""
        return not self._heap and not self.is_whole

    def is_half_used(self, since: float) -> bool:
        """Whether the next part will be needed soon: half of this one had its turn, or it was read before `since`."""
        return not self.is_whole and (len(self._heap) * 2 <= self._shown or self.begun < since)

    def show(self, slots: Iterable[AvailableSlot], begun: float, *, whole: bool) -> None:
        """Takes what was read."""
        self.begun = begun
        self.is_whole = whole
        self.ahead = None
        # In the order of their ids, so that what is equal is served alike whenever it is asked for.
        ordered = sorted(slots, key=_by_id)
        self._mean = sum(slot.share for slot in ordered) / len(ordered) if ordered else 1.0
        self._heap = [(slot.rank(), number, slot) for number, slot in enumerate(ordered)]
        self._numbers = self._shown = len(ordered)
        heapq.heapify(self._heap)

    def top(self) -> float:
        """The rank of the best slot; only when there is one."""
        return self._heap[0][0]

    def pop(self) -> AvailableSlot:
        """Takes the best slot out; only when there is one."""
        return heapq.heappop(self._heap)[2]

    def turn_of(self, slot: AvailableSlot, turn: int) -> int:
        """Returns how many units a slot gives in its turn, by its share in a class that is not whole; may be 0."""
        if not self.is_whole:
            fair = turn * slot.share / self._mean
            turn = int(fair) + (random.random() < fair % 1.0)  # noqa: S311 - a share, not a secret
        return min(turn, slot.room)

    def put_back(self, slot: AvailableSlot, *, had_turn: bool) -> None:
        """Puts a slot back that was taken out, unless it has no room, or had its turn in a class that is not whole."""
        if slot.room > 0 and (self.is_whole or not had_turn):
            self._numbers += 1
            heapq.heappush(self._heap, (slot.rank(), self._numbers, slot))


def _by_id(slot: AvailableSlot) -> bytes:
    return slot.slot_id.bytes
