"""The processes: PostgreSQL, Redis, two replicas, a watcher on each, and workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.fault.replicas import Replicas
from tests.support.redis import RedisServer

WATCHERS = ("watcher-1", "watcher-2")


class Fleet(Replicas):
    """Everything that runs.

    Args:
        folder: Where everything goes.
        redis: The store, which runs, and is not ended with the others.
        workers: How many worker processes.
        seed: Of what workers do.
    """

    def __init__(self, folder: Path, redis: RedisServer, *, workers: int, seed: int) -> None:
        settings = {
            "ENGINE__URL": redis.url,
            # So that sessions leave within the run, and none is lost between its last report and the last look.
            "SESSIONS__LOST_AFTER_SECONDS": "40",
            "SESSIONS__FINISHED_SECONDS": "3",
            "ENGINE__BEAT_SECONDS": "0.3",
            "ENGINE__REPLICA_LIFE_SECONDS": "1.5",
        }
        super().__init__(folder, "session_tracker", settings, ("--engine", "redis"))
        self.redis = redis
        self._seed = seed
        self._workers = [f"worker-{number}" for number in range(1, workers + 1)]

    def begin(self, keys: Mapping[str, str], end: float, healed: float) -> None:
        """Starts watchers and workers.

        Args:
            keys: API keys of a `worker` and an `operator`.
            end: When workers end, in seconds of the epoch.
            healed: When everything runs again for good, likewise.
        """
        for number, name in enumerate(WATCHERS):
            settings = {"key": keys["operator"], "address": self.addresses[number], "packed": number == 0}
            self.start_child(name, "tests.fault.tracker.watcher", settings)
        shared = {"key": keys["worker"], "addresses": self.addresses, "seed": self._seed, "end": end, "healed": healed}
        for name in self._workers:
            self.start_child(name, "tests.fault.tracker.worker", shared)

    async def wait(self, seconds: float) -> None:
        """Waits until the workers have ended, which they must well."""
        await self.all_well(self._workers, seconds)
