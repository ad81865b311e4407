"""PostgreSQL: the pool, the named queries of `.sql` files, and what a failing database looks like to a caller."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

import asyncpg
from prometheus_client import Gauge

from services.call import current
from services.config import PostgresConfig
from services.errors import DatabaseUnavailable, DomainError, StartupError, first_line

POOL_CONNECTIONS = Gauge("muster_postgres_connections", "Connections of the pool.", ["database", "state"])

if TYPE_CHECKING:
    # Generic for the type checker only.
    Connection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

# The longest that one statement may take unless it names its own time, and that a transaction may leave its rows locked
# without a statement. A transaction awaits nothing but the database: one that is silent for longer is of a process that
# was stopped, or of a host that has gone, and everybody else waits for its rows.
_STATEMENT_SECONDS = 30.0
_SILENT_TRANSACTION_MS = "10000"

# The server is away, starting, stopping, full, held up or no longer the primary. What was acknowledged is committed, so
# trying again is right.
_UNAVAILABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InterfaceError,
    # What a connection says whose last statement was given up in the middle: the pool replaces it.
    asyncpg.InternalClientError,
    # A row stayed locked for longer than `lock_timeout`.
    asyncpg.LockNotAvailableError,
    # An administrator, or a timeout of the server's, ended the statement; or this side was silent in a transaction.
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # A former primary after a failover, or one whose disk is about to be full.
    asyncpg.ReadOnlySQLTransactionError,
    ConnectionError,
    OSError,
    TimeoutError,
)

_NAME = re.compile(r"^-- name: (?P<name>\w+)\s*$", re.MULTILINE)


def queries(package: str, file: str) -> Mapping[str, str]:
    """Returns the statements of a package's `sql/<file>`, by name.

    Each begins with a line ``-- name: <name>``; the comment lines after it say what it is for, what each ``$n`` is and
    which index it relies on.

    Raises:
        ValueError: a name stands twice.
    """
    text = resources.files(package).joinpath("sql", file).read_text(encoding="utf-8")
    _, *parts = _NAME.split(text)
    found: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in found:
            raise ValueError(f"{package}/sql/{file}: {name} stands twice")
        # The name travels along, so that pg_stat_statements and the server's log tell statements apart.
        found[name] = f"/* {package}.{name} */ {body.strip().rstrip(';')}"
    return found


class _PooledConnection(asyncpg.Connection):
    """A connection that goes back to its pool without a round trip to the server.

    An open transaction is still rolled back. Nothing here leaves a session changed: settings are local to a
    transaction, nobody listens, and a session's advisory lock is given back by whoever took it.
    """

    def get_reset_query(self) -> str:
        return ""


class Database:
    """A pool of connections to one database, as one role.

    Statements run with the deadline of the call in hand, those of a transaction for 30 s at most. A transaction that
    leaves its connection silent for 10 s loses it. Whoever fails to get a connection in time, or loses it, sees
    `DatabaseUnavailable`.
    """

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self._name = name
        size, idle = POOL_CONNECTIONS.labels(name, "open"), POOL_CONNECTIONS.labels(name, "idle")
        size.set_function(pool.get_size)
        idle.set_function(pool.get_idle_size)

    @classmethod
    async def connect(cls, config: PostgresConfig, name: str, **settings: str) -> Database:
        """Opens the pool and its first connection.

        Args:
            config: Where the database is and how many connections to keep.
            name: `application_name` and the label of metrics.
            settings: Server settings of every connection, such as `search_path`; they come before those made here.

        Raises:
            StartupError: the database does not answer or refuses; the message says what to do.
        """
        dsn = config.resolved_dsn()
        try:
            pool = await asyncpg.create_pool(
                dsn,
                min_size=config.pool_min,
                max_size=config.pool_max,
                max_inactive_connection_lifetime=config.idle_timeout_seconds,
                timeout=config.connect_timeout_seconds,
                command_timeout=_STATEMENT_SECONDS,
                connection_class=_PooledConnection,
                server_settings={
                    "application_name": f"muster {name}",
                    "idle_in_transaction_session_timeout": _SILENT_TRANSACTION_MS,
                    **settings,
                },
            )
            async with pool.acquire(timeout=config.connect_timeout_seconds) as connection:
                await connection.fetchval("SELECT 1")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
            raise StartupError(
                f"the database of {name} does not answer ({first_line(error)}): start it, or correct postgres.dsn"
            ) from None
        return cls(pool, name)

    async def close(self) -> None:
        """Closes the connections, after their statements have ended or 5 s have passed."""
        try:
            await asyncio.wait_for(self._pool.close(), timeout=5)
        except TimeoutError:
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for several statements.

        Raises:
            DatabaseUnavailable: none was to be had, or it broke.
        """
        try:
            async with self._pool.acquire(timeout=_budget()) as connection:
                yield connection
        except _UNAVAILABLE as error:
            raise as_unavailable(error) from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection with a transaction at READ COMMITTED, committed unless the block raises.

        Raises:
            DatabaseUnavailable: as in `connection`. Whether the commit was carried out is unknown if the connection
                broke during it, which is why mutations are idempotent.
        """
        async with self.connection() as connection, connection.transaction(isolation="read_committed"):
            yield connection

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Returns all rows of one statement. Raises: DatabaseUnavailable."""
        async with self.connection() as connection:
            return await connection.fetch(statement, *arguments, timeout=_budget())

    async def fetchrow(self, statement: str, *arguments: Any) -> asyncpg.Record | None:
        """Returns the first row of one statement, or None. Raises: DatabaseUnavailable."""
        async with self.connection() as connection:
            return await connection.fetchrow(statement, *arguments, timeout=_budget())

    async def fetchval(self, statement: str, *arguments: Any) -> Any:
        """Returns the first value of one statement, or None. Raises: DatabaseUnavailable."""
        async with self.connection() as connection:
            return await connection.fetchval(statement, *arguments, timeout=_budget())

    async def execute(self, statement: str, *arguments: Any) -> str:
        """Runs one statement and returns its command tag. Raises: DatabaseUnavailable."""
        async with self.connection() as connection:
            return await connection.execute(statement, *arguments, timeout=_budget())


def as_unavailable(error: BaseException) -> DomainError:
    """Returns what a caller is told of a database that failed."""
    if isinstance(error, DomainError):
        return error
    return DatabaseUnavailable(
        f"the database does not answer ({type(error).__name__}); nothing acknowledged is lost", retry_after_seconds=1.0
    )


def is_unavailable(error: BaseException) -> bool:
    """Whether an exception means that the database is away for now."""
    return isinstance(error, _UNAVAILABLE)


def _budget() -> float:
    try:
        return current().remaining_seconds()
    except LookupError:
        return _STATEMENT_SECONDS
