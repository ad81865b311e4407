"""What the programs of the benches have in common: options, the rows one by one, the table, the last line."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import structlog

from bench import table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Plan = TypeVar("Plan", bound=DataclassInstance)
else:
    Plan = TypeVar("Plan")
Bench = TypeVar("Bench")


def run(
    name: str,
    says: str,
    full: Plan,
    quick: Plan,
    rows: Mapping[int, Callable[[Bench], table.Measure]],
    make: Callable[[Plan, Path, ExitStack], Bench],
) -> int:
    """Measures the rows that are asked for and prints their table.

    Args:
        name: Of the module.
        says: What it does, its first sentence.
        full: How long and how often in a full run; each field is an option.
        quick: Likewise with `--quick`.
        rows: By number.
        make: Makes what the rows share, in a folder; what it starts ends with the stack, before the folder goes.

    Returns:
        The exit code: 1 when a row is missed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=says)
    parser.add_argument("--quick", action="store_true", help="under a minute: a look, not a measurement")
    parser.add_argument("--rows", default="", help="only these, such as 1,3")
    for each in fields(full):
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=type(getattr(full, each.name)),
            help=f"full: {getattr(full, each.name)}",
        )
    options = parser.parse_args()
    given: dict[str, Any] = {
        each.name: value for each in fields(full) if (value := getattr(options, each.name)) is not None
    }
    plan = replace(quick if options.quick else full, **given)
    numbers = sorted({int(number) for number in options.rows.split(",")} if options.rows else rows)
    # What the services' own code says while databases are made ready is not part of the report.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print(f"Python {platform.python_version()}, grpcio {grpc.__version__}, {os.cpu_count()} CPUs; {plan}")
    if plan != full:
        print("Shorter than the full run: a look, not a measurement.")
    measures = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="muster-bench-")))
        folder.chmod(0o755)
        bench = make(plan, folder, stack)
        for number in numbers:
            row = rows[number]
            begun = time.monotonic()
            print(f"{number}: {(row.__doc__ or '').partition('.')[0]}", flush=True)
            measure = row(bench)
            measures.append(measure)
            reached = "reached" if measure.reached else "missed"
            ratios = table.spread(measure.ratios, 2)
            print(f"  ratio {ratios}: {reached} ({time.monotonic() - begun:.0f} s)", flush=True)
    held = table.show(measures)
    print(f"reached {held} of {len(measures)}")
    return 0 if held == len(measures) else 1
