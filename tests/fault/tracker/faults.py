"""What is done to the processes: killed, stopped in their tracks, and restarted, at random."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from tests.fault.tracker.fleet import Fleet
from tests.fault.troubles import Troubles


class Faults:
    """Does something bad every now and then; every kind in its turn, in random order.

    Args:
        fleet: To whom.
        chance: When, and to which of them.
    """

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self._fleet = fleet
        self._chance = chance
        self._troubles = Troubles(
            fleet,
            chance,
            {"redis killed": self._kill_redis, "redis stopped": self._stop_redis},
            # Sometimes for longer than it takes the other one to take its sessions over.
            away_seconds=(0.0, 1.0, 3.0),
            stopped_seconds=(0.3, 1.0, 4.0),
        )

    @property
    def done(self) -> Counter[str]:
        """How often each kind was done."""
        return self._troubles.done

    async def until(self, end: float) -> None:
        """Goes on until a moment, in seconds of the epoch; then everything runs again."""
        while time.time() < end:
            _, trouble = self._troubles.next()
            await trouble()
            await asyncio.sleep(self._chance.uniform(0.3, 2.0))

    async def _kill_redis(self) -> None:
        # With everything in it: it keeps nothing on disk.
        self._fleet.redis.kill()
        await asyncio.sleep(self._chance.choice((0.0, 0.5, 2.0)))
        await asyncio.to_thread(self._fleet.redis.start)

    async def _stop_redis(self) -> None:
        self._fleet.redis.freeze()
        await asyncio.sleep(self._chance.choice((0.3, 1.0, 3.0)))
        self._fleet.redis.thaw()
