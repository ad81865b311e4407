"""Live sessions: the progress of runs as it is reported and watched, and their final results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from muster import values
from muster.calls import Transport, pause_seconds
from muster.errors import Unavailable
from muster.reports import CommandKind, ProgressUpdate, ReportStream, SessionState, UpdateVerdict, update_message
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc
from muster.session_views import (
    ControlAnswer,
    Session,
    SessionChanges,
    SessionDetail,
    SessionFilter,
    SessionTotals,
    SessionView,
    UnknownNumber,
    detail_of,
    filter_message,
    session_of,
    totals_of,
)


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """How often a session's state is written to the database while it runs; with neither: every 30 s.

    Attributes:
        every_pages: After so many pages, 1 to 1,000,000; 0: not by pages.
        every: After so much time, 1 s to 1 h; None: not by time.
    """

    every_pages: int = 0
    every: timedelta | None = None


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
        checkpoint: Makes it important: its state survives a loss of the tracker's memory. None: it is not.
        traceparent: W3C trace context of the run, 55 characters; may be empty.
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
    checkpoint: CheckpointPolicy | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The final result of a session; with all of it set it can be recorded even when the session is not live there.

    What is left empty of `config_snapshot_json`, `slot_id` and `client_id` is as the session was started with.
    """

    session_id: str
    state: SessionState
    stage: str = ""
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    started_at: datetime | None = None
    message: str = ""
    config_snapshot_json: str = ""
    slot_id: str = ""
    client_id: str = ""


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


class Sessions:
    """`client.sessions`: the calls of the session_tracker's contract.

    `start`, `report` and `complete` are for workers (who have it easier with `Client.session`), `control` and `results`
    for operators, and the rest is for both.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> session_pb2_grpc.SessionServiceAsyncStub:
        return self._transport.stub(session_pb2_grpc.SessionServiceStub)

    @property
    def _watch(self) -> session_pb2_grpc.WatchServiceAsyncStub:
        return self._transport.stub(session_pb2_grpc.WatchServiceStub)

    @property
    def _control(self) -> session_pb2_grpc.ControlServiceAsyncStub:
        return self._transport.stub(session_pb2_grpc.ControlServiceStub)

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
            checkpoint=_policy_message(start.checkpoint) if start.checkpoint else None,
            traceparent=start.traceparent,
        )
        answer = await self._transport.call(self._stub.StartSession, request, total_seconds=total_seconds)
        return session_of(answer.session)

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
            config_snapshot_json=end.config_snapshot_json,
            slot_id=end.slot_id,
            client_id=end.client_id,
        )
        answer = await self._transport.call(self._stub.CompleteSession, request, total_seconds=total_seconds)
        return _result(answer.result)

    async def get(self, session_id: str) -> Session:
        """Reads a live session.

        Raises:
            SessionNotFound: it is not live there.
            MusterError: it was refused, or did not succeed in time.
        """
        return (await self.detail(session_id)).session

    async def detail(self, session_id: str) -> SessionDetail:
        """Reads a live session with its last errors, its settings and its pages of the last five minutes.

        Raises:
            SessionNotFound: it is not live there.
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return detail_of(await self._transport.call(self._watch.GetSession, request))

    async def list(self, filter: SessionFilter | None = None, *, page_size: int = 100) -> AsyncIterator[Session]:
        """Yields the live sessions by id.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.ListSessionsRequest(filter=filter_message(filter), page_size=page_size)
        async for answer in self._transport.pages(self._watch.ListSessions, request):
            for session in answer.sessions:
                yield session_of(session)

    def watch(
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
        return self._changes(SessionView(), filter, interval)

    async def views(
        self, filter: SessionFilter | None = None, *, interval: timedelta | None = None
    ) -> AsyncIterator[SessionView]:
        """Yields the latest state of every session by its id, after each change; goes on by itself as `watch` does.

        It is the same view each time, brought up to date: copy what is to be kept.

        Args:
            filter: Which sessions; None for all.
            interval: The least time between two changes, up to 60 s; None means 100 ms.

        Raises:
            Unavailable: the service did not come back within the client's policy.
            MusterError: it was refused.
        """
        view = SessionView()
        async with aclosing(self._changes(view, filter, interval)) as changes:
            async for _ in changes:
                yield view

    async def _changes(
        self, view: SessionView, filter: SessionFilter | None, interval: timedelta | None
    ) -> AsyncGenerator[SessionChanges, None]:
        request = session_pb2.WatchSessionsRequest(
            filter=filter_message(filter), interval=values.duration(interval), packed=True
        )
        clock = asyncio.get_running_loop().time
        # Since when nothing is heard, rather than the last change: a quiet watch is no broken one.
        failing_since: float | None = None
        attempt = 0
        while True:
            try:
                async with aclosing(self._transport.stream(self._watch.WatchSessions, request)) as answers:
                    async for answer in answers:
                        failing_since, attempt = None, 0
                        change = view.apply(answer)
                        request.epoch, request.offset = answer.epoch, answer.offset
                        yield change
                return
            except UnknownNumber:
                request.epoch, request.offset = "", 0
                await asyncio.sleep(pause_seconds(None, 1))
            except Unavailable as error:
                attempt += 1
                pause = pause_seconds(error, attempt)
                failing_since = clock() if failing_since is None else failing_since
                if clock() + pause - failing_since > self._transport.policy.total_seconds:
                    raise
                await asyncio.sleep(pause)

    async def totals(self, *, slot_id: str = "", fleet: bool = False) -> SessionTotals:
        """Reads the live figures.

        Args:
            slot_id: Only of this slot; empty means of the organization.
            fleet: Of all organizations together, which only services may.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.GetTotalsRequest(slot_id=slot_id, fleet=fleet)
        return totals_of(await self._transport.call(self._watch.GetTotals, request))

    async def control(
        self,
        kind: CommandKind,
        session_ids: Sequence[str] = (),
        *,
        filter: SessionFilter | None = None,
        pages_per_minute: float = 0.0,
        reason: str = "",
    ) -> ControlAnswer:
        """Tells sessions to pause, resume, stop or keep to a speed limit; safe to repeat.

        Args:
            kind: PAUSE, RESUME, STOP or SPEED_LIMIT.
            session_ids: Up to 1000; empty means all that match `filter`, which must bind something then.
            filter: Which, when no ids are given.
            pages_per_minute: With SPEED_LIMIT, up to 1,000,000; 0 lifts the limit.
            reason: Why, up to 256 characters.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = session_pb2.ControlSessionsRequest(
            session_ids=session_ids,
            filter=filter_message(filter),
            kind=session_pb2.CommandKind.ValueType(kind),
            pages_per_minute=pages_per_minute,
            reason=reason,
        )
        answer = await self._transport.call(self._control.ControlSessions, request)
        return ControlAnswer(answer.told, tuple(answer.unknown_sessions))

    async def results(
        self,
        *,
        state: SessionState = SessionState.UNSPECIFIED,
        slot_id: str = "",
        client_id: str = "",
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
            client_id=client_id,
        )
        async for answer in self._transport.pages(self._watch.ListResults, request):
            for result in answer.results:
                yield _result(result)


def _policy_message(policy: CheckpointPolicy) -> session_pb2.CheckpointPolicy:
    return session_pb2.CheckpointPolicy(every_pages=policy.every_pages, every=values.duration(policy.every))


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
