"""One service's channel: deadlines, retries and typed errors for every call on it.

What is repeated, and what not:

- UNAVAILABLE, when the call is safe to repeat or the service says when to come back (RetryInfo);
- RESOURCE_EXHAUSTED, only with RetryInfo: without it a limit is reached that time does not lift;
- DEADLINE_EXCEEDED, only for calls that are safe to repeat;
- ABORTED and everything else, never: the caller has to look again first.

The pause is what RetryInfo says plus a tenth of jitter, else exponential from 0.1 s to 5 s with full jitter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import grpc
import tenacity
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from muster import errors, values

Request = TypeVar("Request")
Response = TypeVar("Response")
Stub = TypeVar("Stub")

MESSAGE_BYTES = 8 * 2**20

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # A dead path (a pulled cable, a stopped process) is noticed within 25 s; the service allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A service that was restarted is found again within a second, not after grpc's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.lb_policy_name", "round_robin"),
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a call may take.

    Attributes:
        call_seconds: The deadline of each attempt.
        total_seconds: The bound over all attempts and the pauses between them.
    """

    call_seconds: float = 10.0
    total_seconds: float = 60.0


class Transport:
    """The channel to one service; connects when it is first used.

    Args:
        service: The service's name, for messages.
        variable: The environment variable that names its address, for messages.
        address: `host:port`; empty when the client was not told.
        api_key: The key to show; empty shows none.
        policy: How long calls may take.
    """

    def __init__(self, service: str, variable: str, address: str, api_key: str, policy: RetryPolicy) -> None:
        self.service = service
        self.address = address
        self.policy = policy
        self._variable = variable
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[Any, Any] = {}

    def stub(self, factory: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        """Returns a generated stub on the channel.

        Raises:
            NotConfigured: the client was not told the service's address.
        """
        if factory not in self._stubs:
            if not self.address:
                raise errors.NotConfigured(f"the address of the {self.service} is not known: set {self._variable}")
            if self._channel is None:
                self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
            self._stubs[factory] = factory(self._channel)
        found: Stub = self._stubs[factory]
        return found

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        idempotent: bool = True,
        call_seconds: float | None = None,
        total_seconds: float | None = None,
    ) -> Response:
        """Makes a call, again and again where that is safe, and returns its answer.

        Args:
            method: Of a stub of this transport.
            request: The same message for every attempt, with the same request id in it.
            idempotent: Whether repeating it changes nothing more.
            call_seconds: Another deadline for each attempt than the policy's.
            total_seconds: Another bound over all attempts than the policy's.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """

        async def attempt(seconds: float) -> Response:
            return await method(request, timeout=seconds, metadata=self._metadata)

        return await self.repeat(attempt, idempotent=idempotent, call_seconds=call_seconds, total_seconds=total_seconds)

    async def repeat(
        self,
        attempt: Callable[[float], Awaitable[Response]],
        *,
        idempotent: bool = True,
        call_seconds: float | None = None,
        total_seconds: float | None = None,
    ) -> Response:
        """Runs `attempt`, a coroutine function of its deadline in seconds, by the rules of `call`.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        total = total_seconds or max(self.policy.total_seconds, call_seconds or 0.0)
        each = min(call_seconds or self.policy.call_seconds, total)
        clock = asyncio.get_running_loop().time
        end = clock() + total
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(partial(may_repeat, idempotent=idempotent)),
            wait=_pause,
            stop=tenacity.stop_before_delay(total),
            reraise=True,
        )
        async for round_ in retrying:
            with round_:
                try:
                    return await attempt(min(each, max(end - clock(), 0.05)))
                except grpc.aio.AioRpcError as error:
                    raise self.restored(error) from None
        raise AssertionError("tenacity returns or raises")

    async def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Any, Response], request: Any, *, seconds: float | None = None
    ) -> AsyncGenerator[Response, None]:
        """Yields the answers of a call that streams them; one attempt.

        Args:
            method: Of a stub of this transport.
            request: The message, or an iterator of them.
            seconds: The bound on the whole stream; None for none.

        Raises:
            MusterError: it was refused or broke off.
        """
        call: Any = method(request, timeout=seconds, metadata=self._metadata)
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise self.restored(error) from None
        finally:
            call.cancel()

    async def pages(self, method: Any, request: Any) -> AsyncIterator[Any]:
        """Yields page after page of a list call, whose request has `page_token` and whose answer `next_page_token`.

        Raises:
            MusterError: a page was refused, or did not come in time.
        """
        while True:
            answer = await self.call(method, request)
            yield answer
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call shows, for the few that are made on a stub itself."""
        return self._metadata

    def restored(self, error: grpc.aio.AioRpcError) -> errors.MusterError:
        """Returns the typed error of a failed call; without details, its text names the service and its address."""
        code = error.code().name
        message = error.details() or ""
        reason, metadata, violations, retry_after = "", {}, [], None
        try:
            status = rpc_status.from_call(cast(grpc.Call, error))
        except (ValueError, DecodeError):
            # Details that contradict the status are a proxy's or an attacker's; the code alone is believed.
            status = None
        for detail in status.details if status is not None else ():
            info = error_details_pb2.ErrorInfo()
            fields = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(fields):
                violations = [
                    errors.FieldViolation(violation.field, violation.description)
                    for violation in fields.field_violations
                ]
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToTimedelta()
        if not reason:
            message = f"the {self.service} at {self.address}: {message or 'no answer'}"
        return errors.restore(code, reason, message, metadata=metadata, violations=violations, retry_after=retry_after)

    async def close(self) -> None:
        """Closes the channel; calls in flight end. Safe to call twice, and when never used."""
        channel, self._channel = self._channel, None
        self._stubs.clear()
        if channel is not None:
            await channel.close()


def item_error(error: Any) -> errors.MusterError:
    """Returns the typed error of an `ItemError` message."""
    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    # Of the contracts' messages of this name, not all tell when to come again.
    timed = "retry_after" in error.DESCRIPTOR.fields_by_name
    return errors.restore(
        codes.get(error.code, "UNKNOWN"),
        error.reason,
        error.message,
        metadata=dict(error.metadata),
        retry_after=values.interval(error, "retry_after") if timed else None,
    )


def may_repeat(error: BaseException, *, idempotent: bool) -> bool:
    """Whether a call that failed so is made again."""
    if isinstance(error, errors.Unavailable):
        return idempotent or error.retry_after is not None
    if isinstance(error, errors.ResourceExhausted):
        return error.retry_after is not None
    return isinstance(error, errors.DeadlineExceeded) and idempotent


def pause_seconds(error: BaseException | None, attempt: int) -> float:
    """Returns how long to wait after a failed attempt, counted from 1.

    A tenth of jitter on RetryInfo keeps a fleet from coming back all at once.
    """
    retry_after: timedelta | None = getattr(error, "retry_after", None)
    if retry_after is not None:
        return retry_after.total_seconds() * (1 + random.random() / 10)  # noqa: S311  (not a secret)
    return random.uniform(0, min(0.1 * 2 ** min(attempt - 1, 10), 5.0))  # noqa: S311  (not a secret)


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return pause_seconds(error, state.attempt_number)
