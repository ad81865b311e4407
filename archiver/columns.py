"""The columns of a table: what each is called, which kind it has in a file, and how PostgreSQL reads and hashes it.

A kind is stable: old files name theirs in the catalogue, so kinds may be added but never change their meaning.

| kind | PostgreSQL | Parquet |
|---|---|---|
| int16, int32, int64, float32, float64, bool | int2, int4, int8, float4, float8, bool | the same |
| date, instant, moment | date, timestamptz, timestamp | date32, timestamp[us, UTC], timestamp[us] |
| decimal(p,s) | numeric(p,s) with p <= 18 | decimal128(p, s) |
| bytes | bytea | binary |
| uuid, text | uuid, everything else in its text form; arrays as JSON | string |
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pyarrow as pa

_TYPES: dict[str, pa.DataType] = {
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "instant": pa.timestamp("us", tz="UTC"),
    "moment": pa.timestamp("us"),
    "bytes": pa.binary(),
    "uuid": pa.string(),
    "text": pa.string(),
}
_DECIMAL = re.compile(r"decimal\((\d+),(\d+)\)\Z")


@dataclass(frozen=True, slots=True)
class Column:
    """A column as a file has it."""

    name: str
    kind: str

    @property
    def arrow_type(self) -> pa.DataType:
        """Its type in Arrow and Parquet."""
        decimal = _DECIMAL.match(self.kind)
        return pa.decimal128(int(decimal[1]), int(decimal[2])) if decimal else _TYPES[self.kind]

    @property
    def decimals(self) -> int | None:
        """The digits after the point of a decimal; None for other kinds."""
        decimal = _DECIMAL.match(self.kind)
        return int(decimal[2]) if decimal else None

    @property
    def is_text(self) -> bool:
        """Whether a file has it as a string."""
        return self.kind in ("text", "uuid")


@dataclass(frozen=True, slots=True)
class TableColumn(Column):
    """A column of a table in PostgreSQL, with the expressions that read it and that hash it to a bigint."""

    type: str
    read_sql: str
    hash_sql: str


def schema_of(columns: tuple[Column, ...] | tuple[TableColumn, ...]) -> pa.Schema:
    """Returns the Arrow schema of columns; every field may be null, as older files lack newer columns."""
    return pa.schema([pa.field(column.name, column.arrow_type) for column in columns])


def merged(newest: tuple[Column, ...], older: list[tuple[Column, ...]]) -> tuple[Column, ...]:
    """Returns the columns of a table over all its files: those of `newest`, then those that only older files have."""
    found = {column.name: column for column in newest}
    for columns in older:
        for column in columns:
            found.setdefault(column.name, column)
    return tuple(found.values())


def to_json(columns: tuple[Column, ...] | tuple[TableColumn, ...]) -> str:
    """Returns columns as the catalogue keeps them."""
    return json.dumps([[column.name, column.kind] for column in columns])


def from_json(text: str) -> tuple[Column, ...]:
    """Returns columns from the catalogue."""
    return tuple(Column(name, kind) for name, kind in json.loads(text))
