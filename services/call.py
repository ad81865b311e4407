"""What is known of the call in hand: who makes it, its request id, and how long it may still take."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

# A caller needs some time to receive the answer, so a call passed on gets a little less than is left.
SHAVE_SECONDS = 0.02
# Below this nothing useful can be begun: a round trip to the database on a quiet machine takes about 1 ms.
SHORTEST_SECONDS = 0.005
# What a caller that sets no deadline gets for calls made on its behalf.
DEFAULT_SECONDS = 30.0


class Role(IntEnum):
    """What a principal may do; each role may do what the ones below it may."""

    WORKER = 1
    OPERATOR = 2
    ADMIN = 3
    # Another service of the suite: may act for any organization, which it names.
    SERVICE = 4


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call.

    Attributes:
        key_id: The API key's id, for logs, history and audit; never the key.
        organization_id: The tenant every query is bound to.
        role: What it may do.
        time_zone: The organization's IANA time zone; days begin there.
    """

    key_id: str
    organization_id: UUID
    role: Role
    time_zone: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call: `deadline` is on the clock of `time.monotonic`, None when the caller set none."""

    principal: Principal
    request_id: str
    method: str
    deadline: float | None
    traceparent: str = ""

    def remaining_seconds(self) -> float:
        """Returns how long a call or statement made on behalf of this one may take; never below 1 ms."""
        if self.deadline is None:
            return DEFAULT_SECONDS
        return max(self.deadline - time.monotonic() - SHAVE_SECONDS, 0.001)


_current: ContextVar[Call] = ContextVar("muster_call")


def current() -> Call:
    """Returns the call in hand.

    Raises:
        LookupError: outside a call.
    """
    return _current.get()


def begin(call: Call) -> None:
    """Makes `call` the current one of this task. For the interceptor, and for loops that act on somebody's behalf."""
    _current.set(call)
