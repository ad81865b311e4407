"""The whole suite on one machine: the embedded database, the schemas, the keys, and one process per service.

Everything is kept in one folder:

    postgres/        the database cluster
    objects/         bundles and archives, on the local file system
    keys/            the services' own key and the operator's, readable by their owner only
    muster.toml      written anew at every start; the environment (MUSTER_<SERVICE>__…) wins over it
    client.env       where the services are and which key to use: read by `muster` and by the client package
    logs/            one file per service

Each service is a process of its own, since a Python process has one interpreter lock, and each is restarted when it
ends. Kubernetes runs the same `muster serve <service>`; no service knows how it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from services.call import Role
from services.config import PostgresConfig, read_secret
from services.identity.keys import KeyStore
from services.launcher.errors import LauncherError
from services.launcher.postgres import EmbeddedPostgres
from services.launcher.supervisor import Child, Event, Exited, Restarting, Started, Supervisor
from services.migrations import SCHEMAS, migrate
from services.postgres import Database

SERVICES = ("persona_store", "allocator", "session_tracker", "archiver")
DATABASE = "muster"
ORGANIZATION = "default"

_READY_SECONDS = 30.0
_FIRST_PORT = {"allocator": 0, "persona_store": 1, "session_tracker": 2, "archiver": 3}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service listens."""

    grpc: str
    metrics: str


@dataclass(frozen=True, slots=True)
class Ports:
    """Which ports the services take: four in a row for gRPC and four for metrics; 0 means any free ones."""

    grpc: int = 7401
    metrics: int = 9401

    def endpoints(self) -> dict[str, Endpoint]:
        """Returns where each service will listen."""
        return {
            name: Endpoint(
                f"127.0.0.1:{self.grpc + place if self.grpc else _free_port()}",
                f"127.0.0.1:{self.metrics + place if self.metrics else _free_port()}",
            )
            for name, place in _FIRST_PORT.items()
        }


class Suite:
    """The suite in a folder, from start to stop.

    Args:
        folder: Keeps everything; made if missing.
        ports: Where the services listen.
        environ: On top of the process's environment, for the services; overrides settings.
        on_event: Called for every start, exit and restart of a service.
    """

    def __init__(
        self,
        folder: Path,
        ports: Ports,
        *,
        environ: Mapping[str, str] | None = None,
        on_event: Callable[[Event], None],
    ) -> None:
        self.folder = folder.absolute()
        self.endpoints = ports.endpoints()
        self._environ = dict(environ or {})
        self._on_event = on_event
        self._postgres = EmbeddedPostgres(self.folder / "postgres")
        self._supervisor: Supervisor | None = None
        self._logs: dict[str, IO[str]] = {}

    @property
    def supervisor(self) -> Supervisor:
        """The keeper of the services' processes. Raises: AssertionError, before `start`."""
        assert self._supervisor is not None
        return self._supervisor

    @property
    def operator_key_file(self) -> Path:
        """Where the operator's key lies."""
        return self.folder / "keys" / "operator.key"

    def dsn(self, role: str = "postgres") -> str:
        """Returns the libpq URI of the suite's database for a role: `postgres`, or `muster_<schema>`."""
        return self._postgres.dsn(role, DATABASE)

    async def start(self) -> None:
        """Starts everything and waits until every service is ready.

        Raises:
            StartupError: a part cannot start; what was started is stopped again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        try:
            # In this thread, since the database's life is tied to the thread that starts it.
            self._postgres.start()
            self._postgres.ensure_database(DATABASE, {f"muster_{schema}": schema for schema in SCHEMAS})
            for name, schema in SCHEMAS.items():
                await asyncio.to_thread(migrate, schema, self.dsn(f"muster_{name}"))
            await self._ensure_keys()
            self._write_config()
            self._write_client_env()
            await self._start_services()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Drains the services in reverse order, then the database; safe to call twice and before `start`."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        await asyncio.to_thread(self._postgres.stop)

    async def wait_ready(self, name: str) -> None:
        """Waits until a service answers that it serves.

        Raises:
            LauncherError: it does not within 30 s, or its process could not start.
        """
        assert self._supervisor is not None
        ended = asyncio.ensure_future(self._supervisor.wait())
        ready = asyncio.ensure_future(_serving(self.endpoints[name].grpc))
        done, _ = await asyncio.wait((ended, ready), timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, ready):
            if task not in done:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if ended in done:
            with contextlib.suppress(LauncherError):
                await ended
            raise LauncherError(f"{name} cannot start: {self._last_words(name)}", f"see {self._log_file(name)}")
        if ready not in done:
            raise LauncherError(f"{name} is not ready after {_READY_SECONDS:.0f} s", f"see {self._log_file(name)}")

    async def _ensure_keys(self) -> None:
        folder = self.folder / "keys"
        folder.mkdir(mode=0o700, exist_ok=True)
        config = PostgresConfig(dsn=SecretStr(self.dsn("muster_identity")), pool_min=0, pool_max=1)
        database = await Database.connect(config, "launcher")
        try:
            store = KeyStore(database)
            for file, role, name in (
                ("service.key", Role.SERVICE, "the suite's own calls"),
                ("operator.key", Role.ADMIN, "made by muster up"),
            ):
                path = folder / file
                if path.exists() and await store.find(read_secret(path)) is not None:
                    continue
                _, key = await store.create(ORGANIZATION, role, name=name)
                _write_private(path, key + "\n")
        finally:
            await database.close()

    def _write_config(self) -> None:
        identity = self.dsn("muster_identity")
        service_key = self.folder / "keys" / "service.key"
        objects = self.folder / "objects"
        lines = ["# Written by `muster up` at every start; MUSTER_<SERVICE>__<TABLE>__<KEY> changes a setting.", ""]
        for name, endpoint in self.endpoints.items():
            lines += [
                f"[{name}]",
                f'grpc.listen = "{endpoint.grpc}"',
                f'metrics.listen = "{endpoint.metrics}"',
                f"postgres.dsn = {_toml(self.dsn(f'muster_{name}'))}",
                f"identity.dsn = {_toml(identity)}",
                "identity.pool_min = 0",
                "identity.pool_max = 2",
            ]
            if name == "persona_store":
                lines += [f"objects.folder = {_toml(str(objects / 'bundles'))}"]
            if name == "archiver":
                lines += [
                    f"objects.folder = {_toml(str(objects / 'archive'))}",
                    f"sources.allocator.dsn = {_toml(self.dsn('muster_allocator'))}",
                ]
            peers = {"allocator": ("persona_store",), "session_tracker": ("allocator",)}.get(name, ())
            for peer in peers:
                lines += [
                    f"{peer}.target = {_toml(self.endpoints[peer].grpc)}",
                    f"{peer}.key_file = {_toml(str(service_key))}",
                ]
            lines.append("")
        _write_private(self.config_file, "\n".join(lines))

    @property
    def config_file(self) -> Path:
        """The services' configuration."""
        return self.folder / "muster.toml"

    def client_environment(self) -> dict[str, str]:
        """Returns what a client needs to reach the suite: the variables of `client.env`."""
        found = {f"MUSTER_{name.upper()}": endpoint.grpc for name, endpoint in self.endpoints.items()}
        return {**found, "MUSTER_API_KEY_FILE": str(self.operator_key_file)}

    def _write_client_env(self) -> None:
        lines = [f"{name}={value}" for name, value in self.client_environment().items()]
        _write_private(self.folder / "client.env", "\n".join(lines) + "\n")

    async def _start_services(self) -> None:
        environ = {**os.environ, **self._environ}
        program = [sys.executable, "-m", "services.cli.main", "serve"]
        children = [Child(name, [*program, name, "--config", str(self.config_file)], environ) for name in SERVICES]
        for name in SERVICES:
            self._logs[name] = self._log_file(name).open("a", encoding="utf-8", buffering=1)
        self._supervisor = Supervisor(children, on_line=self._keep_line, on_event=self._note)
        await self._supervisor.start()
        for name in SERVICES:
            await self.wait_ready(name)

    def _log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _keep_line(self, name: str, line: str) -> None:
        if name in self._logs:
            self._logs[name].write(line + "\n")

    def _note(self, event: Event) -> None:
        self._keep_line(event.name, f"# {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {event}")
        self._on_event(event)

    def _last_words(self, name: str) -> str:
        lines = self._log_file(name).read_text(encoding="utf-8").splitlines()
        spoken = [line for line in lines if not line.startswith(("{", "#"))]
        return spoken[-1] if spoken else "it said nothing"


def describe(event: Event) -> str:
    """Returns an event of a service in words."""
    match event:
        case Started(name, pid):
            return f"{name} started (process {pid})"
        case Exited(name, code):
            return f"{name} ended ({f'signal {-code}' if code < 0 else f'code {code}'})"
        case Restarting(name, delay):
            return f"{name} starts again in {delay:.1f} s"


async def _serving(address: str) -> None:
    """Returns when the service at `address` says that it serves."""
    options = (("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200))
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
