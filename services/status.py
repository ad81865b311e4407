"""The one place where a domain error becomes a gRPC status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from muster.errors.v1 import error_reason_pb2

from services.errors import DomainError, InvalidField

DOMAIN = "muster"

if TYPE_CHECKING:
    # Generic for the type checker only.
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

_CODES: dict[str, grpc.StatusCode] = {
    "INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT,
    "INVALID_API_KEY": grpc.StatusCode.UNAUTHENTICATED,
    "ROLE_NOT_ALLOWED": grpc.StatusCode.PERMISSION_DENIED,
    "DEADLINE_TOO_SHORT": grpc.StatusCode.DEADLINE_EXCEEDED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "OVERLOADED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "INTERNAL_FAULT": grpc.StatusCode.INTERNAL,
    "DATABASE_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "INVALID_PAGE_TOKEN": grpc.StatusCode.INVALID_ARGUMENT,
    "REQUEST_ID_REUSED": grpc.StatusCode.ALREADY_EXISTS,
    "METHOD_UNKNOWN": grpc.StatusCode.UNIMPLEMENTED,
    "SLOT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SLOT_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "EXIT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "EXIT_IN_USE": grpc.StatusCode.FAILED_PRECONDITION,
    "EXIT_LIMIT_REACHED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "ALLOCATION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "LEASE_LOST": grpc.StatusCode.FAILED_PRECONDITION,
    "LEASE_TOKEN_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "LEASE_AGE_EXCEEDED": grpc.StatusCode.FAILED_PRECONDITION,
    "STALE_VERSION": grpc.StatusCode.ABORTED,
    "TARGET_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "CLIENT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "QUARANTINED_RESULT_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SLOT_DAY_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "PERSONA_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "FINGERPRINT_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "PERSONA_CHECKED_OUT": grpc.StatusCode.FAILED_PRECONDITION,
    "CHECK_OUT_LOST": grpc.StatusCode.FAILED_PRECONDITION,
    "CHECK_OUT_READ_ONLY": grpc.StatusCode.FAILED_PRECONDITION,
    "STATUS_TRANSITION_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
    "NO_PERSONA_MATCHES": grpc.StatusCode.NOT_FOUND,
    "GENERATION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "PART_TOO_LARGE": grpc.StatusCode.INVALID_ARGUMENT,
    "OBJECT_STORE_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "PART_CORRUPT": grpc.StatusCode.DATA_LOSS,
    "SESSION_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "SESSION_ALREADY_COMPLETED": grpc.StatusCode.ALREADY_EXISTS,
    "SESSION_LIMIT_REACHED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "POLICY_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "TABLE_UNSUITABLE": grpc.StatusCode.FAILED_PRECONDITION,
    "QUERY_TOO_COSTLY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "QUERY_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "RUN_IN_PROGRESS": grpc.StatusCode.ABORTED,
    "ARCHIVE_CORRUPT": grpc.StatusCode.DATA_LOSS,
}


def reasons() -> set[str]:
    """Returns every reason of the contract, without its prefix."""
    names = error_reason_pb2.ErrorReason.keys()
    return {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}


def code_of(reason: str) -> grpc.StatusCode:
    """Returns the status code of a reason.

    Raises:
        KeyError: the reason is not in the table; a test walks all of them.
    """
    return _CODES[reason]


def code_number(reason: str) -> int:
    """Returns the google.rpc.Code of a reason, for the item errors of a batch."""
    number: int = code_of(reason).value[0]
    return number


async def abort(context: Context, error: DomainError, request_id: str) -> NoReturn:
    """Ends the call with the error's status, its ErrorInfo, field violations and RetryInfo."""
    code = code_of(error.reason)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.append(_packed(info))
    if isinstance(error, InvalidField):
        status.details.append(
            _packed(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.rule)
                        for violation in error.violations
                    ]
                )
            )
        )
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        status.details.append(_packed(retry))
    status.details.append(_packed(error_details_pb2.RequestInfo(request_id=request_id)))
    await context.abort(
        code,
        error.message,
        (("grpc-status-details-bin", status.SerializeToString()),),
    )
    raise AssertionError("context.abort always raises")


def _packed(
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo
    | error_details_pb2.RequestInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
