"""A session as plain values: what another replica, or a checkpoint, needs to have it whole."""

from __future__ import annotations

from dataclasses import dataclass

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
