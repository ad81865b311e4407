"""The contract's messages of the domain's objects, and the checks that both services share."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from muster.session_tracker.v1 import session_pb2

from services.validate import Checks
from session_tracker.clock import Clock
from session_tracker.results import RecordedResult
from session_tracker.sessions import REPORTED_STATES, LeaseLost, Session, Update

SESSION_ID_CHARACTERS = 128
STAGE_CHARACTERS = 64
SLOT_CHARACTERS = 128
CLIENT_CHARACTERS = 128
TAG_CHARACTERS = 64
# Workers' clocks are not ours; beyond this it is not a clock that is off but a mistake.
_AHEAD_SECONDS = 60.0


class SessionMessages:
    """Makes messages of live sessions, whose moments are on `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def of(self, session: Session) -> session_pb2.Session:
        """Returns the message of one session as it stands."""
        message = session_pb2.Session(
            session_id=session.session_id,
            state=session.state,  # type: ignore[arg-type]  # the domain's numbers are the contract's
            stage=session.stage,
            current_page=session.current_page,
            total_pages=session.total_pages,
            products_found=session.products_found,
            errors_count=session.errors_count,
            slot_id=session.slot_id,
            client_id=session.client_id,
            tags=session.tags,
            sequence=session.sequence,
        )
        message.started_at.FromDatetime(session.started_at)
        message.updated_at.FromDatetime(self._clock.moment(session.reported))
        now = self._clock.monotonic()
        remaining = session.remaining_seconds(now)
        if remaining is not None:
            message.estimated_completion.FromDatetime(self._clock.wall() + timedelta(seconds=remaining))
            message.eta_method = "pace"
        return message

    def all(self, sessions: Iterable[Session]) -> list[session_pb2.Session]:
        """Returns the messages of some sessions."""
        return [self.of(session) for session in sessions]


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


def command_messages(commands: Iterable[LeaseLost]) -> list[session_pb2.SessionCommand]:
    """Returns the messages of commands."""
    return [
        session_pb2.SessionCommand(
            session_id=command.session_id, kind=session_pb2.COMMAND_KIND_LEASE_LOST, message=command.message
        )
        for command in commands
    ]


def check_session_id(checks: Checks, value: str, field: str = "session_id") -> str:
    """Checks a session's id."""
    return checks.text(field, value, min_length=1, max_length=SESSION_ID_CHARACTERS)


def check_update(checks: Checks, update: Update, path: str) -> None:
    """Checks one report; `path` is its place in the request, with a dot at its end."""
    check_session_id(checks, update.session_id, f"{path}session_id")
    if update.sequence == 0:
        checks.fail(f"{path}sequence", "required: from 1")
    checks.choice(f"{path}state", update.state, REPORTED_STATES, "RUNNING, PAUSED, RATE_LIMITED, or unspecified")
    checks.text(f"{path}stage", update.stage, max_length=STAGE_CHARACTERS)


def check_start(checks: Checks, clock: Clock, started_at: datetime | None) -> datetime | None:
    """Checks that a run's begin is not in the future."""
    if started_at is not None and started_at.astimezone(UTC) > clock.wall() + timedelta(seconds=_AHEAD_SECONDS):
        checks.fail("started_at", f"must not be more than {_AHEAD_SECONDS:g} s in the future")
    return started_at
