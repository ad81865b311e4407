"""What leads watchers from one offset to another, cut into pieces that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from session_tracker.clock import Clock
from session_tracker.filters import Filter
from session_tracker.organizations import Organization
from session_tracker.sessions import Session

# What a piece may weigh: 250 sessions in full are 50 to 150 KB and 5 ms of work, in which no report is taken.
_PIECE_WEIGHT = 4000
_FULL_WEIGHT = 16
# Forecast and pace go with every page, and would make every change a full one. Who takes changes packed learns of them
# this much later at most.
_REFRESH_SECONDS = 10.0
_PARTS = 64
_NEVER = 0.0, 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what a watcher is sent.

    Attributes:
        offset: From where the watcher can go on if it gets nothing after this piece.
        snapshot: It forgets what it holds, before taking this piece.
        rebuilding: Sessions may be missing that workers have yet to report again.
        sessions: To be sent in full.
        packed: Of these the watcher knows all but the counters.
        removed: Left memory, or matching no more; none of them stands in `sessions`.
    """

    offset: int
    snapshot: bool
    rebuilding: bool
    sessions: list[Session]
    packed: list[Session]
    removed: list[str]


Encode = Callable[[Piece], bytes]


@dataclass(frozen=True, slots=True)
class Part:
    """An encoded piece.

    Attributes:
        data: The answer as it goes onto the wire.
        end: Where the next part begins; the span's length after the last.
        empty: It shows nothing.
        rebuilding: As in the piece.
        reported: When one of the sessions shown was reported, on the monotonic clock; None when none of them is shown
            for a report of counters.
    """

    data: bytes
    end: int
    empty: bool
    rebuilding: bool
    reported: float | None


class View:
    """What the watchers of a feed are shown: the sessions of an organization that match a filter.

    Attributes:
        held: The ids that a watcher which is up to date may hold, and perhaps some more; with when each was last due in
            full, and at which offset.
        holds: Whether `held` is kept: with a filter that binds, or packed.
    """

    __slots__ = ("_clock", "encode", "filter", "held", "holds", "organization", "packed")

    def __init__(
        self, organization: Organization, filter: Filter, encode: Encode, clock: Clock, *, packed: bool
    ) -> None:
        self.organization = organization
        self.filter = filter
        self.encode = encode
        self.packed = packed
        self.held: dict[str, tuple[float, int]] = {}
        self._clock = clock
        self.holds = packed or filter.binds

    def matching(self) -> list[str]:
        """Returns the ids of all that match now. Looks at every session."""
        sessions, matches, held = self.organization.sessions, self.filter.matches, self.held
        if not self.holds:
            return list(sessions)
        now = self._clock.monotonic()
        # As if they had been sent one after the other, so that they are not all due at once for ever.
        marks = [(now - _REFRESH_SECONDS * part / _PARTS, 0) for part in range(_PARTS)]
        found = []
        for session in sessions.values():
            if matches(session):
                found.append(session.session_id)
                held.setdefault(session.session_id, marks[session.number % _PARTS])
        return found

    def concerned(self, ids: set[str], offset: int) -> list[str]:
        """Returns those of the sessions changed up to an offset that a watcher which is up to date must be told of."""
        if not self.holds:
            return list(ids)
        sessions, matches, held = self.organization.sessions, self.filter.matches, self.held
        now = self._clock.monotonic()
        due, mark = now - _REFRESH_SECONDS, (now, offset)
        found = []
        for session_id in ids:
            session = sessions.get(session_id)
            if session is not None and matches(session):
                if held.setdefault(session_id, mark)[0] <= due:
                    held[session_id] = mark
                found.append(session_id)
            elif held.pop(session_id, None) is not None:
                found.append(session_id)
        return found

    def in_full(self, session: Session, offset: int) -> bool:
        """Whether a session that is known is due in full with the turn up to an offset.

        Who missed that turn waits for the next time: to make up for it would make the late later.
        """
        return not self.packed or self.held.get(session.session_id, _NEVER)[1] == offset

    def concerned_since(self, ids: set[str], offset: int) -> list[str]:
        """Returns those of the sessions changed after an offset that a watcher which stands there must be told of.

        A session that does not match and is described as it was then did not match then. Some may be named that never
        matched, since what a session was like in between is not known any more.
        """
        if not self.filter.binds:
            return list(ids)
        sessions, matches = self.organization.sessions, self.filter.matches
        return [
            session_id
            for session_id in ids
            if (session := sessions.get(session_id)) is None or session.described > offset or matches(session)
        ]


class Span:
    """Leads from `before` to `after`. Pieces are made when they are first asked for, of what is known at that moment.

    Only the last piece carries the offset `after`: a watcher that is cut off earlier goes on from `before`, and so
    misses nothing.

    Args:
        view: What is shown.
        before: The offset at which a watcher must stand; None for any: this is a snapshot.
        after: Where it stands then.
        turn: The feed's turn that this leads up to; what changed since comes with the next.
        ids: Whom this is about; those that neither match nor are held are told as removed.

    Attributes:
        length: How many sessions this is about.
        kept_bytes: How much is kept encoded.
    """

    __slots__ = ("__weakref__", "_ids", "_parts", "_view", "after", "before", "kept_bytes", "length", "turn")

    def __init__(self, view: View, before: int | None, after: int, turn: int, ids: list[str]) -> None:
        self._view = view
        self._ids = ids
        self._parts: dict[int, Part] | None = {}
        self.before = before
        self.after = after
        self.turn = turn
        self.length = len(ids)
        self.kept_bytes = 0

    def retire(self) -> None:
        """Keeps no part from now on: few still need them, and any of those would hold all of them."""
        self._parts = None
        self.kept_bytes = 0

    def part(self, begin: int) -> Part:
        """Returns the part that begins at a place: 0, or the end of another part."""
        if self._parts is None:
            return self._cut(begin)
        part = self._parts.get(begin)
        if part is None:
            part = self._parts[begin] = self._cut(begin)
            self.kept_bytes += len(part.data)
        return part

    def _cut(self, begin: int) -> Part:
        view, ids, length = self._view, self._ids, self.length
        organization, matches = view.organization, view.filter.matches
        organization.settle()
        sessions = organization.sessions
        snapshot = self.before is None
        # In a snapshot nothing is known to the watcher, since every session began after offset 0.
        known = self.before or 0
        full: list[Session] = []
        packed: list[Session] = []
        removed: list[str] = []
        reported = None
        weight = 0
        end = begin
        while end < length and weight < _PIECE_WEIGHT:
            session_id = ids[end]
            end += 1
            session = sessions.get(session_id)
            if session is None or not matches(session):
                if not snapshot:
                    removed.append(session_id)
                    weight += 1
                continue
            if session.described <= known:
                reported = session.reported
                if not view.in_full(session, self.after):
                    packed.append(session)
                    weight += 1
                    continue
            full.append(session)
            weight += _FULL_WEIGHT
            if view.holds:
                view.held.setdefault(session_id, _NEVER)
        piece = Piece(
            offset=self.after if end == length else known,
            snapshot=snapshot and begin == 0,
            rebuilding=organization.rebuilding,
            sessions=full,
            packed=packed,
            removed=removed,
        )
        empty = not (full or packed or removed)
        return Part(view.encode(piece), end, empty, piece.rebuilding, reported)
