"""The processes: two replicas on one PostgreSQL, workers, and an operator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fault.replicas import Process, Replicas


class Fleet(Replicas):
    """Everything that runs.

    Args:
        folder: Where everything goes.
        lease_seconds: How long a lease lasts.
        workers: How many worker processes.
        seed: Of what workers and the operator do.
    """

    def __init__(self, folder: Path, *, lease_seconds: float, workers: int, seed: int) -> None:
        settings = {
            "LEASES__DURATION_SECONDS": str(lease_seconds),
            "LEASES__GREATEST_AGE_SECONDS": str(lease_seconds * 3),
            "LEASES__SWEEP_SECONDS": "0.2",
        }
        super().__init__(folder, "allocator", settings)
        self.workers = [f"worker-{number}" for number in range(1, workers + 1)]
        self._lives: dict[str, int] = {}
        self._shared: dict[str, Any] = {"addresses": self.addresses, "lease_seconds": lease_seconds, "seed": seed}

    def begin(self, *, keys: Mapping[str, str], slots: list[str], exits: list[str], end: float) -> None:
        """Starts the workers and the operator.

        Args:
            keys: API keys of a `worker` and an `operator`.
            slots: What the operator may change.
            exits: What it may toggle.
            end: When they end, in seconds of the epoch.
        """
        self._shared["end"] = end
        given = {**self._shared, "key": keys["operator"], "slots": slots, "exits": exits}
        self.start_child("operator", "tests.fault.allocator.operators", given)
        self._shared["key"] = keys["worker"]
        for name in self.workers:
            self.start_worker(name)

    def start_worker(self, name: str) -> None:
        """Starts a worker, or another life of one that was killed."""
        life = self._lives.get(name, -1) + 1
        self._lives[name] = life
        self.start_child(name, "tests.fault.allocator.worker", {**self._shared, "instance": life})

    def worker(self, name: str) -> Process:
        """Returns a worker's process."""
        return self.child(name)

    async def wait(self, seconds: float) -> None:
        """Waits until workers and operator have ended, which they must well."""
        await self.all_well(["operator", *self.workers], seconds)
