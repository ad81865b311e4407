"""Two replicas of a service on one PostgreSQL, as processes of their own, and others that use them.

A replica that ends by itself is started again, as its supervisor does in production: a service leaves waiting for its
database to whoever starts it. It may so end for want of something at its start, and never else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from services.call import Role
from services.config import PostgresConfig
from services.identity.keys import KeyStore
from services.launcher.guard import guarded_argv
from services.launcher.postgres import EmbeddedPostgres
from services.launcher.supervisor import BAD_START_CODE
from services.migrations import IDENTITY, SCHEMAS, migrate
from services.postgres import Database

_ROOT = Path(__file__).parents[2]
_DATABASE = "muster"
REPLICAS = ("replica-1", "replica-2")
_POLL_SECONDS = 0.05


class Process:
    """A program that can be started again, killed and stopped; it dies with this process.

    Args:
        name: Of its log.
        folder: Where the log goes.
        environ: Its whole environment.

    Attributes:
        wanted: Whether it is to run: from its start until somebody ends it.
    """

    def __init__(self, name: str, folder: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.wanted = False
        self._log = folder / f"{name}.log"
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll() if self._process is not None else 0

    def start(self, *argv: str) -> None:
        """Starts it."""
        self.wanted = True
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
        await self._end(signal.SIGKILL)

    async def terminate(self) -> None:
        """Ends it in good order."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        self.wanted = False
        if self.code is None:
            self.send(number)
            await self.ended(60)

    def words(self) -> str:
        """Returns the end of its log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


class Replicas:
    """The replicas, their database, and the processes that use them.

    Args:
        folder: Where everything goes.
        service: The service's schema, such as `session_tracker`.
        settings: Of each replica: variables of its environment, without the service's prefix.
        options: Of its command.

    Attributes:
        history: The folder of what the other processes note.
        postgres: The database server.
        addresses: Of the replicas.
        replicas: By name.
        failed: Set when a replica has ended by itself.
        failed_starts: How often one ended so since it could not start.
        crashes: Every other such end, in words.
    """

    def __init__(self, folder: Path, service: str, settings: Mapping[str, str], options: tuple[str, ...] = ()) -> None:
        self.history = folder / "history"
        self.history.mkdir()
        # fsync and synchronous_commit stay on: what is acknowledged must survive.
        self.postgres = EmbeddedPostgres(folder / "postgres", {"shared_buffers": "64MB"})
        self.addresses = [f"127.0.0.1:{_free_port()}" for _ in REPLICAS]
        self.replicas: dict[str, Process] = {}
        self.failed = asyncio.Event()
        self.failed_starts = 0
        self.crashes: list[str] = []
        self._keeping: asyncio.Task[None] | None = None
        self._folder = folder
        self._service = service
        self._settings = settings
        self._argv = (sys.executable, "-m", "services.cli.main", "serve", service.replace("_", "-"), *options)
        self._children: dict[str, Process] = {}

    @property
    def dsn(self) -> str:
        """The database, as a superuser."""
        return self.postgres.dsn(database=_DATABASE)

    def _owner_dsn(self, schema: str) -> str:
        return self.postgres.dsn(f"muster_{schema}", _DATABASE)

    async def start(self) -> None:
        """Starts the database and the replicas."""
        await asyncio.to_thread(self._prepare)
        for name, address in zip(REPLICAS, self.addresses, strict=True):
            settings = {
                "GRPC__LISTEN": address,
                "METRICS__LISTEN": "127.0.0.1:0",
                "POSTGRES__DSN": self._owner_dsn(self._service),
                "IDENTITY__DSN": self._owner_dsn("identity"),
                "DRAIN__GRACE_SECONDS": "2",
                **self._settings,
            }
            environ = {key: value for key, value in os.environ.items() if not key.startswith("MUSTER_")}
            environ |= {f"MUSTER_{self._service.upper()}__{key}": value for key, value in settings.items()}
            self.replicas[name] = Process(name, self._folder, environ)
            self.start_replica(name)
        self._keeping = asyncio.create_task(self._keep(), name="keep replicas")

    def _prepare(self) -> None:
        self.postgres.start()
        roles = {f"muster_{schema}": schema for schema in ("identity", self._service)}
        self.postgres.ensure_database(_DATABASE, roles)
        migrate(IDENTITY, self._owner_dsn("identity"))
        migrate(SCHEMAS[self._service], self._owner_dsn(self._service))

    def start_replica(self, name: str) -> None:
        """Starts a replica."""
        self.replicas[name].start(*self._argv)

    async def _keep(self) -> None:
        while True:
            for name, replica in self.replicas.items():
                code = replica.code
                if code is None or not replica.wanted:
                    continue
                if code == BAD_START_CODE:
                    self.failed_starts += 1
                else:
                    self.crashes.append(f"{name} ended by itself with {code}: {replica.words()}")
                # At once: a start takes long enough for this to be no busy loop.
                self.start_replica(name)
                self.failed.set()
            await asyncio.sleep(_POLL_SECONDS)

    async def keys(self) -> dict[str, str]:
        """Makes API keys of a `worker` and an `operator`."""
        config = PostgresConfig.model_validate({"dsn": self._owner_dsn("identity")})
        database = await Database.connect(config, "keys")
        try:
            store = KeyStore(database)
            roles = (("worker", Role.WORKER), ("operator", Role.OPERATOR))
            return {name: (await store.create("fleet", role))[1] for name, role in roles}
        finally:
            await database.close()

    def start_child(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        """Starts a process that uses the replicas: a module, which is given its settings and where its history goes."""
        process = self._children[name] = Process(name, self._folder, os.environ)
        given = json.dumps({**settings, "folder": str(self.history), "name": name})
        process.start(sys.executable, "-m", module, given)

    def child(self, name: str) -> Process:
        """Returns such a process."""
        return self._children[name]

    async def all_well(self, names: list[str], seconds: float) -> None:
        """Waits until some of them have ended, which they must well; no replica may have crashed meanwhile."""
        for name in names:
            process = self._children[name]
            code = await process.ended(seconds)
            assert code == 0, f"{name} ended with {code}: {process.words()}"
        assert not self.crashes, "\n".join(self.crashes)

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
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        for process in (*self._children.values(), *self.replicas.values()):
            await process.kill()
        await asyncio.to_thread(self.postgres.stop)


def _free_port() -> int:
    # Below what a connection is given as its own end: of all that call a replica that is away, one would sooner or
    # later be given the very port it calls, connect to itself, and keep the replica from its port.
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20,000 to 31,999")
