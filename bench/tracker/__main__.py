"""Measures the session tracker: python -m bench.tracker [--quick] [--rows 1,3]."""

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
from bench.tracker import servers
from bench.tracker.rows import ROWS, Bench, Plan

FULL = Plan(rounds=3, seconds=15, live=10_000, sessions=100_000, whole_runs=300)
QUICK = Plan(rounds=1, seconds=2, live=2_000, sessions=5_000, whole_runs=20)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tracker", description=__doc__.partition("\n")[0])
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
        # Ends the services first, then the server, then removes its data.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muster-bench-")))
        folder.chmod(0o755)
        bench = Bench(plan, folder, stack.enter_context(processes.postgres(folder, servers.POSTGRES)), stack)
        for number in numbers:
            row = ROWS[number]
            begun = time.monotonic()
            print(f"{number}: {(row.__doc__ or '').partition('.')[0]}", flush=True)
            measures.append(row(bench))
            ratios = table.spread(measures[-1].ratios, 2)
            reached = "reached" if measures[-1].reached else "missed"
            print(f"  ratio {ratios}: {reached} ({time.monotonic() - begun:.0f} s)", flush=True)
    reached_rows = table.show(measures)
    print(f"reached {reached_rows} of {len(measures)}")
    return 0 if reached_rows == len(measures) else 1


if __name__ == "__main__":
    sys.exit(main())
