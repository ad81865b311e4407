"""Copies of rows as Parquet files: a whole partition by organization, or one organization's hot rows for a query.

Rows travel as Arrow batches over PostgreSQL's binary COPY (ADBC) and are never held whole: at most one row group is in
memory. A partition becomes one file for each organization, so that a query physically cannot read another's rows and an
organization's history can be erased by deleting files. Everything here blocks and belongs in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import adbc_driver_manager
import adbc_driver_postgresql.dbapi
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from archiver.columns import Column, TableColumn, schema_of
from archiver.fingerprints import Fingerprint, of_sums
from archiver.tables import SQL

# A row group is what a reader skips or reads; both bounds keep it, and with it the memory of a copy, small.
ROW_GROUP_ROWS = 100_000
ROW_GROUP_BYTES = 64 * 2**20
_BLOOM_FALSE_POSITIVES = 0.01


class Interrupted(Exception):
    """The copy was told to stop."""


class CopyFailed(Exception):
    """PostgreSQL refused or the connection broke; the message is PostgreSQL's."""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What to copy: statements that were written by the source database itself.

    Attributes:
        copy_statement: Reads the rows by organization and key.
        fingerprint_statement: Computes what the file is held against, in the same snapshot.
        columns: In the order of the statements.
        organization_column: One of them.
        key_column: One of them, or empty.
        metadata: Goes into each file, so that it explains itself.
    """

    copy_statement: str
    fingerprint_statement: str
    columns: tuple[TableColumn, ...]
    organization_column: str
    key_column: str
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Copy:
    """A file with one organization's rows of a partition; `organization_id` is None for rows that name none."""

    organization_id: UUID | None
    file: Path
    size_bytes: int
    sha256: bytes
    columns: tuple[TableColumn, ...]
    fingerprint: Fingerprint


def copy_partition(dsn: str, plan: CopyPlan, folder: Path, stop: Event) -> list[Copy]:
    """Copies a partition into one file for each organization.

    Args:
        dsn: The source.
        plan: What to copy.
        folder: An empty folder for the files.
        stop: Set to give up between two batches.

    Raises:
        CopyFailed: the source does not do its part.
        Interrupted: `stop` was set.
        OSError: the disk is full.
    """
    schema = schema_of(plan.columns).with_metadata({key: value.encode() for key, value in plan.metadata.items()})
    written: dict[str | None, Path] = {}
    with _snapshot(dsn) as cursor:
        cursor.execute(plan.copy_statement)
        sink: _Sink | None = None
        try:
            for batch in cursor.fetch_record_batch():
                if stop.is_set():
                    raise Interrupted
                for organization, piece in _by_organization(batch, plan.organization_column):
                    if organization not in written:
                        if sink is not None:
                            sink.close()
                        written[organization] = folder / f"{len(written)}.parquet"
                        sink = _Sink(written[organization], schema, plan.key_column, plan.organization_column)
                    assert sink is not None
                    sink.add(_as_stored(piece, plan.columns, schema))
        finally:
            if sink is not None:
                sink.close()
        cursor.execute(plan.fingerprint_statement)
        found = cursor.fetch_arrow_table().to_pylist()
    fingerprints = {row["organization"]: of_sums(plan.columns, row["rows"], row["sums"]) for row in found}
    if set(fingerprints) != set(written):
        raise CopyFailed("the copy and the fingerprint did not see the same organizations")
    return [
        Copy(
            None if organization is None else UUID(organization),
            file,
            file.stat().st_size,
            sha256_of(file),
            plan.columns,
            fingerprints[organization],
        )
        for organization, file in written.items()
    ]


def copy_rows(dsn: str, statement: str, columns: tuple[TableColumn, ...], file: Path, stop: Event) -> int:
    """Copies what a statement reads into one file, for a query to read; returns the rows.

    Args:
        dsn: The source.
        statement: Reads the columns in their order.
        columns: What to expect.
        file: Where to.
        stop: Set to give up between two batches.

    Raises:
        CopyFailed, Interrupted, OSError: as in `copy_partition`.
    """
    schema = schema_of(columns)
    rows = 0
    with _snapshot(dsn) as cursor:
        cursor.execute(statement)
        # Read once and at once: light compression is quicker than none to the disk.
        with pq.ParquetWriter(file, schema, compression="lz4") as writer:
            for batch in cursor.fetch_record_batch():
                if stop.is_set():
                    raise Interrupted
                rows += batch.num_rows
                writer.write_batch(_as_stored(batch, columns, schema))
    return rows


def sha256_of(file: Path) -> bytes:
    """Returns the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


class _Sink:
    """A Parquet file being written, row group by row group."""

    def __init__(self, file: Path, schema: pa.Schema, key_column: str, organization_column: str) -> None:
        self._file = file
        self._schema = schema
        self._key_column = key_column
        self._sorted_by = [name for name in (organization_column, key_column) if name]
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = self._open()
        self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema), row_group_size=self._rows)
        self._waiting.clear()
        self._rows = self._bytes = 0

    def _open(self) -> pq.ParquetWriter:
        names = self._schema.names
        # The first row group is the largest but for rounding, so its rows bound the distinct keys of each.
        bloom = {self._key_column: {"ndv": self._rows, "fpp": _BLOOM_FALSE_POSITIVES}} if self._key_column else None
        options: dict[str, Any] = {
            "compression": "zstd",
            "write_page_index": True,
            "write_page_checksum": True,
            "sorting_columns": [pq.SortingColumn(names.index(name)) for name in self._sorted_by],
            "bloom_filter_options": bloom,
        }
        return pq.ParquetWriter(self._file, self._schema, **options)


@contextmanager
def _snapshot(dsn: str) -> Iterator[Any]:
    """A cursor in a read-only transaction that sees one snapshot of the source."""
    try:
        with closing(adbc_driver_postgresql.dbapi.connect(dsn)) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(SQL["begin_copy"])
            cursor.execute(SQL["session_settings"])
            cursor.fetchall()
            yield cursor
            connection.rollback()
    except adbc_driver_manager.Error as error:
        raise CopyFailed(str(error).splitlines()[0]) from error


def _by_organization(batch: pa.RecordBatch, column: str) -> Iterator[tuple[str | None, pa.RecordBatch]]:
    """Cuts a batch that is sorted by organization where the organization changes."""
    # The stubs lack it.
    runs = pc.run_end_encode(batch.column(column))  # type: ignore[attr-defined]
    begin = 0
    for end, organization in zip(runs.run_ends.to_pylist(), runs.values.to_pylist(), strict=True):
        yield organization, batch.slice(begin, end - begin)
        begin = end


def _as_stored(
    batch: pa.RecordBatch, columns: tuple[Column, ...] | tuple[TableColumn, ...], schema: pa.Schema
) -> pa.RecordBatch:
    """Returns a batch with the stored types: decimals come as text, and everything else as it will be."""
    arrays = [batch.column(number).cast(column.arrow_type) for number, column in enumerate(columns)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
