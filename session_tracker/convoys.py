"""Convoys: sessions that a stream reports together again and again, so that its newest batch stands for all before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from session_tracker.commands import Command
from session_tracker.packed_bytes import PackedBytes, Sequences, count, read
from session_tracker.sessions import Session

if TYPE_CHECKING:
    from session_tracker.live import Live

# Of fewer sessions, to take each report for itself costs no more.
LEAST_SESSIONS = 32


class Convoy:
    """The sessions of one packed batch, which the stream's next batches report again.

    Reports are absolute, so of several batches that change nothing but counters the last one says it all. A batch is
    taken here by looking at its bytes: that it names the same sessions in the same states and with the same totals, and
    that each of its sequences is greater. It then waits in the place of the one before, until it is applied: by
    `Live.settle` before anything is read, and in passing some times a second.

    What makes this the same as applying each at once: while the convoy stands, no session of it is changed in any way
    but by its next batch. Whoever changes one otherwise calls `Live.release` first, which applies what waits and ends
    the convoy; `Live.mark` and `Live.enter`, which every such change goes through, insist on it. A session is in one
    convoy at most.

    Args:
        live: The memory of the sessions.
        sessions: In the order of the batch. Each is as the batch says, and in no convoy.
        batch: Was applied.
        home: The convoys of the stream, by the bytes of their handles.

    Raises:
        ValueError: the batch's sequences cannot be compared as bytes.
    """

    __slots__ = (
        "_arrays",
        "_home",
        "_live",
        "_reported",
        "_sequence",
        "_sequences",
        "_state",
        "_total_pages",
        "handle",
        "sessions",
    )

    def __init__(self, live: Live, sessions: Sequence[Session], batch: PackedBytes, home: dict[bytes, Convoy]) -> None:
        self._sequences = Sequences(batch.sequence)
        self._live = live
        self._home = home
        self._state = batch.state
        self._total_pages = batch.total_pages
        # What waits, if `_sequence` is not empty: pages, products and errors; empty for what did not change.
        self._sequence = b""
        self._arrays = (b"", b"", b"")
        self._reported = 0.0
        self.handle = batch.handle
        self.sessions = sessions
        home[self.handle] = self
        for session in sessions:
            session.convoy = self

    def take(self, batch: PackedBytes, now: float) -> bool:
        """Takes a batch of the same handles whole, or, where it has to be looked at one by one, not at all."""
        pages, products, errors = held = self._arrays
        arrays = batch.current_page or pages, batch.products_found or products, batch.errors_count or errors
        size = len(self.sessions)
        if (
            batch.state != self._state
            or (batch.total_pages and batch.total_pages != self._total_pages)
            or any(new != old and count(new) != size for new, old in zip(arrays, held, strict=True))
            or not self._sequences.advance(batch.sequence)
        ):
            return False
        if not self._sequence:
            self._live.waiting.append(self)
        self._sequence = batch.sequence
        self._arrays = arrays
        self._reported = now
        return True

    def commands(self) -> list[Command]:
        """Returns the commands that wait for these sessions' workers."""
        commanded = self._live.commanded
        named: Iterable[str]
        if len(commanded) < len(self.sessions):
            sessions = self._live.sessions
            named = (session_id for session_id in commanded if sessions[session_id].convoy is self)
        else:
            named = (session.session_id for session in self.sessions if session.session_id in commanded)
        commands = [self._live.sessions[session_id].rarities.command for session_id in sorted(named)]
        return [command for command in commands if command is not None]

    def apply(self) -> None:
        """Gives the sessions the counters of the batch that waits, if one does."""
        if not self._sequence:
            return
        sessions, now, noted = self.sessions, self._reported, self._live.noted
        sequence, pages, products, errors = read(self._sequence, *self._arrays)
        self._sequence = b""
        self._arrays = (b"", b"", b"")
        for session, number in zip(sessions, sequence, strict=True):
            session.sequence = number
            session.reported = now
            if not session.noted:
                session.noted = True
                noted.append(session)
        for session, page in zip(sessions, pages, strict=False):
            session.current_page = page
        for session, found in zip(sessions, products, strict=False):
            session.products_found = found
        for session, met in zip(sessions, errors, strict=False):
            session.errors_count = met

    def dissolve(self) -> None:
        """Applies what waits and ends the convoy."""
        self.apply()
        for session in self.sessions:
            session.convoy = None
        self.sessions = ()
        del self._home[self.handle]
