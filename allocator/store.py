"""What every store of the allocator stands on: transactions that are tried again when PostgreSQL asks for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from allocator.partitions import Partitions
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from services.postgres import Connection, Database

Result = TypeVar("Result")

# The lock order of the statements leaves no deadlock among themselves; operators and migrations may still make one.
_TRIES = 5
_WHOLE_SECONDS = 30.0


async def fetch_whole(database: Database, statement: str, *arguments: Any) -> asyncpg.Record:
    """Returns the one row of a statement that asks of all rows of a table: it reads them in their order on the disk.

    Raises:
        DatabaseUnavailable: as `Database.connection`, or there was no answer within 30 s.
    """
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL enable_seqscan = on")
        row = await connection.fetchrow(statement, *arguments, timeout=_WHOLE_SECONDS)
    assert row is not None
    return row


class Store:
    """Runs work in transactions.

    Args:
        database: The allocator's database.
        partitions: Makes a partition that is found missing.
    """

    def __init__(self, database: Database, partitions: Partitions) -> None:
        self.database = database
        self._partitions = partitions

    async def atomically(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Runs `work` in one transaction at READ COMMITTED, and again if it fell to a deadlock or a missing partition.

        Args:
            work: Must have no effect but in the database, since it may run several times.

        Raises:
            DatabaseUnavailable: the database does not answer, a row stayed locked longer than `lock_timeout`, every try
                fell to a deadlock, or a partition cannot be made. Nothing was changed, unless the commit's answer was
                lost.
        """
        for left in reversed(range(_TRIES)):
            try:
                async with self.database.transaction() as connection:
                    return await work(connection)
            except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError) as error:
                if not left:
                    raise DatabaseUnavailable(
                        "other transactions were in the way each time; nothing was changed", retry_after_seconds=1.0
                    ) from error
            except asyncpg.CheckViolationError as error:
                # PostgreSQL checks a row's new version as projected from the one that the statement began with, before
                # it finds that the row has moved on: what a statement that had to wait violates may be no violation.
                # It reports a row without a partition as a violated check without a name.
                if error.constraint_name:
                    if not left:
                        raise
                elif left:
                    await self._partitions.ensure()
                else:
                    raise DatabaseUnavailable(
                        "a partition is missing and cannot be made; nothing was changed", retry_after_seconds=1.0
                    ) from error
        raise AssertionError("the last try returns or raises")
