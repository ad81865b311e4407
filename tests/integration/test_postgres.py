"""What callers of the database see when it fails, and when they do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

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
