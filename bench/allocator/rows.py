"""The seven measures. Each begins with what it compares, and returns one row of the table."""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import psycopg
from muster.allocator.v1 import work_pb2, work_pb2_grpc

from bench import processes
from bench.allocator import servers, stock
from bench.allocator.baselines import OneByOne, Queue
from bench.allocator.fleet import Fleet
from bench.allocator.load import Tally
from bench.allocator.stock import Stock
from bench.processes import Server
from bench.table import Measure
from services.launcher.postgres import EmbeddedPostgres

_DRAIN_SLOTS, _DRAIN_QUOTA = 200, 50
# Requests that each stream keeps unanswered: a machine of a fleet asks for more before the last answer is used up.
_AHEAD = 2
# Batches that each machine has in hand, when it also submits: one of each of its processes.
_PROCESSES = 8
# Calls for one unit that each connection keeps open, where one replica is to be what limits the rate.
_SINGLE_CALLS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often.

    Attributes:
        rounds: How often each measure and its baseline alternate.
        seconds: Of one round of either.
        warm_seconds: How long a load runs before it counts.
        decline_seconds: Of the long runs that show whether the rate declines; 0 leaves them out.
        hold_seconds: How long another transaction holds xmin, in each round.
        many_slots: The large database of row 5.
        jobs: That PgQueuer finishes in a round.
    """

    rounds: int
    seconds: int
    warm_seconds: float
    decline_seconds: int
    hold_seconds: int
    many_slots: int
    jobs: int


@dataclass(slots=True)
class Bench:
    """What the measures share: the server, the clients, and the database of most of them with its replica."""

    plan: Plan
    folder: Path
    postgres: EmbeddedPostgres
    fleet: Fleet
    stack: contextlib.ExitStack
    _main: tuple[Stock, Server] | None = None
    said: Callable[[str], None] = field(default=lambda text: print(text, flush=True))

    def main(self) -> tuple[Stock, Server]:
        """The database with 30,000 slots and 500 exits, and the replica that serves it; as new."""
        if self._main is None:
            made = stock.fill(processes.make_database(self.postgres, "main"), stock.SLOTS)
            self._main = made, self.stack.enter_context(servers.replica(made.dsn, self.folder))
        self._main[0].renew()
        return self._main

    def load(self, shape: str, on: Sequence[Server], key: str, seconds: float, **how: float) -> Tally:
        """Runs a load to its end."""
        self.fleet.begin(shape, [server.address for server in on], key, seconds, **how)  # type: ignore[arg-type]
        return self.fleet.end()

    def asked_ahead(self, on: Sequence[Server], key: str, seconds: float) -> Tally:
        """Runs the load of row 1: demand on streams, each some requests ahead."""
        return self.load("stream", on, key, seconds, in_flight=_AHEAD)

    def rate(self, tally: Tally) -> float:
        """Returns units a second. Refusals are part of a load only when something is wrong."""
        if tally.refused:
            self.said(f"  {tally.refused} requests or results were refused")
        return sum(tally.units) / len(tally.units)


def durable(bench: Bench) -> Measure:
    """Allocations a second on streams, against pgbench with one allocation per transaction; then both for long."""
    plan = bench.plan
    main, server = bench.main()
    one_by_one = OneByOne(processes.make_database(bench.postgres, "one_by_one"), bench.folder)
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(plan.rounds):
        main.renew()
        ours.append(bench.rate(bench.asked_ahead([server], main.key, plan.seconds)))
        one_by_one.renew()
        baseline.append(statistics.mean(one_by_one.run(plan.seconds)))
        bench.said(f"  {ours[-1]:,.0f}/s, pgbench {baseline[-1]:,.0f}/s")
    measure = Measure(
        1, "durable allocations, 16 streams x 32, against one per transaction", "1/s", ours, baseline, 5.0
    )
    if not plan.decline_seconds:
        return measure
    main.renew()
    kept = _kept(bench.asked_ahead([server], main.key, plan.decline_seconds).units)
    one_by_one.renew()
    baseline_kept = _kept(one_by_one.run(plan.decline_seconds))
    minutes = f"{plan.decline_seconds / 60:g} minutes"
    return replace(
        measure,
        also=[(f"no decline over {minutes} (the end makes {kept:.2f} of the beginning)", kept >= 0.9)],
        notes=[f"the baseline's end makes {baseline_kept:.2f} of its beginning over {minutes}"],
    )


def cycles(bench: Bench) -> Measure:
    """Units allocated and submitted a second, in batches of 32, against the jobs a second of PgQueuer."""
    main, server = bench.main()
    queue = Queue(processes.make_database(bench.postgres, "queue"))
    ours: list[float] = []
    baseline: list[float] = []
    for _ in range(bench.plan.rounds):
        main.renew()
        ours.append(bench.rate(bench.load("cycle", [server], main.key, bench.plan.seconds, in_flight=_PROCESSES)))
        baseline.append(queue.run(bench.plan.jobs))
        bench.said(f"  {ours[-1]:,.0f}/s, PgQueuer {baseline[-1]:,.0f}/s")
    return Measure(2, "allocate + submit, batches of 32 on 16 streams, against PgQueuer", "1/s", ours, baseline, 1.5)


def unary_cpu(bench: Bench) -> Measure:
    """CPU of the server process for one unary call at 64 in flight, against a bare grpc.aio server."""
    main, server = bench.main()
    ours: list[float] = []
    baseline: list[float] = []
    with servers.echo(1, _one_answer(server, main.key), bench.folder) as bare:
        for _ in range(bench.plan.rounds):
            for which, figures in ((server, ours), (bare, baseline)):
                begin = bench.fleet.begin("unary", [which.address], main.key, bench.plan.seconds, in_flight=4, items=1)
                time.sleep(max(0.0, begin - time.monotonic()))
                before = which.cpu_seconds()
                time.sleep(max(0.0, begin + bench.plan.seconds - time.monotonic()))
                spent = which.cpu_seconds() - before
                figures.append(spent / max(1, bench.fleet.end().calls) * 1e6)
            bench.said(f"  {ours[-1]:.0f} us, bare {baseline[-1]:.0f} us")
    return Measure(
        3, "server CPU of a unary allocate, 64 in flight, against bare grpc.aio", "us", ours, baseline, 2.0, True
    )


def latency(bench: Bench) -> Measure:
    """The 99th percentile of the time to an answer at half of the peak rate, against a tenth of it."""
    main, server = bench.main()
    halves: list[float] = []
    tenths: list[float] = []
    for _ in range(bench.plan.rounds):
        main.renew()
        peak = bench.asked_ahead([server], main.key, bench.plan.seconds).calls / bench.plan.seconds
        for share, figures in ((0.1, tenths), (0.5, halves)):
            main.renew()
            tally = bench.load("paced", [server], main.key, bench.plan.seconds, rate=peak * share)
            figures.append(statistics.quantiles(tally.latencies, n=100)[98] * 1e3)
        bench.said(f"  p99 {halves[-1]:.1f} ms at {peak / 2:,.0f} requests/s, {tenths[-1]:.1f} ms at {peak / 10:,.0f}")
    return Measure(4, "p99 at half of the peak rate, against a tenth of it", "ms", halves, tenths, 3.0, True)


def many_slots(bench: Bench) -> Measure:
    """Allocations a second with very many slots, against the same with 30,000."""
    plan = bench.plan
    few, few_server = bench.main()
    begun = time.monotonic()
    many = stock.fill(processes.make_database(bench.postgres, "many"), plan.many_slots)
    bench.said(f"  {plan.many_slots:,} slots made in {time.monotonic() - begun:.0f} s")
    ours: list[float] = []
    baseline: list[float] = []
    with servers.replica(many.dsn, bench.folder) as many_server:
        for number in range(plan.rounds):
            both = [(many, many_server, ours), (few, few_server, baseline)]
            for which, server, figures in both if number % 2 == 0 else reversed(both):
                which.renew()
                figures.append(bench.rate(bench.asked_ahead([server], which.key, plan.seconds)))
            bench.said(f"  {ours[-1]:,.0f}/s, with {stock.SLOTS:,} slots {baseline[-1]:,.0f}/s")
    name = f"allocations with {plan.many_slots:,} slots, against {stock.SLOTS:,}"
    return Measure(5, name, "1/s", ours, baseline, 0.8)


def held_xmin(bench: Bench) -> Measure:
    """Allocations a second after another transaction has held xmin for minutes of load, against the same without."""
    plan = bench.plan
    main, server = bench.main()
    tail = min(60, max(1, plan.hold_seconds // 2))
    held: list[float] = []
    free: list[float] = []
    for number in range(plan.rounds):
        # Both as long: the tables grow alike.
        both: list[tuple[AbstractContextManager[None], list[float]]]
        both = [(_old_snapshot(main.dsn), held), (contextlib.nullcontext(), free)]
        for hold, figures in both if number % 2 == 0 else reversed(both):
            main.renew()
            with hold:
                units = bench.asked_ahead([server], main.key, plan.hold_seconds).units
            figures.append(statistics.mean(units[-tail:]))
        bench.said(f"  {held[-1]:,.0f}/s, without {free[-1]:,.0f}/s")
    name = f"allocations in the last {tail} s of {plan.hold_seconds} s with xmin held, against without"
    return Measure(6, name, "1/s", held, free, 0.9)


def replicas(bench: Bench) -> Measure:
    """Unary allocations a second of two replicas on one database, against one; whether "no work" was ever untrue."""
    main, server = bench.main()
    two: list[float] = []
    one: list[float] = []
    untrue = 0
    with servers.replica(main.dsn, bench.folder) as other:
        for number in range(bench.plan.rounds):
            both = [([server, other], two), ([server], one)]
            for on, figures in both if number % 2 == 0 else reversed(both):
                main.renew()
                tally = bench.load("unary", on, main.key, bench.plan.seconds, in_flight=_SINGLE_CALLS, items=1)
                untrue += tally.no_work
                figures.append(bench.rate(tally))
            bench.said(f"  two {two[-1]:,.0f}/s, one {one[-1]:,.0f}/s")
    given, early = _drained(bench)
    units = _DRAIN_SLOTS * _DRAIN_QUOTA
    return Measure(
        7, "unary allocations of two replicas on one database, against one", "1/s", two, one, 1.2,
        also=[
            (f'no "no work" while units were plenty (heard {untrue})', untrue == 0),
            (f"two replicas hand out all of {units:,} units, each once (handed out {given:,})", given == units),
            ('no unit is handed out to a call made after "no work" was said', early <= 0),
        ],
    )  # fmt: skip


ROWS: dict[int, Callable[[Bench], Measure]] = {
    1: durable,
    2: cycles,
    3: unary_cpu,
    4: latency,
    5: many_slots,
    6: held_xmin,
    7: replicas,
}


def _kept(rates: Sequence[float]) -> float:
    """Returns how much of the first minute's rate the last minute makes; of a short run, the first and last third."""
    part = min(60, max(1, len(rates) // 3))
    return statistics.mean(rates[-part:]) / max(1.0, statistics.mean(rates[:part]))


def _one_answer(server: Server, key: str) -> bytes:
    with grpc.insecure_channel(server.address) as channel:
        request = work_pb2.AllocateWorkRequest(
            request_id=str(uuid.uuid4()), client=work_pb2.ClientIdentity(client_id="bench"), max_items=1
        )
        answer = work_pb2_grpc.WorkServiceStub(channel).AllocateWork(
            request, metadata=(("authorization", f"Bearer {key}"),), timeout=30
        )
    assert len(answer.allocations) == 1, answer
    return answer.SerializeToString()


@contextlib.contextmanager
def _old_snapshot(dsn: str) -> Iterator[None]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT txid_current()")
        yield
        connection.execute("ROLLBACK")


def _drained(bench: Bench) -> tuple[int, float]:
    """Empties a small stock through two replicas.

    Returns:
        The units handed out, and by how many seconds the first "no work" preceded a request that still got units.
    """
    small = stock.fill(processes.make_database(bench.postgres, "small"), _DRAIN_SLOTS, quota=_DRAIN_QUOTA, exits=0)
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            # At once, since each takes seconds to start.
            both = list(pool.map(lambda _: stack.enter_context(servers.replica(small.dsn, bench.folder)), range(2)))
        tally = bench.load("drain", both, small.key, 30)
    with psycopg.connect(small.dsn) as connection:
        row = connection.execute("SELECT count(*) FROM allocator.leases").fetchone()
    return (row[0] if row else 0), tally.last_grant - tally.first_no_work
