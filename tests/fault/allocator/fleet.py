"""The processes: two replicas on one PostgreSQL, workers, and an operator."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from services.launcher.guard import guarded_argv
from services.launcher.postgres import EmbeddedPostgres
from services.migrations import IDENTITY, SCHEMAS, migrate

_ROOT = Path(__file__).parents[3]
_DATABASE = "muster"
_ROLES = {"muster_identity": "identity", "muster_allocator": "allocator"}
REPLICAS = ("replica-1", "replica-2")
_POLL_SECONDS = 0.05


class Process:
    """A program that can be started again, killed and stopped; it dies with this process.

    Args:
        name: Of its log.
        folder: Where the log goes.
        environ: Its whole environment.
    """

    def __init__(self, name: str, folder: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll() if self._process is not None else 0

    def start(self, *argv: str) -> None:
        """Starts it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                guarded_argv(list(argv), on_parent_death=signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
                env=self._environ,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, seconds: float) -> int:
        """Waits until it has ended, and returns its exit code."""
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            assert time.monotonic() < deadline, f"{self.name} has not ended; see {self._log}"
            await asyncio.sleep(_POLL_SECONDS)
        return code

    async def kill(self) -> None:
        """Ends it as a power cut would."""
        if self.code is None:
            self.send(signal.SIGKILL)
            await self.ended(30)

    def words(self) -> str:
        """Returns the end of its log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


class Fleet:
    """Everything that runs.

    Args:
        folder: Where everything goes.
        lease_seconds: How long a lease lasts.
        workers: How many worker processes.
        seed: Of what workers and the operator do.
    """

    def __init__(self, folder: Path, *, lease_seconds: float, workers: int, seed: int) -> None:
        self.history = folder / "history"
        self.history.mkdir()
        self._folder = folder
        self._lease_seconds = lease_seconds
        self._seed = seed
        # fsync and synchronous_commit stay on: what is acknowledged must survive.
        self.postgres = EmbeddedPostgres(folder / "postgres", {"shared_buffers": "64MB"})
        self.addresses = [f"127.0.0.1:{_free_port()}" for _ in REPLICAS]
        self.replicas: dict[str, Process] = {}
        self.workers = [f"worker-{number}" for number in range(1, workers + 1)]
        self._lives: dict[str, int] = {}
        self._processes: dict[str, Process] = {}
        self._settings: dict[str, Any] = {}
        # Those that were killed, whose exit code says nothing.
        self.expected_to_die: set[str] = set()

    @property
    def dsn(self) -> str:
        """The database, as a superuser."""
        return self.postgres.dsn(database=_DATABASE)

    async def start(self) -> None:
        """Starts the database and the replicas, and waits until they serve."""
        await asyncio.to_thread(self._prepare)
        for name, address in zip(REPLICAS, self.addresses, strict=True):
            environ = {
                **{key: value for key, value in os.environ.items() if not key.startswith("MUSTER_")},
                "MUSTER_ALLOCATOR__GRPC__LISTEN": address,
                "MUSTER_ALLOCATOR__METRICS__LISTEN": "127.0.0.1:0",
                "MUSTER_ALLOCATOR__POSTGRES__DSN": self.postgres.dsn("muster_allocator", _DATABASE),
                "MUSTER_ALLOCATOR__IDENTITY__DSN": self.postgres.dsn("muster_identity", _DATABASE),
                "MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": str(self._lease_seconds),
                "MUSTER_ALLOCATOR__LEASES__GREATEST_AGE_SECONDS": str(self._lease_seconds * 3),
                "MUSTER_ALLOCATOR__LEASES__SWEEP_SECONDS": "0.2",
                "MUSTER_ALLOCATOR__DRAIN__GRACE_SECONDS": "2",
            }
            self.replicas[name] = Process(name, self._folder, environ)
            self.start_replica(name)

    def _prepare(self) -> None:
        self.postgres.start()
        self.postgres.ensure_database(_DATABASE, _ROLES)
        migrate(IDENTITY, self.postgres.dsn("muster_identity", _DATABASE))
        migrate(SCHEMAS["allocator"], self.postgres.dsn("muster_allocator", _DATABASE))

    def start_replica(self, name: str) -> None:
        """Starts a replica."""
        self.replicas[name].start(sys.executable, "-m", "services.cli.main", "serve", "allocator")

    def begin(self, *, keys: Mapping[str, str], slots: list[str], exits: list[str], end: float) -> None:
        """Starts the workers and the operator.

        Args:
            keys: API keys of a `worker` and an `operator`.
            slots: What the operator may change.
            exits: What it may toggle.
            end: When they end, in seconds of the epoch.
        """
        self._settings = {
            "folder": str(self.history),
            "addresses": self.addresses,
            "lease_seconds": self._lease_seconds,
            "seed": self._seed,
            "end": end,
        }
        self._start_child("operator", "operators", {"key": keys["operator"], "slots": slots, "exits": exits})
        self._settings["key"] = keys["worker"]
        for name in self.workers:
            self.start_worker(name)

    def start_worker(self, name: str) -> None:
        """Starts a worker, or another life of one that was killed."""
        life = self._lives.get(name, -1) + 1
        self._lives[name] = life
        self._start_child(name, "worker", {"instance": life})

    def _start_child(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        process = self._processes[name] = Process(name, self._folder, os.environ)
        given = json.dumps({**self._settings, "name": name, **settings})
        process.start(sys.executable, "-m", f"tests.fault.allocator.{module}", given)

    def worker(self, name: str) -> Process:
        """Returns a worker's process."""
        return self._processes[name]

    async def wait(self, seconds: float) -> None:
        """Waits until workers and operator have ended, which they must well."""
        for process in self._processes.values():
            code = await process.ended(seconds)
            assert code == 0, f"{process.name} ended with {code}: {process.words()}"

    def postgres_processes(self) -> list[psutil.Process]:
        """Returns every process of the server, its first one first."""
        pid = self.postgres.pid
        if pid is None:
            return []
        try:
            first = psutil.Process(pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def stop(self) -> None:
        """Ends everything."""
        for process in (*self._processes.values(), *self.replicas.values()):
            await process.kill()
        await asyncio.to_thread(self.postgres.stop)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
