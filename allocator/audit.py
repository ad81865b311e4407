"""Audit: what operators did, as a chain of entries per organization in which none can be changed or removed unseen.

An entry's digest covers its own fields and the digest of the entry before; the head holds the last digest. What the
chain does not show is that somebody who can write both tables made the whole of it anew: a copy of the head, kept
elsewhere, would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

# Before the first entry of an organization.
GENESIS = bytes(32)

_LISTED = 10


@dataclass(frozen=True, slots=True)
class Deed:
    """What somebody does.

    Attributes:
        actor: The id of the API key.
        action: The method's name.
        reason: Why; '' when the method takes none.
        request_sha256: Of the request.
    """

    actor: str
    action: str
    reason: str
    request_sha256: bytes


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One entry on record; `resource` is what was acted on: ids, up to ten of many, and what it changed in short."""

    entry_id: UUID
    at: datetime
    actor: str
    action: str
    resource: str
    reason: str
    payload_sha256: bytes
    previous_sha256: bytes
    entry_sha256: bytes


def listed(keys: Sequence[UUID], what: str) -> str:
    """Returns what an entry says of many things: how many, and the ids of the first ten."""
    if not keys:
        return f"0 {what}"
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)} {what}: {', '.join(map(str, keys[:_LISTED]))}{more}"


def payload_sha256(request_sha256: bytes, changed: dict[str, Any]) -> bytes:
    """Returns the digest of a request and what it changed, a JSON object."""
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(request_sha256 + text.encode()).digest()


def entry_sha256(organization_id: UUID, entry: AuditEntry) -> bytes:
    """Returns what an entry's digest must be: SHA-256 over a JSON array of its other fields, in a fixed order."""
    fields = [
        entry.previous_sha256.hex(),
        str(organization_id),
        str(entry.entry_id),
        # Microseconds, as PostgreSQL keeps them.
        entry.at.astimezone(UTC).isoformat(timespec="microseconds"),
        entry.actor,
        entry.action,
        entry.resource,
        entry.reason,
        entry.payload_sha256.hex(),
    ]
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).digest()


def first_break(organization_id: UUID, previous_sha256: bytes, entries: Iterable[AuditEntry]) -> AuditEntry | None:
    """Returns the first entry that does not follow from the one before it, None when all do.

    Args:
        organization_id: Whose.
        previous_sha256: Of the entry before the first; GENESIS when there is none.
        entries: The oldest first, without a gap.
    """
    for entry in entries:
        if entry.previous_sha256 != previous_sha256 or entry.entry_sha256 != entry_sha256(organization_id, entry):
            return entry
        previous_sha256 = entry.entry_sha256
    return None
