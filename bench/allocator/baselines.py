"""What we are measured against: one allocation per transaction by pgbench, and PgQueuer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psycopg

from bench.allocator.stock import CAP, EXITS, QUOTA, SLOTS
from services.launcher.server_host import find_binaries, server_environment

CLIENTS = 16

_SCHEMA = """
CREATE TABLE work_slots (
  slot_id uuid PRIMARY KEY,
  keyword text NOT NULL,
  start_date date NOT NULL,
  end_date date NOT NULL,
  is_active boolean NOT NULL,
  settings jsonb NOT NULL
);
CREATE TABLE daily_work_tracking (
  work_date date NOT NULL,
  slot_id uuid NOT NULL REFERENCES work_slots,
  quota integer NOT NULL,
  allocated integer NOT NULL DEFAULT 0,
  PRIMARY KEY (work_date, slot_id),
  CHECK (allocated <= quota)
) WITH (fillfactor = 50);
CREATE TABLE exits (
  exit_id uuid PRIMARY KEY,
  endpoint text NOT NULL,
  cap integer NOT NULL,
  use_count integer NOT NULL DEFAULT 0,
  CHECK (use_count <= cap)
) WITH (fillfactor = 50);
CREATE TABLE work_allocations (
  allocation_key uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  slot_id uuid NOT NULL,
  exit_id uuid NOT NULL,
  client_id integer NOT NULL,
  allocated_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz NOT NULL DEFAULT now() + interval '5 minutes'
);
-- By these the least served slot and the least used exit are found.
CREATE INDEX daily_work_tracking_next ON daily_work_tracking (work_date, allocated);
CREATE INDEX exits_next ON exits (use_count);
CREATE INDEX work_allocations_expires_at ON work_allocations (expires_at);
INSERT INTO work_slots
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'keyword ' || n, current_date - 30,
  current_date + 30, true, '{"block_mercury": false, "block_image_cdn": true}'
FROM generate_series(1, %(slots)s) n;
INSERT INTO daily_work_tracking SELECT current_date, slot_id, %(quota)s FROM work_slots;
INSERT INTO exits SELECT gen_random_uuid(), 'http://10.0.0.1:' || n, %(cap)s FROM generate_series(1, %(exits)s) n;
VACUUM ANALYZE
"""

# Each pick takes a row with room that nobody else holds, and counts at once: three statements, prepared, and a commit.
_ALLOCATE = """
BEGIN;
UPDATE daily_work_tracking SET allocated = allocated + 1
WHERE work_date = current_date AND slot_id = (
  SELECT t.slot_id FROM daily_work_tracking t JOIN work_slots s USING (slot_id)
  WHERE t.work_date = current_date AND t.allocated < t.quota AND s.is_active
    AND current_date BETWEEN s.start_date AND s.end_date
  ORDER BY t.allocated LIMIT 1 FOR UPDATE OF t SKIP LOCKED)
RETURNING slot_id \\gset
UPDATE exits SET use_count = use_count + 1
WHERE exit_id = (SELECT exit_id FROM exits WHERE use_count < cap ORDER BY use_count LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING exit_id \\gset
INSERT INTO work_allocations (slot_id, exit_id, client_id) VALUES (:slot_id, :exit_id, :client_id);
COMMIT;
"""


class OneByOne:
    """One allocation per transaction, as the documents have it: pick with SKIP LOCKED, counter, exit, row.

    Args:
        dsn: Of an empty database.
        folder: For its script.
    """

    def __init__(self, dsn: str, folder: Path) -> None:
        self._dsn = dsn
        self._script = folder / "allocate.sql"
        self._script.write_text(_ALLOCATE)
        values = {"slots": SLOTS, "quota": QUOTA, "exits": EXITS, "cap": CAP}
        with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement, values)

    def renew(self) -> None:
        """Forgets every allocation, as if the day began."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE work_allocations")
            connection.execute("UPDATE daily_work_tracking SET allocated = 0 WHERE allocated > 0")
            connection.execute("UPDATE exits SET use_count = 0")
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    def run(self, seconds: int) -> list[float]:
        """Allocates for some seconds; returns the allocations of each."""
        argv = [
            str(find_binaries() / "pgbench"), "--no-vacuum", "--protocol=prepared", "--progress=1",
            f"--client={CLIENTS}", "--jobs=2", f"--time={seconds}", f"--file={self._script}", self._dsn,
        ]  # fmt: skip
        done = subprocess.run(argv, env=server_environment(), capture_output=True, text=True, timeout=seconds + 60)
        if done.returncode:
            raise SystemExit(f"pgbench: {done.stderr[-2000:]}")
        return [float(rate) for rate in re.findall(r"^progress: [\d.]+ s, ([\d.]+) tps", done.stderr, re.MULTILINE)]


class Queue:
    """PgQueuer with an empty handler, as it is installed by default: every table logged.

    Args:
        dsn: Of an empty database.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._worker("install")

    def run(self, jobs: int) -> float:
        """Puts jobs into the queue, lets one worker finish them, and returns the jobs a second."""
        self._worker("enqueue", str(jobs))
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        return jobs / float(self._worker("run"))

    def _worker(self, *argv: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "bench.allocator.queue_worker", self._dsn, *argv],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"PgQueuer: {done.stderr[-2000:]}")
        return done.stdout
