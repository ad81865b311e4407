"""What stands between a slot and a worker, in words: kinds, remedies, and when to ask again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from uuid import UUID


class BlockerKind(IntEnum):
    """What stands in the way, as in the contract."""

    NO_SLOT = 1
    SLOT_INACTIVE = 2
    SLOT_OUT_OF_DATE = 3
    QUOTA_EXHAUSTED = 4
    NO_EXIT = 5
    EXIT_EXHAUSTED = 6
    NO_PERSONA = 7
    PERSONA_STORE_UNAVAILABLE = 8
    CLIENT_DRAINING = 9
    PACED = 10
    TARGET_HELD = 11
    TARGET_PAUSED = 12
    TARGET_BUSY = 13
    EXIT_COOLING = 14
    EXIT_UNAVAILABLE = 15


# The way of a unit from its slot to a worker. A slot is held back by the first step that it does not pass, so the
# further this step is, the nearer the slot is to being handed out.
_WAY = (
    BlockerKind.CLIENT_DRAINING,
    BlockerKind.NO_SLOT,
    BlockerKind.SLOT_INACTIVE,
    BlockerKind.SLOT_OUT_OF_DATE,
    BlockerKind.QUOTA_EXHAUSTED,
    BlockerKind.PACED,
    BlockerKind.TARGET_HELD,
    BlockerKind.TARGET_PAUSED,
    BlockerKind.TARGET_BUSY,
    BlockerKind.NO_EXIT,
    BlockerKind.EXIT_EXHAUSTED,
    BlockerKind.EXIT_COOLING,
    BlockerKind.EXIT_UNAVAILABLE,
    BlockerKind.NO_PERSONA,
    BlockerKind.PERSONA_STORE_UNAVAILABLE,
)
STEP = {kind: step for step, kind in enumerate(_WAY)}

_REMEDIES = {
    BlockerKind.NO_SLOT: "create one",
    BlockerKind.SLOT_INACTIVE: "activate one",
    BlockerKind.SLOT_OUT_OF_DATE: "change their dates",
    BlockerKind.QUOTA_EXHAUSTED: "raise a daily quota, or wait for leases to end or for midnight",
    BlockerKind.NO_EXIT: "import exits, or enable one",
    BlockerKind.EXIT_EXHAUSTED: "toggle one, or wait for leases or a window to end",
    BlockerKind.NO_PERSONA: "add personas, or wait until some are checked in",
    BlockerKind.PERSONA_STORE_UNAVAILABLE: "start it, or correct persona_store.target",
    BlockerKind.CLIENT_DRAINING: "end the drain of the client",
    BlockerKind.PACED: "wait for the next unit, or pace them asap",
    BlockerKind.TARGET_HELD: "wait until it ends, or resume the target",
    BlockerKind.TARGET_PAUSED: "wait for a probe, or resume the target",
    BlockerKind.TARGET_BUSY: "wait for leases to end or for its delay, change its policy, or resume the target to "
    "forget what it asked for",
    BlockerKind.EXIT_COOLING: "wait, clear their health, or import other exits",
    BlockerKind.EXIT_UNAVAILABLE: "start the provider, correct exit_providers, or wait until it has exits",
}

# When asking again may be worth it where no moment is known. Units, uses and personas come back as leases end; the
# rest changes as operators act. Nobody waits longer than the longest of them, since operators may act at any moment,
# and never as long as 10 minutes, after which a silent client counts as offline.
_SOON = 2.0
_LATER = 15.0
_LONGEST = 60.0
SHORTEST_SECONDS = 0.1
_RETRY_SECONDS = {
    BlockerKind.NO_SLOT: _LATER,
    BlockerKind.SLOT_INACTIVE: _LATER,
    BlockerKind.SLOT_OUT_OF_DATE: _LONGEST,
    BlockerKind.QUOTA_EXHAUSTED: _SOON,
    BlockerKind.NO_EXIT: _LATER,
    BlockerKind.EXIT_EXHAUSTED: _SOON,
    BlockerKind.NO_PERSONA: _SOON,
    BlockerKind.PERSONA_STORE_UNAVAILABLE: _SOON,
    BlockerKind.CLIENT_DRAINING: 30.0,
    BlockerKind.PACED: _LONGEST,
    BlockerKind.TARGET_HELD: _LONGEST,
    BlockerKind.TARGET_PAUSED: 1.0,
    BlockerKind.TARGET_BUSY: 1.0,
    BlockerKind.EXIT_COOLING: _LONGEST,
    BlockerKind.EXIT_UNAVAILABLE: _SOON,
}
# Their moment comes whatever else happens before; for the others it is the latest at which something changes.
_KNOWN = frozenset(
    {
        BlockerKind.PACED,
        BlockerKind.TARGET_HELD,
        BlockerKind.TARGET_PAUSED,
        BlockerKind.TARGET_BUSY,
        BlockerKind.EXIT_COOLING,
    }
)


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing in the way: `count` of `of` slots or exits are held back by it."""

    kind: BlockerKind
    count: int
    of: int
    examples: tuple[UUID, ...]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class NoWork:
    """Why nothing is handed out, and when to ask again."""

    blocker: BlockerKind
    message: str
    retry_after_seconds: float


def remedy(kind: BlockerKind) -> str:
    """Returns what to do about a blocker."""
    return _REMEDIES[kind]


def retry_seconds(kind: BlockerKind, until: datetime | None, now: datetime, *, returning: bool) -> float:
    """Returns when to ask again.

    Args:
        kind: What stands in the way.
        until: When that may end by itself; None when it is not known.
        now: The database's clock.
        returning: Whether leases live that may give a unit back.

    Returns:
        Seconds: 0.1 to 60.
    """
    seconds = _RETRY_SECONDS[kind]
    if kind is BlockerKind.QUOTA_EXHAUSTED and not returning:
        seconds = _LATER
    if until is not None:
        left = (until - now).total_seconds()
        seconds = min(left, _LONGEST) if kind in _KNOWN else min(left, seconds)
    return max(SHORTEST_SECONDS, seconds)


def when(until: datetime | None) -> str:
    """Returns a moment for a message, '' when it is not known."""
    return "" if until is None else f", until {until:%Y-%m-%d %H:%M:%S} UTC"
