"""What is done to the processes: killed, stopped in their tracks, and restarted, at random."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine

import psutil

from tests.fault.tracker.fleet import REPLICAS, Fleet


class Faults:
    """Does something bad every now and then; every kind in its turn, in random order.

    Args:
        fleet: To whom.
        chance: When, and to which of them.
    """

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self._fleet = fleet
        self._chance = chance
        self.done: Counter[str] = Counter()

    async def until(self, end: float) -> None:
        """Goes on until a moment, in seconds of the epoch; then everything runs again."""
        kinds: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "replica killed": self._kill_replica,
            "replica stopped": self._stop_replica,
            "replica restarted": self._restart_replica,
            "postgres killed": self._kill_postgres,
            "postgres stopped": self._stop_postgres,
            "redis killed": self._kill_redis,
            "redis stopped": self._stop_redis,
        }
        deck: list[str] = []
        while time.time() < end:
            if not deck:
                deck = list(kinds)
                self._chance.shuffle(deck)
            kind = deck.pop()
            await kinds[kind]()
            self.done[kind] += 1
            await asyncio.sleep(self._chance.uniform(0.3, 2.0))

    async def _kill_replica(self) -> None:
        name = self._chance.choice(REPLICAS)
        await self._fleet.replicas[name].kill()
        # Sometimes for longer than it takes the other one to take its sessions over.
        await asyncio.sleep(self._chance.choice((0.0, 1.0, 3.0)))
        self._fleet.start_replica(name)

    async def _stop_replica(self) -> None:
        replica = self._fleet.replicas[self._chance.choice(REPLICAS)]
        replica.send(signal.SIGSTOP)
        await asyncio.sleep(self._chance.choice((0.3, 1.0, 4.0)))
        replica.send(signal.SIGCONT)

    async def _restart_replica(self) -> None:
        name = self._chance.choice(REPLICAS)
        replica = self._fleet.replicas[name]
        replica.send(signal.SIGTERM)
        await replica.ended(60)
        self._fleet.start_replica(name)

    async def _kill_postgres(self) -> None:
        for process in self._fleet.postgres_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(self._fleet.postgres.wait)
        await asyncio.to_thread(self._fleet.postgres.start)

    async def _stop_postgres(self) -> None:
        processes = self._fleet.postgres_processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        await asyncio.sleep(self._chance.uniform(0.2, 2.0))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    async def _kill_redis(self) -> None:
        # With everything in it: it keeps nothing on disk.
        self._fleet.redis.kill()
        await asyncio.sleep(self._chance.choice((0.0, 0.5, 2.0)))
        await asyncio.to_thread(self._fleet.redis.start)

    async def _stop_redis(self) -> None:
        self._fleet.redis.freeze()
        await asyncio.sleep(self._chance.choice((0.3, 1.0, 3.0)))
        self._fleet.redis.thaw()
