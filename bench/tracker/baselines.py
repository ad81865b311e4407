"""What we are measured against: one UPDATE per page by pgbench, and pipelines of 100 HSETs by redis-py."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psycopg
import redis

from bench.tracker.load import BATCH, name
from services.launcher.server_host import find_binaries, server_environment

CLIENTS = 16
SESSIONS = 1000

_SCHEMA = """
CREATE TABLE crawling_sessions (
  session_id integer PRIMARY KEY,
  status text NOT NULL,
  stage text NOT NULL,
  current_page integer NOT NULL,
  total_pages integer NOT NULL,
  products_found integer NOT NULL,
  errors_count integer NOT NULL,
  started_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
INSERT INTO crawling_sessions
SELECT n, 'Running', 'listing', 0, 20000, 0, 0 FROM generate_series(1, %(sessions)s) n;
VACUUM ANALYZE crawling_sessions
"""
_UPDATE = f"""
\\set id random(1, {SESSIONS})
UPDATE crawling_sessions SET current_page = current_page + 1 WHERE session_id = :id;
"""


class UpdatePerPage:
    """A table of running sessions, of which each page is an UPDATE in a transaction of its own.

    Args:
        dsn: Of an empty database.
        folder: For its script.
    """

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self._script = folder / "update.sql"
        self._script.write_text(_UPDATE)
        with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement, {"sessions": SESSIONS})

    def run(self, seconds: int) -> tuple[float, int]:
        """Updates for some seconds; returns updates a second, and how many there were."""
        argv = [
            str(find_binaries() / "pgbench"), "--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2",
            f"--time={seconds}", f"--file={self._script}", self.dsn,
        ]  # fmt: skip
        done = subprocess.run(argv, env=server_environment(), capture_output=True, text=True, timeout=seconds + 60)
        rate = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        count = re.search(r"actually processed: (\d+)", done.stdout)
        if done.returncode or rate is None or count is None:
            raise SystemExit(f"pgbench: {done.stdout}{done.stderr[-2000:]}")
        return float(rate[1]), int(count[1])


def hsets(url: str, seconds: float, sessions: int) -> float:
    """Writes sessions to Redis in pipelines of 100 HSETs; returns HSETs a second."""
    client = redis.Redis.from_url(url)
    keys = [f"bench:{name(number)}" for number in range(sessions)]
    count = 0
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < seconds:
            begin = count % sessions
            with client.pipeline(transaction=False) as pipeline:
                for key in keys[begin : begin + BATCH]:
                    values: dict[Any, Any] = {
                        "state": 2,
                        "page": count,
                        "total": 20_000,
                        "products": 5,
                        "errors": 1,
                        "sequence": count,
                    }
                    pipeline.hset(key, mapping=values)
                pipeline.execute()
            count += BATCH
        return count / (time.monotonic() - begun)
    finally:
        client.flushall()
        client.close()
