"""What the session tracker refuses."""

from __future__ import annotations

from services.errors import DomainError


class SessionNotFound(DomainError):
    """The session is not live here."""

    reason = "SESSION_NOT_FOUND"

    def __init__(self, session_id: str) -> None:
        super().__init__("no such live session: start it again with its absolute counters", session_id=session_id)


class SessionAlreadyCompleted(DomainError):
    """The session has a final result, which stands."""

    reason = "SESSION_ALREADY_COMPLETED"

    def __init__(self, session_id: str) -> None:
        super().__init__("the session has a final result already, and that one stands", session_id=session_id)


class SessionLimitReached(DomainError):
    """The organization has as many live sessions as it may."""

    reason = "SESSION_LIMIT_REACHED"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the organization has {limit} live sessions, as many as it may: complete some first", limit=str(limit)
        )
