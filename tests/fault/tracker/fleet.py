"""The processes: PostgreSQL, Redis, two replicas, a watcher on each, and workers."""

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
from tests.support.redis import RedisServer

_ROOT = Path(__file__).parents[3]
_DATABASE = "muster"
_ROLES = {"muster_identity": "identity", "muster_session_tracker": "session_tracker"}
REPLICAS = ("replica-1", "replica-2")
WATCHERS = ("watcher-1", "watcher-2")
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
        redis: The store, which runs.
        workers: How many worker processes.
        seed: Of what workers do.
    """

    def __init__(self, folder: Path, redis: RedisServer, *, workers: int, seed: int) -> None:
        self.history = folder / "history"
        self.history.mkdir()
        self.redis = redis
        self._folder = folder
        self._seed = seed
        # fsync and synchronous_commit stay on: what is acknowledged must survive.
        self.postgres = EmbeddedPostgres(folder / "postgres", {"shared_buffers": "64MB"})
        self.addresses = [f"127.0.0.1:{_free_port()}" for _ in REPLICAS]
        self.replicas: dict[str, Process] = {}
        self._workers = [f"worker-{number}" for number in range(1, workers + 1)]
        self._processes: dict[str, Process] = {}

    @property
    def dsn(self) -> str:
        """The database, as a superuser."""
        return self.postgres.dsn(database=_DATABASE)

    @property
    def identity_dsn(self) -> str:
        """The database of keys, as its owner."""
        return self.postgres.dsn("muster_identity", _DATABASE)

    async def start(self) -> None:
        """Starts the database and the replicas."""
        await asyncio.to_thread(self._prepare)
        for name, address in zip(REPLICAS, self.addresses, strict=True):
            environ = {
                **{key: value for key, value in os.environ.items() if not key.startswith("MUSTER_")},
                "MUSTER_SESSION_TRACKER__GRPC__LISTEN": address,
                "MUSTER_SESSION_TRACKER__METRICS__LISTEN": "127.0.0.1:0",
                "MUSTER_SESSION_TRACKER__POSTGRES__DSN": self.postgres.dsn("muster_session_tracker", _DATABASE),
                "MUSTER_SESSION_TRACKER__IDENTITY__DSN": self.identity_dsn,
                "MUSTER_SESSION_TRACKER__ENGINE__URL": self.redis.url,
                # So that sessions leave within the run, and none is lost between its last report and the last look.
                "MUSTER_SESSION_TRACKER__SESSIONS__LOST_AFTER_SECONDS": "40",
                "MUSTER_SESSION_TRACKER__SESSIONS__FINISHED_SECONDS": "3",
                "MUSTER_SESSION_TRACKER__ENGINE__BEAT_SECONDS": "0.3",
                "MUSTER_SESSION_TRACKER__ENGINE__REPLICA_LIFE_SECONDS": "1.5",
                "MUSTER_SESSION_TRACKER__DRAIN__GRACE_SECONDS": "2",
            }
            self.replicas[name] = Process(name, self._folder, environ)
            self.start_replica(name)

    def _prepare(self) -> None:
        self.postgres.start()
        self.postgres.ensure_database(_DATABASE, _ROLES)
        migrate(IDENTITY, self.identity_dsn)
        migrate(SCHEMAS["session_tracker"], self.postgres.dsn("muster_session_tracker", _DATABASE))

    def start_replica(self, name: str) -> None:
        """Starts a replica."""
        argv = (sys.executable, "-m", "services.cli.main", "serve", "session-tracker", "--engine", "redis")
        self.replicas[name].start(*argv)

    def begin(self, keys: Mapping[str, str], end: float, healed: float) -> None:
        """Starts watchers and workers.

        Args:
            keys: API keys of a `worker` and an `operator`.
            end: When workers end, in seconds of the epoch.
            healed: When everything runs again for good, likewise.
        """
        for number, name in enumerate(WATCHERS):
            settings = {"key": keys["operator"], "address": self.addresses[number], "packed": number == 0}
            self._start_child(name, "watcher", settings)
        settings = {"key": keys["worker"], "addresses": self.addresses, "seed": self._seed}
        for name in self._workers:
            self._start_child(name, "worker", {**settings, "end": end, "healed": healed})

    def _start_child(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        process = self._processes[name] = Process(name, self._folder, os.environ)
        given = json.dumps({**settings, "folder": str(self.history), "name": name})
        process.start(sys.executable, "-m", f"tests.fault.tracker.{module}", given)

    async def wait(self, seconds: float) -> None:
        """Waits until the workers have ended, which they must well."""
        for name in self._workers:
            process = self._processes[name]
            code = await process.ended(seconds)
            assert code == 0, f"{name} ended with {code}: {process.words()}"

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
        """Ends everything but Redis."""
        for process in (*self._processes.values(), *self.replicas.values()):
            await process.kill()
        await asyncio.to_thread(self.postgres.stop)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
