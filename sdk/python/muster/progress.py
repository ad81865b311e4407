"""Progress in the background: a session says where it stands and goes on; the session_tracker hears of it when it can.

The crawl never waits for the tracker and never fails with it. Of each session only the latest state is kept, so nothing
grows while the tracker is away; when it is back, one report restores the session, and one that it no longer knows is
registered again with its absolute counters. Final results wait in a bounded queue and are given up after ten minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from muster.calls import may_repeat, pause_seconds
from muster.errors import DeadlineExceeded, InvalidField, MusterError, NotConfigured
from muster.reports import MOST_UPDATES, ProgressUpdate, ReportAnswer, ReportStream, SessionCommand
from muster.sessions import SessionEnd, Sessions, SessionStart

Answer = TypeVar("Answer")

_log = logging.getLogger("muster.progress")

# A watcher sees no more than ten states a second, so reporting more often would only cost the tracker.
_INTERVAL_SECONDS = 0.1
# A session without news is reported all the same: by default the tracker takes it for lost after 120 s of silence.
_SILENT_SECONDS = 30.0
_MOST_ENDS = 1000
_END_SECONDS = 600.0
# Calls at a time; the tracker commits results that come together in one transaction.
_AT_ONCE = 16


@dataclass(slots=True)
class _Live:
    """A session that is followed.

    Attributes:
        ahead: What is added to its sequences: reports without news, and those of an earlier process of the same id.
        told: The last report that was taken in full on `stream`: what is equal to it need not be sent again.
        refused: The tracker will not have it; only its final result is sent.
    """

    start: SessionStart
    latest: Callable[[], ProgressUpdate | None]
    on_command: Callable[[SessionCommand], None]
    registered: bool = False
    refused: bool = False
    ahead: int = 0
    told: ProgressUpdate | None = None
    stream: ReportStream | None = None
    sent_at: float = 0.0
    taken_at: float | None = None

    def update(self) -> ProgressUpdate | None:
        """Returns its latest state as the tracker is to be told it."""
        latest = self.latest()
        return replace(latest, sequence=latest.sequence + self.ahead) if latest and self.ahead else latest


@dataclass(slots=True)
class _Ended:
    end: SessionEnd
    give_up_at: float


class Reporter:
    """Sends the latest state of live sessions; `run` is its background loop.

    Args:
        sessions: The tracker's client.
        answer_seconds: How long the tracker may take to answer before the stream is opened anew.
    """

    def __init__(self, sessions: Sessions, answer_seconds: float) -> None:
        self._sessions = sessions
        self._answer_seconds = answer_seconds
        self._live: dict[str, _Live] = {}
        # In the order in which they changed, so that none waits for others that change more often.
        self._unsent: dict[str, None] = {}
        self._unregistered: set[str] = set()
        self._ended: deque[_Ended] = deque()
        self._ending = 0
        self._changed = asyncio.Event()
        self._ends_changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failures = 0
        self._looked_at = 0.0

    def begin(
        self,
        start: SessionStart,
        latest: Callable[[], ProgressUpdate | None],
        on_command: Callable[[SessionCommand], None],
    ) -> None:
        """Takes a session up; it is registered in the background.

        Args:
            start: What it is registered with.
            latest: Gives its latest state; None before its first.
            on_command: Called with everything that the tracker tells it, repetitions included.
        """
        live = _Live(start, latest, on_command, sent_at=asyncio.get_running_loop().time())
        self._live[start.session_id] = live
        self._unregistered.add(start.session_id)
        self._changed.set()

    def changed(self, session_id: str) -> None:
        """Notes that a session has news; one that has ended is passed over."""
        if session_id in self._live:
            self._unsent[session_id] = None
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
        self._unsent.pop(end.session_id, None)
        self._unregistered.discard(end.session_id)
        if len(self._ended) >= _MOST_ENDS:
            dropped = self._ended.popleft()
            _log.error("session %s: its final result is given up: too many wait", dropped.end.session_id)
        start = live.start
        # The tracker may not know what the session was started with.
        whole = replace(
            end,
            config_snapshot_json=end.config_snapshot_json or start.config_snapshot_json,
            slot_id=end.slot_id or start.slot_id,
            client_id=end.client_id or start.client_id,
        )
        self._ended.append(_Ended(whole, asyncio.get_running_loop().time() + _END_SECONDS))
        self._idle.clear()
        self._ends_changed.set()

    async def run(self) -> None:
        """Reports and completes until it is cancelled; ends by itself when no tracker is configured."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._report())
                for _ in range(_AT_ONCE):
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
                self._unsent.update(dict.fromkeys(self._live))
                if self._live:
                    self._changed.set()
                await asyncio.sleep(pause_seconds(error, self._failures))

    async def _one_stream(self) -> None:
        stream = self._sessions.reports()
        answers: asyncio.Queue[ReportAnswer] = asyncio.Queue()
        receiver = asyncio.create_task(self._receive(stream, answers))
        try:
            while not stream.full:
                self._changed.clear()
                await self._register()
                self._break_silence()
                batch = self._batch()
                if batch:
                    await self._send(stream, batch, answers, receiver)
                    if len(batch) < MOST_UPDATES:
                        await asyncio.sleep(_INTERVAL_SECONDS)
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_SILENT_SECONDS / 3 if self._live else None):
                            await _first(self._changed.wait(), receiver)
            self._changed.set()
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
                if live is not None:
                    live.on_command(command)
            if answer.batch:
                answers.put_nowait(answer)

    def _break_silence(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < _SILENT_SECONDS / 3:
            return
        self._looked_at = now
        for name, live in self._live.items():
            if live.registered and name not in self._unsent and now - live.sent_at >= _SILENT_SECONDS:
                live.ahead += 1
                self._unsent[name] = None

    def _batch(self) -> list[tuple[_Live, ProgressUpdate]]:
        """Takes out what is to be sent next: the sessions that have waited longest."""
        batch = []
        for name in list(self._unsent):
            live = self._live.get(name)
            # What is not registered goes with its registration.
            if live is None or not live.registered:
                del self._unsent[name]
                continue
            update = live.update()
            del self._unsent[name]
            if update is not None:
                batch.append((live, update))
                if len(batch) == MOST_UPDATES:
                    break
        return batch

    async def _send(
        self,
        stream: ReportStream,
        batch: list[tuple[_Live, ProgressUpdate]],
        answers: asyncio.Queue[ReportAnswer],
        receiver: asyncio.Task[None],
    ) -> None:
        full: list[tuple[_Live, ProgressUpdate]] = []
        packed: list[ProgressUpdate] = []
        now = asyncio.get_running_loop().time()
        for live, update in batch:
            live.sent_at = now
            if live.stream is stream and live.told is not None and update.counters_only(live.told):
                packed.append(update)
            else:
                full.append((live, update))
        try:
            async with asyncio.timeout(self._answer_seconds):
                number = await stream.send([update for _, update in full], packed)
                answer = await _first(answers.get(), receiver)
                while answer.batch != number:
                    answer = await _first(answers.get(), receiver)
        except TimeoutError:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "", "the session_tracker does not answer reports") from None
        except InvalidField as error:
            self._refuse(error, full)
            raise
        self._failures = 0
        for live, update in full:
            live.told, live.stream = update, stream
        now = asyncio.get_running_loop().time()
        unknown = frozenset(answer.unknown_sessions)
        for live, _ in batch:
            if live.start.session_id in unknown:
                self._forgotten(live)
            else:
                live.taken_at = now

    def _forgotten(self, live: _Live) -> None:
        name = live.start.session_id
        live.registered, live.told = False, None
        if self._live.get(name) is live:
            self._unregistered.add(name)
            self._changed.set()

    @staticmethod
    def _refuse(error: InvalidField, full: list[tuple[_Live, ProgressUpdate]]) -> None:
        """Drops the sessions whose updates were malformed, so that they do not hold the others up for ever."""
        for violation in error.violations:
            found = re.match(r"updates\[(\d+)\]", violation.field)
            if found and int(found[1]) < len(full):
                live = full[int(found[1])][0]
                live.refused, live.registered = True, False
                _log.error("session %s is not followed: %s", live.start.session_id, error)

    async def _register(self) -> None:
        while self._unregistered:
            names = [name for name, _ in zip(self._unregistered, range(_AT_ONCE), strict=False)]
            outcomes = await asyncio.gather(*map(self._register_one, names), return_exceptions=True)
            _raise_first(outcomes)

    async def _register_one(self, name: str) -> None:
        live = self._live.get(name)
        if live is None or live.refused:
            self._unregistered.discard(name)
            return
        update = live.update()
        try:
            found = await self._sessions.start(live.start, progress=update, total_seconds=self._answer_seconds)
        except MusterError as error:
            if isinstance(error, NotConfigured) or may_repeat(error, idempotent=True):
                raise
            _log.error("session %s is not followed: %s", name, error)
            live.refused = True
            self._unregistered.discard(name)
            return
        self._unregistered.discard(name)
        # Another process reported this id before: what comes now is newer.
        live.ahead += max(0, found.sequence - (update.sequence if update else live.ahead))
        live.registered = True
        live.sent_at = asyncio.get_running_loop().time()
        if update is not None:
            # Reported once more although the tracker has it: commands come on the stream that reports the session.
            live.ahead += 1
            self.changed(name)

    async def _complete(self) -> None:
        while True:
            while not self._ended:
                if not self._ending:
                    self._idle.set()
                self._ends_changed.clear()
                await self._ends_changed.wait()
            ended = self._ended.popleft()
            self._ending += 1
            try:
                await self._complete_one(ended)
            finally:
                self._ending -= 1

    async def _complete_one(self, ended: _Ended) -> None:
        failures = 0
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await self._sessions.complete(ended.end, total_seconds=self._answer_seconds)
            except MusterError as error:
                if isinstance(error, NotConfigured):
                    raise
                if may_repeat(error, idempotent=True) and clock() < ended.give_up_at:
                    failures += 1
                    await asyncio.sleep(pause_seconds(error, failures))
                    continue
                _log.error("session %s: its final result is not recorded: %s", ended.end.session_id, error)
            return


def _raise_first(outcomes: Iterable[BaseException | None]) -> None:
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


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
