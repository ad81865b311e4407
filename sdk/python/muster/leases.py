"""Leases kept alive: the worker renews what the session_tracker does not.

The tracker renews a lease while its session makes progress. The worker renews it by itself when no report was taken for
a third of the lease's duration, and at the latest after two thirds of it, so that a tracker which hears the worker but
cannot reach the allocator costs no lease. Expiries are reckoned on the monotonic clock from before the call was made,
so a renewed lease is never believed to live longer than it does, whatever the machine's wall clock says.

A worker that reaches nobody gives a lease up when it has run out: when neither the last renewal of its own keeps it,
nor one that the tracker may have made for the last report it took. Only the latter may be believed in for too long, by
no more than a round of the tracker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from muster.calls import pause_seconds
from muster.errors import LeaseAgeExceeded, MusterError
from muster.results import Lease
from muster.work import Allocation, Work

_log = logging.getLogger("muster.leases")

# How much later than a report its renewal may be: the time between two rounds of a tracker that is not set otherwise.
_TRACKER_ROUND_SECONDS = 30.0


@dataclass(slots=True)
class HeldLease:
    """A lease that is being worked on. Times are on the loop's clock.

    Attributes:
        allocation: The unit.
        renewed_at: When its last renewal, or its grant, was asked for.
        last_progress: Tells when the tracker last took a report of it; None when never.
        lost: Set when the lease is known to be lost.
        expires_at: It lives at least until then.
        renewable: False once it has reached its greatest age.
    """

    allocation: Allocation
    renewed_at: float
    last_progress: Callable[[], float | None]
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    expires_at: float = 0.0
    renewable: bool = True
    _offset: float = 0.0

    def __post_init__(self) -> None:
        granted_at = self.allocation.expires_at - self.allocation.lease_duration
        self._offset = self.renewed_at - granted_at.timestamp()
        self.renewed(self.renewed_at, self.allocation.expires_at)

    def renewed(self, asked_at: float, expires_at: datetime) -> None:
        """Notes a renewal that was asked for at `asked_at` and lasts until `expires_at` on the database's clock."""
        self.renewed_at = asked_at
        self.expires_at = self._offset + expires_at.timestamp()

    def aged(self) -> None:
        """Notes that its expiry stands at its greatest age, to which the tracker may have moved it."""
        self.renewable = False
        self.expires_at = self._oldest_at()

    def due_at(self) -> float:
        """Returns when to look at it again: to renew it, or to give it up."""
        if not self.renewable:
            return self.expires_at
        third = self.allocation.lease_duration.total_seconds() / 3
        heard = max(self.renewed_at, self.last_progress() or 0.0)
        return min(heard + third, self.renewed_at + 2 * third)

    def ends_at(self) -> float:
        """Returns when it has run out, unless it is renewed for what happens from now on."""
        reported = self.last_progress()
        if reported is None:
            return self.expires_at
        by_tracker = reported + _TRACKER_ROUND_SECONDS + self.allocation.lease_duration.total_seconds()
        return max(self.expires_at, min(by_tracker, self._oldest_at()))

    def _oldest_at(self) -> float:
        return self._offset + self.allocation.renewable_until.timestamp()


class LeaseKeeper:
    """Renews the leases a worker holds; `run` is its background loop."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._held: dict[str, HeldLease] = {}
        self._changed = asyncio.Event()

    def hold(self, held: HeldLease) -> None:
        """Takes a lease into care."""
        self._held[held.allocation.allocation_key] = held
        self._changed.set()

    def drop(self, held: HeldLease) -> None:
        """Lets go of a lease; safe to repeat."""
        self._held.pop(held.allocation.allocation_key, None)

    async def run(self) -> None:
        """Renews until it is cancelled."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            if not self._held:
                self._changed.clear()
                await self._changed.wait()
                continue
            wait = min(held.due_at() for held in self._held.values()) - clock()
            if wait > 0:
                self._changed.clear()
                # A lease that is taken up meanwhile may be due earlier.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                continue
            try:
                await self._look_after([held for held in self._held.values() if held.due_at() <= clock()])
                failures = 0
            except MusterError as error:
                failures += 1
                _log.warning("leases are not renewed for now: %s", error)
                now = clock()
                self._give_up(now)
                # However long the service asks to be left alone, a lease that ends is told of in time.
                ends = [held.ends_at() - now for held in self._held.values()]
                await asyncio.sleep(min([pause_seconds(error, failures), *ends]))

    async def _look_after(self, due: list[HeldLease]) -> None:
        for held in [held for held in due if not held.renewable]:
            self._lose(held, "it reached its greatest age")
        renewing = [held for held in due if held.renewable]
        if not renewing:
            return
        asked_at = asyncio.get_running_loop().time()
        leases: list[Lease] = [held.allocation.lease for held in renewing]
        shortest = min(held.allocation.lease_duration.total_seconds() for held in renewing)
        left = min(held.ends_at() for held in renewing) - asked_at
        answers = await self._work.renew(leases, total_seconds=max(min(shortest / 3, left), 1.0))
        for held, answer in zip(renewing, answers, strict=True):
            if answer.expires_at is not None:
                held.renewed(asked_at, answer.expires_at)
            elif isinstance(answer.error, LeaseAgeExceeded):
                held.aged()
            else:
                self._lose(held, str(answer.error))

    def _give_up(self, now: float) -> None:
        for held in [held for held in self._held.values() if held.ends_at() <= now]:
            self._lose(held, "it ran out, and no renewal got through")

    def _lose(self, held: HeldLease, why: str) -> None:
        key = held.allocation.allocation_key
        # Work that was handed in while the renewal was on its way has no lease any more, and needs none.
        if self._held.pop(key, None) is not None:
            _log.warning("the lease on %s is lost: %s", key, why)
            held.lost.set()
