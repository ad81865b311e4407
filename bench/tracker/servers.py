"""What is measured: PostgreSQL, Redis, the tracker and a bare gRPC server, each a process of its own."""

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
import uvloop
from psycopg import sql

from services.call import Role
from services.config import ServiceConfig
from services.identity.keys import KeyStore
from services.launcher.postgres import EmbeddedPostgres
from services.migrations import IDENTITY, SCHEMAS, migrate
from services.postgres import Database

# What was acknowledged is on the disk; the same for everything that is measured.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
}
_READY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A process that answers gRPC, and the key of its organization."""

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
def postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    """Runs a durable PostgreSQL below a folder, which must lie on a disk."""
    with EmbeddedPostgres(folder / "postgres", SETTINGS) as server:
        yield server


def make_database(server: EmbeddedPostgres, name: str) -> str:
    """Makes an empty database and returns its URI."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return server.dsn(database=name)


@contextlib.contextmanager
def tracker(dsn: str, folder: Path, *, redis_url: str = "") -> Iterator[Server]:
    """Runs one replica of the session tracker, as it is deployed, on an empty database.

    Args:
        dsn: Of the database.
        folder: For its log.
        redis_url: Makes it the Redis engine.
    """
    migrate(IDENTITY, dsn)
    migrate(SCHEMAS["session_tracker"], dsn)
    key = uvloop.run(_make_key(dsn))
    settings = {
        "POSTGRES__DSN": dsn,
        "METRICS__LISTEN": "127.0.0.1:0",
        "LOG__LEVEL": "warning",
        "SESSIONS__MAX_PER_ORGANIZATION": "200000",
    }
    if redis_url:
        settings |= {"ENGINE__KIND": "redis", "ENGINE__URL": redis_url}
    argv = [sys.executable, "-m", "services.cli.main", "serve", "session-tracker"]
    with _process(argv, "MUSTER_SESSION_TRACKER__", settings, folder, key) as server:
        yield server


@contextlib.contextmanager
def sink(folder: Path) -> Iterator[Server]:
    """Runs the bare server. It asks for no key, and is sent one all the same: so calls are of one size."""
    with _process([sys.executable, "-m", "bench.tracker.sink"], "BENCH_SINK__", {}, folder, "x" * 50) as server:
        yield server


@contextlib.contextmanager
def _process(argv: Sequence[str], prefix: str, settings: Mapping[str, str], folder: Path, key: str) -> Iterator[Server]:
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


async def _make_key(dsn: str) -> str:
    config = ServiceConfig.model_validate({"postgres": {"dsn": dsn}}).postgres
    keys = await Database.connect(config, "bench", search_path="identity")
    try:
        return (await KeyStore(keys).create("bench", Role.WORKER, time_zone="UTC"))[1]
    finally:
        await keys.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
