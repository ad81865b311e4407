"""Calls to two replicas, each attempt in the history."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.fault.allocator.history import End, Journal

# A call that is not answered by then is given up; a replica that is stopped holds it for longer.
_ATTEMPT_SECONDS = 3.0
# Long enough for the database to recover and for a replica to come back, on a busy machine.
_PATIENCE_SECONDS = 60.0
_REST_SECONDS = 0.1
# With these the service says that it has done nothing.
_REFUSALS = frozenset(
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNIMPLEMENTED,
    )
)
# Reconnects at once: the default waits up to two minutes after a replica was away for long.
_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


@dataclass(frozen=True, slots=True)
class Call:
    """A call that may be made again.

    Attributes:
        kind: As in the history.
        method: The full name, such as `/muster.allocator.v1.WorkService/AllocateWork`.
        request: The message.
        answer: The type of the answer.
        asked: What the history says of the request.
        told: Makes of the answer what the history says of it.
    """

    kind: str
    method: str
    request: Any
    answer: Any
    asked: dict[str, Any]
    told: Callable[[Any], dict[str, Any]]


class GaveUp(Exception):
    """Nobody answered within the patience of a client."""


class Refused(Exception):
    """The call was refused as a whole; the text is the reason."""


class Caller:
    """Makes calls, by turns to each replica, until one is answered.

    Args:
        addresses: The replicas.
        key: The API key.
        journal: The history of this process.
        chance: Which replica comes first.
    """

    def __init__(self, addresses: list[str], key: str, journal: Journal, chance: random.Random) -> None:
        self._channels = [grpc.insecure_channel(address, options=_OPTIONS) for address in addresses]
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._journal = journal
        self._chance = chance

    def call(self, call: Call) -> Any:
        """Returns the answer.

        Raises:
            GaveUp: nobody answered; what was asked may have been done, or may be done still.
            Refused: nothing was done.
        """
        until = time.monotonic() + _PATIENCE_SECONDS
        turn = self._chance.randrange(len(self._channels))
        while time.monotonic() < until:
            name = self._journal.begin(call.kind, call.asked)
            channel = self._channels[turn % len(self._channels)]
            method = channel.unary_unary(
                call.method,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
            try:
                answer = method(call.request, metadata=self._metadata, timeout=_ATTEMPT_SECONDS)
            except grpc.RpcError as error:
                code, reason = _reason(error)
                told = {"code": code.name, "reason": reason}
                if code in _REFUSALS:
                    self._journal.end(name, End.FAIL, told)
                    raise Refused(reason) from None
                self._journal.end(name, End.UNKNOWN, told)
            else:
                self._journal.end(name, End.OK, call.told(answer))
                return answer
            turn += 1
            time.sleep(_REST_SECONDS)
        raise GaveUp(call.kind)

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            channel.close()


def _reason(error: Any) -> tuple[grpc.StatusCode, str]:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return error.code(), str(info.reason)
    return error.code(), str(error.details())
