"""What a call can be refused with: one class per status code, and a subclass for each reason worth telling apart.

Catch the class that says what you will do about it: `NotFound`, `Unavailable` and the like are stable, and a reason
that this release does not know comes as the class of its status code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong: its path in the request, and the rule it breaks with the limit."""

    field: str
    rule: str


class MusterError(Exception):
    """A call, or one item of a batch, was refused.

    Attributes:
        code: The status code's name, such as `NOT_FOUND`.
        reason: The reason's name in the contract, such as `SLOT_NOT_FOUND`; empty when the service gave none.
        message: For people; not stable.
        metadata: What the reason is about, such as `{"slot_id": "…"}`.
        violations: The fields that are wrong; only with `INVALID_FIELD`.
        retry_after: When a retry may succeed; None when the service did not say.
    """

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(f"{reason or code}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after


class NotConfigured(MusterError):
    """The client was not told how to reach the service; raised without a call."""

    def __init__(self, message: str) -> None:
        super().__init__("NOT_CONFIGURED", "", message)


class InvalidArgument(MusterError):
    """The request itself is wrong; repeating it will not help."""


class InvalidField(InvalidArgument):
    """Fields of the request are wrong; `violations` names each with its limit."""


class InvalidPageToken(InvalidArgument):
    """The page token was not given for this request."""


class PartTooLarge(InvalidArgument):
    """A bundle part is larger than its limit; the metadata holds part, size and limit."""


class QueryInvalid(InvalidArgument):
    """The SQL cannot be planned; the message holds the planner's words."""


class Unauthenticated(MusterError):
    """No API key, or one that is unknown, revoked or expired."""


class PermissionDenied(MusterError):
    """The key's role may not make this call; the metadata says which role may."""


class DeadlineExceeded(MusterError):
    """No answer came in time. What was asked may have been done."""


class Unavailable(MusterError):
    """The service, its database or its object store does not answer. Nothing that was acknowledged is lost."""


class ResourceExhausted(MusterError):
    """A limit is reached; with `retry_after` it is a passing one."""


class Overloaded(ResourceExhausted):
    """A bounded queue of the service is full."""


class LimitReached(ResourceExhausted):
    """The organization holds as many exits or sessions as it may."""


class QueryTooCostly(ResourceExhausted):
    """The query would read more than its limit; the metadata holds both in bytes."""


class ServiceFault(MusterError):
    """A fault of the service's own; the metadata names the request for its log."""


class Unimplemented(MusterError):
    """This release of the service does not know the method."""


class NotFound(MusterError):
    """There is no such thing in the caller's organization."""


class NoPersonaMatches(NotFound):
    """No idle persona matches the criteria; the metadata counts those that match but are held or resting."""


class GenerationNotFound(NotFound):
    """The persona has no such bundle, or not any more."""


class SessionNotFound(NotFound):
    """The session is not live there; start it again with its absolute counters."""


class AlreadyExists(MusterError):
    """Something else stands in its place; the metadata names it."""


class RequestIdReused(AlreadyExists):
    """The request id stands for another request."""


class SlotExists(AlreadyExists):
    """Another slot has this `external_id`; the metadata holds its id."""


class FingerprintExists(AlreadyExists):
    """A persona of the organization has the same fingerprint; the metadata holds its `persona_id`."""


class SessionAlreadyCompleted(AlreadyExists):
    """The session was completed with another result, which stands."""


class FailedPrecondition(MusterError):
    """The thing is not in a state that allows this."""


class LeaseLost(FailedPrecondition):
    """The lease ran out, was released or revoked, or another holds it. Stop working on it."""


class LeaseAgeExceeded(FailedPrecondition):
    """The lease has reached its greatest age: it runs out and cannot be renewed again."""


class CheckOutLost(FailedPrecondition):
    """The check-out of the persona ended; nothing can be saved under it."""


class CheckOutReadOnly(FailedPrecondition):
    """A read-only check-out cannot save."""


class PersonaCheckedOut(FailedPrecondition):
    """Another holder has the persona; the metadata says until when."""


class StatusTransitionRefused(FailedPrecondition):
    """A persona's life has no such step; the metadata holds both states."""


class TableUnsuitable(FailedPrecondition):
    """The policy's table is missing, not partitioned by range, or its source is not configured."""


class Aborted(MusterError):
    """Somebody else came first. Never repeated by the client on its own: read again, then decide."""


class StaleVersion(Aborted):
    """The row changed since it was read."""


class RunInProgress(Aborted):
    """Another run works on the same table at this moment."""


class DataLoss(MusterError):
    """Stored bytes do not have the size or hash on record."""


_BY_CODE: dict[str, type[MusterError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "OUT_OF_RANGE": InvalidArgument,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
    # A server that stops cuts calls off with this; a call cancelled by the caller raises asyncio's own error instead.
    "CANCELLED": Unavailable,
    "RESOURCE_EXHAUSTED": ResourceExhausted,
    "INTERNAL": ServiceFault,
    "UNKNOWN": ServiceFault,
    "UNIMPLEMENTED": Unimplemented,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": FailedPrecondition,
    "ABORTED": Aborted,
    "DATA_LOSS": DataLoss,
}

# Reasons that are not here have nothing to add to the class of their code.
_BY_REASON: dict[str, type[MusterError]] = {
    "INVALID_FIELD": InvalidField,
    "INVALID_PAGE_TOKEN": InvalidPageToken,
    "PART_TOO_LARGE": PartTooLarge,
    "QUERY_INVALID": QueryInvalid,
    "OVERLOADED": Overloaded,
    "EXIT_LIMIT_REACHED": LimitReached,
    "SESSION_LIMIT_REACHED": LimitReached,
    "QUERY_TOO_COSTLY": QueryTooCostly,
    "NO_PERSONA_MATCHES": NoPersonaMatches,
    "GENERATION_NOT_FOUND": GenerationNotFound,
    "SESSION_NOT_FOUND": SessionNotFound,
    "REQUEST_ID_REUSED": RequestIdReused,
    "SLOT_EXISTS": SlotExists,
    "FINGERPRINT_EXISTS": FingerprintExists,
    "SESSION_ALREADY_COMPLETED": SessionAlreadyCompleted,
    "LEASE_LOST": LeaseLost,
    "LEASE_TOKEN_MISMATCH": LeaseLost,
    "LEASE_AGE_EXCEEDED": LeaseAgeExceeded,
    "CHECK_OUT_LOST": CheckOutLost,
    "CHECK_OUT_READ_ONLY": CheckOutReadOnly,
    "PERSONA_CHECKED_OUT": PersonaCheckedOut,
    "STATUS_TRANSITION_REFUSED": StatusTransitionRefused,
    "TABLE_UNSUITABLE": TableUnsuitable,
    "STALE_VERSION": StaleVersion,
    "RUN_IN_PROGRESS": RunInProgress,
}


def restore(
    code: str,
    reason: str,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    violations: Sequence[FieldViolation] = (),
    retry_after: timedelta | None = None,
) -> MusterError:
    """Returns the error of a status: by its reason, else by its code, else `MusterError` itself."""
    by_code = _BY_CODE.get(code, MusterError)
    found = _BY_REASON.get(reason, by_code)
    # The code decides what a caller does; a reason under another code than the contract's is not believed.
    cls = found if issubclass(found, by_code) else by_code
    return cls(code, reason, message, metadata=metadata, violations=violations, retry_after=retry_after)
