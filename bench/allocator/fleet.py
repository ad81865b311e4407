"""The client processes, as one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Self

from bench.allocator.load import Order, Tally


class Fleet:
    """Client processes that share the connections of every order.

    Args:
        warm_seconds: How long a load runs before it counts: connecting, the first look-up of the key and the first
            refresh of the index are over by then.
        processes: How many.
    """

    def __init__(self, warm_seconds: float, processes: int = 2) -> None:
        self._warm_seconds = warm_seconds
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.allocator.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(processes)
        ]

    def __enter__(self) -> Self:
        """Does nothing: the processes have begun."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def begin(
        self,
        shape: str,
        targets: Sequence[str],
        key: str,
        seconds: float,
        *,
        connections: int = 16,
        in_flight: int = 1,
        items: int = 32,
        rate: float = 0.0,
    ) -> float:
        """Starts an order and returns when its counting begins, by `time.monotonic`."""
        begin = time.monotonic() + self._warm_seconds
        order = Order(shape, list(targets), key, connections, in_flight, items, begin, seconds, rate)
        shares = len(self._processes)
        for number, process in enumerate(self._processes):
            # Each process deals its connections to the targets in turn; so the first ones must differ.
            turned = [*targets[number % len(targets) :], *targets[: number % len(targets)]]
            share = replace(order, targets=turned, connections=connections // shares, rate=rate / shares)
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(share)) + "\n")
            process.stdin.flush()
        return begin

    def end(self) -> Tally:
        """Waits for the order in hand and returns the tallies added up."""
        tallies = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("a client process failed")
            tallies.append(Tally(**json.loads(line)))
        return Tally(
            units=[sum(second) for second in zip(*(tally.units for tally in tallies), strict=True)],
            calls=sum(tally.calls for tally in tallies),
            no_work=sum(tally.no_work for tally in tallies),
            refused=sum(tally.refused for tally in tallies),
            latencies=[latency for tally in tallies for latency in tally.latencies],
            last_grant=max(tally.last_grant for tally in tallies),
            first_no_work=min(tally.first_no_work for tally in tallies),
        )
