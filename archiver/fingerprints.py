"""Fingerprints: what two copies of the same rows have in common, whatever order the rows stand in.

A fingerprint holds the number of rows and five figures for each column, computed twice and independently: by PostgreSQL
in SQL over the partition, and here over the Parquet file as it was read back from the object store. With `h` a value
hashed to 64 bits (numbers, dates and moments by their value, floats by their bits, everything else by the first half of
its MD5) they are:

- present: how many values are not null;
- total: the sum of all h, modulo 2^64, which no single lost, doubled or changed value leaves as it is;
- tie: the sum of (fold(h) + 1) * (t mod 2^31), modulo 2^64, with t the row's tie column hashed alike and fold(h) the
  exclusive or of the bits 0-30, 31-61 and 62-63 of h. It notices values that changed rows, and changes that cancel each
  other out in the total. Without the fold it would not for floats such as 1.0 and 2.0, whose low bits are all zero, nor
  without the 1 for zero and null;
- least and greatest: of texts in the order of their bytes, of everything else by h; at most 128 characters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import SessionConfig, SessionContext, col, functions

from archiver.columns import Column

_FIGURES = 5
_LOW = 0x7FFF_FFFF
_BATCH_ROWS = 8192
_EXTREME_CHARACTERS = 128
# Every other 64-bit word: the first half of each MD5.
_FIRST_HALVES = pa.array(range(0, 2 * _BATCH_ROWS, 2), pa.int32())
_FLAT_TYPES = {"bool": pa.uint8(), "date": pa.int32()}


@dataclass(frozen=True, slots=True)
class ColumnFigures:
    """What is known of a column's values; `least` and `greatest` are None when all are null."""

    present: int
    total: int
    tie: int
    least: str | None
    greatest: str | None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Rows, and the figures of each column by name."""

    rows: int
    figures: dict[str, ColumnFigures]

    def difference(self, other: Fingerprint) -> str:
        """Returns in words where two fingerprints differ first; empty when they are equal."""
        if self.rows != other.rows:
            return f"{self.rows} rows against {other.rows}"
        for name in sorted({*self.figures, *other.figures}):
            mine, theirs = self.figures.get(name), other.figures.get(name)
            if mine is None or theirs is None:
                return f"only one has the column {name}"
            for figure in ColumnFigures.__slots__:
                if getattr(mine, figure) != getattr(theirs, figure):
                    return f"column {name}: {figure} {getattr(mine, figure)!r} against {getattr(theirs, figure)!r}"
        return ""

    def to_json(self) -> str:
        """Returns the form the catalogue and the manifest keep."""
        figures = {
            name: [one.present, str(one.total), str(one.tie), one.least, one.greatest]
            for name, one in self.figures.items()
        }
        return json.dumps({"rows": self.rows, "columns": figures})

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Returns a fingerprint from the catalogue."""
        found = json.loads(text)
        return cls(
            found["rows"],
            {
                name: ColumnFigures(present, int(total), int(tie), least, greatest)
                for name, (present, total, tie, least, greatest) in found["columns"].items()
            },
        )


def of_sums(columns: tuple[Column, ...], rows: int, sums: list[str | None]) -> Fingerprint:
    """Returns the fingerprint that PostgreSQL computed: the five figures of each column, one after the other."""
    figures = {}
    for index, column in enumerate(columns):
        present, total, tie, least, greatest = sums[index * _FIGURES : (index + 1) * _FIGURES]
        figures[column.name] = ColumnFigures(
            int(present or 0), int(total or 0) % 2**64, int(tie or 0) % 2**64, least, greatest
        )
    return Fingerprint(rows, figures)


def of_file(file: Path, columns: tuple[Column, ...], tie_column: str) -> Fingerprint:
    """Returns the fingerprint of a Parquet file. Holds one batch of 8192 rows in memory; takes a core while it runs.

    Args:
        file: A local file.
        columns: Its columns.
        tie_column: The one that ties the values of a row together.

    Raises:
        Exception: of DataFusion, when the file is damaged.
    """
    config = SessionConfig(
        {
            "datafusion.execution.parquet.schema_force_view_types": "false",
            "datafusion.execution.batch_size": str(_BATCH_ROWS),
            "datafusion.execution.target_partitions": "1",
        }
    )
    # MD5 comes from DataFusion: Arrow has none, and Python's takes ten times as long and holds the interpreter's lock.
    wanted = []
    for number, column in enumerate(columns):
        value = col('"' + column.name.replace('"', '""') + '"')
        wanted.append(value.alias(f"v{number}"))
        if column.is_text or column.kind == "bytes":
            wanted.append(functions.digest(value, "md5").alias(f"d{number}"))
    frame = SessionContext(config).read_parquet(file).select(*wanted)
    tie_number = [column.name for column in columns].index(tie_column)
    sums = [_Sums(column.is_text) for column in columns]
    rows = 0
    for piece in frame.execute_stream():
        batch = piece.to_pyarrow()
        rows += batch.num_rows
        hashes = [_hashes(batch, number, column) for number, column in enumerate(columns)]
        tie = pc.bit_wise_and(pc.fill_null(hashes[tie_number], 0), pa.scalar(_LOW, pa.int64()))
        for number, one in enumerate(sums):
            one.add(hashes[number], batch.column(f"v{number}"), tie)
    return Fingerprint(rows, {column.name: one.figures() for column, one in zip(columns, sums, strict=True)})


class _Sums:
    """The figures of one column, batch by batch."""

    def __init__(self, by_text: bool) -> None:
        self._by_text = by_text
        self._present = self._total = self._tie = 0
        self._least: Any = None
        self._greatest: Any = None

    def add(self, hashes: Any, values: Any, tie: Any) -> None:
        self._present += len(hashes) - hashes.null_count
        self._total += pc.sum(hashes.view(pa.uint64())).as_py() or 0
        product = pc.multiply(pc.add(_folded(hashes), 1), tie)
        self._tie += pc.sum(product.view(pa.uint64())).as_py() or 0
        extremes: Any = pc.min_max(values if self._by_text else hashes).as_py()
        if extremes["min"] is not None:
            # UTF-8 sorts by its bytes as its characters do by their numbers, which is how Python compares.
            self._least = extremes["min"] if self._least is None else min(self._least, extremes["min"])
            self._greatest = extremes["max"] if self._greatest is None else max(self._greatest, extremes["max"])

    def figures(self) -> ColumnFigures:
        return ColumnFigures(
            self._present, self._total % 2**64, self._tie % 2**64, _shortened(self._least), _shortened(self._greatest)
        )


def _folded(hashes: Any) -> Any:
    folded = hashes
    for bits in (31, 62):
        folded = pc.bit_wise_xor(folded, pc.shift_right(hashes, pa.scalar(bits, pa.int64())))
    return pc.bit_wise_and(folded, pa.scalar(_LOW, pa.int64()))


def _shortened(extreme: object) -> str | None:
    return None if extreme is None else str(extreme)[:_EXTREME_CHARACTERS]


def _hashes(batch: pa.RecordBatch, number: int, column: Column) -> Any:
    """Returns the values of a column hashed to int64, null where they are null."""
    if column.is_text or column.kind == "bytes":
        return _first_half(batch.column(f"d{number}"))
    values = batch.column(f"v{number}")
    if column.kind in ("float32", "float64"):
        return values.cast(pa.float64()).view(pa.int64())
    if column.decimals is not None:
        unit = pa.scalar(10**column.decimals, pa.int64()).cast(pa.decimal128(19, 0))
        return pc.multiply(values, unit).cast(pa.int64())
    if column.kind in _FLAT_TYPES:
        values = values.cast(_FLAT_TYPES[column.kind])
    return values.cast(pa.int64())


def _first_half(digests: Any) -> Any:
    """Returns the first 8 of the 16 bytes of each digest as a big-endian number, which is how PostgreSQL reads it."""
    fixed = digests.cast(pa.binary(16))
    words = pa.Array.from_buffers(pa.uint64(), 2 * len(fixed), [None, fixed.buffers()[1]], offset=2 * fixed.offset)
    swapped = words.take(_FIRST_HALVES.slice(0, len(fixed)))
    for bits, mask in ((8, 0x00FF_00FF_00FF_00FF), (16, 0x0000_FFFF_0000_FFFF), (32, 0x0000_0000_FFFF_FFFF)):
        mask_scalar, shift = pa.scalar(mask, pa.uint64()), pa.scalar(bits, pa.uint64())
        left = pc.shift_left(pc.bit_wise_and(swapped, mask_scalar), shift)
        right = pc.bit_wise_and(pc.shift_right(swapped, shift), mask_scalar)
        swapped = pc.bit_wise_or(left, right)
    return pc.if_else(fixed.is_valid(), swapped.view(pa.int64()), pa.scalar(None, pa.int64()))
