"""A tracker that takes every report and tells sessions what a test wants them told."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

from muster.session_tracker.v1 import session_pb2

from tests.support.house import REPORT, House

RUNNING = session_pb2.SESSION_STATE_RUNNING


class ScriptedTracker:
    """Takes reports, and repeats the newest command of a session until its number is acknowledged.

    Attributes:
        latest: The newest report of each session, packed ones as whole updates.
        taken: How often each session was reported.
    """

    def __init__(self, house: House) -> None:
        self.latest: dict[str, session_pb2.ProgressUpdate] = {}
        self.taken: defaultdict[str, int] = defaultdict(int)
        self._commands: dict[str, session_pb2.SessionCommand] = {}
        self._answers: asyncio.Queue[session_pb2.ReportStreamResponse] = asyncio.Queue()
        self._came = asyncio.Condition()
        house.on(REPORT, self._stream)

    def tell(self, session_id: str, kind: session_pb2.CommandKind.ValueType, number: int, **fields: Any) -> None:
        command = session_pb2.SessionCommand(session_id=session_id, kind=kind, number=number, **fields)
        self._commands[session_id] = command
        self._answers.put_nowait(session_pb2.ReportStreamResponse(commands=[command]))

    def at(self, session_id: str) -> session_pb2.ProgressUpdate:
        return self.latest.get(session_id, session_pb2.ProgressUpdate())

    async def until(self, condition: Any, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds), self._came:
            await self._came.wait_for(condition)

    async def _stream(self, batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        names: list[str] = []

        async def take() -> None:
            async for batch in batches:
                names.extend(batch.names)
                updates = [*batch.updates, *(self._whole(names, batch.packed, at) for at in range(packed_size(batch)))]
                async with self._came:
                    for update in updates:
                        before = self.latest.get(update.session_id)
                        assert before is None or before.sequence < update.sequence
                        self.latest[update.session_id] = update
                        self.taken[update.session_id] += 1
                        told = self._commands.get(update.session_id)
                        if told is not None and 0 < told.number <= update.acknowledged_command:
                            del self._commands[update.session_id]
                    self._came.notify_all()
                commands = [self._commands[one.session_id] for one in updates if one.session_id in self._commands]
                self._answers.put_nowait(session_pb2.ReportStreamResponse(batch=batch.batch, commands=commands))

        taking = asyncio.create_task(take())
        try:
            while True:
                yield await self._answers.get()
        finally:
            taking.cancel()

    def _whole(self, names: list[str], packed: session_pb2.PackedUpdates, at: int) -> session_pb2.ProgressUpdate:
        update = session_pb2.ProgressUpdate()
        update.CopyFrom(self.latest[names[packed.handle[at]]])
        update.sequence, update.current_page = packed.sequence[at], packed.current_page[at]
        update.total_pages, update.products_found = packed.total_pages[at], packed.products_found[at]
        update.errors_count = packed.errors_count[at]
        update.state = packed.state[at] if packed.state else RUNNING
        return update


def packed_size(batch: session_pb2.ReportStreamRequest) -> int:
    """Returns how many updates came packed."""
    return len(batch.packed.handle)
