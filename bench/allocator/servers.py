"""What is measured: PostgreSQL, replicas of the allocator and a bare gRPC server, each a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import psycopg
from psycopg import sql

from services.launcher.postgres import EmbeddedPostgres

# As large as a small server of its own would have them; the same for everything that is measured. What was
# acknowledged is on the disk.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "2GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "5min",
}
_READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers gRPC."""

    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the whole process until now, gRPC's own threads included."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    """Runs a durable PostgreSQL below a folder, which must lie on a disk."""
    with EmbeddedPostgres(folder / "postgres", SETTINGS) as server:
        yield server


def make_database(server: EmbeddedPostgres, name: str) -> str:
    """Makes an empty database and returns its URI."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.dsn(database=name)


@contextlib.contextmanager
def replica(dsn: str, folder: Path) -> Iterator[Server]:
    """Runs one replica of the allocator, as it is deployed. Leases live for an hour, so that the sweep has no work."""
    settings = {
        "POSTGRES__DSN": dsn,
        "METRICS__LISTEN": "127.0.0.1:0",
        "LEASES__DURATION_SECONDS": "3600",
        "LOG__LEVEL": "warning",
    }
    argv = [sys.executable, "-m", "services.cli.main", "serve", "allocator"]
    with _process(argv, "MUSTER_ALLOCATOR__", settings, folder) as server:
        yield server


@contextlib.contextmanager
def echo(units: int, answer: bytes, folder: Path) -> Iterator[Server]:
    """Runs a bare grpc.aio server that answers every AllocateWork with the same message."""
    path = folder / f"answer-{units}"
    path.write_bytes(answer)
    with _process([sys.executable, "-m", "bench.allocator.echo", str(path)], "BENCH_ECHO__", {}, folder) as server:
        yield server


@contextlib.contextmanager
def _process(argv: Sequence[str], prefix: str, settings: Mapping[str, str], folder: Path) -> Iterator[Server]:
    address = f"127.0.0.1:{_free_port()}"
    environment = {
        **os.environ,
        **{f"{prefix}{name}": value for name, value in settings.items()},
        f"{prefix}GRPC__LISTEN": address,
    }
    log = folder / f"{address.replace(':', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, env=environment, stdout=output, stderr=output)
    try:
        _await(process, address, log)
        yield Server(address, psutil.Process(process.pid))
    finally:
        if process.poll() is not None:
            print(f"{address} ended by itself ({process.returncode}): {log.read_text()[-4000:]}", file=sys.stderr)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _await(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + _READY_SECONDS
    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(grpc.FutureTimeoutError):
                ready.result(timeout=0.5)
                return
        ready.cancel()
    raise SystemExit(f"{address} does not start: {log.read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
