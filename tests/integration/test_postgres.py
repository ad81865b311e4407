"""What callers of the database see when it fails, and when they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from psycopg.conninfo import conninfo_to_dict

from services import postgres
from services.config import PostgresConfig
from services.errors import DatabaseUnavailable
from services.postgres import Database, queries
from tests.support.postgres import PostgresServer


@pytest.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[Database]:
    name = postgres_server.create_database("faults")
    config = PostgresConfig.model_validate(
        {"dsn": postgres_server.dsn(name), "pool_min": 0, "pool_max": 1, "connect_timeout_seconds": 1}
    )
    made = await Database.connect(config, "test")
    yield made
    await made.close()
    postgres_server.drop_database(name)


async def test_a_connection_that_is_cut_is_unavailable_and_the_next_one_works(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        await database.fetch("SELECT pg_terminate_backend(pg_backend_pid())")
    assert caught.value.retry_after_seconds
    assert await database.fetchval("SELECT 1") == 1


async def test_a_transaction_that_is_cut_leaves_nothing(database: Database) -> None:
    await database.execute("CREATE TABLE kept (n int)")

    async def write() -> None:
        async with database.transaction() as connection:
            await connection.execute("INSERT INTO kept VALUES (1)")
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises(DatabaseUnavailable):
        await write()
    assert await database.fetchval("SELECT count(*) FROM kept") == 0


@pytest.mark.parametrize(
    "statements",
    [
        ("SET LOCAL statement_timeout = 1", "SELECT pg_sleep(60)"),
        ("SET TRANSACTION READ ONLY", "CREATE TABLE t (n int)"),
    ],
)
async def test_what_is_cancelled_or_may_only_read_is_unavailable(
    database: Database, statements: tuple[str, ...]
) -> None:
    async def run() -> None:
        async with database.transaction() as connection:
            for statement in statements:
                await connection.execute(statement)

    with pytest.raises(DatabaseUnavailable):
        await run()
    assert await database.fetchval("SELECT 1") == 1


async def test_a_transaction_that_falls_silent_loses_its_locks(postgres_server: PostgresServer) -> None:
    """What a replica leaves that is stopped, or whose machine is, in the middle of a transaction."""
    name = postgres_server.create_database("faults")
    config = PostgresConfig.model_validate({"dsn": postgres_server.dsn(name), "pool_min": 0, "pool_max": 2})
    default = await Database.connect(config, "test")
    assert await default.fetchval("SHOW idle_in_transaction_session_timeout") == "10s"
    await default.close()
    database = await Database.connect(config, "test", idle_in_transaction_session_timeout="100")
    await database.execute("CREATE TABLE t AS SELECT 1 AS n")

    async def fall_silent() -> None:
        async with database.transaction() as connection:
            await connection.execute("UPDATE t SET n = 2")
            # Waits for the row until the transaction that is open here is ended.
            await database.execute("UPDATE t SET n = n + 10")
            await connection.execute("UPDATE t SET n = 3")

    with pytest.raises(DatabaseUnavailable):
        await fall_silent()
    assert await database.fetchval("SELECT n FROM t") == 11
    await database.close()
    postgres_server.drop_database(name)


class Wire:
    """A connection to the server that can fall silent, as when its host or a switch on the way loses its power."""

    def __init__(self, dsn: str) -> None:
        self.parts = conninfo_to_dict(dsn)
        self.alive = asyncio.Event()
        self.alive.set()

    async def __aenter__(self) -> str:
        """Returns a URI that leads through it."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        password = f":{self.parts['password']}" if self.parts.get("password") else ""
        return f"postgresql://{self.parts['user']}{password}@127.0.0.1:{port}/{self.parts['dbname']}"

    async def __aexit__(self, *_: object) -> None:
        self.alive.set()
        self._listener.close()
        await self._listener.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = str(self.parts["host"]), str(self.parts.get("port", 5432))
        if host.startswith("/"):
            there = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            there = await asyncio.open_connection(host, port)
        await asyncio.gather(self._pump(reader, there[1]), self._pump(there[0], writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self.alive.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def test_a_server_that_is_gone_without_a_word_is_unavailable(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_STATEMENT_SECONDS", 0.2)
    wire = Wire(postgres_server.superuser_dsn)
    async with wire as dsn:
        config = PostgresConfig.model_validate({"dsn": dsn, "pool_min": 0, "pool_max": 1})
        database = await Database.connect(config, "test")

        async def lose_it() -> None:
            async with database.transaction() as connection:
                await connection.execute("SELECT 1")
                wire.alive.clear()
                await connection.execute("SELECT 2")

        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(lose_it(), 30)
        wire.alive.set()
        assert await database.fetchval("SELECT 3") == 3
        await database.close()


async def test_a_fault_of_our_own_is_not_called_unavailable(database: Database) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await database.fetch("SELEKT 1")
    with pytest.raises(asyncpg.DataError, match="out of int32 range"):
        await database.fetch("SELECT $1::int", 2**40)
    await database.execute("CREATE TABLE t (n int UNIQUE)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.execute("INSERT INTO t VALUES (1), (1)")


async def test_callers_that_leave_give_their_connection_back(database: Database) -> None:
    held = asyncio.create_task(database.fetch("SELECT pg_sleep(60)"))
    waiting = asyncio.create_task(database.fetchval("SELECT 2"))
    await asyncio.sleep(0)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert await waiting == 2


def test_statements_have_names_and_explain_themselves() -> None:
    found = queries("services", "requests.sql")
    assert set(found) == {"claim_request", "find_request", "record_answer", "forget_requests"}
    assert found["claim_request"].startswith("/* services.claim_request */ --")
