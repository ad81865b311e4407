"""Targets: how politely the fleet treats them, and how it backs off when they block.

open ──block rate passes, or a Retry-After──> paused ──probe_at, one probe──> open, when it succeeded
                                                ^                     ├──> paused for twice as long, when it was refused
                                                └── another probe ────┘    when it says nothing of the target

Apart from that a target is held until a moment, by its own Retry-After or by an operator; a Retry-After only holds a
target that is not to be paused. All of it stands in the database, so it binds the whole fleet; who reserves work has
read it under a lock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.metrics import TARGETS_HELD, TARGETS_PAUSED
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.availability import Availability
    from allocator.target_store import TargetStore

_log = structlog.get_logger("allocator.targets")

SLOT_PREFIX = "slot:"
# The block rate is that of the latest results, so that a change shows soon under load too.
MOST_RESULTS = 1000
_GAUGE_SECONDS = 5.0


def target_name(target: str, slot_id: UUID) -> str:
    """Returns what a slot's target is called: its own name, or the slot's when it has none."""
    return target or f"{SLOT_PREFIX}{slot_id}"


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """What an operator says of a target.

    Attributes:
        max_in_flight: The most units under lease at once; None for no limit.
        min_delay_ms: The least time between two units.
        auto_pause: Whether it is paused when it blocks, or asks to be left alone.
    """

    max_in_flight: int | None = None
    min_delay_ms: int = 0
    auto_pause: bool = True


@dataclass(frozen=True, slots=True)
class TargetState:
    """How the fleet stands with a target.

    Attributes:
        target: Its name.
        max_in_flight: As in the policy.
        min_delay_ms: As in the policy.
        auto_pause: As in the policy.
        crawl_delay_ms: The delay it asked for; 0 when it did not.
        held_until: Nothing goes out before; None when that has passed.
        paused_at: When it was paused; None when it is not.
        probe_at: When a probe may go out; None when it is not paused.
        pauses: Pauses in a row.
        in_flight: Units under lease, where the policy limits them; else 0.
        reason: Why it is held or paused; '' when it is neither.
    """

    target: str
    max_in_flight: int | None
    min_delay_ms: int
    auto_pause: bool
    crawl_delay_ms: int
    held_until: datetime | None
    paused_at: datetime | None
    probe_at: datetime | None
    pauses: int
    in_flight: int
    reason: str


@dataclass(frozen=True, slots=True)
class BackOff:
    """When a target is left alone, and for how long.

    Attributes:
        base_seconds: The wait for the first probe; each further pause in a row doubles it.
        limit_seconds: The longest wait.
        window_seconds: How far back results count.
        least_results: Fewer say nothing.
        block_rate: The part of them, from 0 to 1, that must be passed.
    """

    base_seconds: float
    limit_seconds: float
    window_seconds: float
    least_results: int
    block_rate: float

    def is_due(self, blocked: int, results: int) -> bool:
        """Whether that many blocked of that many results pause a target."""
        # The quotient and not the product: 29 of 100 is exactly the double 0.29, while 0.29 * 100 is less than 29.
        return results >= self.least_results and blocked / results > self.block_rate

    def reason(self, blocked: int, results: int) -> str:
        """Returns the figures in words."""
        return f"{blocked} of the last {results} results within {self.window_seconds / 60:g} minutes were blocked"


@dataclass(slots=True)
class News:
    """What a batch of results says of one target.

    Attributes:
        slot_id: Of a target that is a slot; None when it has a name.
        results: How many came.
        blocked: How many of them were blocked.
        retry_after_ms: The longest that it asked to be left alone; None when it did not.
        crawl_delay_ms: The delay it asked for last; None when it did not.
        probe_key: The allocation of a probe among them.
        probe_went_well: Whether it shows that the target takes runs again; None when it says nothing of the target.
    """

    slot_id: UUID | None
    results: int = 0
    blocked: int = 0
    retry_after_ms: int | None = None
    crawl_delay_ms: int | None = None
    probe_key: UUID | None = None
    probe_went_well: bool | None = None

    def matter(self) -> bool:
        """Whether they may change anything."""
        return bool(
            self.blocked
            or self.retry_after_ms is not None
            or self.crawl_delay_ms is not None
            or self.probe_key is not None
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """A target that stopped, or goes on; `what` is held, paused, resumed, probe_refused or probe_void."""

    target: str
    what: str
    reason: str


class Targets:
    """Administers targets.

    Args:
        store: The database.
        availability: Is told when a target stops or goes on.
    """

    def __init__(self, store: TargetStore, availability: Availability) -> None:
        self._store = store
        self._availability = availability

    async def set_policy(self, organization_id: UUID, target: str, policy: TargetPolicy) -> TargetState:
        """Sets a whole policy in the place of the last one and returns the target. Raises: DatabaseUnavailable."""
        state = await self._store.set_policy(organization_id, target, policy)
        self._availability.outdate(organization_id)
        return state

    async def hold(self, organization_id: UUID, target: str, seconds: float, reason: str) -> TargetState:
        """Hands out nothing of a target for `seconds` from now on. Raises: DatabaseUnavailable."""
        state = await self._store.hold(organization_id, target, seconds, reason)
        self._availability.outdate(organization_id)
        return state

    async def resume(self, organization_id: UUID, target: str) -> TargetState:
        """Ends a hold and a pause, and forgets the target's own delay; results from before count no more.

        Raises:
            TargetNotFound: nothing is known of it.
            DatabaseUnavailable: the database does not answer.
        """
        state = await self._store.resume(organization_id, target)
        self._availability.outdate(organization_id)
        return state

    async def page(
        self, organization_id: UUID, after: str | None, size: int, *, only: str | None, only_stopped: bool
    ) -> list[TargetState]:
        """Returns targets by name, or `only` one if it is known. Raises: DatabaseUnavailable."""
        return await self._store.page(organization_id, after, size, only=only, only_stopped=only_stopped)

    async def measure(self) -> None:
        """Reads the gauges. Raises: DatabaseUnavailable."""
        paused, held = await self._store.stopped()
        TARGETS_PAUSED.set(paused)
        TARGETS_HELD.set(held)

    async def measure_for_ever(self) -> None:
        """Reads the gauges every few seconds; they keep their values while the database is away."""
        while True:
            try:
                await self.measure()
            except DatabaseUnavailable as error:
                _log.warning("the gauges of targets wait for the database", error=error.message)
            await asyncio.sleep(_GAUGE_SECONDS)
