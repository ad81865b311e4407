"""Measures the allocator: python -m bench.allocator [--quick] [--rows 1,3]."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import grpc

from bench import processes, table
from bench.allocator import servers
from bench.allocator.fleet import Fleet
from bench.allocator.rows import ROWS, Bench, Plan, summary

FULL = Plan(
    rounds=3, seconds=15, warm_seconds=2, decline_seconds=600, hold_seconds=300, many_slots=3_000_000, jobs=50_000
)
QUICK = Plan(rounds=1, seconds=1, warm_seconds=1, decline_seconds=0, hold_seconds=2, many_slots=60_000, jobs=10_000)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.allocator", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: a look, not a measurement")
    parser.add_argument("--rows", default="", help="only these, such as 1,3")
    for plan_field in fields(Plan):
        parser.add_argument(
            f"--{plan_field.name.replace('_', '-')}", type=int, help=f"full: {getattr(FULL, plan_field.name)}"
        )
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    plan = replace(plan, **{f.name: value for f in fields(Plan) if (value := getattr(options, f.name)) is not None})
    numbers = sorted({int(number) for number in options.rows.split(",")} if options.rows else ROWS)
    print(f"Python {platform.python_version()}, grpcio {grpc.__version__}, {os.cpu_count()} CPUs; {plan}")
    if plan != FULL:
        print("Shorter than the full run: a look, not a measurement.")
    measures = []
    with contextlib.ExitStack() as stack:
        # Ends the replicas first, then the server, then removes its data.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muster-bench-")))
        folder.chmod(0o755)
        postgres = stack.enter_context(processes.postgres(folder, servers.POSTGRES))
        fleet = stack.enter_context(Fleet(plan.warm_seconds))
        bench = Bench(plan, folder, postgres, fleet, stack)
        for number in numbers:
            row = ROWS[number]
            begun = time.monotonic()
            print(f"{number}: {(row.__doc__ or '').partition('.')[0]}", flush=True)
            measures.append(row(bench))
            print(f"{summary(measures[-1])} ({time.monotonic() - begun:.0f} s)", flush=True)
    reached = table.show(measures)
    print(f"reached {reached} of {len(measures)}")
    return 0 if reached == len(measures) else 1


if __name__ == "__main__":
    sys.exit(main())
