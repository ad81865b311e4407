"""Domain errors: a reason, a message and metadata. `services.status` decides what status code a reason becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class DomainError(Exception):
    """A refusal that the caller is told about.

    Subclasses set `reason`, the name of a `muster.errors.v1.ErrorReason` without its prefix.

    Args:
        message: For people; names the cause and, where there is one, the mend.
        retry_after_seconds: When a retry may succeed; None when no retry will.
        metadata: Goes into `google.rpc.ErrorInfo`; short values.
    """

    reason: ClassVar[str]

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.metadata = metadata


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong: its path in the request and the rule it breaks, with the limit."""

    field: str
    rule: str


# Of all violations that are told together, in UTF-8. They travel in the call's trailers, of which gRPC takes 8 KiB for
# sure: once as the message, which is three times as long where it is not ASCII, and once as details.
_MOST_BYTES = 1024


class InvalidField(DomainError):
    """The request itself is wrong.

    Args:
        violations: The first of them, at least one. As many are told as fit into 1 KiB.
        count: How many there are in all; by default those given.
    """

    reason = "INVALID_FIELD"

    def __init__(self, violations: list[FieldViolation], count: int = 0) -> None:
        count = max(count, len(violations))
        self.violations: list[FieldViolation] = []
        room = _MOST_BYTES
        for violation in violations:
            room -= len(violation.field.encode()) + len(violation.rule.encode())
            if room < 0 and self.violations:
                break
            self.violations.append(violation)
        told = [f"{violation.field}: {violation.rule}" for violation in self.violations]
        if (more := count - len(told)) > 0:
            told.append(f"and {more} more")
        fields = ",".join(violation.field for violation in self.violations)
        super().__init__("; ".join(told), fields=fields[:512])


class InvalidApiKey(DomainError):
    """No API key, or none that is valid. Which of the two is not told."""

    reason = "INVALID_API_KEY"

    def __init__(self) -> None:
        super().__init__("no valid API key: send it as the metadata 'authorization: Bearer <key>'")


class RoleNotAllowed(DomainError):
    """The caller's role may not make this call."""

    reason = "ROLE_NOT_ALLOWED"


class DeadlineTooShort(DomainError):
    """The call was not begun, since it could not have ended in time."""

    reason = "DEADLINE_TOO_SHORT"


class Draining(DomainError):
    """The service is stopping."""

    reason = "DRAINING"


class Overloaded(DomainError):
    """A bounded queue is full."""

    reason = "OVERLOADED"


class InternalFault(DomainError):
    """A fault of our own; the log has it whole."""

    reason = "INTERNAL_FAULT"


class DatabaseUnavailable(DomainError):
    """The database does not answer."""

    reason = "DATABASE_UNAVAILABLE"


class InvalidPageToken(DomainError):
    """The page token belongs to another request, or to none."""

    reason = "INVALID_PAGE_TOKEN"


class RequestIdReused(DomainError):
    """The request id stands for another request already."""

    reason = "REQUEST_ID_REUSED"


class MethodUnknown(DomainError):
    """This release has no such method."""

    reason = "METHOD_UNKNOWN"


class StartupError(Exception):
    """The process cannot start as it is set up. Its one-line message names the cause and the mend; exit code 2."""


def first_line(error: BaseException) -> str:
    """Returns what an exception says, as one line for an operator: its first line, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
