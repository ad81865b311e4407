"""What operators call: commands for sessions."""

from __future__ import annotations

from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services.call import current
from services.status import Context
from services.validate import Checks
from session_tracker.commands import CommandKind
from session_tracker.messages import REASON_CHARACTERS, check_session_id
from session_tracker.metrics import COMMANDS
from session_tracker.organizations import Organizations
from session_tracker.sessions import Session
from session_tracker.watch_servicer import check_filter

_MAX_SESSIONS = 1000
_MAX_PAGES_PER_MINUTE = 1_000_000
_GIVEN = (CommandKind.PAUSE, CommandKind.RESUME, CommandKind.STOP, CommandKind.SPEED_LIMIT)


class ControlServicer(session_pb2_grpc.ControlServiceServicer):
    """The contract's ControlService."""

    def __init__(self, organizations: Organizations) -> None:
        self._organizations = organizations

    async def ControlSessions(
        self, request: session_pb2.ControlSessionsRequest, context: Context
    ) -> session_pb2.ControlSessionsResponse:
        """See the contract."""
        checks = Checks()
        ids = request.session_ids
        checks.count("session_ids", ids, least=0, most=_MAX_SESSIONS)
        for index, session_id in enumerate(ids[:_MAX_SESSIONS]):
            check_session_id(checks, session_id, f"session_ids[{index}]")
        checks.unique("session_ids", ids[:_MAX_SESSIONS])
        wanted = check_filter(checks, request.filter)
        if not ids and not wanted.binds:
            checks.fail("filter", "must bind something when no session_ids are given")
        elif ids and request.HasField("filter"):
            checks.fail("filter", "must not be set with session_ids")
        checks.choice("kind", request.kind, _GIVEN, "PAUSE, RESUME, STOP, SPEED_LIMIT")
        if request.kind == session_pb2.COMMAND_KIND_SPEED_LIMIT:
            if not 0 <= request.pages_per_minute <= _MAX_PAGES_PER_MINUTE:
                checks.fail("pages_per_minute", f"must be 0 to {_MAX_PAGES_PER_MINUTE}, is {request.pages_per_minute}")
        elif request.pages_per_minute != 0:
            checks.fail("pages_per_minute", "must be 0 unless kind is SPEED_LIMIT")
        checks.text("reason", request.reason, max_length=REASON_CHARACTERS)
        checks.done()
        organization = self._organizations.of(current().principal.organization_id)
        organization.settle()
        response = session_pb2.ControlSessionsResponse()
        sessions: list[Session] = []
        if ids:
            for session_id in ids:
                session = organization.sessions.get(session_id)
                if session is None or session.finished:
                    response.unknown_sessions.append(session_id)
                else:
                    sessions.append(session)
        else:
            sessions = [
                session
                for session in organization.sessions.values()
                if not session.finished and wanted.matches(session)
            ]
        kind = CommandKind(request.kind)
        for session in sessions:
            response.told += organization.command(session, kind, request.reason, request.pages_per_minute)
        COMMANDS.labels(kind.name.lower()).inc(response.told)
        return response
