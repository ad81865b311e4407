"""Progress in the background: a job says where it stands and goes on; the session_tracker hears of it when it can.

The crawl never waits for the tracker and never fails with it. Of each session only the latest state is kept, so nothing
grows while the tracker is away; when it is back, one report restores the session, and one that it no longer knows is
registered again with its absolute counters. Final results wait in a bounded queue and are given up after ten minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from muster.calls import may_repeat, pause_seconds
from muster.errors import DeadlineExceeded, MusterError, NotConfigured
from muster.reports import CommandKind, ProgressUpdate, ReportAnswer, ReportStream
from muster.sessions import SessionEnd, Sessions, SessionStart

Answer = TypeVar("Answer")

_log = logging.getLogger("muster.progress")

# A watcher sees no more than ten states a second, so reporting more often would only cost the tracker.
_INTERVAL_SECONDS = 0.1
_MOST_UPDATES = 1000
_MOST_ENDS = 1000
_END_SECONDS = 600.0


@dataclass(slots=True)
class _Live:
    start: SessionStart
    on_lease_lost: Callable[[str], None]
    latest: ProgressUpdate | None = None
    registered: bool = False
    unsent: bool = False
    taken_at: float | None = None


@dataclass(slots=True)
class _Ended:
    end: SessionEnd
    start: SessionStart
    registered: bool
    give_up_at: float


class Reporter:
    """Keeps the latest state of live sessions and sends it; `run` is its background loop.

    Args:
        sessions: The tracker's client.
        answer_seconds: How long the tracker may take to answer before the stream is opened anew.
    """

    def __init__(self, sessions: Sessions, answer_seconds: float) -> None:
        self._sessions = sessions
        self._answer_seconds = answer_seconds
        self._live: dict[str, _Live] = {}
        self._ended: deque[_Ended] = deque()
        self._changed = asyncio.Event()
        self._ends_changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failures = 0

    def begin(self, start: SessionStart, on_lease_lost: Callable[[str], None]) -> None:
        """Takes a session up; it is registered in the background.

        Args:
            start: What it is registered with.
            on_lease_lost: Called with the tracker's words when it says that the session's lease is lost.
        """
        self._live[start.session_id] = _Live(start, on_lease_lost)
        self._changed.set()

    def report(self, update: ProgressUpdate) -> None:
        """Takes the latest state of a session; one that has ended is passed over."""
        live = self._live.get(update.session_id)
        if live is not None:
            live.latest, live.unsent = update, True
            self._changed.set()

    def taken_at(self, session_id: str) -> float | None:
        """Returns when, on the loop's clock, the tracker last took a report of a session; None when it never did."""
        live = self._live.get(session_id)
        return live.taken_at if live else None

    def end(self, end: SessionEnd) -> None:
        """Ends a session; its final result is committed in the background."""
        live = self._live.pop(end.session_id, None)
        if live is None:
            return
        if len(self._ended) >= _MOST_ENDS:
            dropped = self._ended.popleft()
            _log.error("session %s: its final result is given up: too many wait", dropped.end.session_id)
        give_up_at = asyncio.get_running_loop().time() + _END_SECONDS
        self._ended.append(_Ended(end, live.start, live.registered, give_up_at))
        self._idle.clear()
        self._ends_changed.set()

    async def run(self) -> None:
        """Reports and completes until it is cancelled; ends by itself when no tracker is configured."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._report())
                tasks.create_task(self._complete())
        except* NotConfigured:
            self._live.clear()
            self._ended.clear()
            self._idle.set()
            _log.info("no session_tracker is configured: progress is not reported")

    async def flush(self, seconds: float) -> None:
        """Waits until every final result is committed, but not longer than `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    async def _report(self) -> None:
        while True:
            await self._changed.wait()
            try:
                await self._one_stream()
            except NotConfigured:
                raise
            except MusterError as error:
                self._failures += 1
                level = logging.WARNING if self._failures == 1 else logging.DEBUG
                _log.log(level, "progress is not reported for now: %s", error)
                for live in self._live.values():
                    live.unsent = live.latest is not None
                if self._live:
                    self._changed.set()
                await asyncio.sleep(pause_seconds(error, self._failures))

    async def _one_stream(self) -> None:
        stream = self._sessions.reports()
        answers: asyncio.Queue[ReportAnswer] = asyncio.Queue()
        receiver = asyncio.create_task(self._receive(stream, answers))
        try:
            while True:
                self._changed.clear()
                await self._register()
                batch = [live for live in self._live.values() if live.unsent and live.registered][:_MOST_UPDATES]
                if batch:
                    await self._send(stream, batch, answers, receiver)
                    await asyncio.sleep(_INTERVAL_SECONDS)
                else:
                    await _first(self._changed.wait(), receiver)
        finally:
            receiver.cancel()
            stream.cancel()
            with contextlib.suppress(asyncio.CancelledError, MusterError):
                await receiver

    async def _receive(self, stream: ReportStream, answers: asyncio.Queue[ReportAnswer]) -> None:
        while True:
            answer = await stream.receive()
            for command in answer.commands:
                live = self._live.get(command.session_id)
                if live is not None and command.kind is CommandKind.LEASE_LOST:
                    live.on_lease_lost(command.message)
            if answer.batch:
                answers.put_nowait(answer)

    async def _send(
        self,
        stream: ReportStream,
        batch: list[_Live],
        answers: asyncio.Queue[ReportAnswer],
        receiver: asyncio.Task[None],
    ) -> None:
        updates = [live.latest for live in batch if live.latest is not None]
        for live in batch:
            live.unsent = False
        try:
            async with asyncio.timeout(self._answer_seconds):
                number = await stream.send(updates)
                answer = await _first(answers.get(), receiver)
                while answer.batch != number:
                    answer = await _first(answers.get(), receiver)
        except TimeoutError:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "", "the session_tracker does not answer reports") from None
        self._failures = 0
        now = asyncio.get_running_loop().time()
        for live in batch:
            if live.start.session_id in answer.unknown_sessions:
                live.registered, live.unsent = False, True
                self._changed.set()
            else:
                live.taken_at = now

    async def _register(self) -> None:
        for live in [live for live in self._live.values() if not live.registered]:
            try:
                await self._sessions.start(live.start, progress=live.latest, total_seconds=self._answer_seconds)
            except MusterError as error:
                if isinstance(error, NotConfigured) or may_repeat(error, idempotent=True):
                    raise
                _log.error("session %s is not followed: %s", live.start.session_id, error)
                self._live.pop(live.start.session_id, None)
                continue
            live.registered = True
            # Reported once more although the tracker has it: commands come on the stream that reports the session.
            live.unsent = live.latest is not None

    async def _complete(self) -> None:
        failures = 0
        clock = asyncio.get_running_loop().time
        while True:
            if not self._ended:
                self._idle.set()
                self._ends_changed.clear()
                await self._ends_changed.wait()
            ended = self._ended[0]
            try:
                if not ended.registered:
                    # Without it the row would lack what only the start says: slot, client and settings.
                    await self._sessions.start(ended.start, total_seconds=self._answer_seconds)
                    ended.registered = True
                await self._sessions.complete(ended.end, total_seconds=self._answer_seconds)
            except MusterError as error:
                if isinstance(error, NotConfigured):
                    raise
                if may_repeat(error, idempotent=True) and clock() < ended.give_up_at:
                    failures += 1
                    await asyncio.sleep(pause_seconds(error, failures))
                    continue
                _log.error("session %s: its final result is not recorded: %s", ended.end.session_id, error)
            failures = 0
            if self._ended and self._ended[0] is ended:
                self._ended.popleft()


async def _first(waiting: Coroutine[Any, Any, Answer], receiver: asyncio.Task[None]) -> Answer:
    """Returns what `waiting` returns; raises what ended the receiver if that comes first."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait((task, receiver), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            receiver.result()
        return await task
    finally:
        task.cancel()
