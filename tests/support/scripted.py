"""Real gRPC servers on loopback that answer as a test tells them: the contracts without the services behind them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from muster.allocator.v1 import admin_pb2, exit_pb2, insight_pb2, slot_pb2, work_pb2
from muster.archiver.v1 import archive_pb2
from muster.persona_store.v1 import bundle_pb2, checkout_pb2, persona_pb2
from muster.session_tracker.v1 import session_pb2

from services.errors import DomainError
from services.status import abort

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (
        work_pb2,
        slot_pb2,
        exit_pb2,
        insight_pb2,
        admin_pb2,
        bundle_pb2,
        checkout_pb2,
        persona_pb2,
        session_pb2,
        archive_pb2,
    )
)

Behaviour = Any
"""A message, an error or status to refuse with, or an async function of (request, context)."""


def refusal(
    reason: str, message: str = "as scripted", retry_after: float | None = None, **metadata: str
) -> DomainError:
    """Returns an error that a service would refuse with."""
    error = DomainError(message, retry_after_seconds=retry_after, **metadata)
    error.reason = reason  # type: ignore[misc]
    return error


class Status:
    """A bare status without details, as a proxy or a broken connection gives."""

    def __init__(self, code: grpc.StatusCode, message: str = "", trailing: tuple[tuple[str, bytes], ...] = ()) -> None:
        self.code = code
        self.message = message
        self.trailing = trailing


class ScriptedServer:
    """All services of the suite on one port.

    Attributes:
        address: `host:port`, while it serves.
        calls: The requests that came, by method; of a streaming one every message.
        metadata: The metadata of each call, by method.
    """

    def __init__(self) -> None:
        self.address = ""
        self.calls: defaultdict[str, list[Any]] = defaultdict(list)
        self.metadata: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._behaviours: dict[str, list[Behaviour]] = {}
        self._came = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    def on(self, method: str, *behaviours: Behaviour) -> None:
        """Says how `method`, such as `WorkService/AllocateWork`, answers its calls: one each, the last for ever."""
        self._behaviours[method] = list(behaviours)

    async def came(self, method: str, count: int = 1, seconds: float = 10.0) -> list[Any]:
        """Waits until `count` requests of a method have come and returns them all."""
        async with asyncio.timeout(seconds), self._came:
            await self._came.wait_for(lambda: len(self.calls[method]) >= count)
        return self.calls[method]

    async def start(self, port: int = 0) -> None:
        """Serves."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        for file in FILES:
            for service in file.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
                self._server.add_generic_rpc_handlers((generic,))
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self, grace: float | None = None) -> None:
        """Ends every call and closes the port; safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace)

    def _handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        name = f"{method.containing_service.name}/{method.name}"
        codec: dict[str, Any] = {
            "request_deserializer": GetMessageClass(method.input_type).FromString,
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }
        makers: dict[tuple[bool, bool], Callable[..., Any]] = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        behave = self._many(name) if method.server_streaming else self._one(name)
        made: grpc.RpcMethodHandler[Any, Any] = makers[method.client_streaming, method.server_streaming](
            behave, **codec
        )
        return made

    def _one(self, name: str) -> Callable[..., Any]:
        async def handle(request: Any, context: Any) -> Any:
            given = await self._arrived(name, request, context)
            behaviour = await self._next(name, context)
            if isinstance(behaviour, Message):
                return behaviour
            return await behaviour(given, context)

        return handle

    def _many(self, name: str) -> Callable[..., Any]:
        async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
            given = await self._arrived(name, request, context)
            behaviour = await self._next(name, context)
            async for answer in behaviour(given, context):
                yield answer

        return handle

    async def _arrived(self, name: str, request: Any, context: Any) -> Any:
        self.metadata[name].append(dict(context.invocation_metadata() or ()))
        if isinstance(request, Message):
            await self._note(name, request)
            return request

        async def noted() -> AsyncIterator[Any]:
            async for message in request:
                await self._note(name, message)
                yield message

        return noted()

    async def _note(self, name: str, request: Any) -> None:
        async with self._came:
            self.calls[name].append(request)
            self._came.notify_all()

    async def _next(self, name: str, context: Any) -> Any:
        behaviours = self._behaviours.get(name)
        if not behaviours:
            await abort(context, refusal("METHOD_UNKNOWN", f"no behaviour for {name}"), "scripted")
        assert behaviours is not None
        behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        if isinstance(behaviour, DomainError):
            await abort(context, behaviour, "scripted")
        if isinstance(behaviour, Status):
            await context.abort(behaviour.code, behaviour.message, behaviour.trailing)
        return behaviour
