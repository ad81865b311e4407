"""Progress reports: absolute values on one long stream, and what the service answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

import grpc

from muster import values
from muster.calls import Transport
from muster.errors import Unavailable
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

MOST_UPDATES = 1000
"""Updates in one batch."""

# What one stream may name; a new stream begins anew.
_MOST_NAMES = 100_000


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
    """What a session is told.

    LEASE_LOST: stop working on it and do not save. PAUSE: do nothing until RESUME or STOP. STOP: end the run in good
    order. SPEED_LIMIT: do not exceed so many pages per minute.
    """

    UNSPECIFIED = 0
    LEASE_LOST = 1
    PAUSE = 2
    RESUME = 3
    STOP = 4
    SPEED_LIMIT = 5


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One error of a session.

    Attributes:
        at: When, by the worker's clock.
        error_class: 1 to 64 characters.
        message: In words, up to 256 characters.
        page: The page it was met on; 0 when none.
    """

    at: datetime
    error_class: str
    message: str = ""
    page: int = 0


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """One report of one session: absolute values, and a sequence that grows with every report, from 1.

    Attributes:
        state: RUNNING, PAUSED or RATE_LIMITED.
        reason: Why it is in this state, up to 256 characters; empty keeps it while the state stays.
        errors_by_class: Pairs of class and count, up to 16; empty keeps what stands.
        last_errors: The newest errors, at most 10, oldest first; empty keeps what stands.
        acknowledged_command: The number of the last command that was carried out; 0 for none.
    """

    session_id: str
    sequence: int
    current_page: int
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    stage: str = ""
    state: SessionState = SessionState.RUNNING
    reason: str = ""
    errors_by_class: tuple[tuple[str, int], ...] = ()
    last_errors: tuple[ErrorEntry, ...] = ()
    acknowledged_command: int = 0

    def counters_only(self, before: ProgressUpdate) -> bool:
        """Whether nothing but counters and sequence changed since a report that was taken."""
        return (
            self.state is before.state
            and self.stage == before.stage
            and self.reason == before.reason
            and self.errors_by_class == before.errors_by_class
            and self.last_errors == before.last_errors
            and self.acknowledged_command == before.acknowledged_command
        )


@dataclass(frozen=True, slots=True)
class SessionCommand:
    """What a session's worker is told.

    Attributes:
        message: Why, for people.
        number: What the worker acknowledges once the command is carried out; 0 for LEASE_LOST.
        pages_per_minute: With SPEED_LIMIT; 0 lifts the limit.
    """

    session_id: str
    kind: CommandKind
    message: str
    number: int = 0
    pages_per_minute: float = 0.0


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
        self._handles: dict[str, int] = {}

    @property
    def full(self) -> bool:
        """Whether it has no room for the names of another packed batch: open a new one."""
        return len(self._handles) > _MOST_NAMES - MOST_UPDATES

    async def send(self, updates: Sequence[ProgressUpdate], packed: Sequence[ProgressUpdate] = ()) -> int:
        """Sends 1 to 1000 updates and returns the batch's number.

        Args:
            updates: In full.
            packed: Of these only counters, state and sequence are sent, in a tenth of the bytes; each session once.

        Raises:
            MusterError: the stream broke off.
        """
        self._batch += 1
        message = session_pb2.ReportStreamRequest(
            batch=self._batch, updates=[update_message(update) for update in updates]
        )
        if packed:
            self._pack(message, packed)
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
            SessionCommand(
                command.session_id,
                values.member(CommandKind, command.kind),
                command.message,
                command.number,
                command.pages_per_minute,
            )
            for command in answer.commands
        )
        return ReportAnswer(answer.batch, answer.taken, answer.stale, tuple(answer.unknown_sessions), commands)

    def cancel(self) -> None:
        """Ends the stream at once; safe to repeat."""
        self._call.cancel()

    def _pack(self, message: session_pb2.ReportStreamRequest, updates: Sequence[ProgressUpdate]) -> None:
        for update in updates:
            if update.session_id not in self._handles:
                self._handles[update.session_id] = len(self._handles)
                message.names.append(update.session_id)
        packed = message.packed
        packed.handle.extend(self._handles[update.session_id] for update in updates)
        packed.sequence.extend(update.sequence for update in updates)
        packed.current_page.extend(update.current_page for update in updates)
        packed.total_pages.extend(update.total_pages for update in updates)
        packed.products_found.extend(update.products_found for update in updates)
        packed.errors_count.extend(update.errors_count for update in updates)
        if any(update.state is not SessionState.RUNNING for update in updates):
            packed.state.extend(session_pb2.SessionState.ValueType(update.state) for update in updates)


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
        reason=update.reason,
        errors_by_class=[
            session_pb2.ErrorCount(error_class=name, count=count) for name, count in update.errors_by_class
        ],
        last_errors=[
            session_pb2.ErrorEntry(
                at=values.timestamp(entry.at), error_class=entry.error_class, message=entry.message, page=entry.page
            )
            for entry in update.last_errors
        ],
        acknowledged_command=update.acknowledged_command,
    )
