"""What workers call: start, report, complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services.call import current
from services.errors import Draining
from services.interceptor import takes_bytes
from services.status import Context
from services.validate import Checks
from session_tracker.clock import Clock
from session_tracker.messages import (
    CLIENT_CHARACTERS,
    SLOT_CHARACTERS,
    STAGE_CHARACTERS,
    TAG_CHARACTERS,
    SessionMessages,
    check_session_id,
    check_start,
    command_messages,
    result_message,
)
from session_tracker.organizations import Organizations
from session_tracker.reception import Reception, count
from session_tracker.report_checks import check_update, check_updates
from session_tracker.reports import ReportStream
from session_tracker.results import Outcome, Results, StartUnknown
from session_tracker.sessions import FINAL_STATES, CheckpointPolicy, Lease, Registration, State
from session_tracker.snapshots import redact

_MAX_TAGS = 16
_SNAPSHOT_BYTES = 16 * 1024
_MESSAGE_CHARACTERS = 1024
_TRACEPARENT_CHARACTERS = 55
_MAX_CHECKPOINT_PAGES = 1_000_000
_CHECKPOINT_SECONDS = 30.0
_LEAST_CHECKPOINT_SECONDS, _MOST_CHECKPOINT_SECONDS = 1.0, 3600.0


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
        checkpoint = _check_checkpoint(checks, request)
        if len(request.traceparent) not in (0, _TRACEPARENT_CHARACTERS):
            checks.fail("traceparent", f"must be {_TRACEPARENT_CHARACTERS} characters, is {len(request.traceparent)}")
        checks.text("traceparent", request.traceparent, max_length=_TRACEPARENT_CHARACTERS)
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
                checkpoint=checkpoint,
                traceparent=request.traceparent,
            )
        )
        return session_pb2.StartSessionResponse(session=self._messages.of(session))

    async def ReportProgress(
        self, request: session_pb2.ReportProgressRequest, context: Context
    ) -> session_pb2.ReportProgressResponse:
        """See the contract."""
        check_updates(request.updates)
        batch = self._organizations.of(current().principal.organization_id).report(request.updates)
        count(batch)
        return session_pb2.ReportProgressResponse(
            verdicts=batch.verdicts,  # type: ignore[arg-type]  # the domain's numbers are the contract's
            commands=command_messages(batch.commands),
        )

    @takes_bytes
    async def ReportStream(  # type: ignore[override]  # the contract's messages, as bytes
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        """See the contract."""
        reception = Reception(self._organizations.of(current().principal.organization_id))

        async def write(response: session_pb2.ReportStreamResponse) -> None:
            try:
                await context.write(response)
            except grpc.aio.BaseError:
                # The client is gone; its call is about to be cancelled.
                raise asyncio.CancelledError from None

        if self._draining.is_set():
            raise Draining("the service is stopping: open the stream again", retry_after_seconds=1.0)
        stream = ReportStream()
        self._streams.add(stream)
        try:
            await stream.serve(request_iterator, write, reception.take)
        finally:
            self._streams.discard(stream)
            reception.close()
        # A generator, as every handler of a stream is. It yields nothing, since each answer would pass through two more
        # generators on its way to the wire, at a tenth of what a batch costs.
        nothing: tuple[session_pb2.ReportStreamResponse, ...] = ()
        for response in nothing:
            yield response

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
        checks.text("slot_id", request.slot_id, max_length=SLOT_CHARACTERS)
        checks.text("client_id", request.client_id, max_length=CLIENT_CHARACTERS)
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
            slot_id=request.slot_id,
            client_id=request.client_id,
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


def _check_checkpoint(checks: Checks, request: session_pb2.StartSessionRequest) -> CheckpointPolicy | None:
    if not request.HasField("checkpoint"):
        return None
    policy = request.checkpoint
    pages = checks.number("checkpoint.every_pages", policy.every_pages, least=0, most=_MAX_CHECKPOINT_PAGES)
    seconds = checks.duration(
        policy, "every", least=_LEAST_CHECKPOINT_SECONDS, most=_MOST_CHECKPOINT_SECONDS, path="checkpoint.every"
    )
    if not pages and seconds is None:
        seconds = _CHECKPOINT_SECONDS
    return CheckpointPolicy(every_pages=pages, every_seconds=seconds or 0.0)
