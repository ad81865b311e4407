"""Real services in the test's own process: the chassis, a fresh migrated database, API keys, a channel."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol
from uuid import UUID

import grpc
import pytest

from services.call import Role
from services.chassis import Chassis
from services.config import PostgresConfig, load
from services.identity.keys import KeyStore
from services.migrations import IDENTITY, SCHEMAS, migrate
from services.postgres import Database
from tests.support.postgres import PostgresServer, TemplateDatabases

ROLES = {f"muster_{schema}": schema for schema in SCHEMAS}


@dataclass(slots=True)
class RunningService:
    """A service that serves.

    Attributes:
        name: Its name.
        chassis: What it stands on.
        address: Of its gRPC port.
        channel: To that port.
        database: Its database's name.
        dsn: A superuser's URI of its database.
    """

    name: str
    chassis: Chassis[Any]
    address: str
    channel: grpc.aio.Channel
    database: str
    dsn: str
    store: KeyStore
    _keys: dict[tuple[str, Role], str] = field(default_factory=dict)
    _organizations: dict[str, UUID] = field(default_factory=dict)

    async def key(self, role: Role = Role.WORKER, organization: str = "acme", *, time_zone: str = "UTC") -> str:
        """Returns a key of an organization, made on first use."""
        known = self._keys.get((organization, role))
        if known is None:
            _, known = await self.store.create(organization, role, time_zone=time_zone)
            self._keys[organization, role] = known
            principal = await self.store.find(known)
            assert principal is not None
            self._organizations[organization] = principal.organization_id
        return known

    async def metadata(self, role: Role = Role.WORKER, organization: str = "acme") -> tuple[tuple[str, str], ...]:
        """Returns the metadata that a call of this role carries."""
        return (("authorization", f"Bearer {await self.key(role, organization)}"),)

    async def organization_id(self, organization: str = "acme") -> UUID:
        """Returns an organization's id, making it on first use."""
        await self.key(Role.WORKER, organization)
        return self._organizations[organization]


class StartService(Protocol):
    """Starts a service; `tables` are tables of its configuration, as in the file."""

    def __call__(self, name: str, *, database: str | None = None, **tables: Any) -> Awaitable[RunningService]:
        """Starts it on a fresh database, or on the one named (to restart a service, or to run a replica)."""


@pytest.fixture
def migrated_database(
    postgres_server: PostgresServer, template_databases: TemplateDatabases
) -> Callable[[str], contextlib.AbstractContextManager[str]]:
    """Gives fresh databases with the schemas of one service and of the identity store."""

    def fresh(name: str) -> contextlib.AbstractContextManager[str]:
        def prepare(database: str) -> None:
            postgres_server.ensure_database(database, ROLES)
            migrate(IDENTITY, postgres_server.dsn(database, "muster_identity"))
            migrate(SCHEMAS[name], postgres_server.dsn(database, f"muster_{name}"))

        return template_databases.fresh(name, prepare)

    return fresh


@pytest.fixture
async def start_service(
    postgres_server: PostgresServer, migrated_database: Callable[[str], contextlib.AbstractContextManager[str]]
) -> AsyncIterator[StartService]:
    """Starts services, and drains them at the end of the test, last first."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(name: str, *, database: str | None = None, **tables: Any) -> RunningService:
            if database is None:
                database = stack.enter_context(migrated_database(name))
            app = import_module(f"{name}.app")
            identity = PostgresConfig.model_validate(
                {"dsn": postgres_server.dsn(database, "muster_identity"), "pool_min": 0, "pool_max": 2}
            )
            defaults = load(app.CONFIG, name, None, {})
            given = {
                "grpc": {"listen": "127.0.0.1:0"},
                "metrics": {"listen": "127.0.0.1:0"},
                "postgres": {"dsn": postgres_server.dsn(database, f"muster_{name}")},
                "identity": identity,
                "drain": {"grace_seconds": 1},
                **tables,
            }
            chassis = Chassis(name, type(defaults)(**given))
            address = await chassis.start(app.bind)
            stack.push_async_callback(chassis.drain)
            channel = grpc.aio.insecure_channel(address)
            stack.push_async_callback(channel.close)
            keys = await Database.connect(identity, f"{name} test")
            stack.push_async_callback(keys.close)
            return RunningService(
                name, chassis, address, channel, database, postgres_server.dsn(database), KeyStore(keys)
            )

        yield start
