"""Progress reports: absolute values on one long stream, and what the service answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import grpc

from muster import values
from muster.calls import Transport
from muster.errors import Unavailable
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc


class SessionState(IntEnum):
    """Where a session stands; UNSPECIFIED in a filter means any."""

    UNSPECIFIED = 0
    QUEUED = 1
    RUNNING = 2
    PAUSED = 3
    RATE_LIMITED = 4
    STALLED = 5
    LOST = 6
    COMPLETED = 7
    FAILED = 8
    STOPPED = 9


class UpdateVerdict(IntEnum):
    """What was done with an update: taken, stale, or its session is not live there."""

    UNSPECIFIED = 0
    TAKEN = 1
    STALE = 2
    UNKNOWN_SESSION = 3


class CommandKind(IntEnum):
    """What a session is told. LEASE_LOST: stop working on it and do not save."""

    UNSPECIFIED = 0
    LEASE_LOST = 1


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """One report of one session: absolute values, and a sequence that grows with every report, from 1."""

    session_id: str
    sequence: int
    current_page: int
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    stage: str = ""
    state: SessionState = SessionState.RUNNING


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """What a session's worker is told."""

    session_id: str
    kind: CommandKind
    message: str


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """The answer to one batch, or commands only (`batch` is 0 then)."""

    batch: int
    taken: int
    stale: int
    unknown_sessions: tuple[str, ...]
    commands: tuple[SessionCommand, ...]


class ReportStream:
    """One long stream of progress reports; made by `Sessions.reports`.

    Send a batch, receive until its answer has come, send the next: the service reads no faster than it takes.
    """

    def __init__(self, transport: Transport) -> None:
        stub = transport.stub(session_pb2_grpc.SessionServiceStub)
        self._transport = transport
        self._call = stub.ReportStream(metadata=transport.metadata)
        self._batch = 0

    async def send(self, updates: Sequence[ProgressUpdate]) -> int:
        """Sends 1 to 1000 updates and returns the batch's number.

        Raises:
            MusterError: the stream broke off.
        """
        self._batch += 1
        message = session_pb2.ReportStreamRequest(
            batch=self._batch, updates=[update_message(update) for update in updates]
        )
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise self._transport.restored(error) from None
        except asyncio.InvalidStateError:
            raise Unavailable("UNAVAILABLE", "", "the report stream has ended") from None
        return self._batch

    async def receive(self) -> ReportAnswer:
        """Waits for the next answer.

        Raises:
            MusterError: the stream broke off, or the service ended it.
        """
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._transport.restored(error) from None
        if not isinstance(answer, session_pb2.ReportStreamResponse):
            raise Unavailable("UNAVAILABLE", "", "the session_tracker ended the report stream")
        commands = tuple(
            SessionCommand(command.session_id, values.member(CommandKind, command.kind), command.message)
            for command in answer.commands
        )
        return ReportAnswer(answer.batch, answer.taken, answer.stale, tuple(answer.unknown_sessions), commands)

    def cancel(self) -> None:
        """Ends the stream at once; safe to repeat."""
        self._call.cancel()


def update_message(update: ProgressUpdate) -> session_pb2.ProgressUpdate:
    """Returns a report as a message."""
    return session_pb2.ProgressUpdate(
        session_id=update.session_id,
        sequence=update.sequence,
        state=session_pb2.SessionState.ValueType(update.state),
        stage=update.stage,
        current_page=update.current_page,
        total_pages=update.total_pages,
        products_found=update.products_found,
        errors_count=update.errors_count,
    )
