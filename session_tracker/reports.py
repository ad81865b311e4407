"""One report stream: answers to its batches, and commands in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from muster.session_tracker.v1 import session_pb2

from services.errors import Draining
from session_tracker.messages import command_messages
from session_tracker.metrics import STREAMS
from session_tracker.sessions import LeaseLost

# Answers that may wait for a client which does not read them; then its batches are not read either.
_MAX_ANSWERS = 16

Requests = AsyncIterator[session_pb2.ReportStreamRequest]
Take = Callable[[session_pb2.ReportStreamRequest, "ReportStream"], session_pb2.ReportStreamResponse]


class ReportStream:
    """Reads batches in a task of its own, so that a command does not wait for the next batch.

    One wake-up for each batch is all that this costs; waiting for either of two things afresh for each batch would cost
    a task each.
    """

    def __init__(self, take: Take) -> None:
        self._take = take
        self._answers: deque[session_pb2.ReportStreamResponse] = deque()
        self._commands: deque[LeaseLost] = deque()
        self._stirred = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        self._draining = False

    def tell(self, command: LeaseLost) -> None:
        """Sends a command soon. At most one is kept for each session, since a session is told at most once."""
        if not self._ended:
            self._commands.append(command)
            self._stirred.set()

    def drain(self) -> None:
        """Ends the stream, since the service stops; batches that were taken are answered first."""
        self._draining = True
        self._stirred.set()

    async def responses(self, requests: Requests) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        """Yields the answers until the client has sent all.

        Raises:
            Draining: the service stops.
            InvalidField: a batch is malformed; those before it stand, and are answered.
        """
        reader = asyncio.create_task(self._read(requests), name="report stream")
        reader.add_done_callback(lambda _: self._stirred.set())
        STREAMS.inc()
        try:
            while True:
                self._stirred.clear()
                done = reader.done()
                while self._answers:
                    yield self._answers.popleft()
                    self._room.set()
                if self._commands:
                    commands = command_messages(self._commands)
                    self._commands.clear()
                    yield session_pb2.ReportStreamResponse(commands=commands)
                if done:
                    reader.result()
                    return
                if self._draining:
                    raise Draining("the service is stopping: open the stream again", retry_after_seconds=1.0)
                await self._stirred.wait()
        finally:
            self._ended = True
            STREAMS.dec()
            reader.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await reader

    async def _read(self, requests: Requests) -> None:
        async for request in requests:
            self._answers.append(self._take(request, self))
            self._stirred.set()
            while len(self._answers) >= _MAX_ANSWERS:
                self._room.clear()
                await self._room.wait()
