"""A provider of external exits: a real HTTP server that keeps the contract, and breaks it when it is told to."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from aiohttp import web

TOKEN = "a-token-for-tests"


class Fault(Enum):
    """How a call goes wrong."""

    HANG = "no answer while the test lasts"
    BROKEN = "status 500"
    REFUSED = "status 403"
    LOST = "the work is done and the connection dropped"
    GARBAGE = "an answer that is no JSON"
    SCHEMA = "JSON of another schema"
    ADDRESS = "an address that is none"
    ENDPOINT = "an endpoint that is none"
    LONG = "an answer without an end"
    CUT = "an answer that is cut off"
    PROTOCOL = "bytes that are no HTTP"
    REDIRECT = "another address to ask"
    EARLY = "an exit that ends too early"
    NONE_FREE = "status 409"


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class ProviderServer:
    """Serves exits 203.0.113.x from memory.

    Attributes:
        leases: What is held: the body of the call, by allocation key.
        taken: How often an exit was given under a key for the first time.
        calls: All calls, in order.
        faults: What goes wrong with the next calls of `victims`, one after another.
        victims: The methods of calls that take from `faults`; all when empty.
        always: What goes wrong with every call that `faults` has nothing for.
        answers: What the next calls are answered with, whatever they ask.
        page: The most leases of a page.
        gate: While set to an event, no exit is taken before it comes.
    """

    def __init__(self) -> None:
        self.leases: dict[UUID, dict[str, Any]] = {}
        self.taken = 0
        self.calls: list[Call] = []
        self.faults: deque[Fault | None] = deque()
        self.victims: set[str] = set()
        self.always: Fault | None = None
        self.answers: deque[Any] = deque()
        self.page = 1000
        self.gate: asyncio.Event | None = None
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self._port}/api"

    def hold(self, key: UUID, holder: str = "muster-test") -> None:
        """Holds a lease that nobody asked for now."""
        self.leases[key] = {"holder": holder, "exit_ip": "203.0.113.250"}

    def counted(self, method: str, path: str = "") -> int:
        """Returns how many calls of a method came, to paths with this end."""
        return sum(call.method == method and call.path.endswith(path) for call in self.calls)

    async def start(self) -> None:
        """Serves; on the port of before when it served already."""
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Is down."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.calls.append(Call(request.method, request.path, dict(request.query), dict(request.headers), body))
        is_victim = self.faults and (not self.victims or request.method in self.victims)
        fault = self.faults.popleft() if is_victim else self.always
        if self.gate is not None and request.method == "PUT":
            await self.gate.wait()
        if fault is Fault.HANG:
            await asyncio.Event().wait()
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "no token"}, status=401)
        status = {Fault.BROKEN: 500, Fault.REFUSED: 403, Fault.NONE_FREE: 409}.get(fault) if fault else None
        if status is not None:
            return web.json_response({"error": "on purpose"}, status=status)
        if fault is Fault.REDIRECT:
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
        if self.answers:
            return web.json_response(self.answers.popleft())
        answer = self._answer(request, body)
        if fault is not None:
            return await self._spoil(request, fault)
        return answer

    def _answer(self, request: web.Request, body: Any) -> web.Response:
        path = request.path.removeprefix("/api")
        if (request.method, path) == ("GET", "/v1/health"):
            return web.Response(status=204)
        if (request.method, path) == ("GET", "/v1/leases"):
            after, limit = request.query.get("after"), min(int(request.query["limit"]), self.page)
            keys = sorted(key for key, lease in self.leases.items() if lease["holder"] == request.query["holder"])
            rest = [key for key in keys if after is None or key > UUID(after)]
            return web.json_response({"leases": [{"allocation_key": str(key), "extra": 1} for key in rest[:limit]]})
        key = UUID(path.removeprefix("/v1/leases/"))
        if request.method == "DELETE":
            return web.Response(status=204 if self.leases.pop(key, None) else 404)
        assert request.method == "PUT"
        status = 200
        if key not in self.leases:
            status = 201
            self.taken += 1
            self.leases[key] = {**body, "exit_ip": f"203.0.113.{self.taken % 250}"}
        lease = self.leases[key]
        return web.json_response(
            {
                "exit_ip": lease["exit_ip"],
                "endpoint": f"socks5://exits.example:{20_000 + self.taken}",
                "region": lease["region"],
                "expires_at": (datetime.now(UTC) + timedelta(seconds=lease["duration_seconds"])).isoformat(),
            },
            status=status,
        )

    async def _spoil(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        """Answers wrongly, after the work is done."""
        assert request.transport is not None
        good = {
            "endpoint": "http://127.0.0.1:1",
            "exit_ip": "203.0.113.1",
            "region": "",
            "expires_at": "2099-01-01T00:00Z",
        }
        if fault is Fault.GARBAGE:
            return web.Response(body=b"\xff<html>", status=200)
        if fault is Fault.SCHEMA:
            return web.json_response({"ip": 7, "leases": {}}, status=200)
        if fault is Fault.ADDRESS:
            return web.json_response({**good, "exit_ip": "300.1.1.1'; --"}, status=200)
        if fault is Fault.ENDPOINT:
            return web.json_response({**good, "endpoint": "file:///etc/passwd"}, status=200)
        if fault is Fault.EARLY:
            return web.json_response({**good, "expires_at": "2001-01-01T00:00Z"}, status=200)
        if fault is Fault.LONG:
            stream = web.StreamResponse()
            await stream.prepare(request)
            try:
                for _ in range(1024):
                    await stream.write(b" " * 2**16)
            except ConnectionError:
                pass
            return stream
        if fault is Fault.CUT:
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        if fault is Fault.PROTOCOL:
            request.transport.write(b"\x00\x01\x02 this is no HTTP\r\n\r\n")
        request.transport.close()
        # Ends with the connection.
        await asyncio.Event().wait()
        raise AssertionError
