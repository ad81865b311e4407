"""What a call through the chassis costs the server, against bare grpc.aio.

Two servers, each a process of its own, answer the same messages with the same handlers on the same event loop. One is
bare; the other stands on the chassis as a service does, with a key looked up in a real database. This process is their
client. A round is a fixed number of calls to one of them; rounds alternate, so that whatever else the machine does
meets both. The figure is the server process's CPU time (user and system) divided by the calls. The ratio is the median
over pairs of neighbouring rounds: a machine that is busy for a while makes every call dearer, and both of a pair alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import psutil
import uvloop
from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services import chassis
from services.call import Role
from services.config import ServiceConfig, load
from services.identity.keys import KeyStore
from services.launcher.postgres import EmbeddedPostgres
from services.migrations import IDENTITY, migrate
from services.postgres import Database

TARGET = 1.25
UPDATES = 10  # in a message, about what a worker with ten sessions sends
CALLERS = 32
WINDOW = 64  # messages of a stream that may be unanswered
SERVERS = ("bare", "chassis")

Metadata = tuple[tuple[str, str], ...]
Load = Callable[[session_pb2_grpc.SessionServiceStub, Metadata, int], Awaitable[None]]


class Handlers(session_pb2_grpc.SessionServiceServicer):
    """The same body for both servers: it looks at every update, and answers it."""

    async def ReportProgress(
        self, request: session_pb2.ReportProgressRequest, context: Any
    ) -> session_pb2.ReportProgressResponse:
        """Answers one message."""
        return session_pb2.ReportProgressResponse(
            verdicts=[session_pb2.UPDATE_VERDICT_TAKEN for update in request.updates if update.sequence]
        )

    async def ReportStream(
        self, request_iterator: AsyncIterator[session_pb2.ReportStreamRequest], context: Any
    ) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        """Answers each message as it comes."""
        async for request in request_iterator:
            taken = sum(1 for update in request.updates if update.sequence)
            yield session_pb2.ReportStreamResponse(batch=request.batch, taken=taken)


async def _serve_bare(listen: str) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    session_pb2_grpc.add_SessionServiceServicer_to_server(Handlers(), server)  # type: ignore[abstract]
    server.add_insecure_port(listen)
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(1)


async def _bind(on: chassis.Chassis[ServiceConfig], _: ServiceConfig) -> None:
    on.add(
        session_pb2_grpc.add_SessionServiceServicer_to_server,
        Handlers(),  # type: ignore[abstract]
        session_pb2.DESCRIPTOR.services_by_name["SessionService"],
        Role.WORKER,
    )


def serve(which: str) -> int:
    """Runs one of the servers until SIGTERM, set up by the environment."""
    config = load(ServiceConfig, "bench", None)
    if which == "chassis":
        return chassis.run("bench", config, _bind)
    uvloop.run(_serve_bare(config.grpc.listen))
    return 0


def _updates() -> list[session_pb2.ProgressUpdate]:
    return [
        session_pb2.ProgressUpdate(
            session_id=f"0198c0de-0000-7000-8000-{number:012}", sequence=12345, stage="search results",
            current_page=17, total_pages=40, products_found=345, errors_count=1,
        )
        for number in range(UPDATES)
    ]  # fmt: skip


async def unary(stub: session_pb2_grpc.SessionServiceStub, key: Metadata, calls: int) -> None:
    """Makes `calls` calls, `CALLERS` at a time."""
    request = session_pb2.ReportProgressRequest(updates=_updates())
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await stub.ReportProgress(request, metadata=key, timeout=30)  # type: ignore[misc]

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def stream(stub: session_pb2_grpc.SessionServiceStub, key: Metadata, calls: int) -> None:
    """Sends `calls` messages over one stream, with up to `WINDOW` unanswered."""
    window = asyncio.Semaphore(WINDOW)

    async def requests() -> AsyncIterator[session_pb2.ReportStreamRequest]:
        updates = _updates()
        for batch in range(1, calls + 1):
            await window.acquire()
            yield session_pb2.ReportStreamRequest(batch=batch, updates=updates)

    answered = 0
    async for _ in stub.ReportStream(requests(), metadata=key, timeout=300):  # type: ignore[attr-defined, arg-type]
        answered += 1
        window.release()
    assert answered == calls


SHAPES: dict[str, Load] = {"unary": unary, "stream": stream}


@dataclass(frozen=True, slots=True)
class Server:
    """A server under load."""

    name: str
    process: psutil.Process
    stub: session_pb2_grpc.SessionServiceStub

    async def round(self, load: Load, key: Metadata, calls: int) -> float:
        """Returns the server's CPU time for one call of a round, in microseconds."""
        before = self.process.cpu_times()
        await load(self.stub, key, calls)
        after = self.process.cpu_times()
        spent: float = (after.user - before.user) + (after.system - before.system)
        return spent / calls * 1e6


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(name: str, dsn: str, log: Path) -> Iterator[tuple[psutil.Process, str]]:
    address = f"127.0.0.1:{_free_port()}"
    settings = {"GRPC__LISTEN": address, "METRICS__LISTEN": "127.0.0.1:0", "POSTGRES__DSN": dsn}
    environment = {**os.environ, **{f"MUSTER_BENCH__{key}": value for key, value in settings.items()}}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.chassis", "--serve", name], env=environment, stdout=output, stderr=output
        )
    try:
        yield psutil.Process(process.pid), address
    finally:
        process.terminate()
        process.wait(30)


async def _make_key(dsn: str) -> str:
    database = await Database.connect(ServiceConfig.model_validate({"postgres": {"dsn": dsn}}).postgres, "bench")
    try:
        return (await KeyStore(database).create("bench", Role.WORKER))[1]
    finally:
        await database.close()


async def measure(dsn: str, folder: Path, rounds: int, calls: dict[str, int]) -> dict[str, dict[str, list[float]]]:
    """Returns, for each shape and server, the CPU microseconds per call of every round."""
    key = (("authorization", f"Bearer {await _make_key(dsn)}"),)
    figures: dict[str, dict[str, list[float]]] = {shape: {name: [] for name in SERVERS} for shape in SHAPES}
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for name in SERVERS:
            process, address = stack.enter_context(_running(name, dsn, folder / f"{name}.log"))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            try:
                await asyncio.wait_for(channel.channel_ready(), 30)
            except TimeoutError:
                raise SystemExit(f"{name} does not start: {(folder / f'{name}.log').read_text()}") from None
            servers.append(Server(name, process, session_pb2_grpc.SessionServiceStub(channel)))
        for shape, load_ in SHAPES.items():
            for server in servers:
                await server.round(load_, key, calls[shape] // 4)
            for number in range(rounds):
                # Each goes first in turn.
                for server in servers if number % 2 == 0 else reversed(servers):
                    figures[shape][server.name].append(await server.round(load_, key, calls[shape]))
    return figures


def report(figures: dict[str, dict[str, list[float]]]) -> int:
    """Prints the table; returns how many shapes reach the target."""
    print(f"{'':8}{'bare, us/call':>26}{'chassis, us/call':>26}{'ratio':>24}")
    reached = 0
    for shape, by_server in figures.items():
        ratios = [above / below for below, above in zip(by_server["bare"], by_server["chassis"], strict=True)]
        reached += statistics.median(ratios) <= TARGET
        columns = [_spread(by_server["bare"], 1), _spread(by_server["chassis"], 1), _spread(ratios, 2)]
        print(f"{shape:8}{columns[0]:>26}{columns[1]:>26}{columns[2]:>24}")
    print(f"median (first quartile - third quartile); target: ratio at most {TARGET}")
    return reached


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chassis", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls: a look, not a measurement")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    rounds = 11 if options.quick else 31
    # Some tenths of a second each: the kernel counts CPU time in steps of 10 ms.
    calls = {"unary": 1500, "stream": 3000} if options.quick else {"unary": 3000, "stream": 6000}
    print(
        f"Python {platform.python_version()}, grpcio {grpc.__version__}, uvloop {metadata.version('uvloop')}, "
        f"{os.cpu_count()} CPUs; {rounds} rounds of {calls['unary']} calls and {calls['stream']} messages"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres", {"fsync": "off"}) as postgres,
    ):
        migrate(IDENTITY, postgres.dsn())
        figures = uvloop.run(measure(postgres.dsn(), Path(folder), rounds, calls))
    reached = report(figures)
    print(f"reached {reached} of {len(SHAPES)}")
    return 0 if reached == len(SHAPES) else 1


if __name__ == "__main__":
    sys.exit(main())
