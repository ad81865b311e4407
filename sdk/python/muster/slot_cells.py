"""What stands in a cell of CSV or a value of JSON, read as a field of a slot. Every reader raises ValueError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import date
from typing import Any

from muster.slot_specs import Pacing, PersonaNeed
from muster.values import Setting

# Lone halves of surrogate pairs: from bytes that are no UTF-8, or from an escape in JSON.
BROKEN = re.compile("[\ud800-\udfff]")
SETTING = re.compile(r"setting\.(?P<name>.+?)(?::(?P<type>bool|int|double|text))?\Z", re.DOTALL)
"""A column of a setting, by its name and its type if it has one."""

_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PACINGS = {"asap": Pacing.ASAP, "even": Pacing.EVEN}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    if BROKEN.search(value):
        raise ValueError("is not Unicode: half of a surrogate pair")
    return value


def _day(value: Any) -> date:
    try:
        return date.fromisoformat(_text(value).strip())
    except ValueError:
        raise ValueError(f"must be a date YYYY-MM-DD, is {str(value)[:50]!r}") from None


def _number(value: str) -> int:
    try:
        return _int32(int(value))
    except ValueError:
        raise ValueError(f"must be a whole number of at most 31 bits, is {value[:50]!r}") from None


def _int32(value: Any) -> int:
    # What does not fit the message cannot even be refused by the service, which knows the real limits.
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise ValueError(f"must be a whole number of at most 31 bits, is {str(value)[:50]}")
    return value


def _count(value: Any) -> int:
    number = _int32(value)
    if number < 0:
        raise ValueError(f"must not be below 0, is {number}")
    return number


def _counted(cell: str) -> int:
    return _count(_number(cell))


def _truth(value: str) -> bool:
    try:
        return _TRUTHS[value.strip().lower()]
    except KeyError:
        raise ValueError(f"must be true or false, is {value[:50]!r}") from None


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _pacing(value: Any) -> Pacing:
    try:
        return _PACINGS[_text(value).strip().lower()]
    except KeyError:
        raise ValueError(f"must be asap or even, is {value[:50]!r}") from None


def _any_setting(cell: str) -> Setting:
    try:
        value = json.loads(cell, parse_constant=no_number)
    except (ValueError, RecursionError):
        return cell
    return _setting(value) if isinstance(value, bool | int | float | str) else cell


def _double(cell: str) -> float:
    try:
        return float(_setting(float(cell)))
    except ValueError:
        raise ValueError(f"must be a finite number, is {cell[:50]!r}") from None


def _whole(cell: str) -> int:
    try:
        return int(_setting(int(cell)))
    except ValueError:
        raise ValueError(f"must be a whole number of at most 63 bits, is {cell[:50]!r}") from None


def _setting(value: Any) -> Setting:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("must be a truth value, a number or a text")
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("must fit into 64 bits")
    return value


def _settings(value: Any) -> dict[str, Setting]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    try:
        return {_text(name): _setting(setting) for name, setting in value.items()}
    except ValueError as error:
        raise ValueError(f"each value {error}") from None


def _need(value: Any) -> PersonaNeed | None:
    if isinstance(value, bool):
        return PersonaNeed() if value else None
    readers: dict[str, Callable[[Any], Any]] = {
        "tags": _tags,
        "region": _text,
        "min_aging_level": _count,
        "cool_down_seconds": _count,
    }
    if not isinstance(value, dict) or not value.keys() <= readers.keys():
        raise ValueError(f"must be true, false, or an object of {', '.join(readers)}")
    criteria = {}
    for name, criterion in value.items():
        try:
            criteria[name] = readers[name](criterion)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return PersonaNeed(**criteria)


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("must be a list of texts")
    return tuple(_text(tag) for tag in value)


def no_number(name: str) -> float:
    """Refuses NaN and Infinity, which are no JSON although Python reads them. Raises: ValueError."""
    raise ValueError(f"{name} is no number of JSON")


_TEXTS = ("external_id", "keyword", "code", "target", "exit_region", "exit_provider")
CSV_READERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_TEXTS, _text),
    "start_date": _day,
    "end_date": _day,
    "daily_quota": _counted,
    "is_active": _truth,
    "priority": _number,
    "weight": _counted,
    "pacing": _pacing,
    "without_exit": _truth,
    "persona": lambda cell: _need(_truth(cell)),
    "persona.tags": lambda cell: tuple(cell.split()),
    "persona.region": _text,
    "persona.min_aging_level": _counted,
    "persona.cool_down_seconds": _counted,
}
JSON_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_TEXTS, _text),
    "start_date": _day,
    "end_date": _day,
    "daily_quota": _count,
    "settings": _settings,
    "is_active": _boolean,
    "priority": _int32,
    "weight": _count,
    "pacing": _pacing,
    "without_exit": _boolean,
    "persona": _need,
}
SETTING_READERS: dict[str | None, Callable[[str], Setting]] = {
    None: _any_setting,
    "bool": _truth,
    "int": _whole,
    "double": _double,
    "text": _text,
}
