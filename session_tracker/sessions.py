"""A live session: its state, its counters and its pace."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from sys import intern
from typing import Protocol

# A new page counts for a fifth: the mean follows a change of pace within some ten pages.
_NEWEST_WEIGHT = 0.2
# Below this many pages a mean says little.
_LEAST_PAGES = 3


class State(IntEnum):
    """Where a session stands; the numbers are the contract's.

    queued → running, paused, rate_limited: by the first report.
    running, paused, rate_limited → each other: by reports.
    running → stalled: no page for far longer than its own pace; back by a page, or by a report of another state.
    any of these → lost: no report for too long; back by the next report.
    """

    QUEUED = 1
    RUNNING = 2
    PAUSED = 3
    RATE_LIMITED = 4
    STALLED = 5
    LOST = 6
    COMPLETED = 7
    FAILED = 8
    STOPPED = 9


# Plain numbers: members of an IntEnum compare several times slower, and these are compared for every update.
QUEUED, RUNNING, STALLED, LOST = 1, 2, 5, 6
LIVE_STATES = (State.QUEUED, State.RUNNING, State.PAUSED, State.RATE_LIMITED, State.STALLED, State.LOST)
FINAL_STATES = frozenset({State.COMPLETED, State.FAILED, State.STOPPED})
# What a worker may report; 0 stands for running.
REPORTED_STATES = frozenset({0, State.RUNNING, State.PAUSED, State.RATE_LIMITED})


class Update(Protocol):
    """One report of one session, in absolute values. The contract's message is one as it is, uncopied."""

    @property
    def session_id(self) -> str:
        """Which session."""

    @property
    def sequence(self) -> int:
        """Above that of the session's last report, or the update changes nothing."""

    @property
    def state(self) -> int:
        """One of `REPORTED_STATES`."""

    @property
    def stage(self) -> str:
        """Empty keeps it."""

    @property
    def current_page(self) -> int:
        """Pages done."""

    @property
    def total_pages(self) -> int:
        """Pages to do; 0 when unknown."""

    @property
    def products_found(self) -> int:
        """Products found."""

    @property
    def errors_count(self) -> int:
        """Errors met."""


@dataclass(frozen=True, slots=True)
class Lease:
    """An allocation's lease, renewed while its session moves. `allocation_key` is a UUID in its usual text form."""

    allocation_key: str
    lease_token: bytes


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The command to stop: the lease of the session's allocation could not be renewed."""

    session_id: str
    message: str


class Listener(Protocol):
    """An open report stream, which can be told something between its answers."""

    def tell(self, command: LeaseLost) -> None:
        """Sends a command soon; does nothing when the stream has ended."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a session is started with.

    Attributes:
        started_at: None means now.
        config_snapshot: Redacted JSON; empty for none.
        lease: None when no allocation is to be renewed.
        progress: The newest report, when the session is registered again.
    """

    session_id: str
    stage: str = ""
    total_pages: int = 0
    started_at: datetime | None = None
    slot_id: str = ""
    client_id: str = ""
    tags: tuple[str, ...] = ()
    config_snapshot: str = ""
    lease: Lease | None = None
    progress: Update | None = None


class Session:
    """One live session. Mutable and slotted, since it is written some hundred thousand times a second.

    Only its organization writes to it, which keeps the roll-ups with it.

    Attributes:
        state: A number of `State`.
        sequence: Of the last report that was taken.
        reported: When it was last reported, on the monotonic clock.
        paged: When its last page was done, or its pace last began anew.
        interval: Mean seconds per page, the last pages weighing most.
        measured: Pages that `interval` was measured over.
        changed: The organization's offset at its last change.
        renewable: It has a lease, and has not moved since the last round of renewals.
        command: What its worker is told with each answer.
        listener: The stream that reported it last.
    """

    __slots__ = (
        "changed",
        "client_id",
        "command",
        "config_snapshot",
        "current_page",
        "errors_count",
        "interval",
        "lease",
        "listener",
        "measured",
        "paged",
        "products_found",
        "renewable",
        "reported",
        "sequence",
        "session_id",
        "slot_id",
        "stage",
        "started_at",
        "state",
        "tags",
        "total_pages",
    )

    def __init__(self, registration: Registration, started_at: datetime, now: float) -> None:
        self.session_id = registration.session_id
        self.state: int = QUEUED
        # Interned: many sessions share these, and a session should cost less than 1 KB.
        self.stage = intern(registration.stage)
        self.current_page = 0
        self.total_pages = registration.total_pages
        self.products_found = 0
        self.errors_count = 0
        self.started_at = started_at
        self.sequence = 0
        self.reported = now
        self.paged = now
        self.interval = 0.0
        self.measured = 0
        self.changed = 0
        self.slot_id = intern(registration.slot_id)
        self.client_id = intern(registration.client_id)
        self.tags = tuple(map(intern, registration.tags))
        self.config_snapshot = intern(registration.config_snapshot)
        self.lease = registration.lease
        self.renewable = registration.lease is not None
        self.command: LeaseLost | None = None
        self.listener: Listener | None = None
        progress = registration.progress
        if progress is not None:
            # Nothing of it is measured: these pages were done before, at a pace unknown here.
            self.sequence = progress.sequence
            self.state = progress.state or RUNNING
            self.stage = intern(progress.stage) or self.stage
            self.current_page = progress.current_page
            self.total_pages = progress.total_pages or self.total_pages
            self.products_found = progress.products_found
            self.errors_count = progress.errors_count

    def measure(self, pages: int, now: float) -> None:
        """Takes `pages` (at least 1) done at `now` into the pace."""
        each = (now - self.paged) / pages
        if self.measured == 0:
            self.interval = each
        else:
            weight = _NEWEST_WEIGHT if pages == 1 else 1.0 - (1.0 - _NEWEST_WEIGHT) ** pages
            self.interval += weight * (each - self.interval)
        self.measured += pages
        self.paged = now

    def remaining_seconds(self, now: float) -> float | None:
        """Returns how long the pages left will take at the mean pace of the last ones.

        None when the total is unknown, fewer than three pages were measured since it last changed, or the session is
        not running: a pace says nothing about a pause.
        """
        if self.total_pages == 0 or self.measured < _LEAST_PAGES or self.state != RUNNING:
            return None
        left = max(0, self.total_pages - self.current_page)
        return max(0.0, self.paged + left * self.interval - now)
