"""When the pool of exits will be used up, at the pace of the last 15 minutes.

Every replica looks at the counts in the database every few seconds and adds up how they moved, so each sees what all
of them handed out; a replica that was just started has seen less, and says how much. A count that falls because uses
came back, or because a window ended, is a use less. One that falls because its exit was toggled is not: the forecast
says when the pool will be empty if nobody toggles, which is what a person must know to act in time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.exits import CapMode
from allocator.metrics import EXIT_SECONDS_TO_EMPTY, EXIT_USE_RATIO
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "exits.sql")
_log = structlog.get_logger("allocator.exit_forecast")

WINDOW_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one enabled exit stands."""

    region: str
    cap_mode: int
    cap: int
    toggle_epoch: int
    use_count: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The pool now, and when it will be empty.

    Attributes:
        room: Uses left on enabled exits.
        capacity: Their caps together.
        uses_per_minute: Uses taken net of those given back; never negative.
        observed_seconds: How much of the window the pace rests on; 0 when it is unknown.
        empty_at: When nothing will be left; None when nothing is being used up.
    """

    room: int
    capacity: int
    uses_per_minute: float
    observed_seconds: float
    empty_at: datetime | None


@dataclass(slots=True)
class Flow:
    """How the counts of one organization's exits moved over the window: the moments of looking, and uses by region."""

    exits: dict[UUID, Sample] = field(default_factory=dict)
    moves: deque[tuple[float, Counter[str]]] = field(default_factory=deque)

    def observe(self, at: float, exits: dict[UUID, Sample]) -> None:
        """Adds a look at the exits, at a moment in seconds of a steady clock."""
        taken: Counter[str] = Counter()
        for exit_id, now in exits.items():
            if (before := self.exits.get(exit_id)) is not None:
                taken[now.region] += _taken(before, now)
        self.exits = exits
        self.moves.append((at, taken))
        # The first entry only says since when; what it counted lies before it.
        while len(self.moves) > 2 and self.moves[1][0] <= at - WINDOW_SECONDS:
            self.moves.popleft()

    def pace(self, region: str) -> tuple[float, float]:
        """Returns uses a minute, of a region or ('') of all, and the seconds that were observed."""
        if len(self.moves) < 2:
            return 0.0, 0.0
        observed = self.moves[-1][0] - self.moves[0][0]
        rest = [taken for _, taken in self.moves][1:]
        taken = sum(move[region] if region else move.total() for move in rest)
        return max(0.0, taken * 60 / observed) if observed > 0 else 0.0, observed

    def seconds_to_empty(self) -> float:
        """Returns when the whole pool will be empty; infinity when it is not being used up, or there is none."""
        room, capacity = self.pool()
        pace, _ = self.pace("")
        if capacity and not room:
            return 0.0
        return room * 60 / pace if pace else float("inf")

    def pool(self) -> tuple[int, int]:
        """Returns the uses left and the capacity at the last look."""
        capacity = sum(exit_.cap for exit_ in self.exits.values())
        return capacity - sum(exit_.use_count for exit_ in self.exits.values()), capacity


def _taken(before: Sample, now: Sample) -> int:
    """Returns the uses taken between two looks at one exit, net of those given back."""
    if now.cap_mode == CapMode.UNTIL_TOGGLE and now.toggle_epoch != before.toggle_epoch:
        # What was taken before the toggle, since the last look, is not known here: at most one look's worth.
        return now.use_count
    return now.use_count - before.use_count


class ExitForecast:
    """Forecasts for every organization.

    Args:
        database: The allocator's database.
        sample_seconds: How often it is looked at.
    """

    def __init__(self, database: Database, *, sample_seconds: float) -> None:
        self._database = database
        self._sample_seconds = sample_seconds
        self._flows: dict[UUID, Flow] = {}

    async def forecast(self, organization_id: UUID, region: str) -> Forecast:
        """Returns the forecast for exits of a region, or ('') of all.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        row = await self._database.fetchrow(_SQL["pool"], organization_id, region or None)
        assert row is not None
        room, capacity, now = row["room"], row["capacity"], row["at"]
        flow = self._flows.get(organization_id, Flow())
        pace, observed = flow.pace(region)
        empty_at: datetime | None = None
        if capacity and not room:
            empty_at = now
        elif pace > 0:
            # A pace of less than a use in a year is none; timestamps end somewhere.
            minutes = room / pace
            empty_at = now + timedelta(minutes=minutes) if minutes < 366 * 1440 else None
        return Forecast(room, capacity, pace, observed, empty_at)

    async def sample(self) -> None:
        """Looks at the exits of all organizations and sets the metrics. Raises: DatabaseUnavailable."""
        rows = await self._database.fetch(_SQL["sample_exits"])
        now = time.monotonic()
        seen: dict[UUID, dict[UUID, Sample]] = {}
        for row in rows:
            seen.setdefault(row["organization_id"], {})[row["exit_id"]] = Sample(
                row["region"], row["cap_mode"], row["cap"], row["toggle_epoch"], row["use_count"]
            )
        flows = {organization_id: self._flows.get(organization_id, Flow()) for organization_id in seen}
        for organization_id, flow in flows.items():
            flow.observe(now, seen[organization_id])
        self._flows = flows
        pools = [flow.pool() for flow in flows.values()]
        EXIT_USE_RATIO.set(max((1 - room / capacity for room, capacity in pools if capacity), default=0.0))
        EXIT_SECONDS_TO_EMPTY.set(min((flow.seconds_to_empty() for flow in flows.values()), default=float("inf")))

    async def sample_for_ever(self) -> None:
        """Looks every `sample_seconds`; waits while the database is away."""
        while True:
            try:
                await self.sample()
            except DatabaseUnavailable as error:
                _log.warning("the forecast waits for the database", error=error.message)
            await asyncio.sleep(self._sample_seconds)
