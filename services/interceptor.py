"""The one wrapper around every handler: deadline, authentication, role, errors, metrics and the canonical log line.

It wraps handlers once, when they are registered, instead of standing as grpc.aio interceptors in the path of each
call: an interceptor costs a coroutine and a fresh handler object per call, a fifth of a bare call each (measured in
``bench/chassis.py``). The order inside is:

1. time and count the call, whatever becomes of it;
2. deadline: a call that cannot end in time is not begun;
3. authentication, then role: nothing of the request is looked at before;
4. the handler;
5. errors: a domain error becomes its status; anything else is logged whole and answered with a fixed text.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import structlog
from prometheus_client import Counter, Gauge, Histogram

from services.call import SHORTEST_SECONDS, Call, Principal, Role, begin, current
from services.errors import DeadlineTooShort, DomainError, InternalFault, MethodUnknown, RoleNotAllowed
from services.identity.keys import Authenticator
from services.status import Context, abort, code_of

_log = structlog.get_logger("rpc")

SECONDS = Histogram(
    "muster_rpc_seconds",
    "Time from a call's arrival to its end; for streams, their whole life.",
    ["service", "method"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
TOTAL = Counter("muster_rpc", "Calls ended, by status code.", ["service", "method", "code"])
IN_FLIGHT = Gauge("muster_rpc_in_flight", "Calls begun and not ended.", ["service", "method"])

Handler = Callable[[Any, Context], Any]
Behaviour = TypeVar("Behaviour", bound=Callable[..., Any])


class Registrar:
    """Stands in for a server in a generated ``add_…Servicer_to_server``: wraps the handlers, then registers them.

    Args:
        server: The server to register with.
        authenticator: Says who calls.
        role: The least role for the service's methods.
        exceptions: Another least role for single methods, by name.
    """

    def __init__(
        self, server: grpc.aio.Server, authenticator: Authenticator, role: Role, exceptions: dict[str, Role]
    ) -> None:
        self._server = server
        self._authenticator = authenticator
        self._role = role
        self._exceptions = dict(exceptions)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated code; the same handlers come by `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Called by generated code with the handlers of one service.

        Raises:
            ValueError: an exception names a method that the service does not have.
        """
        strangers = set(self._exceptions) - set(handlers)
        if strangers:
            raise ValueError(f"{service} has no method {', '.join(sorted(strangers))}")
        wrapped = {
            method: _wrap(
                handler, _Method(service, method, self._exceptions.get(method, self._role), self._authenticator)
            )
            for method, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


class _Method:
    """What the wrapper needs to know of one method, looked up once."""

    __slots__ = ("authenticator", "full_name", "in_flight", "method", "ok", "role", "seconds", "service")

    def __init__(self, service: str, method: str, role: Role, authenticator: Authenticator) -> None:
        self.service = service
        self.method = method
        self.full_name = f"{service}/{method}"
        self.role = role
        self.authenticator = authenticator
        self.seconds = SECONDS.labels(service, method)
        self.in_flight = IN_FLIGHT.labels(service, method)
        self.ok = TOTAL.labels(service, method, "OK")

    def count(self, code: str) -> None:
        TOTAL.labels(self.service, self.method, code).inc()

    def admit(self, context: Context) -> Awaitable[None] | None:
        """Checks deadline, key and role, and makes this the current call.

        Returns:
            None when that is done, which is nearly always; else what must be awaited to do it.

        Raises:
            DeadlineTooShort: so little time is left that the call is not begun.
        """
        authorization = request_id = organization = traceparent = ""
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                authorization = str(value)
            elif key == "x-request-id":
                request_id = str(value)[:64]
            elif key == "muster-organization":
                organization = str(value)
            elif key == "traceparent":
                traceparent = str(value)[:55]
        if not request_id:
            request_id = _new_request_id()
        remaining = context.time_remaining()
        # grpc answers with a great number when the caller set none.
        deadline = None if remaining is None or remaining > 1e6 else time.monotonic() + remaining
        if deadline is None or remaining >= SHORTEST_SECONDS:
            principal = self.authenticator.remembered(authorization)
            if principal is not None and principal.role >= self.role and not organization:
                begin(Call(principal, request_id, self.full_name, deadline, traceparent))
                return None
        call = Call(_NOBODY, request_id, self.full_name, deadline, traceparent)
        begin(call)
        if deadline is not None and remaining < SHORTEST_SECONDS:
            raise DeadlineTooShort(
                "too little time is left to begin: set a longer deadline",
                remaining_ms=str(max(0, int(remaining * 1000))),
            )
        return self._look_up(call, authorization, organization)

    async def _look_up(self, call: Call, authorization: str, organization: str) -> None:
        """Finds out who makes the call. Raises: InvalidApiKey, RoleNotAllowed, DatabaseUnavailable."""
        principal = self.authenticator.remembered(authorization) or await self.authenticator.authenticate(authorization)
        if principal.role < self.role:
            raise RoleNotAllowed(
                f"this call needs the role {self.role.name.lower()}",
                role=principal.role.name.lower(),
                needs=self.role.name.lower(),
            )
        if organization and principal.role is Role.SERVICE:
            principal = await self.authenticator.acting_for(principal, organization)
        begin(replace(call, principal=principal))

    async def refuse(self, context: Context, error: BaseException, started: float) -> None:
        """Ends the call with the status of an error."""
        call = _call_or_none()
        request_id = call.request_id if call else _new_request_id()
        if isinstance(error, NotImplementedError):
            # What generated code raises for a method of the contract that the servicer does not have.
            error = MethodUnknown(f"this release does not serve {self.full_name}")
        if isinstance(error, DomainError):
            code = code_of(error.reason).name
            level = "warning" if code in ("UNAVAILABLE", "DATA_LOSS", "INTERNAL") else "info"
            getattr(_log, level)(
                "call refused",
                method=self.full_name,
                code=code,
                reason=error.reason,
                message=error.message,
                request=request_id,
                key=call.principal.key_id if call else "",
                seconds=round(time.perf_counter() - started, 6),
            )
        else:
            code = "INTERNAL"
            _log.error("call failed", method=self.full_name, request=request_id, exc_info=error)
            error = InternalFault(
                f"a fault of the service's own; its log has the request {request_id}", request=request_id
            )
        self.count(code)
        await abort(context, error, request_id)

    def answered(self, started: float) -> None:
        """Counts a call that ended well. The log line is for debugging: at full speed it costs more than the call."""
        self.ok.inc()
        _log.debug("call", method=self.full_name, seconds=round(time.perf_counter() - started, 6))


_NOBODY = Principal("", uuid.UUID(int=0), Role.WORKER, "UTC")


# What a request is called when its caller does not say: as unlike others as random ids are, but without asking the
# kernel for randomness in every call.
_process_id = uuid.uuid4().hex[:16]
_numbers = itertools.count(1)


def _new_request_id() -> str:
    return f"{_process_id}{next(_numbers):016x}"


def _call_or_none() -> Call | None:
    try:
        return current()
    except LookupError:
        return None


def takes_bytes(behaviour: Behaviour) -> Behaviour:
    """Marks a servicer's method that is handed requests as the bytes they came as, and parses them itself."""
    behaviour.takes_bytes = True  # type: ignore[attr-defined]
    return behaviour


def _wrap(handler: Any, method: _Method) -> Any:
    """Returns `handler` with the wrapper around its behaviour, for any of the four shapes."""
    behaviours = handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    parses = any(getattr(behaviour, "takes_bytes", False) for behaviour in behaviours)
    serialize = handler.response_serializer

    def encoded(response: Any) -> bytes:
        # What a servicer has encoded itself goes out as it is.
        return response if type(response) is bytes else serialize(response)

    options = {"request_deserializer": None if parses else handler.request_deserializer, "response_serializer": encoded}
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream, method), **options)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(_single(handler.stream_unary, method), **options)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, method), **options)
    return grpc.unary_unary_rpc_method_handler(_single(handler.unary_unary, method), **options)


def _single(behaviour: Callable[[Any, Context], Awaitable[Any]], method: _Method) -> Handler:
    async def handle(request: Any, context: Context) -> Any:
        started = time.perf_counter()
        method.in_flight.inc()
        try:
            if (unknown := method.admit(context)) is not None:
                await unknown
            response = await behaviour(request, context)
            method.answered(started)
            return response
        except asyncio.CancelledError:
            method.count("CANCELLED")
            raise
        except Exception as error:
            await method.refuse(context, error, started)
        finally:
            method.in_flight.dec()
            method.seconds.observe(time.perf_counter() - started)

    return handle


def _streaming(behaviour: Callable[[Any, Context], AsyncIterator[Any]], method: _Method) -> Handler:
    async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
        started = time.perf_counter()
        method.in_flight.inc()
        try:
            if (unknown := method.admit(context)) is not None:
                await unknown
            async for response in behaviour(request, context):
                yield response
            method.answered(started)
        except (asyncio.CancelledError, GeneratorExit):
            method.count("CANCELLED")
            raise
        except Exception as error:
            await method.refuse(context, error, started)
        finally:
            method.in_flight.dec()
            method.seconds.observe(time.perf_counter() - started)

    return handle
