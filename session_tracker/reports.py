"""One report stream: answers to its batches, and commands in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from muster.session_tracker.v1 import session_pb2

from services.errors import Draining
from session_tracker.commands import Command
from session_tracker.messages import command_messages
from session_tracker.metrics import STREAMS

Requests = AsyncIterator[bytes]
Write = Callable[[session_pb2.ReportStreamResponse], Awaitable[None]]
Take = Callable[[bytes, "ReportStream"], session_pb2.ReportStreamResponse]


class ReportStream:
    """Reads a batch, takes it, writes the answer, and only then reads the next.

    So a client that does not read its answers is not read from, and nothing queues up. Commands are written by a task
    of their own between two answers; of each session only the newest waits.

    Sessions hold on to the stream that reported them last, so it keeps nothing once it has ended.
    """

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        # The wire takes one message at a time.
        self._wire = asyncio.Lock()
        self._write: Write | None = None
        self._telling: asyncio.Task[None] | None = None
        self._drained = asyncio.Event()

    def tell(self, command: Command) -> None:
        """Sends a command soon, instead of an older one of the same session that still waits."""
        if self._write is not None:
            self._commands[command.session_id] = command
            if self._telling is None:
                self._telling = asyncio.create_task(self._tell(self._write), name="commands of a report stream")

    def drain(self) -> None:
        """Ends the stream, since the service stops; a batch that was taken is answered first."""
        self._drained.set()

    async def serve(self, requests: Requests, write: Write, take: Take) -> None:
        """Answers batches until the client has sent all.

        Args:
            requests: The batches.
            write: Sends an answer, and returns when there is room for another.
            take: Takes a batch and returns its answer.

        Raises:
            Draining: the service stops.
            InvalidField: a batch is malformed; those before it stand, and were answered.
        """
        self._write = write
        reader = asyncio.create_task(self._read(requests, write, take), name="report stream")
        end = asyncio.create_task(self._drained.wait(), name="end of a report stream")
        STREAMS.inc()
        try:
            await asyncio.wait({reader, end}, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done():
                # Whoever holds the wire is about to answer what was taken.
                async with self._wire:
                    raise Draining("the service is stopping: open the stream again", retry_after_seconds=1.0)
            reader.result()
            if self._telling is not None:
                await self._telling
        finally:
            self._write = None
            self._commands.clear()
            STREAMS.dec()
            tasks = [task for task in (reader, end, self._telling) if task is not None]
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _read(self, requests: Requests, write: Write, take: Take) -> None:
        wire = self._wire
        async for request in requests:
            response = take(request, self)
            async with wire:
                await write(response)

    async def _tell(self, write: Write) -> None:
        try:
            while self._commands:
                async with self._wire:
                    commands = command_messages(self._commands.values())
                    self._commands.clear()
                    await write(session_pb2.ReportStreamResponse(commands=commands))
        finally:
            self._telling = None
