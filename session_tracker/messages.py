"""The contract's messages of the domain's objects, and the checks that the services share."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp
from muster.session_tracker.v1 import session_pb2

from services.validate import Checks
from session_tracker import eta
from session_tracker.clock import Clock
from session_tracker.commands import Command
from session_tracker.results import RecordedResult
from session_tracker.sessions import ErrorEntry, Session

SESSION_ID_CHARACTERS = 128
STAGE_CHARACTERS = 64
SLOT_CHARACTERS = 128
CLIENT_CHARACTERS = 128
TAG_CHARACTERS = 64
REASON_CHARACTERS = 256
# Workers' clocks are not ours; beyond this it is not a clock that is off but a mistake.
_AHEAD_SECONDS = 60.0
# By how much the time of day may drift from the monotonic clock before moments are shown by the new difference.
_STEADY_SECONDS = 0.005


class SessionMessages:
    """Makes messages of sessions, whose moments are on `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead = 0.0

    def of(self, session: Session) -> session_pb2.Session:
        """Returns the message of one session as it stands."""
        now = self._clock.monotonic()
        ahead = self._clock.wall().timestamp() - now
        if abs(ahead - self._ahead) < _STEADY_SECONDS:
            # Two clocks are not read at one instant: without this, a moment would differ from answer to answer.
            ahead = self._ahead
        else:
            self._ahead = ahead
        rarities = session.rarities
        message = session_pb2.Session(
            session_id=session.session_id,
            state=session.state,  # type: ignore[arg-type]  # the domain's numbers are the contract's
            stage=session.stage,
            current_page=session.current_page,
            total_pages=session.total_pages,
            products_found=session.products_found,
            errors_count=session.errors_count,
            updated_at=_timestamp(ahead + session.reported),
            slot_id=session.slot_id,
            client_id=session.client_id,
            tags=session.tags,
            sequence=session.sequence,
            reason=session.reason,
            state_since=_timestamp(ahead + session.since),
            pages_per_minute_limit=rarities.pages_per_minute_limit,
            pages_per_second=eta.pages_per_second(session),
            rebuilding=session.rebuilding,
            number=session.number,
            important=session.important,
            allocation_key=session.allocation_key,
            traceparent=session.traceparent,
            acknowledged_command=rarities.acknowledged_command,
        )
        message.started_at.FromDatetime(session.started_at)
        for error_class, count in rarities.errors_by_class:
            message.errors_by_class.add(error_class=error_class, count=count)
        forecast = eta.forecast(session, now)
        if forecast is not None:
            message.eta_method = eta.METHOD
            _set(message.estimated_completion, ahead + now + forecast.seconds)
            _set(message.eta_low, ahead + now + forecast.low)
            _set(message.eta_high, ahead + now + forecast.high)
        return message

    def all(self, sessions: Iterable[Session]) -> list[session_pb2.Session]:
        """Returns the messages of some sessions."""
        return [self.of(session) for session in sessions]


# The last moment that a Timestamp can name; a pace of hours per page over billions of pages ends later.
_LAST_SECOND = 253402300799


def _timestamp(at: float) -> Timestamp:
    whole = min(int(at), _LAST_SECOND)
    return Timestamp(seconds=whole, nanos=int((at - whole) % 1.0 * 1e6) * 1000)


def _set(message: Timestamp, at: float) -> None:
    message.CopyFrom(_timestamp(at))


def error_messages(errors: Iterable[ErrorEntry]) -> list[session_pb2.ErrorEntry]:
    """Returns the messages of errors."""
    return [
        session_pb2.ErrorEntry(
            at=_timestamp(error.at), error_class=error.error_class, message=error.message, page=error.page
        )
        for error in errors
    ]


def result_message(result: RecordedResult) -> session_pb2.CrawlingResult:
    """Returns the message of a result on record."""
    message = session_pb2.CrawlingResult(
        session_id=result.session_id,
        state=int(result.state),  # type: ignore[arg-type]  # as above
        stage=result.stage,
        total_pages=result.total_pages,
        products_found=result.products_found,
        errors_count=result.errors_count,
        config_snapshot_json=result.config_snapshot,
        message=result.message,
        slot_id=result.slot_id,
        client_id=result.client_id,
    )
    message.started_at.FromDatetime(result.started_at)
    message.completed_at.FromDatetime(result.completed_at)
    message.execution_time.FromTimedelta(timedelta(seconds=result.execution_time_seconds))
    return message


def command_messages(commands: Iterable[Command]) -> list[session_pb2.SessionCommand]:
    """Returns the messages of commands."""
    return [
        session_pb2.SessionCommand(
            session_id=command.session_id,
            kind=command.kind,  # type: ignore[arg-type]  # as above
            message=command.message,
            number=command.number,
            pages_per_minute=command.pages_per_minute,
        )
        for command in commands
    ]


def check_session_id(checks: Checks, value: str, field: str = "session_id") -> str:
    """Checks a session's id."""
    return checks.text(field, value, min_length=1, max_length=SESSION_ID_CHARACTERS)


def check_start(checks: Checks, clock: Clock, started_at: datetime | None) -> datetime | None:
    """Checks that a run's begin is not in the future."""
    if started_at is not None and started_at.astimezone(UTC) > clock.wall() + timedelta(seconds=_AHEAD_SECONDS):
        checks.fail("started_at", f"must not be more than {_AHEAD_SECONDS:g} s in the future")
    return started_at
