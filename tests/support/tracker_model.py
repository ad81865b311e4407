"""A small model of one session, and a table of results: what the session tracker is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from services.errors import DatabaseUnavailable
from session_tracker.clock import Clock
from session_tracker.commands import Command
from session_tracker.results import RecordedResult, Result
from session_tracker.sessions import Session, State

REASONS = {
    State.RUNNING: "reported running",
    State.PAUSED: "reported paused",
    State.RATE_LIMITED: "reported rate limited",
}


class Ear:
    """An open report stream that hears commands."""

    def __init__(self) -> None:
        self.heard: list[Command] = []

    def tell(self, command: Command) -> None:
        self.heard.append(command)


@dataclass(slots=True)
class Known:
    """What the model knows of a session. `paged` is None when only the tracker knows when its last page was done."""

    started_at: datetime
    reported: float
    paged: float | None
    state: int = State.QUEUED
    reason: str = "registered"
    stage: str = ""
    sequence: int = 0
    page: int = 0
    total: int = 0
    products: int = 0
    errors: int = 0
    classes: tuple[tuple[str, int], ...] = ()
    command: Command | None = None
    acknowledged: int = 0
    speed: float = 0.0
    refused: bool = False
    lease: bytes = b""
    ear: Ear | None = None
    leaves: float | None = None

    def take(self, update: Any, now: float, ear: Ear | None) -> bool:
        """Takes a report, as the contract says; returns whether it is news."""
        if update.sequence <= self.sequence or self.leaves is not None:
            return False
        gained = update.current_page - self.page
        state = State(update.state or State.RUNNING)
        self.take_rarities(update)
        if state != self.state and not self.refused:
            if self.state != State.STALLED or state != State.RUNNING or gained > 0:
                back = "a page was done" if self.state == State.STALLED and gained > 0 else REASONS[state]
                if self.state != State.STALLED:
                    self.paged = now
                self.state, self.reason = state, update.reason or back
        elif not self.refused:
            self.reason = update.reason or self.reason
        if gained > 0:
            self.paged = now
        self.sequence, self.reported, self.ear = update.sequence, now, ear
        self.stage = update.stage or self.stage
        self.page, self.total = update.current_page, update.total_pages
        self.products, self.errors = update.products_found, update.errors_count
        return True

    def take_rarities(self, update: Any) -> None:
        if update.errors_by_class:
            counts = [(one.error_class, one.count) for one in update.errors_by_class]
            self.classes = tuple(sorted(counts, key=lambda pair: -pair[1]))
        if update.acknowledged_command > self.acknowledged:
            self.acknowledged = update.acknowledged_command
            if self.command is not None and 0 < self.command.number <= self.acknowledged:
                self.command = None

    def view(self) -> tuple[Any, ...]:
        return (
            self.state, self.reason, self.stage, self.sequence, self.page, self.total, self.products, self.errors,
            self.classes, self.command, self.acknowledged, self.speed,
        )  # fmt: skip


def shown(session: Session) -> tuple[Any, ...]:
    rare = session.rarities
    return (
        session.state, session.reason, session.stage, session.sequence, session.current_page, session.total_pages,
        session.products_found, session.errors_count, rare.errors_by_class, rare.command, rare.acknowledged_command,
        rare.pages_per_minute_limit,
    )  # fmt: skip


@dataclass(slots=True)
class Table:
    """A table of results that fails when told to; it outlives the tracker."""

    clock: Clock
    rows: dict[str, RecordedResult] = field(default_factory=dict)
    fails: bool = False

    async def record(self, results: Sequence[Result]) -> list[tuple[RecordedResult, bool]]:
        if self.fails:
            raise DatabaseUnavailable("away")
        answers = []
        for result in results:
            fresh = result.session_id not in self.rows
            if fresh:
                values = {name: getattr(result, name) for name in Result.__slots__}
                at = self.clock.wall()
                seconds = (at - result.started_at).total_seconds()
                self.rows[result.session_id] = RecordedResult(**values, completed_at=at, execution_time_seconds=seconds)
            answers.append((self.rows[result.session_id], fresh))
        return answers

    async def find(self, organization_id: UUID, session_id: str) -> RecordedResult | None:
        return self.rows.get(session_id)

    async def find_all(self, organization_id: UUID, session_ids: Sequence[str]) -> list[RecordedResult]:
        if self.fails:
            raise DatabaseUnavailable("away")
        return [self.rows[session_id] for session_id in session_ids if session_id in self.rows]
