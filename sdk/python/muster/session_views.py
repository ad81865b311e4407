"""Live sessions as they are read and watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from muster import values
from muster.reports import ErrorEntry, SessionState
from muster.session_tracker.v1 import session_pb2

_EPOCH = datetime.fromtimestamp(0, UTC)


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
        reason: Why it is in this state; may be empty.
        state_since: Since when it is in this state.
        errors_by_class: Counts by class, most first.
        eta_low: The early end of a 90 % interval around `estimated_completion`; set with it.
        eta_high: The late end.
        pages_per_minute_limit: The speed limit it was last told; 0 for none.
        pages_per_second: Its own pace; 0 when unknown.
        rebuilding: Known from a checkpoint only; its worker has yet to report again.
        number: Names it in packed changes of one epoch.
        important: Whether it is checkpointed.
        allocation_key: May be empty.
        traceparent: May be empty.
        acknowledged_command: The last command that its worker carried out.
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
    reason: str = ""
    state_since: datetime | None = None
    errors_by_class: Mapping[str, int] = field(default_factory=dict)
    eta_low: datetime | None = None
    eta_high: datetime | None = None
    pages_per_minute_limit: float = 0.0
    pages_per_second: float = 0.0
    rebuilding: bool = False
    number: int = 0
    important: bool = False
    allocation_key: str = ""
    traceparent: str = ""
    acknowledged_command: int = 0


@dataclass(frozen=True, slots=True)
class SessionDetail:
    """A live session with what a list leaves out.

    Attributes:
        session: As it stands.
        last_errors: The newest errors, oldest first; at most 10.
        config_snapshot_json: Redacted; may be empty.
        pages_per_span: Pages done in each of the last spans of 10 s, oldest first; the last one is not over yet.
        span_begins: When the last span began.
    """

    session: Session
    last_errors: tuple[ErrorEntry, ...]
    config_snapshot_json: str
    pages_per_span: tuple[int, ...]
    span_begins: datetime | None


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

    `removed` names sessions that left memory or no longer match; `rebuilding` says that sessions may be missing which
    workers have yet to report again.
    """

    snapshot: bool
    sessions: tuple[Session, ...]
    removed: tuple[str, ...]
    epoch: str
    offset: int
    rebuilding: bool = False


@dataclass(frozen=True, slots=True)
class SessionTotals:
    """Live figures; `by_state` counts by the name of a state."""

    live: int
    by_state: Mapping[str, int]
    pages: int
    products: int
    errors: int
    pages_per_second: float
    results_committed: int
    rebuilding: bool = False


@dataclass(frozen=True, slots=True)
class ControlAnswer:
    """How many sessions will be told, and which of those named are not live."""

    told: int
    unknown_sessions: tuple[str, ...]


class UnknownNumber(Exception):
    """A packed change names a session that the watcher was never shown."""


class SessionView(Mapping[str, Session]):
    """What a watcher holds: the latest state of every session it was shown, by id.

    Attributes:
        rebuilding: Whether sessions may be missing that workers have yet to report again.
    """

    def __init__(self) -> None:
        self._held: dict[str, Session] = {}
        self._names: dict[int, str] = {}
        self.rebuilding = False

    def __getitem__(self, session_id: str) -> Session:
        return self._held[session_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, answer: session_pb2.WatchSessionsResponse) -> SessionChanges:
        """Takes an answer and returns what changed by it, packed changes as whole sessions.

        Raises:
            UnknownNumber: nothing is to be made of it without a new snapshot.
        """
        if answer.snapshot:
            self._held.clear()
            self._names.clear()
        changed = [session_of(message) for message in answer.sessions]
        for session in changed:
            self._held[session.session_id] = session
            self._names[session.number] = session.session_id
        changed += self._unpacked(answer.packed)
        for name in answer.removed:
            gone = self._held.pop(name, None)
            if gone is not None and self._names.get(gone.number) == name:
                del self._names[gone.number]
        self.rebuilding = answer.rebuilding
        return SessionChanges(
            answer.snapshot, tuple(changed), tuple(answer.removed), answer.epoch, answer.offset, answer.rebuilding
        )

    def _unpacked(self, packed: session_pb2.PackedSessions) -> list[Session]:
        changed = []
        for number, state, page, total, products, errors, sequence, updated_at_ms in zip(
            packed.number,
            packed.state,
            packed.current_page,
            packed.total_pages,
            packed.products_found,
            packed.errors_count,
            packed.sequence,
            packed.updated_at_ms,
            strict=True,
        ):
            name = self._names.get(number)
            if name is None:
                raise UnknownNumber(number)
            session = self._held[name] = replace(
                self._held[name],
                state=values.member(SessionState, state),
                current_page=page,
                total_pages=total,
                products_found=products,
                errors_count=errors,
                sequence=sequence,
                updated_at=_EPOCH + timedelta(milliseconds=updated_at_ms),
            )
            changed.append(session)
        return changed


def filter_message(filter: SessionFilter | None) -> session_pb2.SessionFilter | None:
    """Returns a filter as a message."""
    if filter is None:
        return None
    return session_pb2.SessionFilter(
        states=[session_pb2.SessionState.ValueType(state) for state in filter.states],
        slot_id=filter.slot_id,
        client_id=filter.client_id,
        stage=filter.stage,
        tag=filter.tag,
    )


def session_of(message: session_pb2.Session) -> Session:
    """Returns a live session of its message."""
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
        reason=message.reason,
        state_since=values.moment(message, "state_since"),
        errors_by_class={entry.error_class: entry.count for entry in message.errors_by_class},
        eta_low=values.moment(message, "eta_low"),
        eta_high=values.moment(message, "eta_high"),
        pages_per_minute_limit=message.pages_per_minute_limit,
        pages_per_second=message.pages_per_second,
        rebuilding=message.rebuilding,
        number=message.number,
        important=message.important,
        allocation_key=message.allocation_key,
        traceparent=message.traceparent,
        acknowledged_command=message.acknowledged_command,
    )


def detail_of(answer: session_pb2.GetSessionResponse) -> SessionDetail:
    """Returns a live session in detail."""
    return SessionDetail(
        session_of(answer.session),
        tuple(
            ErrorEntry(values.required_moment(entry, "at"), entry.error_class, entry.message, entry.page)
            for entry in answer.last_errors
        ),
        answer.config_snapshot_json,
        tuple(answer.pages_per_span),
        values.moment(answer, "span_begins"),
    )


def totals_of(answer: session_pb2.GetTotalsResponse) -> SessionTotals:
    """Returns live figures."""
    return SessionTotals(
        answer.live,
        dict(answer.by_state),
        answer.pages,
        answer.products,
        answer.errors,
        answer.pages_per_second,
        answer.results_committed,
        answer.rebuilding,
    )
