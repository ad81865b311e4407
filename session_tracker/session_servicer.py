"""What workers call: start, report, complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services.call import current
from services.errors import Draining
from services.status import Context
from services.validate import Checks
from session_tracker.clock import Clock
from session_tracker.messages import (
    CLIENT_CHARACTERS,
    SESSION_ID_CHARACTERS,
    SLOT_CHARACTERS,
    STAGE_CHARACTERS,
    TAG_CHARACTERS,
    SessionMessages,
    check_session_id,
    check_start,
    check_update,
    command_messages,
    result_message,
)
from session_tracker.metrics import UPDATES
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Batch, Organizations
from session_tracker.reports import ReportStream
from session_tracker.results import Outcome, Results, StartUnknown
from session_tracker.sessions import FINAL_STATES, REPORTED_STATES, Lease, Registration, State
from session_tracker.snapshots import redact

_MAX_UPDATES = 1000
_MAX_TAGS = 16
_SNAPSHOT_BYTES = 16 * 1024
_MESSAGE_CHARACTERS = 1024

_TAKEN = UPDATES.labels("taken")
_STALE = UPDATES.labels("stale")
_UNKNOWN = UPDATES.labels("unknown")


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """The contract's SessionService."""

    def __init__(self, organizations: Organizations, results: Results, clock: Clock, draining: asyncio.Event) -> None:
        self._organizations = organizations
        self._results = results
        self._clock = clock
        self._draining = draining
        self._messages = SessionMessages(clock)
        self._streams: set[ReportStream] = set()

    async def StartSession(
        self, request: session_pb2.StartSessionRequest, context: Context
    ) -> session_pb2.StartSessionResponse:
        """See the contract."""
        checks = Checks()
        check_session_id(checks, request.session_id)
        checks.text("stage", request.stage, max_length=STAGE_CHARACTERS)
        started_at = check_start(checks, self._clock, checks.moment(request, "started_at"))
        checks.text("slot_id", request.slot_id, max_length=SLOT_CHARACTERS)
        checks.text("client_id", request.client_id, max_length=CLIENT_CHARACTERS)
        checks.count("tags", request.tags, least=0, most=_MAX_TAGS)
        for index, tag in enumerate(request.tags[:_MAX_TAGS]):
            checks.text(f"tags[{index}]", tag, min_length=1, max_length=TAG_CHARACTERS)
        checks.unique("tags", request.tags[:_MAX_TAGS])
        snapshot = _check_snapshot(checks, request.config_snapshot_json)
        lease = None
        if request.allocation_key:
            key = str(checks.uuid("allocation_key", request.allocation_key))
            # One string instead of two, for sessions that are named by their allocation.
            key = request.session_id if key == request.session_id else key
            lease = Lease(key, checks.token("lease_token", request.lease_token))
        elif request.lease_token:
            checks.fail("allocation_key", "required with lease_token: a UUID")
        progress = None
        if request.HasField("progress"):
            progress = request.progress
            check_update(checks, progress, "progress.")
            if progress.session_id != request.session_id:
                checks.fail("progress.session_id", "must be the request's session_id")
        checks.done()
        session = self._organizations.of(current().principal.organization_id).start(
            Registration(
                session_id=request.session_id,
                stage=request.stage,
                total_pages=request.total_pages,
                started_at=started_at,
                slot_id=request.slot_id,
                client_id=request.client_id,
                tags=tuple(request.tags),
                config_snapshot=snapshot,
                lease=lease,
                progress=progress,
            )
        )
        return session_pb2.StartSessionResponse(session=self._messages.of(session))

    async def ReportProgress(
        self, request: session_pb2.ReportProgressRequest, context: Context
    ) -> session_pb2.ReportProgressResponse:
        """See the contract."""
        _check_updates(request.updates)
        batch = self._organizations.of(current().principal.organization_id).report(request.updates)
        _count(batch)
        return session_pb2.ReportProgressResponse(
            verdicts=batch.verdicts,  # type: ignore[arg-type]  # the domain's numbers are the contract's
            commands=command_messages(batch.commands),
        )

    async def ReportStream(
        self, request_iterator: AsyncIterator[session_pb2.ReportStreamRequest], context: Context
    ) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        """See the contract."""
        organization = self._organizations.of(current().principal.organization_id)

        def take(request: session_pb2.ReportStreamRequest, stream: ReportStream) -> session_pb2.ReportStreamResponse:
            updates = request.updates
            _check_updates(updates, batch=request.batch)
            batch = organization.report(updates, stream)
            taken, stale, unknown = _count(batch)
            response = session_pb2.ReportStreamResponse(batch=request.batch, taken=taken, stale=stale)
            if unknown:
                response.unknown_sessions.extend(
                    {
                        update.session_id: None
                        for update, verdict in zip(updates, batch.verdicts, strict=True)
                        if verdict == UNKNOWN
                    }
                )
            if batch.commands:
                response.commands.extend(command_messages(batch.commands))
            return response

        if self._draining.is_set():
            raise Draining("the service is stopping: open the stream again", retry_after_seconds=1.0)
        stream = ReportStream(take)
        self._streams.add(stream)
        try:
            async for response in stream.responses(request_iterator):
                yield response
        finally:
            self._streams.discard(stream)

    async def CompleteSession(
        self, request: session_pb2.CompleteSessionRequest, context: Context
    ) -> session_pb2.CompleteSessionResponse:
        """See the contract."""
        checks = Checks()
        check_session_id(checks, request.session_id)
        checks.choice("state", request.state, FINAL_STATES, "COMPLETED, FAILED, STOPPED")
        checks.text("stage", request.stage, max_length=STAGE_CHARACTERS)
        started_at = check_start(checks, self._clock, checks.moment(request, "started_at"))
        snapshot = _check_snapshot(checks, request.config_snapshot_json)
        checks.text("message", request.message, max_length=_MESSAGE_CHARACTERS)
        checks.done()
        outcome = Outcome(
            session_id=request.session_id,
            state=State(request.state),
            stage=request.stage,
            total_pages=request.total_pages,
            products_found=request.products_found,
            errors_count=request.errors_count,
            started_at=started_at,
            config_snapshot=snapshot,
            message=request.message,
        )
        try:
            result = await self._results.complete(current().principal.organization_id, outcome)
        except StartUnknown:
            checks.fail("started_at", "required: the session is not live here")
            checks.done()
            raise
        return session_pb2.CompleteSessionResponse(result=result_message(result))

    async def end_streams(self) -> None:
        """Waits until the service drains, and then ends the open streams and wakes the watchers to end theirs."""
        await self._draining.wait()
        for stream in list(self._streams):
            stream.drain()
        self._organizations.wake_watchers()


def _check_snapshot(checks: Checks, text: str) -> str:
    snapshot = checks.json_object("config_snapshot_json", text, max_bytes=_SNAPSHOT_BYTES)
    if not snapshot:
        return ""
    try:
        return redact(snapshot)
    except ValueError as error:
        checks.fail("config_snapshot_json", str(error))
        return ""


def _check_updates(updates: Iterable[session_pb2.ProgressUpdate], batch: int = 1) -> None:
    """Checks a batch before any of it is taken.

    The first pass only tells what is surely right, at a sixth of the price; `Checks` has the last word on the rest.

    Raises:
        InvalidField: names every field that is wrong.
    """
    size = len(updates)  # type: ignore[arg-type]
    if 0 < size <= _MAX_UPDATES and batch > 0:
        for update in updates:
            if (
                update.state not in REPORTED_STATES
                or not update.sequence
                or len(stage := update.stage) > STAGE_CHARACTERS
                or not stage.isprintable()
                or not 0 < len(name := update.session_id) <= SESSION_ID_CHARACTERS
                or not name.isprintable()
            ):
                break
        else:
            return
    checks = Checks()
    if batch <= 0:
        checks.fail("batch", "required: from 1, growing")
    checks.count("updates", updates, most=_MAX_UPDATES)  # type: ignore[arg-type]
    checks.done()
    for index, update in enumerate(updates):
        check_update(checks, update, f"updates[{index}].")
        # The first malformed update says it all; a thousand would not fit into a call's trailers.
        checks.done()


def _count(batch: Batch) -> tuple[int, int, int]:
    verdicts = batch.verdicts
    taken = verdicts.count(TAKEN)
    if taken:
        _TAKEN.inc(taken)
    if taken == len(verdicts):
        return taken, 0, 0
    stale, unknown = verdicts.count(STALE), verdicts.count(UNKNOWN)
    _STALE.inc(stale)
    _UNKNOWN.inc(unknown)
    return taken, stale, unknown
