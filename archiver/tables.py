"""Partitioned tables as PostgreSQL knows them: their columns, their partitions and the bounds of these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from archiver.columns import TableColumn
from archiver.errors import TableUnsuitable
from services.partitions import Interval
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

SQL = queries("archiver", "source.sql")

_BOUND = re.compile(r"FOR VALUES FROM \('([^']*)'\) TO \('([^']*)'\)\Z")
_DAY = re.compile(r"(\d{4}-\d\d-\d\d)(?: 00:00:00(?:\+00)?)?\Z")
_DEFAULT = "DEFAULT"
_PARTITION_TYPES = ("date", "timestamp with time zone", "timestamp without time zone")
# What Interval.label adds at most, with its underscore; PostgreSQL cuts names at 63 bytes.
_LONGEST_TABLE_NAME = 63 - len("_2025_08_14")


@dataclass(frozen=True, slots=True)
class TablePartition:
    """A partition of a table.

    Attributes:
        schema: Its schema.
        name: Its name.
        begin: Its first day.
        end: The day after its last.
        size_bytes: On disk, with indexes.
        table_bytes: On disk, without indexes.
        estimated_rows: As of the last ANALYZE.
    """

    schema: str
    name: str
    begin: date
    end: date
    size_bytes: int
    table_bytes: int
    estimated_rows: int

    @property
    def qualified(self) -> str:
        """Its name with its schema."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class PartitionedTable:
    """A table partitioned by range over one column of days or moments.

    Attributes:
        schema: Its schema.
        name: Its name.
        partition_column: What it is partitioned by.
        columns: All its columns, in order.
        partitions: Those with bounds, by lower bound.
        default_bytes: The size of its default partition without indexes; None when it has none.
    """

    schema: str
    name: str
    partition_column: str
    columns: tuple[TableColumn, ...]
    partitions: tuple[TablePartition, ...]
    default_bytes: int | None

    def column(self, name: str) -> TableColumn | None:
        """Returns a column by its name, or None."""
        return next((column for column in self.columns if column.name == name), None)

    def covers(self, begin: date, end: date) -> bool:
        """Whether a partition overlaps the days from `begin` to before `end`."""
        return any(one.begin < end and one.end > begin for one in self.partitions)

    def check(self, interval: Interval, key_column: str, organization_column: str) -> None:
        """Checks that the table suits a policy.

        Raises:
            TableUnsuitable: it does not; says in what.
        """
        table = f"{self.schema}.{self.name}"
        if len(self.name.encode()) > _LONGEST_TABLE_NAME:
            raise TableUnsuitable(
                f"the name of {table} leaves no room for those of its partitions: at most {_LONGEST_TABLE_NAME} bytes",
                table=table,
            )
        for one in self.partitions:
            if interval.begin(one.begin) != one.begin or interval.after(one.begin) != one.end:
                raise TableUnsuitable(
                    f"{one.qualified} holds {one.begin} to {one.end}, which is not one {interval.value}", table=table
                )
        organization = self.column(organization_column)
        if organization is None or organization.kind != "uuid":
            raise TableUnsuitable(
                f"{table} has no column {organization_column!r} of type uuid to tell organizations by", table=table
            )
        if key_column and self.column(key_column) is None:
            raise TableUnsuitable(f"{table} has no column {key_column!r}", table=table)


async def read_table(connection: Connection, schema: str, name: str) -> PartitionedTable:
    """Returns a table as it stands.

    Args:
        connection: A session of `Sources`.
        schema: The table's schema.
        name: The table.

    Raises:
        TableUnsuitable: there is no such table, or it is not partitioned by range over one date or timestamp column,
            or its partitions are not cut at midnight UTC.
    """
    table = f"{schema}.{name}"
    shape = await connection.fetchrow(SQL["table_shape"], schema, name)
    if shape is None:
        raise TableUnsuitable(f"there is no table {table}", table=table)
    if not shape["by_range"] or shape["partition_type"] not in _PARTITION_TYPES:
        raise TableUnsuitable(f"{table} is not partitioned by range over one date or timestamp column", table=table)
    columns = tuple(TableColumn(**row) for row in await connection.fetch(SQL["table_columns"], schema, name))
    partitions = []
    default_bytes = None
    for row in await connection.fetch(SQL["table_partitions"], schema, name):
        if row["bound"] == _DEFAULT:
            default_bytes = row["table_bytes"]
            continue
        found = _BOUND.match(row["bound"])
        bounds = [_DAY.match(text) for text in found.groups()] if found else []
        if not bounds or not bounds[0] or not bounds[1] or not row["plain"]:
            raise TableUnsuitable(
                f"{row['schema_name']}.{row['name']} is not a plain partition of whole days in UTC ({row['bound']})",
                table=table,
            )
        begin, end = date.fromisoformat(bounds[0][1]), date.fromisoformat(bounds[1][1])
        sizes = (row["size_bytes"], row["table_bytes"], row["estimated_rows"])
        partitions.append(TablePartition(row["schema_name"], row["name"], begin, end, *sizes))
    partitions.sort(key=lambda one: one.begin)
    return PartitionedTable(schema, name, shape["partition_column"], columns, tuple(partitions), default_bytes)
