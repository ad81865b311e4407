"""What a session's worker is told, and how it reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class CommandKind(IntEnum):
    """What a session is told; the numbers are the contract's."""

    LEASE_LOST = 1
    PAUSE = 2
    RESUME = 3
    STOP = 4
    SPEED_LIMIT = 5


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        session_id: To whom.
        kind: A number of `CommandKind`.
        message: Why, for people.
        number: Grows with every command of the session; 0 for LEASE_LOST, which nothing replaces.
        pages_per_minute: With SPEED_LIMIT.
    """

    session_id: str
    kind: int
    message: str
    number: int = 0
    pages_per_minute: float = 0.0


class Listener(Protocol):
    """An open report stream, which can be told something between its answers."""

    def tell(self, command: Command) -> None:
        """Sends a command soon; does nothing when the stream has ended."""
