"""Pages of lists: how much goes into one, and tokens of their last key, bound to the request they belong to."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

from services.errors import InvalidPageToken

# gRPC's clients take 4 MiB a message unless they are told otherwise. A single row may be larger.
MOST_BYTES = 3 * 2**20

Row = TypeVar("Row", bound=Message)


def fitting(rows: Sequence[Row]) -> Sequence[Row]:
    """Returns the first rows of a page, at least one, that fit into a message; the next page begins after them."""
    size = 0
    for number, row in enumerate(rows):
        size += row.ByteSize()
        if size > MOST_BYTES and number:
            return rows[:number]
    return rows


def encode(position: list[str | int], scope: str) -> str:
    """Returns the token that continues after `position`.

    Args:
        position: The key of the page's last row.
        scope: Everything that must be the same on the next page: method and filters.
    """
    body = json.dumps([_digest(scope), *position], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(body).decode()


def decode(token: str, scope: str) -> list[str | int] | None:
    """Returns the position of a token, or None for the first page.

    Raises:
        InvalidPageToken: the token is damaged or belongs to another scope.
    """
    if not token:
        return None
    try:
        digest, *position = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        digest, position = "", []
    if digest != _digest(scope) or not all(_may_stand(part) for part in position):
        raise InvalidPageToken("page_token was not given for this request: begin again without one")
    found: list[str | int] = position
    return found


def _may_stand(part: object) -> bool:
    # A token is no secret, so anybody may write one: what PostgreSQL's text cannot hold is of no key.
    if isinstance(part, str):
        return "\x00" not in part and not any("\ud800" <= letter <= "\udfff" for letter in part)
    return isinstance(part, int)


def _digest(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()[:16]
