"""The whole suite on one machine: the embedded database, the schemas, the keys, and one process per service.

Everything is kept in one folder:

    postgres/        the database cluster
    objects/         bundles and archives, on the local file system
    keys/            the services' own key and the operator's, readable by their owner only
    muster.toml      written anew at every start; the environment (MUSTER_<SERVICE>__…) wins over it
    client.env       where the services are and which key to use, for a shell's `.`; written before they are ready
    logs/            one file per service, moved to <service>.log.1 by a start that finds it above 16 MiB

Each service is a process of its own, since a Python process has one interpreter lock. What ends unasked, a service or
the database, is started again. Kubernetes runs the same `muster serve <service>`; no service knows how it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from services.call import Role
from services.config import PostgresConfig, read_secret
from services.errors import DomainError, first_line
from services.identity.keys import KeyStore
from services.launcher.errors import LauncherError
from services.launcher.postgres import EmbeddedPostgres
from services.launcher.supervisor import (
    Backoff,
    BadStart,
    Child,
    Event,
    Exited,
    Restarting,
    Started,
    Supervisor,
)
from services.metrics import split_address
from services.migrations import SCHEMAS, migrate
from services.postgres import Database

SERVICES = ("persona_store", "allocator", "session_tracker", "archiver")
DATABASE = "muster"
POSTGRES = "postgres"
ORGANIZATION = "default"

_READY_SECONDS = 30.0
_FIRST_PORT = {"allocator": 0, "persona_store": 1, "session_tracker": 2, "archiver": 3}
_LOG_BYTES = 16 * 1024 * 1024

Result = TypeVar("Result")
Given = ParamSpec("Given")


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
        """Returns where each service will listen. A port that is free now may be taken by then."""
        with contextlib.ExitStack() as held:
            # All held until all are found, or the kernel could give one twice.
            return {
                name: Endpoint(
                    f"127.0.0.1:{self.grpc + place if self.grpc else _free_port(held)}",
                    f"127.0.0.1:{self.metrics + place if self.metrics else _free_port(held)}",
                )
                for name, place in _FIRST_PORT.items()
            }


class Suite:
    """The suite in a folder, from start to stop.

    Args:
        folder: Keeps everything; made if missing.
        ports: Where the services listen.
        environ: On top of the process's environment, for the services; overrides settings.
        on_event: Called for every start, exit and restart of a service, and for an exit and restart of the database.
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
        self._environ = {**os.environ, **(environ or {})}
        self._on_event = on_event
        self._postgres = EmbeddedPostgres(self.folder / "postgres")
        self._postgres_keeper: asyncio.Task[None] | None = None
        self._supervisor: Supervisor | None = None
        self._logs: dict[str, BinaryIO] = {}
        self._last_words: dict[str, str] = {}

    @property
    def supervisor(self) -> Supervisor:
        """The keeper of the services' processes. Raises: AssertionError, before `start`."""
        assert self._supervisor is not None
        return self._supervisor

    @property
    def operator_key_file(self) -> Path:
        """Where the operator's key lies."""
        return self.folder / "keys" / "operator.key"

    @property
    def config_file(self) -> Path:
        """The services' configuration."""
        return self.folder / "muster.toml"

    def dsn(self, role: str = "postgres") -> str:
        """Returns the libpq URI of the suite's database for a role: `postgres`, or `muster_<schema>`."""
        return self._postgres.dsn(role, DATABASE)

    async def start(self) -> None:
        """Starts everything and waits until every service is ready.

        Raises:
            StartupError: a part cannot start; what was started is stopped again. The same when it is cancelled, after
                the step in hand has ended.
        """
        try:
            await self._start()
        except OSError as error:
            await self.stop()
            place = error.filename or self.folder
            cause = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
            raise LauncherError(
                f"cannot use {place}: {cause}", "choose a data folder that this user can write, on a disk with room"
            ) from error
        except (psycopg.Error, DomainError) as error:
            await self.stop()
            raise LauncherError(
                f"the embedded PostgreSQL does not serve: {first_line(error)}", f"see {self._postgres.log}"
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        self._refuse_other_addresses()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("logs", "objects", "keys"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        # First, since it also says whether another suite has the folder: that one's files are not touched.
        await _to_its_end(self._postgres.start)
        self._refuse_taken_ports()
        await _to_its_end(self._postgres.ensure_database, DATABASE, {f"muster_{schema}": schema for schema in SCHEMAS})
        for name, schema in SCHEMAS.items():
            await _to_its_end(migrate, schema, self.dsn(f"muster_{name}"))
        self._postgres_keeper = asyncio.create_task(self._keep_postgres(), name="keep postgres")
        await self._ensure_keys()
        self._write_config()
        self._write_client_env()
        await self._start_services()

    async def stop(self) -> None:
        """Drains the services in reverse order, then the database; safe to call twice and before `start`."""
        if self._supervisor is not None:
            await self._supervisor.stop()
        if self._postgres_keeper is not None:
            self._postgres_keeper.cancel()
            await asyncio.wait({self._postgres_keeper})
        await asyncio.to_thread(self._postgres.stop)
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    async def wait(self) -> None:
        """Waits until the suite ends: by `stop`, or because a part cannot be kept running.

        Raises:
            LauncherError: a part cannot be kept running. The rest may still run: `stop` it.
            AssertionError: before `start`.
        """
        keeper = self._postgres_keeper
        assert keeper is not None
        services = asyncio.ensure_future(self.supervisor.wait())
        try:
            await asyncio.wait({services, keeper}, return_when=asyncio.FIRST_COMPLETED)
            if keeper.done() and not keeper.cancelled():
                await keeper
            await services
        except BadStart as error:
            raise LauncherError(
                f"{error.name} cannot start{self._words_of(error.name)}", f"see {self._log_file(error.name)}"
            ) from None
        finally:
            services.cancel()

    def kill(self, name: str) -> None:
        """Sends SIGKILL to a service's process, or to the database's (`postgres`), as a fault; it comes back by itself.

        Raises:
            KeyError: no process has this name.
        """
        if name != POSTGRES:
            self.supervisor.kill(name)
        elif (pid := self._postgres.pid) is not None:
            os.kill(pid, signal.SIGKILL)

    async def wait_ready(self, name: str) -> None:
        """Waits until a service answers that it serves.

        Raises:
            LauncherError: it does not within 30 s, or a part of the suite cannot be kept running.
        """
        ended = asyncio.ensure_future(self.wait())
        ready = asyncio.ensure_future(_serving(self.endpoints[name].grpc))
        try:
            done, _ = await asyncio.wait((ended, ready), timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if ended in done:
                await ended
                raise LauncherError(f"{name} was stopped before it was ready", f"see {self._log_file(name)}")
            if ready not in done:
                raise LauncherError(
                    f"{name} is not ready after {_READY_SECONDS:.0f} s{self._words_of(name)}",
                    f"see {self._log_file(name)}",
                )
            await ready
        finally:
            ended.cancel()
            ready.cancel()
            await asyncio.wait({ended, ready})

    def _refuse_other_addresses(self) -> None:
        # The peers and the clients are told the launcher's addresses; a service elsewhere would never be found.
        for name in SERVICES:
            for table in ("GRPC", "METRICS"):
                variable = f"MUSTER_{name.upper()}__{table}__LISTEN"
                if any(given.upper() == variable and value for given, value in self._environ.items()):
                    raise LauncherError(
                        f"{variable} is set, but here the launcher gives out the addresses",
                        "unset it, and choose ports with --port and --metrics-port",
                    )

    def _refuse_taken_ports(self) -> None:
        # Asked before any service is: what listens there could answer that it is healthy, and be taken for ours.
        for name, endpoint in self.endpoints.items():
            for address, option in ((endpoint.grpc, "--port"), (endpoint.metrics, "--metrics-port")):
                with socket.socket() as probe:
                    # As the services do, so that what only lingers from their last run is no obstacle.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind(split_address(address))
                    except OSError as error:
                        raise LauncherError(
                            f"the port {address} of {name} cannot be used: {error.strerror}",
                            f"stop what uses it, or choose others with {option}",
                        ) from None

    async def _keep_postgres(self) -> None:
        """Starts the database again whenever its server ends, until this is cancelled."""
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            code = await asyncio.to_thread(self._postgres.wait)
            delay = backoff.after(loop.time() - began)
            self._note(Exited(POSTGRES, code))
            self._note(Restarting(POSTGRES, delay))
            await asyncio.sleep(delay)
            await _to_its_end(self._postgres.start)
            self._note(Started(POSTGRES, self._postgres.pid or 0))

    async def _ensure_keys(self) -> None:
        config = PostgresConfig(dsn=SecretStr(self.dsn("muster_identity")), pool_min=0, pool_max=1)
        database = await Database.connect(config, "launcher")
        try:
            store = KeyStore(database)
            for file, role, name in (
                ("service.key", Role.SERVICE, "the suite's own calls"),
                ("operator.key", Role.ADMIN, "made by muster up"),
            ):
                path = self.folder / "keys" / file
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

    def client_environment(self) -> dict[str, str]:
        """Returns what a client needs to reach the suite: the variables of `client.env`."""
        found = {f"MUSTER_{name.upper()}": endpoint.grpc for name, endpoint in self.endpoints.items()}
        return {**found, "MUSTER_API_KEY_FILE": str(self.operator_key_file)}

    def _write_client_env(self) -> None:
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.client_environment().items()]
        _write_private(self.folder / "client.env", "\n".join(lines) + "\n")

    async def _start_services(self) -> None:
        # -P: the folder where the operator stands may hold modules named like ours.
        program = [sys.executable, "-P", "-m", "services.cli.main", "serve"]
        config = ["--config", str(self.config_file)]
        children = [Child(name, [*program, name, *config], self._environ) for name in SERVICES]
        for name in SERVICES:
            self._logs[name] = _open_log(self._log_file(name))
        self._supervisor = Supervisor(children, on_line=self._keep_line, on_event=self._note)
        await self._supervisor.start()
        for name in SERVICES:
            await self.wait_ready(name)

    def _log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _keep_line(self, name: str, line: str) -> None:
        if line.strip() and not line.startswith("{"):
            self._last_words[name] = line
        self._log_line(name, line)

    def _log_line(self, name: str, line: str) -> None:
        if name in self._logs:
            # A full disk costs the line, not the service.
            with contextlib.suppress(OSError):
                self._logs[name].write(f"{line}\n".encode())

    def _note(self, event: Event) -> None:
        self._log_line(event.name, f"# {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {describe(event)}")
        self._on_event(event)

    def _words_of(self, name: str) -> str:
        """Returns the last thing a service said that is not a log line, ready to follow a cause."""
        said = self._last_words.get(name, "").removeprefix("muster: ").removeprefix(f"{name}: ")
        return f": {said}" if said else ""


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


async def _to_its_end(work: Callable[Given, Result], *arguments: Given.args, **named: Given.kwargs) -> Result:
    """Runs `work` in a thread. A cancellation waits for its end: nothing can interrupt it, and a stop would race it."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        task.exception()  # seen; being cancelled is what counts
        raise


def _free_port(held: contextlib.ExitStack) -> int:
    probe = held.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    return port


def _open_log(path: Path) -> BinaryIO:
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    # Unbuffered: a line is in the file when it is written, and a failed write leaves nothing behind that fails again.
    return path.open("ab", buffering=0)


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
