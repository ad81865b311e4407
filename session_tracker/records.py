"""A session as plain values: what another replica, or a checkpoint, needs to have it whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from session_tracker.commands import Command
from session_tracker.sessions import CheckpointPolicy, ErrorEntry


@dataclass(frozen=True, slots=True)
class Counters:
    """What changes with every report. `reported_at` is in seconds since 1970.

    Attributes:
        revision: Of two records with the same sequence, the greater revision is the newer.
    """

    sequence: int
    revision: int
    state: int
    current_page: int
    total_pages: int
    products_found: int
    errors_count: int
    reported_at: float


@dataclass(frozen=True, slots=True)
class Record:
    """A session whole. Moments are in seconds since 1970; fields are as in `Session`, `Rarities` and `Registration`."""

    session_id: str
    counters: Counters
    since_at: float
    reason: str
    stage: str
    started_at: float
    slot_id: str
    client_id: str
    tags: tuple[str, ...]
    config_snapshot: str
    traceparent: str
    allocation_key: str
    lease_token: bytes
    checkpoint: CheckpointPolicy | None
    errors_by_class: tuple[tuple[str, int], ...]
    last_errors: tuple[ErrorEntry, ...]
    command: Command | None
    pages_per_minute_limit: float
    acknowledged_command: int
    lease_refused: bool


def described(record: Record) -> str:
    """Returns all of a record but its counters, as JSON by field names; what is empty is left out.

    By names, so that replicas of two releases, and checkpoints of an earlier one, pass over what they do not know.
    """
    checkpoint, told = record.checkpoint, record.command
    fields = {
        "session_id": record.session_id,
        "since_at": record.since_at,
        "reason": record.reason,
        "stage": record.stage,
        "started_at": record.started_at,
        "slot_id": record.slot_id,
        "client_id": record.client_id,
        "tags": record.tags,
        "config_snapshot": record.config_snapshot,
        "traceparent": record.traceparent,
        "allocation_key": record.allocation_key,
        "lease_token": record.lease_token.hex(),
        "checkpoint": (checkpoint.every_pages, checkpoint.every_seconds) if checkpoint else None,
        "errors_by_class": record.errors_by_class,
        "last_errors": [(entry.at, entry.error_class, entry.message, entry.page) for entry in record.last_errors],
        "command": (told.kind, told.message, told.number, told.pages_per_minute) if told else None,
        "pages_per_minute_limit": record.pages_per_minute_limit,
        "acknowledged_command": record.acknowledged_command,
        "lease_refused": record.lease_refused,
    }
    shown = {name: value for name, value in fields.items() if value}
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


def whole(description: str | bytes, counters: Counters) -> Record:
    """Returns the record of a description, with the counters that belong to it."""
    fields: dict[str, Any] = json.loads(description)
    checkpoint, told = fields.get("checkpoint"), fields.get("command")
    return Record(
        session_id=fields["session_id"],
        counters=counters,
        since_at=fields["since_at"],
        reason=fields.get("reason", ""),
        stage=fields.get("stage", ""),
        started_at=fields["started_at"],
        slot_id=fields.get("slot_id", ""),
        client_id=fields.get("client_id", ""),
        tags=tuple(fields.get("tags", ())),
        config_snapshot=fields.get("config_snapshot", ""),
        traceparent=fields.get("traceparent", ""),
        allocation_key=fields.get("allocation_key", ""),
        lease_token=bytes.fromhex(fields.get("lease_token", "")),
        checkpoint=CheckpointPolicy(*checkpoint) if checkpoint else None,
        errors_by_class=tuple((name, count) for name, count in fields.get("errors_by_class", ())),
        last_errors=tuple(ErrorEntry(*entry) for entry in fields.get("last_errors", ())),
        command=Command(fields["session_id"], *told) if told else None,
        pages_per_minute_limit=fields.get("pages_per_minute_limit", 0.0),
        acknowledged_command=fields.get("acknowledged_command", 0),
        lease_refused=fields.get("lease_refused", False),
    )
