"""The gRPC service of queries: checks the request, and cuts the answer's Arrow stream into messages."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pyarrow as pa
from muster.archiver.v1 import archive_pb2 as pb
from muster.archiver.v1 import archive_pb2_grpc

from archiver.queries import Answer, QueryEngine, Question
from archiver.scans import Range
from services.call import current
from services.status import Context
from services.validate import Checks

_MESSAGE_BYTES = 2**20
_DEFAULT_SCAN_BYTES = 2**30
_MOST_SCAN_BYTES = 2**40
_DEFAULT_ROWS = 10_000
_MOST_ROWS = 10_000_000
_LONGEST_SQL = 65_536


class QueryServicer(archive_pb2_grpc.QueryServiceServicer):
    """Answers queries.

    Args:
        engine: Carries them out.
    """

    def __init__(self, engine: QueryEngine) -> None:
        self._engine = engine

    async def Query(self, request: pb.QueryRequest, context: Context) -> AsyncIterator[pb.QueryResponse]:
        """Runs one SELECT and streams Arrow record batches."""
        checks = Checks()
        checks.text("sql", request.sql, min_length=1, max_length=_LONGEST_SQL)
        begin = checks.day("from_date", request.from_date, required=False)
        end = checks.day("to_date", request.to_date, required=False)
        if begin is not None and end is not None and begin >= end:
            checks.fail("to_date", "must be after from_date")
        scan_bytes = checks.number(
            "max_scan_bytes", request.max_scan_bytes or _DEFAULT_SCAN_BYTES, least=1, most=_MOST_SCAN_BYTES
        )
        rows = checks.number("max_rows", request.max_rows or _DEFAULT_ROWS, least=1, most=_MOST_ROWS)
        checks.done()
        question = Question(request.sql, Range(begin, end), scan_bytes, rows)
        async with AsyncExitStack() as stack:
            answer = await self._engine.ask(question, current().principal.organization_id, stack)
            async for piece in _arrow_stream(answer):
                yield pb.QueryResponse(arrow_ipc=piece)
            found = answer.statistics
            yield pb.QueryResponse(
                statistics=pb.QueryStatistics(
                    rows=found.rows,
                    cold_files=found.cold_files,
                    cold_files_pruned=found.cold_files_pruned,
                    hot_partitions=found.hot_partitions,
                    scanned_bytes=found.scanned_bytes,
                    truncated=found.truncated,
                )
            )


class _Pieces(io.RawIOBase):
    """Takes what Arrow writes and gives it out in pieces of at most `_MESSAGE_BYTES`."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._written += view
        return len(view)

    def taken(self) -> Iterator[bytes]:
        written, self._written = bytes(self._written), bytearray()
        for begin in range(0, len(written), _MESSAGE_BYTES):
            yield written[begin : begin + _MESSAGE_BYTES]


async def _arrow_stream(answer: Answer) -> AsyncIterator[bytes]:
    pieces = _Pieces()
    # Closed by its end-of-stream marker only when the answer is whole: a reader of a broken one notices.
    writer = pa.ipc.new_stream(pieces, answer.schema)
    async for batch in answer.batches():
        writer.write_batch(batch)
        for piece in pieces.taken():
            yield piece
    writer.close()
    for piece in pieces.taken():
        yield piece
