"""What is done to the processes: killed, stopped in their tracks, and restarted, at random."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter

from tests.fault.allocator.fleet import Fleet
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
            {"worker killed": self._kill_worker, "worker stopped": self._stop_worker},
            away_seconds=(0.0, 0.3, 1.0),
            # Sometimes beyond the life of the leases that it is just handing out.
            stopped_seconds=(0.3, 1.0, 4.0),
        )

    @property
    def done(self) -> Counter[str]:
        """How often each kind was done."""
        return self._troubles.done

    async def until(self, end: float) -> None:
        """Goes on until a moment, in seconds of the epoch; then everything runs again."""
        async with asyncio.TaskGroup() as pending:
            while time.time() < end:
                kind, trouble = self._troubles.next()
                # Workers' troubles go on beside the others'; the parts that they all need fail one at a time.
                if kind.startswith("worker"):
                    pending.create_task(trouble())
                else:
                    await trouble()
                await asyncio.sleep(self._chance.uniform(0.3, 1.5))

    async def _kill_worker(self) -> None:
        name = self._chance.choice(self._fleet.workers)
        await self._fleet.worker(name).kill()
        self._fleet.start_worker(name)

    async def _stop_worker(self) -> None:
        worker = self._fleet.worker(self._chance.choice(self._fleet.workers))
        if worker.code is None:
            worker.send(signal.SIGSTOP)
            await asyncio.sleep(self._chance.uniform(0.5, 5.0))
            if worker.code is None:
                worker.send(signal.SIGCONT)
