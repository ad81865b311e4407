"""What is measured runs as it is deployed: PostgreSQL and gRPC servers, each a process of its own."""

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

# What was acknowledged is on the disk; the same for everything that is measured.
_DURABLE = {"fsync": "on", "synchronous_commit": "on"}
_READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers gRPC, and the key to call it with, where it asks for one."""

    address: str
    process: psutil.Process
    key: str = ""

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the whole process until now, gRPC's own threads included."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)

    def resident_bytes(self) -> int:
        """Returns the memory it occupies."""
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def postgres(folder: Path, settings: Mapping[str, str]) -> Iterator[EmbeddedPostgres]:
    """Runs a durable PostgreSQL with these settings below a folder, which must lie on a disk."""
    with EmbeddedPostgres(folder / "postgres", {**_DURABLE, **settings}) as server:
        yield server


def make_database(server: EmbeddedPostgres, name: str) -> str:
    """Makes an empty database, in the place of one of that name, and returns its URI."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.dsn(database=name)


@contextlib.contextmanager
def serving(
    argv: Sequence[str], prefix: str, settings: Mapping[str, str], folder: Path, key: str = ""
) -> Iterator[Server]:
    """Runs a server on a free port until the block ends.

    Args:
        argv: Its command.
        prefix: Of the environment variables that it reads its settings from.
        settings: By name, without the prefix; the address is added.
        folder: For its log.
        key: What to call it with.

    Raises:
        SystemExit: It does not answer within a minute.
    """
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
        yield Server(address, psutil.Process(process.pid), key)
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
