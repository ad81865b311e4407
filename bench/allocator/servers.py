"""What is measured: replicas of the allocator and a bare gRPC server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.processes import Server, serving

# As large as a small server of its own would have them; the same for everything that is measured.
POSTGRES = {"shared_buffers": "2GB", "max_wal_size": "8GB", "checkpoint_timeout": "5min"}


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
    with serving(argv, "MUSTER_ALLOCATOR__", settings, folder) as server:
        yield server


@contextlib.contextmanager
def echo(units: int, answer: bytes, folder: Path) -> Iterator[Server]:
    """Runs a bare grpc.aio server that answers every AllocateWork with the same message."""
    path = folder / f"answer-{units}"
    path.write_bytes(answer)
    with serving([sys.executable, "-m", "bench.allocator.echo", str(path)], "BENCH_ECHO__", {}, folder) as server:
        yield server
