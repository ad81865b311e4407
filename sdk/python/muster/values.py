"""Between the contract's messages and plain Python values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from muster.allocator.v1 import work_pb2

Setting = bool | int | float | str
"""One opaque setting of a slot or attribute of a product."""

Member = TypeVar("Member", bound=IntEnum)

_INT64 = 2**63
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+")


def member(enum: type[Member], number: int) -> Member:
    """Returns the member of a number; its UNSPECIFIED for one that a later release of the service sends."""
    try:
        return enum(number)
    except ValueError:
        return enum(0)


def plain(text: str, length: int) -> str:
    """Returns a text as the services take it: valid UTF-8, without control characters (tools colour theirs), cut."""
    return _CONTROL.sub(" ", text.encode(errors="replace").decode())[:length]


def moment(owner: Any, field: str) -> datetime | None:
    """Returns the Timestamp field of a message as an aware datetime in UTC; None when it is not set."""
    if not owner.HasField(field):
        return None
    value: Timestamp = getattr(owner, field)
    return value.ToDatetime(tzinfo=UTC)


def required_moment(owner: Any, field: str) -> datetime:
    """Returns a Timestamp field that the contract promises; the epoch when it is missing all the same."""
    return moment(owner, field) or datetime.fromtimestamp(0, UTC)


def timestamp(value: datetime | None) -> Timestamp | None:
    """Returns a Timestamp.

    Raises:
        ValueError: the datetime has no time zone.
    """
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("a moment needs a time zone: use datetime.now(UTC)")
    made = Timestamp()
    made.FromDatetime(value)
    return made


def interval(owner: Any, field: str) -> timedelta | None:
    """Returns the Duration field of a message; None when it is not set."""
    if not owner.HasField(field):
        return None
    value: Duration = getattr(owner, field)
    return value.ToTimedelta()


def duration(value: timedelta | None) -> Duration | None:
    """Returns a Duration."""
    if value is None:
        return None
    made = Duration()
    made.FromTimedelta(value)
    return made


def plain_settings(values: Mapping[str, work_pb2.SettingValue]) -> dict[str, Setting]:
    """Returns settings as a dict; a value of a kind that this release does not know is left out."""
    plain: dict[str, Setting] = {}
    for name, value in values.items():
        kind = value.WhichOneof("kind")
        if kind is not None:
            plain[name] = getattr(value, kind)
    return plain


def setting_values(settings: Mapping[str, Setting]) -> dict[str, work_pb2.SettingValue]:
    """Returns settings as messages.

    Raises:
        TypeError: a value is not a bool, int, float or str.
        ValueError: a number is not finite or has more than 64 bits.
    """
    return {name: _setting_value(name, value) for name, value in settings.items()}


def _setting_value(name: str, value: Setting) -> work_pb2.SettingValue:
    # A bool is an int to Python, so it is asked for first.
    if isinstance(value, bool):
        return work_pb2.SettingValue(bool_value=value)
    if isinstance(value, int):
        if not -_INT64 <= value < _INT64:
            raise ValueError(f"setting {name!r}: must fit into 64 bits")
        return work_pb2.SettingValue(int_value=value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"setting {name!r}: must be a finite number")
        return work_pb2.SettingValue(double_value=value)
    if isinstance(value, str):
        return work_pb2.SettingValue(string_value=value)
    raise TypeError(f"setting {name!r}: must be a bool, int, float or str, is {type(value).__name__}")
