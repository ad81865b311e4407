"""Pieces as the bytes of the contract's answers."""

from __future__ import annotations

from muster.session_tracker.v1 import session_pb2

from session_tracker.clock import Clock
from session_tracker.messages import SessionMessages
from session_tracker.pieces import Piece
from session_tracker.sessions import Session


class PieceMessages:
    """Encodes pieces, whose moments are on `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._messages = SessionMessages(clock)

    def encoded(self, epoch: str, piece: Piece) -> bytes:
        """Returns the WatchSessionsResponse of a piece."""
        answer = session_pb2.WatchSessionsResponse(
            epoch=epoch,
            offset=piece.offset,
            snapshot=piece.snapshot,
            sessions=self._messages.all(piece.sessions),
            removed=piece.removed,
            rebuilding=piece.rebuilding,
        )
        if piece.packed:
            answer.packed.CopyFrom(self._packed(piece.packed))
        return answer.SerializeToString()

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
