"""A session in the hands of the crawl: it says where it stands, and is told what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from muster.progress import Reporter
from muster.reports import CommandKind, ErrorEntry, ProgressUpdate, SessionCommand, SessionState
from muster.sessions import SessionEnd, SessionStart
from muster.values import plain

_log = logging.getLogger("muster.progress")

_UINT32 = 2**32 - 1
_MOST_CLASSES = 16
_MOST_ERRORS = 10
_CLASS_CHARACTERS = 64
_STAGE_CHARACTERS = 64
_REASON_CHARACTERS = 256
_MESSAGE_CHARACTERS = 1024
# Where the errors of further classes are counted.
_OTHER = "other"


class LiveSession:
    """One session that is followed live; `Client.session` and `Job.session` give it.

        async with client.session("run-7", total_pages=40) as session:
            while await session.permit():
                session.page(products=await crawl_next_page())

    Nothing here waits for the tracker or fails because of it. `page`, `progress`, `error`, `hold`, `go_on`, `stopping`
    `finish` and `wait_permit` may be called from any thread, the rest from the loop's.

    Leaving the body completes the session: as failed after an exception (which goes on), as stopped when it was told to
    stop or was cancelled, else as completed. `finish` says otherwise.

    Args:
        reporter: Sends what it says; runs in the background of the same loop.
        start: What it is registered with.
        lease_lost: Set when the lease is known to be lost; None makes an event of its own.

    Attributes:
        lease_lost: Set when the lease is known to be lost: stop, and do not save.
        pages_per_minute: The speed limit it was told last; 0 for none.
    """

    def __init__(self, reporter: Reporter, start: SessionStart, lease_lost: asyncio.Event | None = None) -> None:
        self._reporter = reporter
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        # Guards what follows up to the next blank line, since threads may report.
        self._lock = threading.Lock()
        self._sequence = 0
        self._handing_over = False
        self._state = SessionState.RUNNING
        self._reason = ""
        self._stage = start.stage
        self._page = self._products = self._errors = 0
        self._total = start.total_pages
        self._by_class: dict[str, int] = {}
        self._newest: deque[ErrorEntry] = deque(maxlen=_MOST_ERRORS)
        self._classes: tuple[tuple[str, int], ...] = ()
        self._entries: tuple[ErrorEntry, ...] = ()
        self._acknowledged = 0

        self._told = 0
        self._commanded = asyncio.Event()
        self._pause = ""
        self._paused = False
        self._stopped = False
        self._why = ""
        self._next_page_at = 0.0
        self._outcome: tuple[SessionState, str] | None = None
        self._ended = False
        self.lease_lost = lease_lost or asyncio.Event()
        self.pages_per_minute = 0.0

    @property
    def session_id(self) -> str:
        """Its id."""
        return self._start.session_id

    @property
    def stopping(self) -> bool:
        """Whether to end the run in good order: it was told to stop, or its lease is lost."""
        if self._stopped:
            self._acknowledge()
        return self._stopped or self.lease_lost.is_set()

    @property
    def paused(self) -> bool:
        """Whether it was told to pause; `permit` waits then."""
        return self._paused

    def page(
        self, products: int = 0, *, pages: int = 1, errors: int = 0, total: int | None = None, stage: str = ""
    ) -> None:
        """Counts pages that were done.

        Args:
            products: Products found on them.
            pages: How many.
            errors: Errors met on them; `error` tells them apart.
            total: Pages to do, if that is now known better; 0 when unknown.
            stage: What it does now, up to 64 characters; empty keeps it.
        """
        with self._lock:
            self._page = _bounded(self._page + pages)
            self._products = _bounded(self._products + products)
            self._errors = _bounded(self._errors + errors)
            self._note(self._total if total is None else total, stage)

    def progress(self, page: int, total: int = 0, products: int = 0, errors: int = 0, *, stage: str = "") -> None:
        """Says where the work stands, in absolute numbers.

        Args:
            page: Pages done.
            total: Pages to do; 0 when unknown.
            products: Products found so far.
            errors: Errors met so far.
            stage: What it does now, up to 64 characters; empty keeps it.
        """
        with self._lock:
            self._page, self._products, self._errors = _bounded(page), _bounded(products), _bounded(errors)
            self._note(total, stage)

    def error(self, error: BaseException | str, message: str = "") -> None:
        """Counts an error by its class and keeps the newest ten.

        Args:
            error: An exception, or the name of a class of errors such as `http_503`; after 15 of them, others are
                counted together.
            message: In words; empty means the exception's own. Cut at 256 characters.
        """
        if isinstance(error, BaseException):
            name, message = type(error).__name__, message or str(error)
        else:
            name = error
        name = plain(name, _CLASS_CHARACTERS) or _OTHER
        with self._lock:
            if name not in self._by_class and len(self._by_class) >= _MOST_CLASSES - 1:
                name = _OTHER
            self._by_class[name] = _bounded(self._by_class.get(name, 0) + 1)
            self._errors = _bounded(self._errors + 1)
            self._newest.append(ErrorEntry(datetime.now(UTC), name, plain(message, _REASON_CHARACTERS), self._page))
            self._classes = tuple(self._by_class.items())
            self._entries = tuple(self._newest)
            self._changed()

    def hold(self, reason: str, state: SessionState = SessionState.RATE_LIMITED) -> None:
        """Says that it does nothing for now: RATE_LIMITED (held back by the target) or PAUSED; the next page ends it.

        Args:
            reason: Why; cut at 256 characters.
            state: Which of the two.
        """
        with self._lock:
            self._enter(state, reason)

    def go_on(self, reason: str = "") -> None:
        """Says that it is running again."""
        with self._lock:
            self._enter(SessionState.RUNNING, reason)

    async def permit(self) -> bool:
        """Waits while the session is told to pause, and for as long as its speed limit asks; ask before each page.

        Returns:
            Whether to do the next page; False means to end the run in good order.
        """
        while not self.stopping:
            commanded = self._commanded
            self._acknowledge()
            if self._paused:
                self.hold(self._pause, SessionState.PAUSED)
                await self._told_something(commanded, None)
                continue
            now = self._loop.time()
            if now < self._next_page_at:
                await self._told_something(commanded, self._next_page_at - now)
                continue
            if self.pages_per_minute:
                self._next_page_at = now + 60.0 / self.pages_per_minute
            if self._state is SessionState.PAUSED or not self._sequence:
                self.go_on()
            return True
        return False

    def wait_permit(self) -> bool:
        """As `permit`, for a thread that is not the loop's: blocks it.

        Raises:
            RuntimeError: it is the loop's own thread, which would wait for ever.
        """
        if threading.get_ident() == self._thread:
            raise RuntimeError("wait_permit would block the event loop: await permit() there")
        return asyncio.run_coroutine_threadsafe(self.permit(), self._loop).result()

    def finish(self, state: SessionState, message: str = "") -> None:
        """Says how the session ends when its body is left.

        Args:
            state: COMPLETED, FAILED or STOPPED.
            message: Why; cut at 1024 characters.
        """
        self._outcome = state, message

    def ends_by(self, error: BaseException) -> None:
        """Says that an exception ends it: as failed, or as stopped by one that is no `Exception`, such as Ctrl-C."""
        if isinstance(error, Exception):
            self.finish(SessionState.FAILED, f"{type(error).__name__}: {error}")
        else:
            self.finish(SessionState.STOPPED, "cancelled")

    def begin(self) -> None:
        """Takes it up; the context manager does it."""
        self._reporter.begin(self._start, self._latest, self._take)

    def end(self, state: SessionState, message: str = "") -> None:
        """Completes it in the background; the context manager does it. Safe to repeat: the first counts."""
        if self._ended:
            return
        self._ended = True
        self._reporter.end(
            SessionEnd(
                session_id=self.session_id,
                state=state,
                stage=self._stage,
                total_pages=self._page,
                products_found=self._products,
                errors_count=self._errors,
                started_at=self._start.started_at,
                message=plain(message, _MESSAGE_CHARACTERS),
            )
        )

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.ends_by(error)
        if self._outcome is not None:
            self.end(*self._outcome)
        elif self._stopped or self.lease_lost.is_set():
            self.end(SessionState.STOPPED, self._why or "told to stop")
        else:
            self.end(SessionState.COMPLETED)

    def _take(self, command: SessionCommand) -> None:
        """Takes a command; one that comes again, since it is not acknowledged yet, changes nothing."""
        match command.kind:
            case CommandKind.LEASE_LOST:
                if not self.lease_lost.is_set():
                    _log.warning("the lease on %s is lost: %s", self.session_id, command.message)
                    self._why = self._why or f"the lease is lost: {command.message}"
                    self.lease_lost.set()
            case CommandKind.PAUSE:
                self._paused, self._pause = True, command.message
            case CommandKind.RESUME:
                self._paused = False
            case CommandKind.STOP:
                self._stopped, self._why = True, self._why or command.message
            case CommandKind.SPEED_LIMIT:
                if self.pages_per_minute != command.pages_per_minute:
                    self.pages_per_minute, self._next_page_at = command.pages_per_minute, 0.0
            case _:
                return
        self._told = command.number or self._told
        self._commanded.set()
        self._commanded = asyncio.Event()

    def _acknowledge(self) -> None:
        # Carried out only now, when the crawl asks: one that never asks does not stop, and should not seem to.
        if self._told != self._acknowledged:
            with self._lock:
                self._acknowledged = self._told
                self._changed()

    async def _told_something(self, commanded: asyncio.Event, seconds: float | None) -> None:
        waiting = [asyncio.ensure_future(event.wait()) for event in (commanded, self.lease_lost)]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()

    def _latest(self) -> ProgressUpdate | None:
        with self._lock:
            self._handing_over = False
            if not self._sequence:
                return None
            return ProgressUpdate(
                self.session_id,
                self._sequence,
                self._page,
                self._total,
                self._products,
                self._errors,
                self._stage,
                self._state,
                self._reason,
                self._classes,
                self._entries,
                self._acknowledged,
            )

    def _note(self, total: int, stage: str) -> None:
        self._total = _bounded(total)
        if stage:
            self._stage = plain(stage, _STAGE_CHARACTERS) or self._stage
        if self._state is not SessionState.RUNNING:
            self._state, self._reason = SessionState.RUNNING, ""
        self._changed()

    def _enter(self, state: SessionState, reason: str) -> None:
        reason = plain(reason, _REASON_CHARACTERS)
        if (state, reason) != (self._state, self._reason) or not self._sequence:
            self._state, self._reason = state, reason
            self._changed()

    def _changed(self) -> None:
        self._sequence += 1
        # Once until the reporter takes it, so that nothing piles up in the loop however often a thread reports.
        if not self._handing_over:
            self._handing_over = True
            if threading.get_ident() == self._thread:
                self._reporter.changed(self.session_id)
            else:
                # A loop that is closed takes nothing any more, and the crawl does not fail by it.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._reporter.changed, self.session_id)


def _bounded(count: int) -> int:
    return max(0, min(int(count), _UINT32))
