"""Slots in files: CSV, and JSON in lines. Read row by row, however long the file is."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from muster.errors import FieldViolation, InvalidField
from muster.slot_cells import BROKEN, CSV_READERS, JSON_READERS, SETTING, SETTING_READERS, no_number
from muster.slot_specs import PersonaNeed, SlotSpec

# Well above the longest slot: 16 KiB of settings, all of them escaped. Longer ones are not even kept in memory.
_LINE_BYTES = 256 * 2**10
_REQUIRED = ("external_id", "keyword", "start_date", "end_date", "daily_quota")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number, its external id as far as it can be read, and its slot or what is wrong with it."""

    number: int
    external_id: str
    spec: SlotSpec | InvalidField


def refusal(field: str, rule: str) -> InvalidField:
    """Returns what a row is answered with that cannot be sent."""
    return _refusals([FieldViolation(field, rule)])


def read_csv(file: BinaryIO) -> Iterator[Row]:
    """Yields the rows of a CSV file, by the rules of `Slots.import_csv`; the number of a row is the line it begins on.

    Raises:
        ValueError: the first line is not usable.
    """
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
    except (csv.Error, _LineTooLong) as error:
        raise ValueError(f"the first line is no line of CSV: {error}") from None
    readers = _columns(header)
    return _distinct(_csv_rows(reader, lines, header, readers))


def read_jsonl(file: BinaryIO) -> Iterator[Row]:
    """Yields the rows of a file with a JSON object in each line, by the rules of `Slots.import_jsonl`."""
    return _distinct(_jsonl_rows(_Lines(file)))


class _LineTooLong(Exception):
    def __init__(self) -> None:
        super().__init__(f"the line is longer than {_LINE_BYTES} bytes")


class _Lines:
    """The lines of a file as text; what is not UTF-8 comes as surrogates, for the row that holds it to be refused.

    Lines that a broken row has swallowed, looking for the end of a quotation, can be given back.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._again: deque[tuple[int, str]] = deque()
        self._row: list[tuple[int, str]] = []
        self._read = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = self._again.popleft() if self._again else self._next()
        self._row.append((number, line))
        return line

    def begin(self) -> None:
        """Says that the next line begins a row."""
        self._row.clear()

    @property
    def number(self) -> int:
        """The line on which the row in hand began."""
        return self._row[0][0] if self._row else self._read

    def give_back(self) -> None:
        """Reads the lines after the first of the row in hand again."""
        self._again.extendleft(reversed(self._row[1:]))

    def _next(self) -> tuple[int, str]:
        line = self._file.readline(_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self._read += 1
        if len(line) > _LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._file.readline(_LINE_BYTES)
            raise _LineTooLong
        if self._read == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        return self._read, line.decode(errors="surrogateescape")


def _csv_rows(
    reader: Iterator[list[str]], lines: _Lines, header: list[str], readers: dict[str, Callable[[str], Any]]
) -> Iterator[Row]:
    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _LineTooLong) as error:
            yield Row(lines.number, "", refusal("row", str(error)))
            lines.give_back()
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            rule = f"has {len(cells)} columns, and the first line {len(header)}"
            yield Row(lines.number, "", refusal("row", rule))
            continue
        values: dict[str, Any] = {}
        wrong = []
        for name, cell in zip(header, cells, strict=True):
            try:
                if BROKEN.search(cell):
                    raise ValueError("is not UTF-8")
                if cell.strip():
                    values[name] = readers[name](cell)
            except ValueError as error:
                wrong.append(FieldViolation(name, str(error)))
        if values.get("persona", True) is None and any(name.startswith("persona.") for name in values):
            wrong.append(FieldViolation("persona", "is false, and criteria are given all the same"))
        yield _row(lines.number, _folded(values), wrong)


def _jsonl_rows(lines: _Lines) -> Iterator[Row]:
    while True:
        lines.begin()
        try:
            line = next(lines)
        except StopIteration:
            return
        except _LineTooLong as error:
            yield Row(lines.number, "", refusal("row", str(error)))
            continue
        if not line.strip():
            continue
        if BROKEN.search(line):
            yield Row(lines.number, "", refusal("row", "is not UTF-8"))
            continue
        try:
            given = json.loads(line, parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            yield Row(lines.number, "", refusal("row", f"is not JSON: {error}"))
            continue
        if not isinstance(given, dict):
            yield Row(lines.number, "", refusal("row", "must be a JSON object"))
            continue
        values: dict[str, Any] = {}
        wrong = []
        for name, value in given.items():
            try:
                if name not in JSON_READERS:
                    raise ValueError("is no field of a slot")
                if value is not None:
                    values[name] = JSON_READERS[name](value)
            except ValueError as error:
                wrong.append(FieldViolation(name, str(error)))
        yield _row(lines.number, values, wrong)


def _row(number: int, values: dict[str, Any], wrong: list[FieldViolation]) -> Row:
    named = {violation.field for violation in wrong}
    wrong += [FieldViolation(name, "required") for name in _REQUIRED if name not in values and name not in named]
    external_id = values.get("external_id", "")
    return Row(number, external_id, _refusals(wrong) if wrong else SlotSpec(**values))


def _distinct(rows: Iterator[Row]) -> Iterator[Row]:
    seen: dict[str, int] = {}
    for row in rows:
        if isinstance(row.spec, SlotSpec) and (first := seen.setdefault(row.external_id, row.number)) != row.number:
            yield Row(row.number, row.external_id, refusal("external_id", f"stands in row {first} already"))
        else:
            yield row


def _columns(header: list[str]) -> dict[str, Callable[[str], Any]]:
    """Returns what reads the cells of each column. Raises: ValueError."""
    readers: dict[str, Callable[[str], Any]] = {}
    unknown, twice = [], []
    for name in header:
        setting = SETTING.match(name)
        if name in readers:
            twice.append(name)
        elif setting:
            readers[name] = SETTING_READERS[setting["type"]]
        elif name in CSV_READERS:
            readers[name] = CSV_READERS[name]
        else:
            unknown.append(name)
    names = [SETTING.sub(r"setting.\g<name>", name) for name in readers]
    twice += sorted({name for name in names if names.count(name) > 1})
    missing = [name for name in _REQUIRED if name not in readers]
    faults = [
        f"{said} {', '.join(found)}"[:500]
        for said, found in (("unknown columns", unknown), ("repeated columns", twice), ("missing columns", missing))
        if found
    ]
    if faults:
        plain = "; ".join(faults).encode(errors="replace").decode()
        raise ValueError(f"{plain}; known are {', '.join(CSV_READERS)} and setting.<name>")
    return readers


def _folded(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a slot: columns of settings and of its persona become one field each."""
    folded: dict[str, Any] = {}
    settings, criteria = {}, {}
    for name, value in values.items():
        if setting := SETTING.match(name):
            settings[setting["name"]] = value
        elif name.startswith("persona."):
            criteria[name.removeprefix("persona.")] = value
        else:
            folded[name] = value
    if settings:
        folded["settings"] = settings
    if criteria:
        folded["persona"] = PersonaNeed(**criteria)
    return folded


def _refusals(violations: list[FieldViolation]) -> InvalidField:
    message = "; ".join(f"{violation.field}: {violation.rule}" for violation in violations)
    return InvalidField("INVALID_ARGUMENT", "INVALID_FIELD", message, violations=violations)
