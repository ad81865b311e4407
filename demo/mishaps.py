"""What goes wrong on purpose while the fleet works, and the proof that it did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import muster

from demo.fleet import Fleet
from demo.journal import Leased
from demo.screen import Screen
from services.launcher.suite import Suite

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60.0


@dataclass(slots=True)
class Mishaps:
    """Which units were hit.

    Attributes:
        killed_key: The unit of the worker that was killed.
        late_key: The unit of the worker that was stopped past its lease.
        allocator_pids: The allocator's process before and after it was killed.
    """

    killed_key: str = ""
    late_key: str = ""
    allocator_pids: tuple[int, int] = (0, 0)


async def happen(mishaps: Mishaps, suite: Suite, fleet: Fleet, client: muster.Client, screen: Screen) -> None:
    """Kills a worker, stops another past its lease, and kills the allocator, each in the midst of work.

    Raises:
        TimeoutError: the fleet gave no occasion within a minute.
    """
    name, unit = await _somebody_at_work(fleet)
    await fleet.kill(name)
    mishaps.killed_key = unit.allocation_key
    screen.event(f"{name} killed while at work on '{unit.keyword}': its lease will run out", "red")
    await fleet.start(name)

    paused, unit = await _somebody_at_work(fleet, besides=name)
    fleet.pause(paused)
    mishaps.late_key = unit.allocation_key
    screen.event(f"{paused} stopped while at work on '{unit.keyword}', past its lease", "yellow")

    before = suite.supervisor.pid("allocator") or 0
    suite.supervisor.kill("allocator")
    screen.event("allocator killed", "red")
    await suite.wait_ready("allocator")
    mishaps.allocator_pids = (before, suite.supervisor.pid("allocator") or 0)
    screen.event("allocator serves again", "green")

    async def both_ran_out() -> bool:
        expired = {
            record.allocation_key async for record in client.insight.allocations(status=muster.AllocationStatus.EXPIRED)
        }
        return {mishaps.killed_key, mishaps.late_key} <= expired

    await _until(both_ran_out)
    screen.event("both leases ran out; their quota is free again", "yellow")
    fleet.resume(paused)
    screen.event(f"{paused} goes on, and will submit late", "yellow")


async def _somebody_at_work(fleet: Fleet, besides: str = "") -> tuple[str, Leased]:
    # The unit of a worker that was killed stays under its name until its successor has begun one.
    found: list[tuple[str, Leased]] = []

    async def look() -> bool:
        found[:] = sorted(one for one in fleet.under_way().items() if one[0] != besides)
        return bool(found)

    await _until(look)
    return found[0]


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(_POLL_SECONDS)
