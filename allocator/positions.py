"""Positions of pages: what a page token of each list holds."""

from __future__ import annotations

from datetime import UTC, date, datetime
from uuid import UUID

from services.errors import InvalidPageToken

Position = list[str | int] | None


def day_position(position: Position) -> tuple[date, UUID] | None:
    """Returns the day that is listed and the id after which a page of it begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        day, key = position
        return date.fromisoformat(str(day)), UUID(str(key))
    except ValueError:
        raise _damaged() from None


def uuid_position(position: Position) -> UUID | None:
    """Returns the id after which a page begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        (key,) = position
        return UUID(str(key))
    except ValueError:
        raise _damaged() from None


def text_position(position: Position) -> str | None:
    """Returns the name after which a page begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        (name,) = position
    except ValueError:
        raise _damaged() from None
    if not isinstance(name, str):
        raise _damaged()
    return name


def time_position(position: Position) -> tuple[datetime, UUID] | None:
    """Returns the time and id after which a page begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        at, key = position
        moment = datetime.fromisoformat(str(at))
        if moment.tzinfo is None:
            raise _damaged()
        return moment.astimezone(UTC), UUID(str(key))
    except (ValueError, OverflowError):
        raise _damaged() from None


def rate_position(position: Position) -> tuple[date, int, UUID] | None:
    """Returns the day that is listed, and the rate and id after which a page of it begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        day, rate, key = position
        if not 0 <= int(rate) < 2**62:
            raise _damaged()
        return date.fromisoformat(str(day)), int(rate), UUID(str(key))
    except ValueError:
        raise _damaged() from None


def pair_position(position: Position) -> tuple[UUID, str] | None:
    """Returns the id and name after which a page begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        key, name = position
        return UUID(str(key)), str(name)
    except ValueError:
        raise _damaged() from None


def week_position(position: Position) -> tuple[date, str] | None:
    """Returns the week and client after which a page begins. Raises: InvalidPageToken."""
    if position is None:
        return None
    try:
        week, client_id = position
        if not isinstance(client_id, str):
            raise _damaged()
        return date.fromisoformat(str(week)), client_id
    except ValueError:
        raise _damaged() from None


def _damaged() -> InvalidPageToken:
    return InvalidPageToken("page_token was not given for this request: begin again without one")
