"""Slots in files: what a row says, and what becomes of one that is broken."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from muster import InvalidField, Pacing, PersonaNeed, SlotSpec
from muster.slot_files import Row, read_csv, read_jsonl

DAYS = "2026-01-01,2026-12-31"
BASE = "external_id,keyword,start_date,end_date,daily_quota"
GOOD = f"k,{DAYS},4"


def csv_rows(*lines: str | bytes) -> list[Row]:
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    return list(read_csv(io.BytesIO(data)))


def json_rows(*lines: str | bytes) -> list[Row]:
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    return list(read_jsonl(io.BytesIO(data)))


def spec(row: Row) -> SlotSpec:
    assert isinstance(row.spec, SlotSpec), row
    return row.spec


def faults(row: Row) -> dict[str, str]:
    assert isinstance(row.spec, InvalidField), row
    return {violation.field: violation.rule for violation in row.spec.violations}


FULL = SlotSpec(
    keyword="노트북",
    start_date=date(2026, 1, 1),
    end_date=date(2026, 12, 31),
    daily_quota=100,
    code="12345",
    target="shop",
    settings={"on": True, "pages": 4, "pace": 0.5, "locale": "ko", "code": "007"},
    is_active=False,
    priority=-5,
    weight=3,
    without_exit=True,
    persona=PersonaNeed(("a", "b"), "kr", 2, 60),
    external_id="s-1",
    pacing=Pacing.EVEN,
    exit_region="kr",
    exit_provider="vpn",
)


def test_a_row_of_csv_has_every_field_of_a_slot() -> None:
    header = (
        f"{BASE},code,target,is_active,priority,weight,pacing,without_exit,exit_region,exit_provider,"
        "persona.tags,persona.region,persona.min_aging_level,persona.cool_down_seconds,"
        "setting.on,setting.pages,setting.pace,setting.locale,setting.code:text"
    )
    (row,) = csv_rows(header, f"s-1,노트북,{DAYS},100,12345,shop,no,-5,3,even,yes,kr,vpn,a b,kr,2,60,true,4,0.5,ko,007")
    assert (row.number, row.external_id, row.spec) == (2, "s-1", FULL)


def test_a_line_of_json_has_every_field_of_a_slot() -> None:
    fields = {
        "external_id": "s-1",
        "keyword": "노트북",
        "start_date": "2026-01-01",
        "end_date": "2026-12-31",
        "daily_quota": 100,
        "code": "12345",
        "target": "shop",
        "settings": {"on": True, "pages": 4, "pace": 0.5, "locale": "ko", "code": "007"},
        "is_active": False,
        "priority": -5,
        "weight": 3,
        "without_exit": True,
        "persona": {"tags": ["a", "b"], "region": "kr", "min_aging_level": 2, "cool_down_seconds": 60},
        "pacing": "even",
        "exit_region": "kr",
        "exit_provider": "vpn",
    }
    (row,) = json_rows(json.dumps(fields))
    assert (row.number, row.external_id, row.spec) == (1, "s-1", FULL)


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("setting.x", "true", True),
        ("setting.x", "4", 4),
        ("setting.x", "-0.5", -0.5),
        ("setting.x", "1e3", 1000.0),
        ("setting.x", "007", "007"),
        ("setting.x", "True", "True"),
        ("setting.x", "null", "null"),
        ("setting.x", "[1]", "[1]"),
        ("setting.x", "NaN", "NaN"),
        ("setting.x", '"""4"""', "4"),
        ("setting.x", "a text", "a text"),
        ("setting.x:text", "4", "4"),
        ("setting.x:text", "true", "true"),
        ("setting.x:int", "4", 4),
        ("setting.x:double", "4", 4.0),
        ("setting.x:bool", "yes", True),
        ("setting.a:b", "4", 4),
    ],
)
def test_a_setting_of_csv_has_the_type_that_its_cell_or_column_says(column: str, cell: str, value: Any) -> None:
    (row,) = csv_rows(f"{BASE},{column}", f"a,{GOOD},{cell}")
    (found,) = spec(row).settings.values()
    assert (found, type(found)) == (value, type(value))


def test_an_empty_cell_says_nothing() -> None:
    (row,) = csv_rows(f"{BASE},priority,weight,persona,setting.x,setting.y:int,code", f"a,{GOOD},,,,,,")
    assert spec(row) == SlotSpec("k", date(2026, 1, 1), date(2026, 12, 31), 4, external_id="a")
    truths = csv_rows(f"{BASE},persona", f"a,{GOOD},true", f"b,{GOOD},no")
    assert [spec(row).persona for row in truths] == [PersonaNeed(), None]


@pytest.mark.parametrize(
    ("header", "line", "field", "said"),
    [
        (BASE, f",{GOOD}", "external_id", "required"),
        (BASE, f"a,,{DAYS},4", "keyword", "required"),
        (BASE, "a,k,tomorrow,2026-12-31,4", "start_date", "must be a date"),
        (BASE, f"a,k,{DAYS},-1", "daily_quota", "must not be below 0"),
        (BASE, f"a,k,{DAYS},4.0", "daily_quota", "whole number"),
        (BASE, f"a,k,{DAYS},{2**31}", "daily_quota", "31 bits"),
        (BASE, f"a,k,{DAYS}", "row", "has 4 columns, and the first line 5"),
        (BASE, f"a,{GOOD},more", "row", "has 6 columns"),
        (BASE, b"a,\xff\xfe,2026-01-01,2026-12-31,4", "keyword", "is not UTF-8"),
        (BASE, f'a,"k"x,{DAYS},4', "row", "expected after"),
        (f"{BASE},pacing", f"a,{GOOD},slow", "pacing", "asap or even"),
        (f"{BASE},is_active", f"a,{GOOD},maybe", "is_active", "true or false"),
        (f"{BASE},setting.x:int", f"a,{GOOD},four", "setting.x:int", "whole number"),
        (f"{BASE},setting.x:int", f"a,{GOOD},{2**63}", "setting.x:int", "63 bits"),
        (f"{BASE},setting.x", f"a,{GOOD},{2**63}", "setting.x", "64 bits"),
        (f"{BASE},setting.x", f"a,{GOOD},1e999", "setting.x", "finite"),
        (f"{BASE},setting.x:double", f"a,{GOOD},inf", "setting.x:double", "finite"),
        (f"{BASE},setting.x:bool", f"a,{GOOD},2", "setting.x:bool", "true or false"),
        (f"{BASE},setting.x", f'a,{GOOD},"""\\ud800"""', "setting.x", "surrogate"),
        (f"{BASE},persona,persona.tags", f"a,{GOOD},false,t", "persona", "criteria"),
        (f"{BASE},persona.min_aging_level", f"a,{GOOD},old", "persona.min_aging_level", "whole number"),
        (BASE, f"a,{'x' * 140_000},{DAYS},4", "row", "field larger"),
        (BASE, f"a,{'x' * 300_000},{DAYS},4", "row", "longer than 262144 bytes"),
    ],
)
def test_a_broken_row_of_csv_names_its_field_and_stops_no_other(
    header: str, line: str | bytes, field: str, said: str
) -> None:
    rest = "," * header.removeprefix(BASE).count(",")
    before, broken, after = csv_rows(header, f"x,{GOOD}{rest}", line, f"y,{GOOD}{rest}")
    assert said in faults(broken)[field]
    assert broken.number == 3
    assert (before.number, spec(before).external_id) == (2, "x")
    assert (after.number, spec(after).external_id) == (4, "y")


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ("{", "row", "is not JSON"),
        ("[]", "row", "must be a JSON object"),
        (b'{"keyword": "\xff"}', "row", "is not UTF-8"),
        ('{"keyword": "\\ud800"}', "keyword", "surrogate"),
        ('{"colour": 1}', "colour", "is no field"),
        ('{"keyword": 1}', "keyword", "must be a text"),
        ('{"daily_quota": "4"}', "daily_quota", "whole number"),
        ('{"daily_quota": true}', "daily_quota", "whole number"),
        ('{"is_active": "true"}', "is_active", "true or false"),
        ('{"settings": [1]}', "settings", "must be an object"),
        ('{"settings": {"x": [1]}}', "settings", "truth value, a number or a text"),
        ('{"settings": {"x": 1e999}}', "settings", "finite"),
        ('{"settings": {"x": NaN}}', "row", "NaN"),
        ('{"persona": {"colour": 1}}', "persona", "an object of tags"),
        ('{"persona": {"tags": "a"}}', "persona", "tags: must be a list"),
        ('{"pacing": "slow"}', "pacing", "asap or even"),
        ("[" * 100_000, "row", "is not JSON"),
        ('{"keyword": "' + "x" * 300_000 + '"}', "row", "longer than 262144 bytes"),
        ("{}", "external_id", "required"),
    ],
)
def test_a_broken_line_of_json_names_its_field_and_stops_no_other(line: str | bytes, field: str, said: str) -> None:
    good = {"external_id": "x", "keyword": "k", "start_date": "2026-01-01", "end_date": "2026-12-31", "daily_quota": 4}
    before, broken, after = json_rows(json.dumps(good), line, "", json.dumps({**good, "external_id": "y"}))
    assert said in faults(broken)[field]
    assert (before.number, broken.number, after.number) == (1, 2, 4)
    assert (spec(before).external_id, spec(after).external_id) == ("x", "y")


def test_a_quotation_that_never_closes_swallows_no_row_after_it() -> None:
    rows = csv_rows(BASE, f"a,{GOOD}", f'b,"k,{DAYS},4', *(f"c{number},{GOOD}" for number in range(20)))
    assert [row.number for row in rows] == list(range(2, 24))
    assert "unexpected end" in faults(rows[1])["row"]
    assert all(isinstance(row.spec, SlotSpec) for row in rows if row.number != 3)
    # One that another quotation ends is found out there.
    rows = csv_rows(BASE, f'b,"k,{DAYS},4', f'c,"k",{DAYS},4', f"d,{GOOD}")
    assert [(row.number, isinstance(row.spec, SlotSpec)) for row in rows] == [(2, False), (3, True), (4, True)]


def test_a_row_of_several_lines_is_named_by_its_first() -> None:
    first, second = csv_rows(BASE, f'a,"k\nl",{DAYS},4', f"b,{GOOD}")
    assert (first.number, spec(first).keyword) == (2, "k\nl")
    assert second.number == 4


def test_an_external_id_stands_once_in_a_file() -> None:
    rows = csv_rows(BASE, f"a,{GOOD}", f"b,k,{DAYS},none", f"a,{GOOD}", f"b,{GOOD}", f"b,{GOOD}")
    assert faults(rows[2]) == {"external_id": "stands in row 2 already"}
    # A row that was refused does not keep its id from the one that mends it.
    assert isinstance(rows[3].spec, SlotSpec)
    assert faults(rows[4]) == {"external_id": "stands in row 5 already"}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("keyword,colour", "unknown columns colour; missing columns external_id, start_date, end_date, daily_quota"),
        (f"{BASE},keyword", "repeated columns keyword"),
        (f"{BASE},setting.x,setting.x:int", "repeated columns setting.x"),
        (f"{BASE},setting.", "unknown columns setting."),
        ("", "missing columns"),
        ('"', "no line of CSV"),
        ("x" * 300_000, "longer than 262144 bytes"),
    ],
)
def test_a_first_line_that_is_not_usable_is_refused_as_a_whole(header: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_csv(io.BytesIO(header.encode() + b"\n"))


class _Endless(io.RawIOBase):
    """A file of a million rows that stand nowhere."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines

    def readline(self, size: int | None = -1) -> bytes:
        return next(self._lines, b"")


def test_a_file_is_read_row_by_row() -> None:
    # A whole file of them would take more than 20 MB as rows.
    count = 20_000
    lines = (f"x{number},{GOOD},{'y' * 200}\n".encode() for number in range(count))
    header = iter([f"{BASE},setting.x\n".encode()])

    def all_lines() -> Iterator[bytes]:
        yield from header
        yield from lines

    tracemalloc.start()
    try:
        found = sum(isinstance(row.spec, SlotSpec) for row in read_csv(_Endless(all_lines())))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == count
    # The ids that were seen, and no rows.
    assert peak < 200 * count


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_whatever_the_bytes_are_every_row_is_answered_and_nothing_breaks(lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n" + f"last,{GOOD}\n".encode()
    rows = list(read_csv(io.BytesIO(BASE.encode() + b"\n" + data)))
    assert [row.number for row in rows] == sorted({row.number for row in rows})
    for row in json_rows(data):
        assert isinstance(row.spec, SlotSpec | InvalidField)
