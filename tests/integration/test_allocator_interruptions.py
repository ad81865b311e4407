"""What ends a statement or a transaction of the allocator from outside stops no replica."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from allocator.partitions import Partitions
from allocator.store import Store
from services.errors import DatabaseUnavailable
from services.postgres import Database
from tests.support.allocator import Allocator, until
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))


@pytest.fixture
async def database(allocator: Allocator) -> AsyncIterator[Database]:
    """Another replica's: it loses its transactions when it is silent in one for long."""
    database = await Database.connect(
        allocator.service.chassis.config.postgres,
        "interrupted",
        search_path="allocator",
        idle_in_transaction_session_timeout="200",
    )
    yield database
    await database.close()


async def test_a_sweep_that_is_cancelled_comes_again(allocator: Allocator) -> None:
    slot = await allocator.slot()
    unit, _ = await allocator.take(2)
    peer = await allocator.connect()
    async with peer.transaction():
        await peer.execute("SELECT FROM daily_work_tracking WHERE slot_id = $1 FOR UPDATE", uuid.UUID(slot.slot_id))
        await allocator.run_out(unit)
        await until(allocator.waits_for_a_lock)
        await peer.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    await peer.close()
    await allocator.swept(unit)
    assert (await allocator.tracking(slot.slot_id))["expired"] == 1
    assert (await allocator.heartbeat()).HasField("server_time")
    assert not allocator.service.chassis.failed
    await allocator.check_invariants()


async def test_work_goes_on_past_a_replica_that_stands_still_in_a_transaction(
    allocator: Allocator, database: Database
) -> None:
    slot = await allocator.slot()

    async def stand_still() -> None:
        async with database.transaction() as connection:
            await connection.execute(
                "SELECT FROM daily_work_tracking WHERE slot_id = $1 FOR UPDATE", uuid.UUID(slot.slot_id)
            )
            # Waits for the row; the transaction that holds it says nothing meanwhile.
            await allocator.take()
            await connection.execute("UPDATE daily_work_tracking SET allocated = 100")

    with pytest.raises(DatabaseUnavailable):
        await stand_still()
    assert (await allocator.tracking(slot.slot_id))["allocated"] == 1


@pytest.mark.parametrize("error", [asyncpg.DeadlockDetectedError, asyncpg.SerializationError])
async def test_what_falls_to_others_each_time_is_unavailable(
    database: Database, error: type[asyncpg.PostgresError]
) -> None:
    tries = 0

    async def work(_: Any) -> None:
        nonlocal tries
        tries += 1
        raise error("in the way")

    with pytest.raises(DatabaseUnavailable, match="nothing was changed"):
        await Store(database, Partitions(database)).atomically(work)
    assert tries == 5


async def test_a_partition_that_is_not_made_is_unavailable(allocator: Allocator, database: Database) -> None:
    async def work(connection: Any) -> None:
        await connection.execute(
            "INSERT INTO audit_heads VALUES ($1, '')", await allocator.service.organization_id("rival")
        )
        await connection.execute("INSERT INTO work_results (created_at) VALUES ('1999-01-01')")

    with pytest.raises(DatabaseUnavailable, match="cannot be made; nothing was changed"):
        await Store(database, Partitions(database)).atomically(work)
    assert not await allocator.sql("SELECT FROM audit_heads")
