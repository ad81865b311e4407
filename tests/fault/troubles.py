"""What is done to replicas and their PostgreSQL: killed, stopped in their tracks, and restarted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping

import psutil

from tests.fault.replicas import REPLICAS, Replicas

Trouble = Callable[[], Coroutine[None, None, None]]


class Troubles:
    """Every kind in its turn, in random order.

    Args:
        on: To whom.
        chance: When, and to which of them.
        others: Further kinds, by name.
        away_seconds: For how long a replica that was killed may be away.
        stopped_seconds: For how long a stopped one may stand.

    Attributes:
        done: How often each kind was done.
    """

    def __init__(
        self,
        on: Replicas,
        chance: random.Random,
        others: Mapping[str, Trouble],
        *,
        away_seconds: tuple[float, ...],
        stopped_seconds: tuple[float, ...],
    ) -> None:
        self.done: Counter[str] = Counter()
        self._on = on
        self._chance = chance
        self._away_seconds = away_seconds
        self._stopped_seconds = stopped_seconds
        self._kinds = {
            "replica killed": self._kill_replica,
            "replica stopped": self._stop_replica,
            "replica restarted": self._restart_replica,
            "postgres killed": self._kill_postgres,
            "postgres stopped": self._stop_postgres,
            **others,
        }
        self._deck: list[str] = []

    def next(self) -> tuple[str, Trouble]:
        """Returns the kind whose turn it is, which counts as done, and how to do it."""
        if not self._deck:
            self._deck = list(self._kinds)
            self._chance.shuffle(self._deck)
        kind = self._deck.pop()
        self.done[kind] += 1
        return kind, self._kinds[kind]

    async def _kill_replica(self) -> None:
        name = self._chance.choice(REPLICAS)
        await self._on.replicas[name].kill()
        await asyncio.sleep(self._chance.choice(self._away_seconds))
        self._on.start_replica(name)

    async def _stop_replica(self) -> None:
        replica = self._on.replicas[self._chance.choice(REPLICAS)]
        replica.send(signal.SIGSTOP)
        await asyncio.sleep(self._chance.choice(self._stopped_seconds))
        replica.send(signal.SIGCONT)

    async def _restart_replica(self) -> None:
        name = self._chance.choice(REPLICAS)
        await self._on.replicas[name].terminate()
        self._on.start_replica(name)

    async def _kill_postgres(self) -> None:
        for process in self._on.postgres_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(self._on.postgres.wait)
        await asyncio.to_thread(self._on.postgres.start)

    async def _stop_postgres(self) -> None:
        processes = self._on.postgres_processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        await asyncio.sleep(self._chance.uniform(0.2, 2.0))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
