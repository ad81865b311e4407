"""The seven measures. Each begins with what it compares, and returns one row of the table."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psycopg

from bench import processes
from bench.processes import Server
from bench.table import Measure
from bench.tracker import servers
from bench.tracker.baselines import UpdatePerPage, hsets
from bench.tracker.load import BATCH, Order, Tally
from services.launcher.postgres import EmbeddedPostgres
from tests.support.redis import running_redis

_PROCESSES = 2
# As many as the contract allows in one request.
_LARGEST_BATCH = 1000
# Far more than any round reports.
_ROUND_SEQUENCES = 100_000
# A client process has to be up before its load counts.
_START_SECONDS = 2.0
_KILOBYTE = 1024
_STATISTICS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often.

    Attributes:
        rounds: How often each measure and its baseline alternate.
        seconds: Of one round of either.
        live: Sessions that report.
        sessions: In memory, where that is measured.
        whole_runs: Sessions from start to end, where what they write to disk is measured.
    """

    rounds: int
    seconds: int
    live: int
    sessions: int
    whole_runs: int


@dataclass(slots=True)
class Bench:
    """What the measures share: the database server, a tracker and the bare server."""

    plan: Plan
    folder: Path
    postgres: EmbeddedPostgres
    stack: contextlib.ExitStack
    said: Callable[[str], None] = field(default=lambda text: print(text, flush=True))
    _tracker: Server | None = None
    _sink: Server | None = None
    _rounds: int = 0

    def tracker(self) -> Server:
        """The tracker with the live sessions."""
        if self._tracker is None:
            dsn = processes.make_database(self.postgres, "main")
            self._tracker = self.stack.enter_context(servers.tracker(dsn, self.folder))
            self.start(self._tracker, self.plan.live)
        return self._tracker

    def sink(self) -> Server:
        """The bare server."""
        if self._sink is None:
            self._sink = self.stack.enter_context(servers.sink(self.folder))
        return self._sink

    def start(self, on: Server, sessions: int) -> None:
        """Starts sessions."""
        self.run(on, [self.order(on, "start", sessions=sessions, in_flight=64)])

    def order(self, on: Server, shape: str, **values: float) -> Order:
        """Makes an order for this server; whatever it reports is newer than what was reported before."""
        given = {"first": 0, "sessions": self.plan.live, "streams": 1, "in_flight": 4, "begin": 0.0, "seconds": 0.0}
        self._rounds += 1
        return Order(shape, on.address, on.key, **{**given, "base": self._rounds * _ROUND_SEQUENCES, **values})  # type: ignore[arg-type]

    def run(self, on: Server, orders: Sequence[Order]) -> tuple[Tally, float]:
        """Runs client processes to their end.

        Returns:
            What came of it, added up, and the server's CPU seconds while it counted.
        """
        clients = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.tracker.load", json.dumps(asdict(order))], stdout=subprocess.PIPE
            )
            for order in orders
        ]
        spent = 0.0
        if orders[0].seconds:
            time.sleep(max(0.0, orders[0].begin - time.monotonic()))
            before = on.cpu_seconds()
            time.sleep(max(0.0, orders[0].begin + orders[0].seconds - time.monotonic()))
            spent = on.cpu_seconds() - before
        whole = Tally()
        for client in clients:
            output, _ = client.communicate(timeout=300)
            if client.returncode:
                raise SystemExit(f"a client ended with {client.returncode}")
            tally = Tally(**json.loads(output))
            whole.updates += tally.updates
            whole.stale += tally.stale
            whole.unknown += tally.unknown
            whole.lags += tally.lags
        if whole.stale or whole.unknown:
            self.said(f"  {whole.stale} updates were stale, {whole.unknown} of unknown sessions")
        return whole, spent

    def report(self, on: Server, seconds: float, sessions: int = 0, batch: int = BATCH) -> tuple[float, float]:
        """Reports in packed batches as fast as the server takes them; returns updates a second, and a core-second."""
        share = (sessions or self.plan.live) // _PROCESSES
        begin = time.monotonic() + _START_SECONDS
        sizes = {"sessions": share, "streams": 2, "batch": batch}
        orders = [
            self.order(on, "packed", first=place * share, begin=begin, seconds=seconds, **sizes)
            for place in range(_PROCESSES)
        ]
        tally, spent = self.run(on, orders)
        return tally.updates / seconds, tally.updates / spent


def per_core(bench: Bench) -> Measure:
    """Updates a core-second, packed batches of 100 on streams, against bare grpc.aio into a dict."""
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(bench.plan.rounds):
        ours.append(bench.report(bench.tracker(), bench.plan.seconds)[1])
        baseline.append(bench.report(bench.sink(), bench.plan.seconds)[1])
        bench.said(f"  {ours[-1]:,.0f}, bare {baseline[-1]:,.0f} a core-second")
    return Measure(
        1, f"updates per core, packed batches of 100, {bench.plan.live:,} sessions", "1/s", ours, baseline, 0.5
    )


def unary(bench: Bench) -> Measure:
    """Server CPU of a unary report, against a bare grpc.aio echo."""
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(bench.plan.rounds):
        for on, values in ((bench.tracker(), ours), (bench.sink(), baseline)):
            begin = time.monotonic() + _START_SECONDS
            order = bench.order(on, "unary", in_flight=16, begin=begin, seconds=bench.plan.seconds)
            tally, spent = bench.run(on, [order])
            values.append(1e6 * spent / tally.updates)
        bench.said(f"  {ours[-1]:.0f} us, bare {baseline[-1]:.0f} us")
    return Measure(2, "server CPU per unary report", "us", ours, baseline, 1.4, at_most=True)


def against_updates(bench: Bench) -> Measure:
    """Updates a second, against pgbench with one UPDATE per page."""
    pages = UpdatePerPage(processes.make_database(bench.postgres, "pages"), bench.folder)
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(bench.plan.rounds):
        ours.append(bench.report(bench.tracker(), bench.plan.seconds, batch=_LARGEST_BATCH)[0])
        baseline.append(pages.run(bench.plan.seconds)[0])
        bench.said(f"  {ours[-1]:,.0f}/s, pgbench {baseline[-1]:,.0f}/s")
    notes = [
        f"packed batches of {_LARGEST_BATCH:,}, the most that the contract allows in one request",
        "server and clients share the machine: neither has a core of its own",
    ]
    return Measure(3, "updates, against one UPDATE per page", "1/s", ours, baseline, 100.0, notes=notes)


def written(bench: Bench) -> Measure:
    """Bytes written to disk for 1,000 pages of a session, against one UPDATE per page."""
    pages = UpdatePerPage(processes.make_database(bench.postgres, "written"), bench.folder)
    ours: list[float] = []
    baseline: list[float] = []
    for turn in range(bench.plan.rounds):
        on = bench.tracker()
        before = _bytes_written(pages.dsn)
        order = bench.order(
            on, "run", first=10**6 * (turn + 1), sessions=bench.plan.whole_runs, in_flight=8, pages=1000
        )
        tally, _ = bench.run(on, [order])
        ours.append((_bytes_written(pages.dsn) - before) / (tally.updates / 1000))
        before = _bytes_written(pages.dsn)
        _, count = pages.run(bench.plan.seconds)
        baseline.append((_bytes_written(pages.dsn) - before) / (count / 1000))
        bench.said(f"  {ours[-1]:,.0f} bytes, one UPDATE per page {baseline[-1]:,.0f}")
    notes = ["write-ahead log and data pages, from checkpoint to checkpoint, whatever else the server wrote included"]
    name = "bytes written to disk per 1,000 pages"
    return Measure(4, name, "bytes", ours, baseline, 0.01, at_most=True, notes=notes)


def _bytes_written(dsn: str) -> int:
    """Returns what the server wrote to disk until now, all of its databases together."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        if connection.info.server_version >= 170000:
            checkpoints = "(SELECT num_timed + num_requested FROM pg_stat_checkpointer)"
            buffers = (
                "(SELECT buffers_written FROM pg_stat_checkpointer) + (SELECT buffers_clean FROM pg_stat_bgwriter)"
                " + (SELECT coalesce(sum(writes), 0) FROM pg_stat_io WHERE backend_type = 'client backend')"
            )
        else:
            checkpoints = "(SELECT checkpoints_timed + checkpoints_req FROM pg_stat_bgwriter)"
            buffers = "(SELECT buffers_checkpoint + buffers_clean + buffers_backend FROM pg_stat_bgwriter)"
        before = _number(connection, checkpoints)
        connection.execute("CHECKPOINT")
        # The checkpointer tells of what it wrote a moment after it is done.
        until = time.monotonic() + _STATISTICS_SECONDS
        while _number(connection, checkpoints) == before and time.monotonic() < until:
            time.sleep(0.05)
        return _number(connection, f"(pg_current_wal_lsn() - '0/0') + 8192 * ({buffers})")


def _number(connection: psycopg.Connection, expression: str) -> int:
    connection.execute("SELECT pg_stat_clear_snapshot()")
    row = connection.execute(f"SELECT {expression}").fetchone()
    assert row is not None
    return int(row[0])


def redis_engine(bench: Bench) -> Measure:
    """Updates a second of the Redis engine, one replica, against raw pipelines of 100 HSETs."""
    ours: list[float] = []
    baseline: list[float] = []
    with running_redis() as store:
        dsn = processes.make_database(bench.postgres, "redis")
        for _ in range(bench.plan.rounds):
            with servers.tracker(dsn, bench.folder, redis_url=store.url) as on:
                bench.start(on, bench.plan.live)
                ours.append(bench.report(on, bench.plan.seconds)[0])
            baseline.append(hsets(store.url, bench.plan.seconds, bench.plan.live))
            bench.said(f"  {ours[-1]:,.0f}/s, HSETs {baseline[-1]:,.0f}/s")
    notes = ["each HSET writes the six fields that a report carries; the baseline is one client process of redis-py"]
    return Measure(5, "updates, Redis engine, one replica", "1/s", ours, baseline, 1.0, notes=notes)


def memory(bench: Bench) -> Measure:
    """Memory of a live session, against 1 KB."""
    ours = []
    count = bench.plan.sessions
    for turn in range(bench.plan.rounds):
        dsn = processes.make_database(bench.postgres, f"memory{turn}")
        with servers.tracker(dsn, bench.folder) as on:
            # What the first sessions cost is the service's and not theirs.
            bench.start(on, 1000)
            bench.report(on, 1, 1000)
            before = on.resident_bytes()
            bench.run(on, [bench.order(on, "start", first=1000, sessions=count, in_flight=64)])
            share = count // 2
            begin = time.monotonic() + _START_SECONDS
            halves = [
                bench.order(on, "packed", first=1000 + place * share, sessions=share, begin=begin, seconds=5)
                for place in range(2)
            ]
            bench.run(on, halves)
            ours.append((on.resident_bytes() - before) / count)
        bench.said(f"  {ours[-1]:,.0f} bytes a session at {count:,}")
    baseline = [float(_KILOBYTE)] * len(ours)
    notes = [f"growth of the process from 1,000 to {count + 1000:,} sessions, each started and reported several times"]
    return Measure(6, f"memory per session at {count:,}", "bytes", ours, baseline, 1.0, at_most=True, notes=notes)


def lag(bench: Bench) -> Measure:
    """Report to watcher, p99: 10,000 sessions and 100 watchers against 100 sessions and one watcher."""
    ours: list[float] = []
    baseline: list[float] = []
    for turn in range(bench.plan.rounds):
        for sessions, watchers, values in ((bench.plan.live, 100, ours), (100, 1, baseline)):
            dsn = processes.make_database(bench.postgres, f"lag{turn}_{watchers}")
            with servers.tracker(dsn, bench.folder) as on:
                bench.start(on, sessions)
                # A second more, for the snapshots of a hundred watchers.
                begin = time.monotonic() + _START_SECONDS + 1
                seconds = max(bench.plan.seconds, 3)
                orders = [
                    bench.order(on, "paced", sessions=sessions, begin=begin, seconds=seconds),
                    bench.order(on, "watch", streams=watchers, begin=begin, seconds=seconds),
                ]
                tally, _ = bench.run(on, orders)
                values.append(1e3 * statistics.quantiles(tally.lags, n=100)[98])
        bench.said(f"  {ours[-1]:.0f} ms, small {baseline[-1]:.0f} ms")
    notes = ["packed, at the default interval of 100 ms; of the watchers two are read in full, the others only counted"]
    name = f"report-to-watcher lag p99, {bench.plan.live:,} sessions at 1/s, 100 watchers"
    return Measure(7, name, "ms", ours, baseline, 3.0, at_most=True, notes=notes)


ROWS: dict[int, Callable[[Bench], Measure]] = {
    1: per_core,
    2: unary,
    3: against_updates,
    4: written,
    5: redis_engine,
    6: memory,
    7: lag,
}
