"""An organization's sessions on a clock set by hand, and reports as the memory takes them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.organizations import Organization

ORGANIZATION = UUID(int=1)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass(slots=True)
class Hands:
    """A clock set by hand; it begins far from 0, as a monotonic clock does."""

    seconds: float = 1000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, lambda: NOON + timedelta(seconds=self.seconds))


@dataclass(frozen=True, slots=True)
class Report:
    """An update of a session, as the contract's message has it."""

    session_id: str = "s"
    sequence: int = 1
    state: int = 0
    stage: str = ""
    current_page: int = 0
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    reason: str = ""
    errors_by_class: tuple[Any, ...] = ()
    last_errors: tuple[Any, ...] = ()
    acknowledged_command: int = 0


def organization(hands: Hands, **settings: Any) -> Organization:
    """Returns an organization without sessions."""
    return Organization(ORGANIZATION, SessionsConfig(**settings), hands.clock())
