"""What reads live sessions and results: consoles, the command, and workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from itertools import islice

from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services import pages
from services.call import Role, current
from services.errors import Draining, InvalidPageToken, RoleNotAllowed
from services.status import Context
from services.validate import Checks
from session_tracker.clock import Clock
from session_tracker.feeds import Feeds, Wish
from session_tracker.filters import Filter
from session_tracker.messages import (
    CLIENT_CHARACTERS,
    SLOT_CHARACTERS,
    STAGE_CHARACTERS,
    TAG_CHARACTERS,
    SessionMessages,
    check_session_id,
    error_messages,
    result_message,
)
from session_tracker.organizations import Organization, Organizations
from session_tracker.packing import PieceMessages
from session_tracker.series import SPAN_SECONDS, read
from session_tracker.sessions import FINAL_STATES, Session, State
from session_tracker.store import PostgresResults
from session_tracker.watching import Watching

_EPOCH_CHARACTERS = 64
_MAX_STATES = 16
_DEFAULT_INTERVAL_SECONDS = 0.1
_MAX_INTERVAL_SECONDS = 60.0
# Sessions a list looks at in one go: below a millisecond, so that reports do not wait for a filter that matches few.
_SLICE_SESSIONS = 2000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class WatchServicer(session_pb2_grpc.WatchServiceServicer):
    """The contract's WatchService."""

    def __init__(
        self, organizations: Organizations, store: PostgresResults, clock: Clock, draining: asyncio.Event
    ) -> None:
        self._organizations = organizations
        self._store = store
        self._clock = clock
        self._messages = SessionMessages(clock)
        self._watching = Watching(Feeds(organizations, PieceMessages(clock).encoded, clock, draining), clock)

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: Context
    ) -> session_pb2.GetSessionResponse:
        """See the contract."""
        checks = Checks()
        check_session_id(checks, request.session_id)
        checks.done()
        session = self._organization().get(request.session_id)
        now = self._clock.monotonic()
        response = session_pb2.GetSessionResponse(
            session=self._messages.of(session),
            last_errors=error_messages(session.last_errors),
            config_snapshot_json=session.config_snapshot,
            pages_per_span=read(session.series, now),
        )
        response.span_begins.FromDatetime(self._clock.moment(now // SPAN_SECONDS * SPAN_SECONDS))
        return response

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Context
    ) -> session_pb2.ListSessionsResponse:
        """See the contract."""
        checks = Checks()
        wanted = check_filter(checks, request.filter)
        size = checks.page(request.page_size)
        checks.done()
        scope = f"ListSessions {request.filter.SerializeToString(deterministic=True)!r}"
        position = pages.decode(request.page_token, scope)
        after = ""
        if position is not None:
            match position:
                case [str(after)]:
                    pass
                case _:
                    raise InvalidPageToken("page_token is damaged: begin again without one")
        response = session_pb2.ListSessionsResponse()
        found, more = await self._page(wanted, after, size)
        response.sessions.extend(self._messages.all(found))
        if more:
            response.next_page_token = pages.encode([found[-1].session_id], scope)
        return response

    async def _page(self, wanted: Filter, after: str, size: int) -> tuple[list[Session], bool]:
        """Returns up to `size` sessions after an id, by id, and whether there are more.

        Finished sessions are among them only where the filter names their state.
        """
        organization = self._organization()
        finished = not wanted.states.isdisjoint(FINAL_STATES)
        found: list[Session] = []
        while True:
            looked_at = list(islice(organization.after(after), _SLICE_SESSIONS))
            for session in looked_at:
                if (finished or not session.finished) and wanted.matches(session):
                    if len(found) == size:
                        return found, True
                    found.append(session)
            if len(looked_at) < _SLICE_SESSIONS:
                return found, False
            after = looked_at[-1].session_id
            await asyncio.sleep(0)

    async def WatchSessions(  # type: ignore[override]  # bytes: an answer is encoded once for all who get it
        self, request: session_pb2.WatchSessionsRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """See the contract."""
        checks = Checks()
        wanted = check_filter(checks, request.filter)
        checks.text("epoch", request.epoch, max_length=_EPOCH_CHARACTERS)
        if request.offset and not request.epoch:
            checks.fail("epoch", "required with offset")
        interval = checks.duration(request, "interval", least=0, most=_MAX_INTERVAL_SECONDS)
        checks.done()
        wish = Wish(
            organization_id=current().principal.organization_id,
            filter=wanted,
            interval_seconds=_DEFAULT_INTERVAL_SECONDS if interval is None else interval,
            packed=request.packed,
        )
        # Closed here and not by the garbage collector, so that a watcher who leaves costs nothing from then on.
        async with aclosing(self._watching.answers(wish, request.epoch, request.offset)) as answers:
            async for answer in answers:
                yield answer
        raise Draining("the service is stopping: watch again", retry_after_seconds=1.0)

    async def GetTotals(self, request: session_pb2.GetTotalsRequest, context: Context) -> session_pb2.GetTotalsResponse:
        """See the contract."""
        checks = Checks()
        checks.text("slot_id", request.slot_id, max_length=SLOT_CHARACTERS)
        if request.fleet and request.slot_id:
            checks.fail("slot_id", "must be empty with fleet")
        checks.done()
        if request.fleet:
            role = current().principal.role
            if role < Role.SERVICE:
                raise RoleNotAllowed(
                    "the figures of all organizations are for another service only: leave out fleet",
                    role=role.name.lower(),
                    needs=Role.SERVICE.name.lower(),
                )
            totals = self._organizations.fleet()
        else:
            totals = self._organization().totals(request.slot_id)
        return session_pb2.GetTotalsResponse(
            live=totals.live,
            by_state={state.name: count for state, count in totals.by_state.items()},
            pages=totals.pages,
            products=totals.products,
            errors=totals.errors,
            pages_per_second=totals.pages_per_second,
            results_committed=totals.results_committed,
            rebuilding=totals.rebuilding,
        )

    async def ListResults(
        self, request: session_pb2.ListResultsRequest, context: Context
    ) -> session_pb2.ListResultsResponse:
        """See the contract."""
        checks = Checks()
        size = checks.page(request.page_size)
        if request.state:
            checks.choice("state", request.state, FINAL_STATES, "COMPLETED, FAILED, STOPPED, or unspecified for any")
        checks.text("slot_id", request.slot_id, max_length=SLOT_CHARACTERS)
        checks.text("client_id", request.client_id, max_length=CLIENT_CHARACTERS)
        not_before = checks.moment(request, "completed_after")
        before = checks.moment(request, "completed_before")
        if not_before and before and not_before >= before:
            checks.fail("completed_before", "must be after completed_after")
        checks.done()
        scope = f"ListResults {request.state} {request.slot_id!r} {request.client_id!r} {not_before} {before}"
        after = _position(pages.decode(request.page_token, scope))
        results = await self._store.list(
            current().principal.organization_id,
            state=State(request.state) if request.state else None,
            slot_id=request.slot_id,
            client_id=request.client_id,
            not_before=not_before,
            before=before,
            after=after,
            limit=size + 1,
        )
        response = session_pb2.ListResultsResponse(results=[result_message(result) for result in results[:size]])
        if len(results) > size:
            last = results[size - 1]
            at = (last.completed_at - _EPOCH) // _MICROSECOND
            response.next_page_token = pages.encode([at, last.session_id], scope)
        return response

    def _organization(self) -> Organization:
        return self._organizations.of(current().principal.organization_id)


def _position(position: list[str | int] | None) -> tuple[datetime, str] | None:
    if position is None:
        return None
    match position:
        case [int(at), str(session_id)] if 0 <= at < 2**57 and "\0" not in session_id:
            return _EPOCH + at * _MICROSECOND, session_id
        case _:
            raise InvalidPageToken("page_token is damaged: begin again without one")


def check_filter(checks: Checks, filter: session_pb2.SessionFilter) -> Filter:
    """Checks a filter's fields, all of which are optional."""
    checks.count("filter.states", filter.states, least=0, most=_MAX_STATES)
    for index, state in enumerate(filter.states[:_MAX_STATES]):
        checks.choice(f"filter.states[{index}]", state, (0, *State), "the states, QUEUED to STOPPED")
    return Filter(
        # Unspecified stands for any.
        states=frozenset() if 0 in filter.states else frozenset(filter.states),
        slot_id=checks.text("filter.slot_id", filter.slot_id, max_length=SLOT_CHARACTERS),
        client_id=checks.text("filter.client_id", filter.client_id, max_length=CLIENT_CHARACTERS),
        stage=checks.text("filter.stage", filter.stage, max_length=STAGE_CHARACTERS),
        tag=checks.text("filter.tag", filter.tag, max_length=TAG_CHARACTERS),
    )
