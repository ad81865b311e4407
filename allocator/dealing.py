"""Dealing units out of windows: whose turn it is, and through which exit."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from allocator.exit_pool import HAND, ExitPool
from allocator.packages import Pick
from allocator.slot_windows import AvailableSlot, ClassWindow

_NO_NEEDS: frozenset[str] = frozenset()
_NO_PROVIDERS: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Wish:
    """Which slots a demand may be served from.

    Attributes:
        target: Only this one; '' for any.
        region: Only exits of this region; '' for any.
        needs: Persona needs, as canonical texts, that cannot be met; '*' for all.
        providers: External providers and regions that cannot serve.
    """

    target: str = ""
    region: str = ""
    needs: frozenset[str] = _NO_NEEDS
    providers: frozenset[tuple[str, str]] = _NO_PROVIDERS

    def admits(self, window: ClassWindow) -> bool:
        """Whether a class may serve it."""
        slots = window.slots
        if self.target and slots.target != self.target:
            return False
        if self.region and slots.exit_region not in ("", self.region):
            return False
        if slots.persona_need and (slots.persona_need in self.needs or "*" in self.needs):
            return False
        return not slots.exit_provider or (slots.exit_provider, slots.exit_region or self.region) not in self.providers


@dataclass(frozen=True, slots=True)
class Basics:
    """What is read of an organization about once a second.

    Attributes:
        work_date: Today, in its time zone; None before its first contact.
        complete: Whether every slot has its row of today.
        draining: Clients that get nothing.
        cooling: By target, exits that it does not take for now.
        rooms: Of targets that hold anything back, the units that may go out.
    """

    work_date: date | None = None
    complete: bool = True
    draining: frozenset[str] = frozenset()
    cooling: dict[str, frozenset[UUID]] | None = None
    rooms: dict[str, int] | None = None


class Dealer:
    """Proposes units, and remembers what it proposed.

    Attributes:
        exits: The pool.
        rooms: Of targets that hold anything back, the units that may still go out.
        is_short: Set when a target let nothing out.
        proposals: Counts calls, as the clock by which classes wait.
        proposed_slots: Units by slot since the batch began, of which a reading does not know.
        proposed_exits: Likewise uses by exit.
    """

    def __init__(self) -> None:
        self.exits = ExitPool()
        self.rooms: dict[str, int] = {}
        self._slots_are_targets = False
        self.is_short = False
        self.proposals = 0
        self.proposed_slots: Counter[UUID] = Counter()
        self.proposed_exits: Counter[UUID] = Counter()

    def begin_batch(self) -> None:
        """Begins to note what is proposed, and takes other exits than the batch before, which may still hold theirs."""
        self.proposed_slots.clear()
        self.proposed_exits.clear()
        self.exits.shuffle()

    def limit(self, rooms: Mapping[str, int]) -> None:
        """Takes what targets let out by now."""
        self.rooms = dict(rooms)
        self._slots_are_targets = any(target.startswith("slot:") for target in rooms)
        self.is_short = False

    def deal(self, level: Sequence[ClassWindow], wish: Wish, units: int, turn: int) -> list[Pick]:
        """Proposes units of one level as far as its windows go."""
        ready = [window for window in level if len(window) and self._is_open(window, wish)]
        # Few slots are served one by one, by their exact shares; of many, a hand takes turns together.
        few = sum(map(len, ready)) <= HAND
        # Which window is next, by its best slot. An entry whose rank is no longer the window's is void.
        tops = [(window.top(), number) for number, window in enumerate(ready)]
        heapq.heapify(tops)
        closed: set[int] = set()
        picks: list[Pick] = []
        while tops and len(picks) < units:
            hand: deque[tuple[int, AvailableSlot, int]] = deque()
            most = 1 if few else HAND
            promised = len(picks)
            # No more slots than can give their whole turns: one that is cut short comes up again before its window is
            # read anew, while another batch may still hold its row.
            while tops and len(hand) < most and promised < units:
                rank, number = heapq.heappop(tops)
                window = ready[number]
                if number in closed or not len(window) or window.top() != rank:
                    continue
                slot = window.pop()
                if len(window):
                    heapq.heappush(tops, (window.top(), number))
                if left := min(window.turn_of(slot, 1 if few else turn), self._room_of(slot, window)):
                    hand.append((left, slot, number))
                    promised += left
            while hand:
                left, slot, number = hand.popleft()
                window = ready[number]
                if len(picks) == units or number in closed:
                    window.put_back(slot, had_turn=False)
                    continue
                pick = self._take(slot, window, wish, turn)
                if pick is None:
                    closed.add(number)
                    window.put_back(slot, had_turn=False)
                    continue
                picks.append(pick)
                if left > 1 and not few:
                    hand.append((left - 1, slot, number))
                    continue
                window.put_back(slot, had_turn=True)
                if len(window):
                    heapq.heappush(tops, (window.top(), number))
        return picks

    def _is_open(self, window: ClassWindow, wish: Wish) -> bool:
        """Whether a class can be served at all: its target lets something out, and an exit is to be had."""
        slots = window.slots
        if slots.target and self.rooms.get(slots.target, 1) <= 0:
            self.is_short = True
            return False
        return not slots.is_pooled or self.exits.has_room(slots.exit_region or wish.region, slots.target)

    def _room_of(self, slot: AvailableSlot, window: ClassWindow) -> int:
        """Returns the units that a slot may give, as far as it is a target of its own."""
        if window.slots.target or not self._slots_are_targets:
            return slot.room
        room = self.rooms.get(f"slot:{slot.slot_id}", slot.room)
        if room <= 0:
            self.is_short = True
        return max(0, room)

    def _take(self, slot: AvailableSlot, window: ClassWindow, wish: Wish, turn: int) -> Pick | None:
        """Proposes one unit of a slot; None when its class can give none now."""
        slots = window.slots
        exit_ = None
        if self.rooms:
            target = slots.target or f"slot:{slot.slot_id}"
            room = self.rooms.get(target)
            if room is not None:
                if room <= 0:
                    self.is_short = True
                    return None
                self.rooms[target] = room - 1
        if slots.is_pooled:
            exit_ = self.exits.take(slots.exit_region or wish.region, slots.target, turn)
            if exit_ is None:
                return None
            self.proposed_exits[exit_.exit_id] += 1
        slot.taken += 1
        slot.room -= 1
        window.served = self.proposals
        self.proposed_slots[slot.slot_id] += 1
        return Pick(slot.slot_id, slots, exit_, slot.place)
