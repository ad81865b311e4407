"""The life of a service process: start, serve, drain, stop.

    starting ──bind ok──> ready ──signal or a failed loop──> draining ──grace──> stopped
        └── StartupError: one line on stderr, exit code 2

A service hands `run` its configuration class and one function ``async def bind(chassis, config)``, which builds the
service from its parts with constructor arguments and registers it. The chassis owns signals, health, metrics,
authentication and the close of everything in reverse order of opening. Draining is: health says NOT_SERVING and
`Chassis.draining` is set, then `drain.delay_seconds` for balancers to notice, then no new calls and
`drain.grace_seconds` for those in flight, then the closers.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any, Generic, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services import logs, metrics
from services.call import Role
from services.config import PostgresConfig, ServiceConfig
from services.errors import DatabaseUnavailable, StartupError
from services.identity.keys import Authenticator, KeyStore
from services.interceptor import Registrar
from services.migrations import SCHEMAS, pending
from services.postgres import Database

_log = structlog.get_logger("chassis")

# Nearly all that a call makes is freed with its last reference. At the interpreter's 700 objects the search for cycles
# took a tenth of the time of a busy service, and its full searches were the longest pauses.
_OBJECTS_BEFORE_SEARCH = 50_000

Config = TypeVar("Config", bound=ServiceConfig)
Bind = Callable[["Chassis[Any]", Any], Awaitable[None]]


class Chassis(Generic[Config]):
    """What a service stands on while it runs.

    Attributes:
        name: The service's name.
        config: Its configuration.
        draining: Set when the service begins to stop; long streams end themselves then.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.config = config
        self.draining = asyncio.Event()
        self._closers: list[tuple[str, Callable[[], Awaitable[Any]]]] = []
        self._loops: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        self._services: list[str] = []
        self._authenticator: Authenticator | None = None
        limit = config.grpc.max_message_bytes
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # Without this a second process on the same port is not refused but silently gets half of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 1000),
                # Clients behind NATs keep their streams alive; grpc would drop them for pinging below 5 minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            )
        )
        self._health = health_aio.HealthServicer()

    async def database(self, **settings: str) -> Database:
        """Opens the service's own database, checks that its schema is up to date, and closes it at the end.

        Args:
            settings: Server settings of every connection.

        Raises:
            StartupError: it does not answer, or migrations are pending.
        """
        schema = SCHEMAS[self.name]
        await self._refuse_pending(schema.name, self.config.postgres)
        settings = {"search_path": schema.name, **settings}
        database = await Database.connect(self.config.postgres, self.name, **settings)
        self.on_close("database", database.close)
        return database

    async def _refuse_pending(self, schema: str, postgres: PostgresConfig) -> None:
        behind = await asyncio.to_thread(pending, SCHEMAS[schema], postgres.resolved_dsn())
        if behind:
            raise StartupError(
                f"the schema {schema} lacks {len(behind)} migration(s) ({', '.join(behind)}): run `muster migrate`"
            )

    def add(
        self,
        add_to_server: Callable[[Any, Any], None],
        servicer: object,
        descriptor: ServiceDescriptor,
        role: Role,
        **exceptions: Role,
    ) -> None:
        """Registers a gRPC service.

        Args:
            add_to_server: The generated ``add_…Servicer_to_server``.
            servicer: Its implementation.
            descriptor: The service's descriptor, for reflection and health.
            role: The least role for its methods.
            exceptions: Another least role for single methods, by name.
        """
        assert self._authenticator is not None
        add_to_server(servicer, Registrar(self._server, self._authenticator, role, exceptions))
        self._services.append(descriptor.full_name)

    def on_close(self, name: str, close: Callable[[], Awaitable[Any]]) -> None:
        """Calls `close` at the end, after the server has stopped; the last to be added comes first."""
        self._closers.append((name, close))

    def run_loop(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Runs a background loop until the end. If it raises, or returns while serving, the process stops."""
        task = asyncio.ensure_future(loop())
        self._loops.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._loops.discard(done)
            if done.cancelled() or self.draining.is_set():
                return
            self._failed = done.exception() or RuntimeError("it returned")
            _log.error("a background loop failed: stopping", loop=name, exc_info=self._failed)
            self.draining.set()

        task.add_done_callback(ended)

    async def start(self, bind: Bind) -> str:
        """Opens the identity store, binds the service, listens; returns the address of the gRPC port.

        Raises:
            StartupError: a part cannot be used; everything opened until then is closed.
        """
        try:
            identity = self.config.identity_database()
            await self._refuse_pending("identity", identity)
            keys = await Database.connect(identity, f"{self.name} identity")
            self.on_close("identity", keys.close)
            self._authenticator = Authenticator(KeyStore(keys))
            await bind(self, self.config)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
            if self.config.grpc.reflection:
                names = [*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
                reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], self._server)
            if self.config.grpc.channelz:
                channelz.add_channelz_servicer(self._server)
            address = self._listen()
            await self._server.start()
            for service in ("", *self._services):
                await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        except DatabaseUnavailable as error:
            # Its connections were open already.
            await self.close()
            raise StartupError(f"the start lost the database ({error.message}): start again when it is back") from None
        except BaseException:
            await self.close()
            raise
        return address

    def _listen(self) -> str:
        listen = self.config.grpc.listen
        host, _ = metrics.split_address(listen)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise StartupError(f"the port {listen} cannot be used: stop what uses it, or set grpc.listen")
        return f"{host}:{port}"

    async def drain(self) -> None:
        """Stops serving in order; safe to call twice, and when never started."""
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        if self._services and self.config.drain.delay_seconds:
            await asyncio.sleep(self.config.drain.delay_seconds)
        await self._server.stop(self.config.drain.grace_seconds)
        await self.close()

    async def close(self) -> None:
        """Ends the loops and closes what was opened, last first; a closer that fails does not keep the others."""
        self.draining.set()
        for task in list(self._loops):
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while self._closers:
            name, close = self._closers.pop()
            try:
                await close()
            except Exception as error:
                _log.error("closing failed", part=name, exc_info=error)
        await self._server.stop(None)

    @property
    def failed(self) -> bool:
        """Whether a background loop failed, which makes the process end with code 1."""
        return self._failed is not None


def run(name: str, config: ServiceConfig, bind: Bind) -> int:
    """Runs a service until SIGTERM or SIGINT and returns the process's exit code.

    Raises:
        StartupError: the service cannot start as it is set up.
    """
    logs.configure(config.log, name)
    if config.event_loop == "uvloop":
        import uvloop

        return uvloop.run(_serve(name, config, bind))
    return asyncio.run(_serve(name, config, bind))


async def _serve(name: str, config: ServiceConfig, bind: Bind) -> int:
    chassis = Chassis(name, config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, chassis.draining.set)
    exporter, metrics_address = metrics.serve(config.metrics)
    metrics.BUILD.labels(name, metadata.version("muster-suite")).set(1)
    try:
        address = await chassis.start(bind)
        # What is there by now stays; it need not be searched.
        gc.freeze()
        gc.set_threshold(_OBJECTS_BEFORE_SEARCH)
        chassis.run_loop("loop lag", metrics.watch_loop_lag)
        _log.info("ready", grpc=address, metrics=metrics_address)
        await chassis.draining.wait()
        _log.info("draining")
        await chassis.drain()
    finally:
        exporter.shutdown()
    _log.info("stopped")
    return 1 if chassis.failed else 0
