"""A live session: where it stands, its counters, and what its pace is reckoned from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from sys import intern
from typing import TYPE_CHECKING

from session_tracker.commands import Command, Listener
from session_tracker.updates import Update

if TYPE_CHECKING:
    from session_tracker.convoys import Convoy
    from session_tracker.rollups import Figures


class State(IntEnum):
    """Where a session stands; the numbers are the contract's.

    queued → running, paused, rate_limited: by the first report.
    running, paused, rate_limited → each other: by reports.
    running → stalled: no page for far longer than its own pace; back by a page, or by a report of another state.
    any of these → lost: no report for too long, back by the next one; or its lease was refused, and stays lost.
    any of these → completed, failed, stopped: the final result, committed.
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
QUEUED, RUNNING, STALLED, LOST, COMPLETED = 1, 2, 5, 6, 7
LIVE_STATES = (State.QUEUED, State.RUNNING, State.PAUSED, State.RATE_LIMITED, State.STALLED, State.LOST)
FINAL_STATES = frozenset({State.COMPLETED, State.FAILED, State.STOPPED})
# What a worker may report; 0 stands for running.
REPORTED_STATES = frozenset({0, 2, 3, 4})
# The sequence of a session that left memory: no report is above it, so that the hot path needs no check of its own.
GONE = 2**64


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One error: `at` in seconds since 1970 by the worker's clock."""

    at: float
    error_class: str
    message: str
    page: int


@dataclass(frozen=True, slots=True)
class Lease:
    """An allocation's lease, renewed while its session moves. `allocation_key` is a UUID in its usual text form."""

    allocation_key: str
    lease_token: bytes


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """How often a session is checkpointed: after so many pages, so much time, or whichever comes first; 0 is never."""

    every_pages: int
    every_seconds: float


class SavePoint:
    """What is on record of an important session: a checkpoint is due by what came after it.

    Attributes:
        at: When it was last saved, on the monotonic clock.
        page: Its page then.
        described: Its `described` then: while it is the same, only counters are written.
        unsaved_since: When the oldest change came that is not saved; of no meaning when there is none.
    """

    __slots__ = ("at", "described", "page", "policy", "unsaved_since")

    def __init__(self, policy: CheckpointPolicy, now: float) -> None:
        self.policy = policy
        self.at = now
        self.page = 0
        self.described = -1
        self.unsaved_since = now

    def due(self, page: int, now: float) -> bool:
        """Whether what came since should be saved now; what was never saved is due at once."""
        policy = self.policy
        return (
            self.described < 0
            or (policy.every_seconds > 0 and now - self.at >= policy.every_seconds)
            or (policy.every_pages > 0 and abs(page - self.page) >= policy.every_pages)
        )


@dataclass(frozen=True, slots=True)
class Registration:
    """What a session is started with.

    Attributes:
        started_at: None means now.
        config_snapshot: Redacted JSON; empty for none.
        lease: None when no allocation is to be renewed.
        progress: The newest report, when the session is registered again.
        checkpoint: None when its state need not survive a loss of memory.
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
    checkpoint: CheckpointPolicy | None = None
    traceparent: str = ""


class Rarities:
    """What most sessions do not have, kept apart so that they do not pay for it.

    Attributes:
        errors_by_class: Class and count, as reported.
        last_errors: The newest, oldest first.
        command: What its worker is told until it says that it was carried out.
        pages_per_minute_limit: As last told.
        acknowledged_command: The last command that was carried out.
        lease_refused: Its lease is lost: it stays lost until it is completed or given another lease.
    """

    __slots__ = (
        "acknowledged_command",
        "command",
        "errors_by_class",
        "last_errors",
        "lease_refused",
        "pages_per_minute_limit",
    )

    def __init__(self) -> None:
        self.errors_by_class: tuple[tuple[str, int], ...] = ()
        self.last_errors: tuple[ErrorEntry, ...] = ()
        self.command: Command | None = None
        self.pages_per_minute_limit = 0.0
        self.acknowledged_command = 0
        self.lease_refused = False


# What every session without rarities shows; never written to.
_NO_RARITIES = Rarities()


@lru_cache(maxsize=10_000)
def _shared(tags: tuple[str, ...]) -> tuple[str, ...]:
    """Returns one and the same tuple for the same tags, of which most sessions have some."""
    return tuple(map(intern, tags))


class Session:
    """One session in memory. Mutable and slotted, since it is written some hundred thousand times a second.

    Only its organization writes to it. A report writes the counters alone; what follows from them (roll-ups, pace,
    series, order of changes) is brought up to date by `Live.settle`, for many reports of a session at once.

    Attributes:
        number: Names it among the organization's sessions of this process; never used twice.
        state: A number of `State`.
        sequence: Of the last report that was taken.
        reported: When it was last reported, on the monotonic clock.
        noted: Reported since it was last settled.
        counted_page, counted_products, counted_errors: What of it stands in the roll-ups.
        since: Since when it is in this state, on the monotonic clock.
        reason: Why it is in this state.
        paged: When its last page was done, or its pace last began anew.
        interval: Mean seconds per page, the last pages weighing most.
        variance: Of the seconds per page, in the same weighing.
        measured: Pages that `interval` was measured over, in this stage and for this total, up to some 100.
        series: Its pages of the last minutes: see `session_tracker.series`.
        changed: The organization's offset at its last change.
        described: The same, of anything but counters, sequence and time of report.
        revision: Grows with every change that its owner makes while the sequence stays.
        owner: The replica that took its last report; empty for this process.
        allocation_key: Of its lease; empty for none.
        renewable: It has a lease, and has not moved since the last round of renewals.
        rebuilding: Known from a checkpoint, and not reported since.
        listener: The stream that reported it last.
        convoy: What it is reported with; a batch may wait there that is newer than what stands here.
        slot: The roll-ups of its slot.
        save: Set for important sessions.
    """

    __slots__ = (
        "_lease_token",
        "_rarities",
        "_started_at",
        "allocation_key",
        "changed",
        "client_id",
        "config_snapshot",
        "convoy",
        "counted_errors",
        "counted_page",
        "counted_products",
        "current_page",
        "described",
        "errors_count",
        "interval",
        "listener",
        "measured",
        "noted",
        "number",
        "owner",
        "paged",
        "products_found",
        "reason",
        "rebuilding",
        "renewable",
        "reported",
        "revision",
        "save",
        "sequence",
        "series",
        "session_id",
        "since",
        "slot",
        "slot_id",
        "stage",
        "state",
        "tags",
        "total_pages",
        "traceparent",
        "variance",
    )

    def __init__(self, registration: Registration, number: int, started_at: datetime, now: float) -> None:
        self.session_id = registration.session_id
        self.number = number
        self.state: int = QUEUED
        self.since = now
        self.reason = "registered"
        # Interned: many sessions share these, and a session should cost less than 1 KB.
        self.stage = intern(registration.stage)
        self.current_page = self.counted_page = 0
        self.total_pages = registration.total_pages
        self.products_found = self.counted_products = 0
        self.errors_count = self.counted_errors = 0
        self.sequence = 0
        self.reported = now
        self.noted = False
        self.paged = now
        self.interval = 0.0
        self.variance = 0.0
        self.measured = 0
        self.series = b""
        self.changed = self.described = 0
        self.revision = 0
        self.owner = ""
        self.slot: Figures | None = None
        self.identify(registration, started_at)
        self.renewable = False
        self.lease = registration.lease
        self.rebuilding = False
        self.listener: Listener | None = None
        self.convoy: Convoy | None = None
        self.save = SavePoint(registration.checkpoint, now) if registration.checkpoint else None
        self._rarities: Rarities | None = None
        progress = registration.progress
        if progress is not None:
            # Nothing of it is measured: these pages were done before, at a pace unknown here.
            self.sequence = progress.sequence
            self.state = progress.state or RUNNING
            self.reason = progress.reason or "registered again"
            self.stage = intern(progress.stage) or self.stage
            self.current_page = progress.current_page
            self.total_pages = progress.total_pages or self.total_pages
            self.products_found = progress.products_found
            self.errors_count = progress.errors_count
            self.take_rarities(progress)

    def identify(self, registration: Registration, started_at: datetime) -> None:
        """Takes what stays as it was registered, for as long as nobody else is believed to have registered it."""
        # A number weighs half as much as a moment; in this century it is exact to the microsecond.
        self._started_at = started_at.timestamp()
        self.slot_id = intern(registration.slot_id)
        self.client_id = intern(registration.client_id)
        self.tags = _shared(registration.tags)
        self.config_snapshot = intern(registration.config_snapshot)
        self.traceparent = registration.traceparent

    @property
    def finished(self) -> bool:
        """Whether it has its final result."""
        return self.state >= COMPLETED

    @property
    def rarities(self) -> Rarities:
        """What most sessions do not have; to be read only."""
        return self._rarities or _NO_RARITIES

    def own_rarities(self) -> Rarities:
        """Returns the same, to be written to."""
        if self._rarities is None:
            self._rarities = Rarities()
        return self._rarities

    @property
    def command(self) -> Command | None:
        """What its worker is told until it says that it was carried out."""
        return self.rarities.command

    @property
    def last_errors(self) -> tuple[ErrorEntry, ...]:
        """The newest errors, oldest first."""
        return self.rarities.last_errors

    @property
    def important(self) -> bool:
        """Whether it is checkpointed."""
        return self.save is not None

    @property
    def started_at(self) -> datetime:
        """When it started."""
        return datetime.fromtimestamp(self._started_at, UTC)

    @property
    def lease(self) -> Lease | None:
        """Its allocation's lease; setting it makes it due for renewal."""
        return Lease(self.allocation_key, self._lease_token) if self.allocation_key else None

    @lease.setter
    def lease(self, lease: Lease | None) -> None:
        self.allocation_key = lease.allocation_key if lease else ""
        self._lease_token = lease.lease_token if lease else b""
        self.renewable = lease is not None

    def take_rarities(self, update: Update) -> bool:
        """Takes errors and acknowledgement from a report; returns whether any were in it."""
        changed = False
        if classes := update.errors_by_class:
            counts = ((intern(errors.error_class), errors.count) for errors in classes)
            self.own_rarities().errors_by_class = tuple(sorted(counts, key=lambda pair: -pair[1]))
            changed = True
        if errors := update.last_errors:
            self.own_rarities().last_errors = tuple(
                ErrorEntry(
                    error.at.seconds + error.at.nanos / 1e9, intern(error.error_class), error.message, error.page
                )
                for error in errors
            )
            changed = True
        if update.acknowledged_command > self.rarities.acknowledged_command:
            rarities = self.own_rarities()
            rarities.acknowledged_command = update.acknowledged_command
            command = rarities.command
            if command is not None and 0 < command.number <= rarities.acknowledged_command:
                rarities.command = None
            changed = True
        return changed
