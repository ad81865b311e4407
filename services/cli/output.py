"""What the operators' commands print: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from enum import Enum
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

# A table that goes into a pipe or a file is not cut to the 80 columns that nobody looks at.
_PIPE_COLUMNS = 200


def console() -> Console:
    """Returns the console to print to; as wide as the terminal, or wide enough when there is none."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints rows as a table. Texts are printed as they are: what looks like markup is none."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    console().print(table)


def show_json(value: object) -> None:
    """Prints a value as one JSON document."""
    click.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def show_json_line(value: object) -> None:
    """Prints a value as one line of JSON, at once."""
    click.echo(json.dumps(value, default=_plain, ensure_ascii=False))
    sys.stdout.flush()


def cell(value: object) -> str:
    """Returns a value as a person reads it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, datetime):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(cell(item) for item in value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def parsed_day(_: click.Context, __: click.Parameter, value: str | None) -> date | None:
    """Reads a date option."""
    if not value:
        return None
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a date such as 2026-01-31") from None


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parsed_duration(_: click.Context, __: click.Parameter, value: str | None) -> timedelta | None:
    """Reads a duration option, such as 90s, 10m, 2h or 1d."""
    if not value:
        return None
    try:
        seconds = float(value[:-1]) * _UNITS[value[-1].lower()]
        if not math.isfinite(seconds) or not 0 <= seconds <= 366 * 86400:
            raise ValueError
    except (ValueError, KeyError):
        raise click.BadParameter(f"{value!r} is not a duration such as 90s, 10m, 2h or 1d") from None
    return timedelta(seconds=seconds)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict, which would copy an enum's number where a reader wants its name.
        return {item.name: _named(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Exception):
        return str(value)
    return str(value)


def _named(value: object) -> object:
    # An IntEnum is an int to the encoder, which would print its number.
    return value.name if isinstance(value, Enum) else value
