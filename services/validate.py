"""Checks the fields of a request and reports every one that is wrong, with its rule and limit."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Sized
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from services.errors import FieldViolation, InvalidField

_IDENTIFIER = re.compile(r"[A-Za-z0-9._:\-]+\Z")
# date.fromisoformat also takes the dates of weeks, 2026-W01-4.
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\Z", re.ASCII)
# A batch of thousands may be wrong in all its fields: what is kept to be told is bounded, the rest is counted.
_MOST_KEPT = 32
# PostgreSQL's text cannot hold NUL, and control characters in names only serve to confuse logs and terminals.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Checks:
    """Collects violations; `done` raises the first of them at once, with the number of all.

    Each check returns the usable value, or a harmless stand-in when the field is wrong, so that a servicer can check
    a whole request in one pass and use the values after `done`.
    """

    __slots__ = ("_count", "_violations")

    def __init__(self) -> None:
        self._count = 0
        self._violations: list[FieldViolation] = []

    def fail(self, field: str, rule: str) -> None:
        """Notes a violation."""
        self._count += 1
        if self._count <= _MOST_KEPT:
            self._violations.append(FieldViolation(field, rule))

    def done(self) -> None:
        """Ends the checks.

        Raises:
            InvalidField: if any check failed.
        """
        if self._violations:
            raise InvalidField(self._violations, self._count)

    def uuid(self, field: str, value: str, *, required: bool = True) -> UUID:
        """A UUID in its usual text form."""
        if not value:
            if required:
                self.fail(field, "required: a UUID")
            return UUID(int=0)
        try:
            if len(value) == 36:
                return UUID(value)
        except ValueError:
            pass
        self.fail(field, "must be a UUID such as 123e4567-e89b-12d3-a456-426614174000")
        return UUID(int=0)

    def text(self, field: str, value: str, *, max_length: int, min_length: int = 0) -> str:
        """A text of `min_length` to `max_length` characters, without control characters but tab and line end."""
        if len(value) < min_length:
            self.fail(field, f"required: {min_length} to {max_length} characters")
        elif len(value) > max_length:
            self.fail(field, f"at most {max_length} characters, is {len(value)}")
        elif _CONTROL.search(value):
            self.fail(field, "must not contain control characters")
        return value

    def identifier(self, field: str, value: str, *, max_length: int = 128, required: bool = True) -> str:
        """A text of `A-Z a-z 0-9 . _ : -`."""
        if not value:
            if required:
                self.fail(field, f"required: 1 to {max_length} characters of A-Z a-z 0-9 . _ : -")
        elif len(value) > max_length:
            self.fail(field, f"at most {max_length} characters, is {len(value)}")
        elif not _IDENTIFIER.match(value):
            self.fail(field, "may contain only A-Z a-z 0-9 . _ : -")
        return value

    def number(self, field: str, value: int, *, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        if not least <= value <= most:
            self.fail(field, f"must be from {least} to {most}, is {value}")
            return least
        return value

    def count(self, field: str, items: Sized, *, most: int, least: int = 1) -> None:
        """A list or map of `least` to `most` entries."""
        size = len(items)
        if not least <= size <= most:
            self.fail(field, f"must have {least} to {most} entries, has {size}")

    def unique(self, field: str, values: Iterable[object]) -> None:
        """A list without repetition."""
        seen = set()
        for value in values:
            if value in seen:
                self.fail(field, f"names {value!r} twice"[:200])
                return
            seen.add(value)

    def token(self, field: str, value: bytes, *, required: bool = True) -> bytes:
        """A fencing token: 16 bytes."""
        if len(value) != 16 and (required or value):
            self.fail(field, f"must be the 16 bytes that were given, is {len(value)}")
        return value

    def octets(self, field: str, value: bytes, *, most: int, least: int = 0) -> bytes:
        """A byte string of `least` to `most` bytes."""
        if not least <= len(value) <= most:
            self.fail(field, f"must be {least} to {most} bytes, is {len(value)}")
        return value

    def choice(self, field: str, value: int, allowed: Iterable[int], names: str) -> int:
        """A number of an enum that is one of `allowed`; `names` is what the caller is told."""
        if value not in allowed:
            self.fail(field, f"must be one of {names}, is {value}")
        return value

    def day(self, field: str, value: str, *, required: bool = True) -> date | None:
        """A date `YYYY-MM-DD` of the years 1970 to 9999."""
        if not value:
            if required:
                self.fail(field, "required: a date YYYY-MM-DD")
            return None
        try:
            if _DAY.match(value) and (day := date.fromisoformat(value)).year >= 1970:
                return day
        except ValueError:
            pass
        self.fail(field, "must be a date YYYY-MM-DD from 1970-01-01 on")
        return None

    def duration(
        self, owner: Any, field: str, *, least: float, most: float, required: bool = False, path: str = ""
    ) -> float | None:
        """The Duration field `field` of the message `owner`, in seconds; None when it is not set."""
        name = path or field
        if not owner.HasField(field):
            if required:
                self.fail(name, f"required: a duration of {least:g} to {most:g} s")
            return None
        value: Duration = getattr(owner, field)
        seconds = value.seconds + value.nanos / 1e9
        if not least <= seconds <= most:
            self.fail(name, f"must be {least:g} to {most:g} s, is {seconds:g} s")
        return seconds

    def moment(self, owner: Any, field: str, *, required: bool = False, path: str = "") -> datetime | None:
        """The Timestamp field `field` of the message `owner` as an aware datetime; None when it is not set."""
        name = path or field
        if not owner.HasField(field):
            if required:
                self.fail(name, "required: a timestamp")
            return None
        value: Timestamp = getattr(owner, field)
        try:
            moment = value.ToDatetime(tzinfo=UTC)
            if 1970 <= moment.year < 9999:
                return moment
        except (ValueError, OverflowError):
            pass
        self.fail(name, "must be a timestamp of the years 1970 to 9998")
        return None

    def address(self, field: str, value: str) -> str:
        """An IPv4 or IPv6 address without a scope, or nothing."""
        if value:
            try:
                # A scope, fe80::1%eth0, is of one machine's own and may be any text.
                if "%" not in value:
                    return str(ipaddress.ip_address(value))
            except ValueError:
                pass
            self.fail(field, "must be an IPv4 or IPv6 address without a scope")
        return value

    def json_object(self, field: str, value: str | bytes, *, max_bytes: int, required: bool = False) -> dict[str, Any]:
        """A JSON object of at most `max_bytes` bytes; an empty one when the field is empty and not required."""
        if not value:
            if required:
                self.fail(field, f"required: a JSON object of at most {max_bytes} bytes")
            return {}
        size = len(value.encode()) if isinstance(value, str) else len(value)
        if size > max_bytes:
            self.fail(field, f"at most {max_bytes} bytes, is {size}")
            return {}
        try:
            # Decoded here, since json.loads would take UTF-16 and UTF-32 as well.
            text = value if isinstance(value, str) else value.decode()
            parsed = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            self.fail(field, "must be JSON (UTF-8, no NaN or Infinity)")
            return {}
        if not isinstance(parsed, dict):
            self.fail(field, "must be a JSON object")
            return {}
        return parsed

    def finite(self, field: str, value: float) -> float:
        """A number that is neither NaN nor infinite."""
        if not math.isfinite(value):
            self.fail(field, "must be a finite number")
            return 0.0
        return value

    def page(self, page_size: int) -> int:
        """The page size of a list: 1 to 1000, where 0 means 100."""
        return self.number("page_size", page_size or 100, least=1, most=1000)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
