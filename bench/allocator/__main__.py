"""Measures the allocator: python -m bench.allocator [--quick] [--rows 1,3]."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from bench import processes, program
from bench.allocator import servers
from bench.allocator.fleet import Fleet
from bench.allocator.rows import ROWS, Bench, Plan

FULL = Plan(
    rounds=3, seconds=15, warm_seconds=2.0, decline_seconds=600, hold_seconds=300, many_slots=3_000_000, jobs=50_000
)
QUICK = Plan(rounds=1, seconds=1, warm_seconds=0.5, decline_seconds=0, hold_seconds=1, many_slots=50_000, jobs=5_000)


def _make(plan: Plan, folder: Path, stack: ExitStack) -> Bench:
    postgres = stack.enter_context(processes.postgres(folder, servers.POSTGRES))
    return Bench(plan, folder, postgres, stack.enter_context(Fleet(plan.warm_seconds)), stack)


if __name__ == "__main__":
    sys.exit(program.run("bench.allocator", __doc__.partition("\n")[0], FULL, QUICK, ROWS, _make))
