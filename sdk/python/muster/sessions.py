"""Live sessions: the progress of runs as it is reported and watched, and their final results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from muster import values
from muster.calls import Transport, pause_seconds
from muster.errors import Unavailable
from muster.reports import ProgressUpdate, ReportStream, SessionState, UpdateVerdict, update_message
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc


@dataclass(frozen=True, slots=True)
class Session:
    """A live session.

    Attributes:
        session_id: An allocation key or any id of the caller's.
        state: Where it stands.
        stage: What it does now, in the worker's words.
        current_page: Pages done.
        total_pages: Pages to do; 0 when unknown.
        products_found: So far.
        errors_count: So far.
        started_at: When it began.
        updated_at: When it was last reported.
        estimated_completion: None when it is not known.
        eta_method: How that was reckoned, such as `pace`; empty when unknown.
        slot_id: May be empty.
        client_id: May be empty.
        tags: Its tags.
        sequence: Of the last report that was taken.
    """

    session_id: str
    state: SessionState
    stage: str
    current_page: int
    total_pages: int
    products_found: int
    errors_count: int
    started_at: datetime
    updated_at: datetime
    estimated_completion: datetime | None
    eta_method: str
    slot_id: str
    client_id: str
    tags: tuple[str, ...]
    sequence: int


@dataclass(frozen=True, slots=True)
class SessionStart:
    """What a session is registered with.

    Attributes:
        session_id: 1 to 128 characters.
        started_at: When the run began; None means now.
        stage: Up to 64 characters.
        total_pages: 0 when unknown.
        slot_id: May be empty.
        client_id: May be empty.
        tags: Up to 16, of 1 to 64 characters.
        config_snapshot_json: A JSON object recorded with the result, at most 16 KiB; may be empty.
        allocation_key: The allocation to renew while the session makes progress; empty for none.
        lease_token: Its token; needed with `allocation_key`.
    """

    session_id: str
    started_at: datetime | None = None
    stage: str = ""
    total_pages: int = 0
    slot_id: str = ""
    client_id: str = ""
    tags: Sequence[str] = ()
    config_snapshot_json: str = ""
    allocation_key: str = ""
    lease_token: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The final result of a session; with `started_at` it can be recorded even when the session is not live there."""

    session_id: str
    state: SessionState
    stage: str = ""
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    started_at: datetime | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class CrawlingResult:
    """The one row that stays of a session."""

    session_id: str
    state: SessionState
    stage: str
    total_pages: int
    products_found: int
    errors_count: int
    started_at: datetime
    completed_at: datetime
    execution_time: timedelta
    config_snapshot_json: str
    message: str
    slot_id: str
    client_id: str


@dataclass(frozen=True, slots=True)
class SessionFilter:
    """Selects sessions: all that is set must hold."""

    states: Sequence[SessionState] = ()
    slot_id: str = ""
    client_id: str = ""
    stage: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class SessionChanges:
    """One answer of a watch; with `snapshot` set, forget what was held before.

    `removed` names sessions that ended or no longer match.
    """

    snapshot: bool
    sessions: tuple[Session, ...]
    removed: tuple[str, ...]
    epoch: str
    offset: int


@dataclass(frozen=True, slots=True)
class SessionTotals:
    """The organization's live figures; `by_state` counts by the name of a state."""

    live: int
    by_state: Mapping[str, int]
    pages: int
    products: int
    errors: int
    pages_per_second: float
    results_committed: int


class Sessions:
    """`client.sessions`: `start`, `report` and `complete` are for workers; role operator or worker for reading."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> session_pb2_grpc.SessionServiceAsyncStub:
        return self._transport.stub(session_pb2_grpc.SessionServiceStub)

    @property
    def _watch(self) -> session_pb2_grpc.WatchServiceAsyncStub:
        return self._transport.stub(session_pb2_grpc.WatchServiceStub)

    async def start(
        self, start: SessionStart, *, progress: ProgressUpdate | None = None, total_seconds: float | None = None
    ) -> Session:
        """Registers a session, or registers it again; safe to repeat.

        Args:
            start: What it is registered with.
            progress: Its newest report, when it is registered again.
            total_seconds: How long to keep trying; None means the client's policy.

        Raises:
            SessionAlreadyCompleted: it ended before.
            LimitReached: the organization has as many live sessions as it may.
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.StartSessionRequest(
            session_id=start.session_id,
            stage=start.stage,
            total_pages=start.total_pages,
            started_at=values.timestamp(start.started_at),
            slot_id=start.slot_id,
            client_id=start.client_id,
            tags=start.tags,
            config_snapshot_json=start.config_snapshot_json,
            allocation_key=start.allocation_key,
            lease_token=start.lease_token,
            progress=update_message(progress) if progress else None,
        )
        answer = await self._transport.call(self._stub.StartSession, request, total_seconds=total_seconds)
        return _session(answer.session)

    async def report(self, updates: Sequence[ProgressUpdate]) -> tuple[UpdateVerdict, ...]:
        """Reports 1 to 1000 updates in a call of their own; `muster.Worker` uses the stream, which is cheaper.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.ReportProgressRequest(updates=[update_message(update) for update in updates])
        answer = await self._transport.call(self._stub.ReportProgress, request)
        return tuple(values.member(UpdateVerdict, verdict) for verdict in answer.verdicts)

    def reports(self) -> ReportStream:
        """Opens a stream of reports.

        Raises:
            NotConfigured: the client was not told the session_tracker's address.
        """
        return ReportStream(self._transport)

    async def complete(self, end: SessionEnd, *, total_seconds: float | None = None) -> CrawlingResult:
        """Commits the final result of a session, once; the same result again gets the same answer.

        Raises:
            SessionAlreadyCompleted: another result stands.
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.CompleteSessionRequest(
            session_id=end.session_id,
            state=session_pb2.SessionState.ValueType(end.state),
            stage=end.stage,
            total_pages=end.total_pages,
            products_found=end.products_found,
            errors_count=end.errors_count,
            started_at=values.timestamp(end.started_at),
            message=end.message,
        )
        answer = await self._transport.call(self._stub.CompleteSession, request, total_seconds=total_seconds)
        return _result(answer.result)

    async def get(self, session_id: str) -> Session:
        """Reads a live session.

        Raises:
            SessionNotFound: it is not live there.
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return _session((await self._transport.call(self._watch.GetSession, request)).session)

    async def list(self, filter: SessionFilter | None = None, *, page_size: int = 100) -> AsyncIterator[Session]:
        """Yields the live sessions by id.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.ListSessionsRequest(filter=_filter_message(filter), page_size=page_size)
        async for answer in self._transport.pages(self._watch.ListSessions, request):
            for session in answer.sessions:
                yield _session(session)

    async def watch(
        self, filter: SessionFilter | None = None, *, interval: timedelta | None = None
    ) -> AsyncIterator[SessionChanges]:
        """Yields a snapshot, then every change; goes on where it was when the connection breaks.

        Args:
            filter: Which sessions; None for all.
            interval: The least time between two answers, up to 60 s; None means 100 ms.

        Raises:
            Unavailable: the service did not come back within the client's policy.
            MusterError: it was refused.
        """
        request = session_pb2.WatchSessionsRequest(filter=_filter_message(filter), interval=values.duration(interval))
        clock = asyncio.get_running_loop().time
        heard, attempt = clock(), 0
        while True:
            try:
                async for answer in self._transport.stream(self._watch.WatchSessions, request):
                    heard, attempt = clock(), 0
                    request.epoch, request.offset = answer.epoch, answer.offset
                    sessions = tuple(_session(session) for session in answer.sessions)
                    yield SessionChanges(answer.snapshot, sessions, tuple(answer.removed), answer.epoch, answer.offset)
                return
            except Unavailable as error:
                attempt += 1
                pause = pause_seconds(error, attempt)
                if clock() + pause - heard > self._transport.policy.total_seconds:
                    raise
                await asyncio.sleep(pause)

    async def totals(self) -> SessionTotals:
        """Reads the live figures.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._watch.GetTotals, session_pb2.GetTotalsRequest())
        return SessionTotals(
            answer.live,
            dict(answer.by_state),
            answer.pages,
            answer.products,
            answer.errors,
            answer.pages_per_second,
            answer.results_committed,
        )

    async def results(
        self,
        *,
        state: SessionState = SessionState.UNSPECIFIED,
        slot_id: str = "",
        completed_after: datetime | None = None,
        completed_before: datetime | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[CrawlingResult]:
        """Yields final results, newest first.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.ListResultsRequest(
            page_size=page_size,
            state=session_pb2.SessionState.ValueType(state),
            slot_id=slot_id,
            completed_after=values.timestamp(completed_after),
            completed_before=values.timestamp(completed_before),
        )
        async for answer in self._transport.pages(self._watch.ListResults, request):
            for result in answer.results:
                yield _result(result)


def _filter_message(filter: SessionFilter | None) -> session_pb2.SessionFilter | None:
    if filter is None:
        return None
    return session_pb2.SessionFilter(
        states=[session_pb2.SessionState.ValueType(state) for state in filter.states],
        slot_id=filter.slot_id,
        client_id=filter.client_id,
        stage=filter.stage,
        tag=filter.tag,
    )


def _session(message: session_pb2.Session) -> Session:
    return Session(
        session_id=message.session_id,
        state=values.member(SessionState, message.state),
        stage=message.stage,
        current_page=message.current_page,
        total_pages=message.total_pages,
        products_found=message.products_found,
        errors_count=message.errors_count,
        started_at=values.required_moment(message, "started_at"),
        updated_at=values.required_moment(message, "updated_at"),
        estimated_completion=values.moment(message, "estimated_completion"),
        eta_method=message.eta_method,
        slot_id=message.slot_id,
        client_id=message.client_id,
        tags=tuple(message.tags),
        sequence=message.sequence,
    )


def _result(message: session_pb2.CrawlingResult) -> CrawlingResult:
    return CrawlingResult(
        session_id=message.session_id,
        state=values.member(SessionState, message.state),
        stage=message.stage,
        total_pages=message.total_pages,
        products_found=message.products_found,
        errors_count=message.errors_count,
        started_at=values.required_moment(message, "started_at"),
        completed_at=values.required_moment(message, "completed_at"),
        execution_time=message.execution_time.ToTimedelta(),
        config_snapshot_json=message.config_snapshot_json,
        message=message.message,
        slot_id=message.slot_id,
        client_id=message.client_id,
    )
