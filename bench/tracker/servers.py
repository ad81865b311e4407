"""What is measured: the tracker and a bare gRPC server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench.processes import Server, serving
from services.call import Role
from services.config import ServiceConfig
from services.identity.keys import KeyStore
from services.migrations import IDENTITY, SCHEMAS, migrate
from services.postgres import Database

# Enough for results and checkpoints; no checkpoint of PostgreSQL's own falls into a measure.
POSTGRES = {"shared_buffers": "256MB", "max_wal_size": "4GB", "checkpoint_timeout": "15min"}


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
    with serving(argv, "MUSTER_SESSION_TRACKER__", settings, folder, key) as server:
        yield server


@contextlib.contextmanager
def sink(folder: Path) -> Iterator[Server]:
    """Runs the bare server. It asks for no key, and is sent one all the same: so calls are of one size."""
    with serving([sys.executable, "-m", "bench.tracker.sink"], "BENCH_SINK__", {}, folder, "x" * 50) as server:
        yield server


async def _make_key(dsn: str) -> str:
    config = ServiceConfig.model_validate({"postgres": {"dsn": dsn}}).postgres
    keys = await Database.connect(config, "bench", search_path="identity")
    try:
        return (await KeyStore(keys).create("bench", Role.WORKER, time_zone="UTC"))[1]
    finally:
        await keys.close()
