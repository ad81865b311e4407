"""Measures the session tracker: python -m bench.tracker [--quick] [--rows 1,3]."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from bench import processes, program
from bench.tracker import servers
from bench.tracker.rows import ROWS, Bench, Plan

FULL = Plan(rounds=3, seconds=15, live=10_000, sessions=100_000, whole_runs=300)
QUICK = Plan(rounds=1, seconds=2, live=2_000, sessions=5_000, whole_runs=20)


def _make(plan: Plan, folder: Path, stack: ExitStack) -> Bench:
    return Bench(plan, folder, stack.enter_context(processes.postgres(folder, servers.POSTGRES)), stack)


if __name__ == "__main__":
    sys.exit(program.run("bench.tracker", __doc__.partition("\n")[0], FULL, QUICK, ROWS, _make))
