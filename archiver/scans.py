"""What a query reads of one table: hot partitions from PostgreSQL and cold files, each row in exactly one of them.

A file counts once its partition is detached, and not before. Both sides of that line are read while an ACCESS SHARE
lock keeps every partition that is attached attached, and the catalogue is read after the lock: a file whose partition
is still attached is left out, since its rows are read hot, and any other published file is read. A partition that was
made again for late rows is hot beside the file of its first rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from archiver.columns import Column, TableColumn, merged
from archiver.errors import TableUnsuitable
from archiver.policies import Policy
from archiver.store import ColdFile, Store
from archiver.tables import SQL, PartitionedTable, read_table

if TYPE_CHECKING:
    from services.postgres import Connection


@dataclass(frozen=True, slots=True)
class Range:
    """Days from `begin` to before `end`; None is no bound."""

    begin: date | None
    end: date | None

    def overlaps(self, begin: date, end: date) -> bool:
        """Whether some day of `begin` to before `end` lies within."""
        return (self.begin is None or end > self.begin) and (self.end is None or begin < self.end)

    def contains(self, begin: date, end: date) -> bool:
        """Whether every day of `begin` to before `end` lies within."""
        return (self.begin is None or begin >= self.begin) and (self.end is None or end <= self.end)


@dataclass(frozen=True, slots=True)
class Scan:
    """What to read of a policy's table for one organization.

    Attributes:
        policy: The policy.
        columns: Of the table over all times: those of today first.
        files: The cold files to read.
        files_pruned: The cold files left out by date.
        hot_partitions: The partitions to read.
        hot_bytes: Their size without indexes.
        table: The table; None when it is gone, and only files are read.
    """

    policy: Policy
    columns: tuple[Column, ...]
    files: list[ColdFile]
    files_pruned: int
    hot_partitions: int
    hot_bytes: int
    table: PartitionedTable | None

    @property
    def bytes(self) -> int:
        """What is read at most, before any push-down."""
        return self.hot_bytes + sum(file.size_bytes for file in self.files)

    def hot_columns(self, names: set[str] | None) -> tuple[TableColumn, ...]:
        """Returns the columns to fetch from PostgreSQL for those a query needs; None for all. At least one."""
        assert self.table is not None
        found = tuple(column for column in self.table.columns if names is None or column.name in names)
        return found or (self.table.columns[0],)

    async def hot_statement(
        self, connection: Connection, columns: tuple[TableColumn, ...], organization_id: UUID, days: Range
    ) -> str:
        """Returns the statement that reads the hot rows; organization and days are in it."""
        assert self.table is not None
        statement: str = await connection.fetchval(
            SQL["hot_statement"],
            self.policy.schema,
            self.policy.table,
            [column.read_sql for column in columns],
            [column.name for column in columns],
            self.policy.organization_column,
            organization_id,
            self.table.partition_column,
            days.begin,
            days.end,
        )
        return statement


async def scan(store: Store, connection: Connection, policy: Policy, organization_id: UUID, days: Range) -> Scan:
    """Returns what to read. Until the transaction ends, no partition of the table can be detached.

    Args:
        store: The catalogue.
        connection: A session on the policy's source, in a transaction at READ COMMITTED.
        policy: Whose table.
        organization_id: Whose rows.
        days: Which days.
    """
    table: PartitionedTable | None
    try:
        await read_table(connection, policy.schema, policy.table)
        await connection.execute(
            await connection.fetchval(SQL["lock_readers_out_statement"], policy.schema, policy.table)
        )
        table = await read_table(connection, policy.schema, policy.table)
    except TableUnsuitable:
        table = None
    attached = {one.qualified for one in table.partitions} if table else set()
    published = await store.readable_files(policy.name, organization_id)
    cold = [file for file in published if file.detached or file.partition not in attached]
    files = [file for file in cold if days.overlaps(file.from_date, file.to_date)]
    hot = [one for one in table.partitions if days.overlaps(one.begin, one.end)] if table else []
    default_bytes = (table.default_bytes or 0) if table else 0
    return Scan(
        policy,
        merged(table.columns if table else (), [file.columns for file in reversed(published)]),
        files,
        len(cold) - len(files),
        len(hot) + (1 if default_bytes else 0),
        sum(one.table_bytes for one in hot) + default_bytes,
        table,
    )
