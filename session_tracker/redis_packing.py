"""How sessions stand in Redis, and how they travel between replicas. Numbers are big-endian.

    order      final (1 byte), sequence (8), revision (4), owner (8): what stands is only replaced by what is above it
    counters   order, state (1), page, total, products, errors (4 each), reported (8): 46 bytes
    state      length of the id (2), id, counters, length of the record (4), record as described in `records`; empty: it
               stands as the same owner wrote it before
    command    length of the id (2), id, number (8), length of the record (4), record
    ids        length (2) and id of each

The scripts in ``lua/`` read the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from session_tracker.clock import Clock
from session_tracker.records import Counters, Record, described
from session_tracker.sessions import COMPLETED, Session

_COUNTERS = struct.Struct(">BQI8sBIIIId")
_ID = struct.Struct(">H")
_RECORD = struct.Struct(">I")
_NUMBER = struct.Struct(">d")
_NO_RECORD = _RECORD.pack(0)


class Packing:
    """Packs the sessions of one replica.

    Args:
        replica: Its id, 8 characters: the owner of what is not another's.
        clock: Of its sessions.
    """

    def __init__(self, replica: str, clock: Clock) -> None:
        self._replica = replica.encode()
        self._clock = clock

    def ahead(self) -> float:
        """Returns by how much the time of day is ahead of the monotonic clock: once for many sessions."""
        return self._clock.wall().timestamp() - self._clock.monotonic()

    def state(self, session: Session, record: Record | None, ahead: float) -> bytes:
        """Returns the entry of a session as it stands; without `record`, that of its counters only."""
        name = session.session_id.encode()
        state = session.state
        counters = _COUNTERS.pack(
            state >= COMPLETED,
            session.sequence,
            session.revision,
            session.owner.encode() or self._replica,
            state,
            session.current_page,
            session.total_pages,
            session.products_found,
            session.errors_count,
            session.reported + ahead,
        )
        if record is None:
            return _ID.pack(len(name)) + name + counters + _NO_RECORD
        packed = described(record).encode()
        return b"".join((_ID.pack(len(name)), name, counters, _RECORD.pack(len(packed)), packed))

    @staticmethod
    def command(session_id: str, number: int, record: Record) -> bytes:
        """Returns the entry of a command, with the record of the session that it was given to."""
        name, packed = session_id.encode(), described(record).encode()
        return b"".join((_ID.pack(len(name)), name, _NUMBER.pack(number), _RECORD.pack(len(packed)), packed))


def pack_ids(session_ids: Sequence[str]) -> bytes:
    """Returns the ids of sessions."""
    return b"".join(_ID.pack(len(name)) + name for name in map(str.encode, session_ids))


def states(body: bytes) -> Iterator[tuple[str, str, Counters, bytes]]:
    """Yields id, owner, counters and packed record, which may be empty, of each entry."""
    place = 0
    while place < len(body):
        session_id, place = _name(body, place)
        owner, counters = unpack_counters(body, place)
        place += _COUNTERS.size
        record, place = _bytes(body, place)
        yield session_id, owner, counters, record


def commands(body: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yields id, number and packed record of each entry."""
    place = 0
    while place < len(body):
        session_id, place = _name(body, place)
        number, record = command(body, place)
        place += _NUMBER.size + _RECORD.size + len(record)
        yield session_id, number, record


def command(entry: bytes, place: int = 0) -> tuple[int, bytes]:
    """Returns number and packed record of an entry behind its id."""
    (number,) = _NUMBER.unpack_from(entry, place)
    return int(number), _bytes(entry, place + _NUMBER.size)[0]


def ids(body: bytes) -> Iterator[str]:
    """Yields the ids."""
    place = 0
    while place < len(body):
        session_id, place = _name(body, place)
        yield session_id


def unpack_counters(packed: bytes, place: int = 0) -> tuple[str, Counters]:
    """Returns the owner and the counters."""
    _, sequence, revision, owner, state, page, total, products, errors, reported_at = _COUNTERS.unpack_from(
        packed, place
    )
    return owner.decode(), Counters(sequence, revision, state, page, total, products, errors, reported_at)


def _name(body: bytes, place: int) -> tuple[str, int]:
    begin = place + _ID.size
    end = begin + _ID.unpack_from(body, place)[0]
    return body[begin:end].decode(), end


def _bytes(body: bytes, place: int) -> tuple[bytes, int]:
    begin = place + _RECORD.size
    end = begin + _RECORD.unpack_from(body, place)[0]
    return body[begin:end], end
