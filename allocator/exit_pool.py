"""Pooled exits with head-room, in memory: which one a unit goes through.

The least used exit goes first. Under load an exit gives several uses in one turn, so that a batch moves few rows, and
the uses of a turn are dealt over the exits of a hand in rounds: consecutive units still leave through different exits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from uuid import UUID

# As many, or fewer, are dealt one by one, by their exact shares.
HAND = 64
# How many exits take turns at a time under load, and how much longer a turn is than that of a slot: the units of one
# call leave through as many exits, and a large batch moves about so many rows of exits. There are few exits, so each
# row moves often, and while another transaction keeps its old versions from being removed, every move that leaves its
# page costs more than the one before.
_TAKING_TURNS = 32
_LONGER = 2


@dataclass(slots=True, eq=False)
class AvailableExit:
    """An exit with head-room; `taken` grows as the pool proposes it.

    Attributes:
        exit_id: The exit.
        region: It leaves from.
        cap: The most uses.
        taken: Uses that count against the cap.
        place: Where its row was last seen, block and offset; a hint that spares the index. None: not known.
    """

    exit_id: UUID
    region: str
    cap: int
    taken: int
    place: tuple[int, int] | None = None

    def rank(self) -> float:
        """The least used first."""
        return self.taken / self.cap


class _Group:
    """The exits that serve one region and target. Exits are shared by groups, so ranks are checked when drawn."""

    __slots__ = ("_hand", "_heap", "_is_small")

    def __init__(self, exits: Iterable[AvailableExit]) -> None:
        self._heap = [(exit_.rank(), number, exit_) for number, exit_ in enumerate(exits)]
        heapq.heapify(self._heap)
        self._is_small = len(self._heap) <= HAND
        self._hand: deque[tuple[int, int, AvailableExit]] = deque()

    def has_room(self) -> bool:
        """Whether any exit has head-room."""
        hand, heap = self._hand, self._heap
        while hand and hand[0][2].taken >= hand[0][2].cap:
            hand.popleft()
        while heap and heap[0][2].taken >= heap[0][2].cap:
            heapq.heappop(heap)
        return bool(hand or heap)

    def put_back(self) -> None:
        """Ends the turns of the hand."""
        for _, number, exit_ in self._hand:
            heapq.heappush(self._heap, (exit_.rank(), number, exit_))
        self._hand.clear()

    def take(self, turn: int) -> AvailableExit | None:
        """Takes one use; None when no exit has head-room."""
        while True:
            if not self._hand:
                self._draw(turn)
                if not self._hand:
                    return None
            left, number, exit_ = self._hand.popleft()
            if exit_.taken >= exit_.cap:
                continue
            exit_.taken += 1
            if left > 1:
                self._hand.append((left - 1, number, exit_))
            else:
                heapq.heappush(self._heap, (exit_.rank(), number, exit_))
            return exit_

    def _draw(self, turn: int) -> None:
        heap = self._heap
        if self._is_small or turn == 1:
            hand, turn = 1, 1
        else:
            hand, turn = _TAKING_TURNS, turn * _LONGER
        while heap and len(self._hand) < hand:
            rank, number, exit_ = heapq.heappop(heap)
            if exit_.taken >= exit_.cap:
                continue
            if rank != (now := exit_.rank()):
                heapq.heappush(heap, (now, number, exit_))
                continue
            self._hand.append((turn, number, exit_))


class ExitPool:
    """The exits of an organization that have head-room.

    Args:
        exits: Enabled, with head-room.
        cooling: By target, the exits that it does not take for now.
    """

    def __init__(self, exits: Iterable[AvailableExit] = (), cooling: Mapping[str, Set[UUID]] | None = None) -> None:
        self._exits = {exit_.exit_id: exit_ for exit_ in exits}
        self._cooling = cooling or {}
        self._groups: dict[tuple[str, str | None], _Group] = {}

    def has_room(self, region: str, target: str) -> bool:
        """Whether any exit of the region ('' for any) has head-room and does not cool down for the target."""
        return self._group(region, target).has_room()

    def take(self, region: str, target: str, turn: int) -> AvailableExit | None:
        """Takes one use of such an exit; None when none has head-room. A turn is at most so many uses in a row."""
        return self._group(region, target).take(turn)

    def shuffle(self) -> None:
        """Puts the exits of the hands back: the least used come next."""
        for group in self._groups.values():
            group.put_back()

    def place_of(self, exit_id: UUID) -> tuple[int, int] | None:
        """Returns where an exit's row was last seen."""
        exit_ = self._exits.get(exit_id)
        return exit_.place if exit_ else None

    def cool(self, cooling: Mapping[str, Set[UUID]]) -> None:
        """Notes which exits cool down by now."""
        if cooling != self._cooling:
            self._cooling = cooling
            self._groups.clear()

    def _group(self, region: str, target: str) -> _Group:
        cooling = self._cooling.get(target)
        key = (region, target if cooling else None)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(
                exit_
                for exit_ in self._exits.values()
                if (not region or exit_.region == region) and not (cooling and exit_.exit_id in cooling)
            )
        return group
