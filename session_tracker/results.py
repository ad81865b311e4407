"""Final results: committed once, in batches, before they are acknowledged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.coalesce import Coalescer
from session_tracker.clock import Clock
from session_tracker.errors import SessionAlreadyCompleted
from session_tracker.metrics import RESULTS, RESULTS_OLDEST, RESULTS_PENDING
from session_tracker.organizations import Organization, Organizations
from session_tracker.sessions import State

# One statement of so many rows stays below a megabyte even if each carries the largest snapshot of half a page.
_MAX_BATCH = 256
_MAX_WAITING = 8192
# A caller whose commit failed repeats it within seconds; when nobody did for so long, nothing waits any more.
_REPEATED_SECONDS = 120.0
# The part of a result's message that a finished session shows as its reason.
_REASON_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a caller says came of a session.

    Attributes:
        session_id: Which.
        state: One of `FINAL_STATES`.
        stage: Empty means the last one reported.
        started_at: None means the start on record.
        config_snapshot: Redacted JSON; empty means what the session was started with.
        slot_id: Empty means what the session was started with.
        client_id: Likewise.
    """

    session_id: str
    state: State
    stage: str
    total_pages: int
    products_found: int
    errors_count: int
    started_at: datetime | None
    config_snapshot: str
    message: str
    slot_id: str = ""
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A row to record: an outcome, completed by what the live session knew. Fields as in `crawling_results`."""

    organization_id: UUID
    session_id: str
    state: State
    stage: str
    total_pages: int
    products_found: int
    errors_count: int
    started_at: datetime
    config_snapshot: str
    slot_id: str
    client_id: str
    message: str


@dataclass(frozen=True, slots=True)
class RecordedResult:
    """A row on record. `completed_at` is by the database's clock."""

    organization_id: UUID
    session_id: str
    state: State
    stage: str
    total_pages: int
    products_found: int
    errors_count: int
    started_at: datetime
    completed_at: datetime
    execution_time_seconds: float
    config_snapshot: str
    slot_id: str
    client_id: str
    message: str

    def agrees_with(self, outcome: Outcome) -> bool:
        """Whether an outcome says what is on record; what it leaves open agrees."""
        return (
            (self.state, self.total_pages, self.products_found, self.errors_count, self.message)
            == (outcome.state, outcome.total_pages, outcome.products_found, outcome.errors_count, outcome.message)
            and outcome.stage in ("", self.stage)
            and outcome.started_at in (None, self.started_at)
            and outcome.slot_id in ("", self.slot_id)
            and outcome.client_id in ("", self.client_id)
            and (
                not outcome.config_snapshot
                or json.loads(outcome.config_snapshot) == json.loads(self.config_snapshot or "null")
            )
        )


class StartUnknown(Exception):
    """The session is not live and the outcome does not say when it began."""


class ResultStore(Protocol):
    """Where results stand."""

    async def record(self, results: Sequence[Result]) -> list[tuple[RecordedResult, bool]]:
        """Records what is not on record, and returns for each what is, and whether this entry is what was recorded."""

    async def find(self, organization_id: UUID, session_id: str) -> RecordedResult | None:
        """Returns the result on record of a session, or None."""


class Results:
    """Commits outcomes and then forgets their sessions.

    Callers that come while a batch is committed share the next. A caller that gives up does not undo its outcome: the
    same one sent again is answered with what was recorded.
    """

    def __init__(self, organizations: Organizations, store: ResultStore, clock: Clock) -> None:
        self._organizations = organizations
        self._store = store
        self._clock = clock
        self._uncommitted_since: float | None = None
        self._tried_at = 0.0
        RESULTS_OLDEST.set_function(self._oldest_seconds)
        self._queue: Coalescer[Result, tuple[RecordedResult, bool]] = Coalescer(
            "session results", self._commit, max_batch=_MAX_BATCH, max_waiting=_MAX_WAITING
        )

    async def complete(self, organization_id: UUID, outcome: Outcome) -> RecordedResult:
        """Records the outcome of a session, live or not, and returns what is on record once it is committed.

        Raises:
            StartUnknown: it is not live, is not on record, and `started_at` is not given.
            SessionAlreadyCompleted: another result is on record, and stands.
            DatabaseUnavailable: nothing was acknowledged; the session is live still. Repeat it.
            Overloaded: too many results wait.
        """
        session = self._organizations.of(organization_id).sessions.get(outcome.session_id)
        started_at = outcome.started_at or (session.started_at if session else None)
        if started_at is None:
            recorded = await self._store.find(organization_id, outcome.session_id)
            if recorded is None:
                raise StartUnknown
            return self._answer(outcome, recorded, fresh=False)
        result = Result(
            organization_id=organization_id,
            session_id=outcome.session_id,
            state=outcome.state,
            stage=outcome.stage or (session.stage if session else ""),
            total_pages=outcome.total_pages,
            products_found=outcome.products_found,
            errors_count=outcome.errors_count,
            started_at=started_at,
            config_snapshot=outcome.config_snapshot or (session.config_snapshot if session else ""),
            slot_id=outcome.slot_id or (session.slot_id if session else ""),
            client_id=outcome.client_id or (session.client_id if session else ""),
            message=outcome.message,
        )
        RESULTS_PENDING.inc()
        try:
            recorded, fresh = await self._queue.submit(result)
        finally:
            RESULTS_PENDING.dec()
        return self._answer(outcome, recorded, fresh=fresh)

    @staticmethod
    def _answer(outcome: Outcome, recorded: RecordedResult, *, fresh: bool) -> RecordedResult:
        if not recorded.agrees_with(outcome):
            RESULTS.labels("refused").inc()
            raise SessionAlreadyCompleted(outcome.session_id)
        RESULTS.labels("recorded" if fresh else "repeated").inc()
        return recorded

    async def close(self) -> None:
        """Waits for what was submitted."""
        await self._queue.close()

    def _oldest_seconds(self) -> float:
        now = self._clock.monotonic()
        if self._uncommitted_since is None or now - self._tried_at > _REPEATED_SECONDS:
            return 0.0
        return now - self._uncommitted_since

    async def _commit(self, results: Sequence[Result]) -> Sequence[tuple[RecordedResult, bool]]:
        self._tried_at = self._clock.monotonic()
        if self._uncommitted_since is None:
            self._uncommitted_since = self._tried_at
        recorded = await self._store.record(results)
        self._uncommitted_since = None
        # Here and not in `complete`, whose caller may be gone by now.
        for result, fresh in recorded:
            organization = self._organizations.of(result.organization_id)
            end_by(organization, result)
            organization.live.figures.results_committed += fresh
        return recorded


def end_by(organization: Organization, result: RecordedResult) -> None:
    """Ends a session, if it is live, as its result on record says."""
    organization.complete(
        result.session_id,
        result.total_pages,
        result.state,
        products=result.products_found,
        errors=result.errors_count,
        reason=result.message[:_REASON_CHARACTERS],
    )
