"""Pieces as the bytes of the contract's answers."""

from __future__ import annotations

from muster.session_tracker.v1 import session_pb2

from session_tracker.clock import Clock
from session_tracker.messages import SessionMessages
from session_tracker.pieces import Piece
from session_tracker.sessions import Session

# For how long a session that does not change is shown as it was encoded: by so much its forecast may be older. Long
# enough for whoever comes in one burst, whatever each of them wishes to see.
_SHARED_SECONDS = 1.0
# What is kept for that, and what an entry of the table weighs beside its bytes.
_SHARED_BYTES = 8 * 1024 * 1024
_ENTRY_BYTES = 200


class PieceMessages:
    """Encodes pieces, whose moments are on `clock`.

    A session in full is encoded once a change for all pieces that show it, of whatever feed, and handed on for a
    twentieth of that: so a hundred watchers that come at once, each with a wish of its own, cost little more than one.
    Kept are the bytes of the last second, up to a bound; what does not fit is encoded for each piece.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._messages = SessionMessages(clock)
        # By epoch, which names an organization's memory, and number: the offset of its last change, and its bytes.
        self._shared: dict[tuple[str, int], tuple[int, bytes]] = {}
        self._shared_bytes = 0
        self._shared_until = 0.0

    def encoded(self, epoch: str, piece: Piece) -> bytes:
        """Returns the WatchSessionsResponse of a piece."""
        answer = session_pb2.WatchSessionsResponse(
            epoch=epoch,
            offset=piece.offset,
            snapshot=piece.snapshot,
            removed=piece.removed,
            rebuilding=piece.rebuilding,
        )
        if piece.packed:
            answer.packed.CopyFrom(self._packed(piece.packed))
        encoded = answer.SerializeToString()
        if not piece.sessions:
            return encoded
        now = self._clock.monotonic()
        if now >= self._shared_until:
            self._shared.clear()
            self._shared_bytes = 0
            self._shared_until = now + _SHARED_SECONDS
        # Encoded messages one after the other are read as one whose lists are joined.
        return b"".join([encoded, *[self._in_full(epoch, session) for session in piece.sessions]])

    def _in_full(self, epoch: str, session: Session) -> bytes:
        """Returns an answer that shows one session."""
        key = epoch, session.number
        known = self._shared.get(key)
        if known is not None and known[0] == session.changed:
            return known[1]
        encoded = session_pb2.WatchSessionsResponse(sessions=[self._messages.of(session)]).SerializeToString()
        # One that changed counts again, until all are forgotten: what is counted is never less than what is kept.
        self._shared_bytes += len(encoded) + _ENTRY_BYTES
        if self._shared_bytes <= _SHARED_BYTES:
            self._shared[key] = session.changed, encoded
        return encoded

    def _packed(self, sessions: list[Session]) -> session_pb2.PackedSessions:
        # One list for each field: a generator's step per value would cost more than all the rest.
        epoch_seconds = self._clock.wall().timestamp() - self._clock.monotonic()
        return session_pb2.PackedSessions(
            number=[session.number for session in sessions],
            state=[session.state for session in sessions],  # type: ignore[misc]  # the contract's numbers
            current_page=[session.current_page for session in sessions],
            total_pages=[session.total_pages for session in sessions],
            products_found=[session.products_found for session in sessions],
            errors_count=[session.errors_count for session in sessions],
            sequence=[session.sequence for session in sessions],
            updated_at_ms=[int((session.reported + epoch_seconds) * 1000) for session in sessions],
        )
