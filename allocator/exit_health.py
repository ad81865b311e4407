"""Which exits a target does not take for now, by what runs report.

A run's signal about its exit counts for the exit and target together: what one target blocks, another takes. Each kind
of fault has a cool-down of its own, doubled with every further fault in a row. Runs that were out together tell of one
fault: what they report during the cool-down neither doubles it nor, when they went well, ends it.

The cool-down is advice to the choice of exits, which reads it about once a second; no count depends on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.errors import ExitNotFound
from allocator.metrics import EXITS_COOLING
from allocator.store import Store
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.config import CoolDownConfig
    from allocator.partitions import Partitions
    from services.postgres import Connection, Database

_SQL = queries("allocator", "exit_health.sql")
_log = structlog.get_logger("allocator.exit_health")

_GAUGE_SECONDS = 15.0

# An exit and a target; '' for slots without one.
Pair = tuple[UUID, str]
# An exit, a target, the signal (1 to 3) and what the target asked for in milliseconds (Retry-After), if it did.
Fault = tuple[UUID, str, int, int | None]


class Signal(IntEnum):
    """What a run says of its exit, as in the contract and in the database."""

    RATE_LIMITED = 1
    BLOCKED = 2
    TRANSPORT = 3


@dataclass(frozen=True, slots=True)
class ExitStanding:
    """How one exit stands with one target; `faults` in a row, the last of them `signal`."""

    exit_id: UUID
    target: str
    signal: int
    faults: int
    cooling_until: datetime
    reported_at: datetime


class ExitHealth(Store):
    """Keeps cool-downs. Every method is bound to one organization unless it says otherwise.

    Args:
        database: The allocator's database.
        partitions: Makes a partition that is found missing.
        cool_down: How long.
    """

    def __init__(self, database: Database, partitions: Partitions, cool_down: CoolDownConfig) -> None:
        super().__init__(database, partitions)
        self._bases = (cool_down.rate_limited_seconds, cool_down.blocked_seconds, cool_down.transport_seconds)
        self._limit = cool_down.limit_seconds

    async def report(
        self, connection: Connection, organization_id: UUID, faults: Sequence[Fault], good: Sequence[Pair]
    ) -> None:
        """Takes in what runs say of their exits, within the transaction in hand, after it has locked all else.

        Two transactions that report the same pairs in opposite roles can meet in a deadlock, which `atomically` mends.

        Args:
            connection: In a transaction.
            organization_id: The tenant.
            faults: In any order; of several for the same pair the last is the signal, and they count as one.
            good: Exits that served their target well. A pair that is also among `faults` counts as faulty.
        """
        worst: dict[Pair, tuple[int, float]] = {}
        for exit_id, target, signal, asked_ms in faults:
            _, asked = worst.get((exit_id, target), (0, 0.0))
            worst[exit_id, target] = signal, max(asked, (asked_ms or 0) / 1000)
        if well := sorted(set(good) - worst.keys()):
            await connection.execute(
                _SQL["recover_exits"],
                organization_id,
                [exit_id for exit_id, _ in well],
                [target for _, target in well],
            )
        if ill := sorted(worst):
            await connection.execute(
                _SQL["cool_exits"],
                organization_id,
                [exit_id for exit_id, _ in ill],
                [target for _, target in ill],
                [worst[pair][0] for pair in ill],
                [worst[pair][1] for pair in ill],
                *self._bases,
                self._limit,
            )

    async def page(
        self, organization_id: UUID, exit_id: UUID | None, target: str | None, after: Pair | None, size: int
    ) -> list[ExitStanding]:
        """Returns how exits stand, by exit and target. Raises: DatabaseUnavailable."""
        last_exit, last_target = after or (None, None)
        rows = await self.database.fetch(
            _SQL["page_of_health"], organization_id, exit_id, target, last_exit, last_target, size
        )
        return [ExitStanding(**row) for row in rows]

    async def clear(self, organization_id: UUID, exit_id: UUID, target: str | None) -> int:
        """Ends the cool-downs of an exit, for one target or for all (None); returns how many.

        Raises:
            ExitNotFound: there is no such exit.
            DatabaseUnavailable: the database does not answer.
        """

        async def work(connection: Connection) -> int:
            if not await connection.fetchval(_SQL["exit_stands"], organization_id, exit_id):
                raise ExitNotFound(exit_id)
            tag = await connection.execute(_SQL["clear_health"], organization_id, exit_id, target)
            return int(tag.rpartition(" ")[2])

        return await self.atomically(work)

    async def measure(self) -> None:
        """Forgets old rows and sets the gauges, for all organizations. Raises: DatabaseUnavailable."""
        await self.database.execute(_SQL["forget_health"])
        cooling = {row["signal"]: row["exits"] for row in await self.database.fetch(_SQL["count_cooling"])}
        for signal in Signal:
            EXITS_COOLING.labels(signal.name.lower()).set(cooling.get(signal, 0))

    async def measure_for_ever(self) -> None:
        """Measures every few seconds; waits while the database is away."""
        while True:
            try:
                await self.measure()
            except DatabaseUnavailable as error:
                _log.warning("the cool-downs wait for the database", error=error.message)
            await asyncio.sleep(_GAUGE_SECONDS)
