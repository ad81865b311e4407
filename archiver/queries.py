"""Queries: one SELECT over hot and cold rows, planned and carried out by DataFusion, streamed as Arrow.

A query sees a context of its own, in which each policy it names is a table made of the caller's rows alone: cold files
hold one organization each, and hot rows are fetched with the organization in the WHERE of the statement. There is no
other table, file or function to reach, so there is no row to hide. What it may read is settled before anything is read.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import asyncpg
import pyarrow as pa
import structlog
from datafusion import DataFrame, RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions, col, lit

from archiver import metrics
from archiver.cold import ColdReader
from archiver.columns import Column, schema_of
from archiver.copies import CopyFailed, copy_rows
from archiver.errors import ArchiveCorrupt, PolicyNotFound, QueryInvalid, QueryTooCostly
from archiver.policies import Policies
from archiver.scans import Range, Scan, scan
from archiver.sources import Sources
from archiver.store import Store
from archiver.threads import Threads
from services.errors import DatabaseUnavailable
from services.objects import ObjectStoreUnavailable

_log = structlog.get_logger("queries")

_ONLY_SELECT = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
# What a SELECT may have as its outermost node is everything but these, which describe plans and schemas.
_NOT_A_SELECT = ("Explain", "Analyze", "DescribeTable")
# They tell where files lie.
_HIDDEN_FUNCTIONS = ("input_file_name", "file_row_index")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNKNOWN_TABLE = re.compile(r"table '(?:datafusion\.public\.)?([^']*)' not found")
_TABLE_SCAN = re.compile(r"^\s*TableScan: (\w+)(?: projection=\[([^\]]*)\])?", re.MULTILINE)
_LONGEST_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class Question:
    """A query.

    Attributes:
        sql: One SELECT.
        days: Only rows of these days.
        max_scan_bytes: The most to read.
        max_rows: The most to answer.
    """

    sql: str
    days: Range
    max_scan_bytes: int
    max_rows: int


@dataclass(slots=True)
class Statistics:
    """What a query read; complete when its stream has ended."""

    rows: int = 0
    cold_files: int = 0
    cold_files_pruned: int = 0
    hot_partitions: int = 0
    scanned_bytes: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class _Needed:
    """A table of a query and the columns it needs; None when that is not known, for all."""

    scan: Scan
    columns: set[str] | None


class Answer:
    """The answer of a query: its schema, its batches, and at the end what was read."""

    def __init__(self, frame: DataFrame, max_rows: int, statistics: Statistics) -> None:
        self._frame = frame
        self._max_rows = max_rows
        # What the plan promises and what its batches say differ in nullability where a part was computed beforehand.
        self.schema: pa.Schema = pa.schema([field.with_nullable(True) for field in frame.schema()])
        self.statistics = statistics

    async def batches(self) -> AsyncIterator[pa.RecordBatch]:
        """Yields the rows, at most `max_rows`.

        Raises:
            QueryInvalid: a value cannot be computed, such as a division by zero.
            QueryTooCostly: it needs more memory than it may have.
            ArchiveCorrupt, ObjectStoreUnavailable: a file cannot be read.
        """
        left = self._max_rows
        try:
            stream = await asyncio.to_thread(self._frame.execute_stream)
            async for piece in stream:
                batch = pa.RecordBatch.from_arrays(piece.to_pyarrow().columns, schema=self.schema)
                if batch.num_rows > left:
                    batch, self.statistics.truncated = batch.slice(0, left), True
                left -= batch.num_rows
                self.statistics.rows += batch.num_rows
                if batch.num_rows:
                    yield batch
                if self.statistics.truncated:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            raise _refusal(error) from error


class QueryEngine:
    """Carries out queries.

    Args:
        store: The catalogue.
        policies: What may be queried.
        sources: Where hot rows are.
        cold: Where cold rows are.
        threads: For what blocks.
        memory_bytes: What one query may hold in memory.
    """

    def __init__(
        self, store: Store, policies: Policies, sources: Sources, cold: ColdReader, threads: Threads, memory_bytes: int
    ) -> None:
        self._store = store
        self._policies = policies
        self._sources = sources
        self._cold = cold
        self._threads = threads
        self._memory_bytes = memory_bytes

    async def ask(self, question: Question, organization_id: UUID, stack: AsyncExitStack) -> Answer:
        """Plans a query, fetches its hot rows and returns its answer, ready to be streamed.

        Args:
            question: The query.
            organization_id: Whose rows it sees.
            stack: Keeps what the answer needs until it has been read.

        Raises:
            PolicyNotFound, QueryInvalid, QueryTooCostly, ArchiveCorrupt: the query is refused; nothing was read.
            DatabaseUnavailable, ObjectStoreUnavailable: a part does not answer.
        """
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muster-query-")))
        async with AsyncExitStack() as locks:
            scans, connections = await self._scan(question, organization_id, locks)
            needed = await self._threads.run(self._plan, question.sql, scans)
            statistics = _statistics(needed, question.max_scan_bytes)
            for one in needed:
                await self._cold.check(one.scan.files)
            hot = {}
            for one in needed:
                if one.scan.hot_partitions:
                    connection = connections[one.scan.policy.name]
                    hot[one.scan.policy.name] = await self._fetch(one, connection, organization_id, question, folder)
        context = self._context()
        self._cold.register(context)
        try:
            for one in needed:
                await self._threads.run(self._register, context, one, hot.get(one.scan.policy.name), question.days)
            # One more than may be answered tells whether there are more.
            frame = await self._threads.run(
                lambda: context.sql_with_options(question.sql, _ONLY_SELECT).limit(question.max_rows + 1)
            )
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            raise _refusal(error) from error
        metrics.QUERY_BYTES.labels("cold").inc(sum(file.size_bytes for one in needed for file in one.scan.files))
        metrics.QUERY_BYTES.labels("hot").inc(sum(one.scan.hot_bytes for one in needed))
        return Answer(frame, question.max_rows, statistics)

    async def _scan(
        self, question: Question, organization_id: UUID, locks: AsyncExitStack
    ) -> tuple[list[Scan], dict[str, Any]]:
        """Looks at every table whose name occurs in the SQL; whether it is meant is for the planner to say."""
        words = {word.lower() for word in _WORD.findall(question.sql)}
        scans = []
        connections = {}
        for policy in await self._policies.all():
            if policy.name in words:
                connection = await locks.enter_async_context(self._sources.session(policy.source))
                await locks.enter_async_context(connection.transaction())
                scans.append(await scan(self._store, connection, policy, organization_id, question.days))
                connections[policy.name] = connection
        return scans, connections

    def _plan(self, sql: str, scans: list[Scan]) -> list[_Needed]:
        """Plans the query over empty tables and returns which it reads. Raises: QueryInvalid, PolicyNotFound."""
        context = self._context()
        for one in scans:
            empty = schema_of(one.columns).empty_table()
            context.from_arrow(empty, name=one.policy.name)
        try:
            frame = context.sql_with_options(sql, _ONLY_SELECT)
            outermost = type(frame.logical_plan().to_variant()).__name__
            plan = frame.optimized_logical_plan().display_indent()
        except BaseException as error:
            raise _refusal(error) from error
        if outermost in _NOT_A_SELECT:
            raise QueryInvalid("only a SELECT can be queried")
        found: dict[str, set[str] | None] = {}
        for match in _TABLE_SCAN.finditer(plan):
            name, projection = match.groups()
            known = found.setdefault(name, set())
            found[name] = None if known is None or projection is None else known | _names(projection)
        return [_Needed(one, _certain(one, found[one.policy.name])) for one in scans if one.policy.name in found]

    async def _fetch(
        self, needed: _Needed, connection: Any, organization_id: UUID, question: Question, folder: Path
    ) -> Path:
        """Fetches the hot rows of one table into a file, which is given up with the query."""
        columns = needed.scan.hot_columns(needed.columns)
        statement = await needed.scan.hot_statement(connection, columns, organization_id, question.days)
        file = folder / f"{needed.scan.policy.name}.parquet"
        dsn = self._sources.dsn(needed.scan.policy.source)
        try:
            await self._threads.run(copy_rows, dsn, statement, columns, file, Event())
        except CopyFailed as error:
            raise DatabaseUnavailable(f"hot rows cannot be read: {error}", retry_after_seconds=1.0) from error
        return file

    def _register(self, context: SessionContext, needed: _Needed, hot: Path | None, days: Range) -> None:
        """Makes the table of a policy: the union of its files, cut to the days."""
        one = needed.scan
        schema = schema_of(one.columns)
        frames = []
        for file in one.files:
            frame = context.read_parquet(self._cold.url(file.key), schema=schema)
            if not days.contains(file.from_date, file.to_date):
                frame = _cut(frame, one, days)
            frames.append(frame)
        if hot is not None:
            frames.append(context.read_parquet(hot, schema=schema))
        if not frames:
            context.from_arrow(schema.empty_table(), name=one.policy.name)
            return
        while len(frames) > 1:
            # As a tree: a chain of some thousand unions would be as deep as it is long.
            pairs = zip(frames[::2], frames[1::2], strict=False)
            frames = [a.union(b) for a, b in pairs] + ([frames[-1]] if len(frames) % 2 else [])
        context.register_view(one.policy.name, frames[0])

    def _context(self) -> SessionContext:
        config = SessionConfig(
            {
                # Plain strings: what readers of Arrow IPC have known for longest.
                "datafusion.execution.parquet.schema_force_view_types": "false",
                "datafusion.execution.target_partitions": "2",
                "datafusion.execution.time_zone": "UTC",
            }
        ).with_information_schema(False)
        context = SessionContext(config, RuntimeEnvBuilder().with_fair_spill_pool(self._memory_bytes))
        for name in _HIDDEN_FUNCTIONS:
            context.deregister_udf(name)
        return context


def _names(projection: str) -> set[str]:
    return {part.strip() for part in projection.split(",") if part.strip()}


def _certain(one: Scan, names: set[str] | None) -> set[str] | None:
    """Returns the names if they were read from the plan without doubt; None for all columns otherwise."""
    plain = all(_WORD.fullmatch(column.name) for column in one.columns)
    return names if plain and names is not None and names <= {column.name for column in one.columns} else None


def _statistics(needed: list[_Needed], max_scan_bytes: int) -> Statistics:
    """Adds up what will be read. Raises: QueryTooCostly."""
    total = sum(one.scan.bytes for one in needed)
    if total > max_scan_bytes:
        raise QueryTooCostly(
            f"the query would read {total} bytes, its limit is {max_scan_bytes}: name fewer days, or raise the limit",
            scan_bytes=str(total),
            max_scan_bytes=str(max_scan_bytes),
        )
    return Statistics(
        cold_files=sum(len(one.scan.files) for one in needed),
        cold_files_pruned=sum(one.scan.files_pruned for one in needed),
        hot_partitions=sum(one.scan.hot_partitions for one in needed),
        scanned_bytes=total,
    )


def _cut(frame: DataFrame, one: Scan, days: Range) -> DataFrame:
    column = next(column for column in one.columns if column.name == one.policy.partition_column)
    name = col('"' + column.name.replace('"', '""') + '"')
    if days.begin is not None:
        frame = frame.filter(name >= lit(_bound(column, days.begin)))
    if days.end is not None:
        frame = frame.filter(name < lit(_bound(column, days.end)))
    return frame


def _bound(column: Column, day: date) -> Any:
    if column.kind == "date":
        return pa.scalar(day, pa.date32())
    zone = UTC if column.kind == "instant" else None
    return pa.scalar(datetime.combine(day, time(), zone), column.arrow_type)


def _refusal(error: BaseException) -> Exception:
    """Returns what the caller is told of a failure of DataFusion, which tells failures apart by words only."""
    if isinstance(error, asyncpg.PostgresError | PolicyNotFound | QueryInvalid | QueryTooCostly):
        return error
    text = str(error).strip() or type(error).__name__
    if (unknown := _UNKNOWN_TABLE.search(text)) is not None:
        return PolicyNotFound(f"there is no policy {unknown[1]!r}", policy=unknown[1][:200])
    if "Resources exhausted" in text:
        return QueryTooCostly("the query needs more memory than it may have: aggregate or sort less at once")
    # The operator is told what the caller is not: where files lie.
    _log.warning("a query failed", message=text[:_LONGEST_MESSAGE])
    if "Object Store error" in text or "ObjectStore" in text:
        return ObjectStoreUnavailable("a cold file cannot be read from the object store", retry_after_seconds=2.0)
    if "Parquet error" in text:
        return ArchiveCorrupt("a cold file cannot be decoded")
    return QueryInvalid(text[:_LONGEST_MESSAGE])
