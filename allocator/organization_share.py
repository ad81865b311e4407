"""Organizations share a replica: those that wait take turns, by weight.

Start-time fair queueing (Goyal, Vin and Cheng, 1996). A turn starts, in virtual time, when the one before it of the
same organization ended or the one that is being served began, whichever is later; it lasts as long as its cost by the
weight; the earliest start goes first. Whoever uses little never waits behind the backlog of one who uses much.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID

_REMEMBERED = 10_000


class OrganizationShare:
    """Turns on a bounded number of lanes.

    Args:
        lanes: How many turns are taken at once.
        weights: By organization; 1 for others.
    """

    def __init__(self, lanes: int, weights: Mapping[UUID, float]) -> None:
        self._free = lanes
        self._weights = weights
        self._now = 0.0
        self._ends: dict[UUID, float] = {}
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals = 0

    @asynccontextmanager
    async def turn(self, organization_id: UUID, cost: float) -> AsyncIterator[None]:
        """Waits for a turn and holds a lane.

        Args:
            organization_id: Whose turn it is.
            cost: In units of work, as many as are asked for.
        """
        start = max(self._now, self._ends.get(organization_id, 0.0))
        if len(self._ends) >= _REMEMBERED:
            # Ends that have passed bind nobody.
            self._ends = {key: end for key, end in self._ends.items() if end > self._now}
        self._ends[organization_id] = start + cost / self._weights.get(organization_id, 1.0)
        if self._free:
            self._free -= 1
            self._now = max(self._now, start)
        else:
            self._arrivals += 1
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (start, self._arrivals, granted))
            try:
                await granted
            except asyncio.CancelledError:
                if granted.done() and not granted.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            start, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                self._now = max(self._now, start)
                granted.set_result(None)
                return
        self._free += 1
