"""Watchers and workers over gRPC, for tests of what is watched and listed."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from tests.support.services import RunningService

Metadata = tuple[tuple[str, str], ...]
Held = dict[str, pb.Session]


class Console:
    """Holds what a watcher holds: it applies every answer, and knows where it stands."""

    def __init__(
        self,
        service: RunningService,
        metadata: Metadata,
        *,
        channel: Any = None,
        packed: bool = False,
        interval_seconds: float = 0.0,
        **filter: Any,
    ) -> None:
        self._watch = session_pb2_grpc.WatchServiceStub(channel or service.channel)
        self._metadata = metadata
        self._filter = pb.SessionFilter(**filter)
        self._packed = packed
        self._interval = Duration()
        self._interval.FromTimedelta(timedelta(seconds=interval_seconds))
        self.held: Held = {}
        self.epoch, self.offset = "", 0
        self.rebuilding = False
        self.answers: list[pb.WatchSessionsResponse] = []
        self._call: Any = None

    def open(self) -> None:
        """Begins to watch, from where it stands."""
        request = pb.WatchSessionsRequest(
            filter=self._filter, epoch=self.epoch, offset=self.offset, interval=self._interval, packed=self._packed
        )
        self._call = self._watch.WatchSessions(request, metadata=self._metadata)

    async def read(self) -> pb.WatchSessionsResponse:
        """Reads an answer and applies it."""
        async with asyncio.timeout(20):
            answer: pb.WatchSessionsResponse = await self._call.read()
        self.apply(answer)
        return answer

    def apply(self, answer: pb.WatchSessionsResponse) -> None:
        """Takes an answer into what is held."""
        if answer.snapshot:
            self.held.clear()
        for session in answer.sessions:
            self.held[session.session_id] = session
        for session_id in answer.removed:
            self.held.pop(session_id, None)
        by_number = {session.number: session for session in self.held.values()}
        for place, number in enumerate(answer.packed.number):
            session = by_number[number]
            for name in ("state", "current_page", "total_pages", "products_found", "errors_count", "sequence"):
                setattr(session, name, getattr(answer.packed, name)[place])
            session.updated_at.FromMilliseconds(answer.packed.updated_at_ms[place])
        self.epoch, self.offset, self.rebuilding = answer.epoch, answer.offset, answer.rebuilding
        self.answers.append(answer)

    async def read_until(self, done: Any) -> None:
        """Reads until what is held is as it should be."""
        while not done(self.held):
            await self.read()

    def close(self) -> None:
        """Leaves; what is held stays."""
        self._call.cancel()


class Worker:
    """Starts, reports and completes sessions."""

    def __init__(self, service: RunningService, metadata: Metadata) -> None:
        self.stub: Any = session_pb2_grpc.SessionServiceStub(service.channel)
        self._metadata = metadata
        self._sequence = 0

    async def start(self, *session_ids: str, **fields: Any) -> None:
        for session_id in session_ids:
            await self.stub.StartSession(
                pb.StartSessionRequest(session_id=session_id, **fields), metadata=self._metadata
            )

    async def page(self, *session_ids: str, page: int, **fields: Any) -> None:
        self._sequence += 1
        updates = [
            pb.ProgressUpdate(session_id=name, sequence=self._sequence, current_page=page, **fields)
            for name in session_ids
        ]
        await self.stub.ReportProgress(pb.ReportProgressRequest(updates=updates), metadata=self._metadata)

    async def complete(self, session_id: str, **fields: Any) -> None:
        request = pb.CompleteSessionRequest(session_id=session_id, state=pb.SESSION_STATE_COMPLETED, **fields)
        await self.stub.CompleteSession(request, metadata=self._metadata)
