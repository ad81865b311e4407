"""The invariants of the design, read from the database again and again: each gauge must show 0.

What a gauge of 0 does not say: `quota`, `counters` and `result_kept` look at today and yesterday, `result_kept` at the
last allocations of them, `acknowledged_kept` at the last requests of an hour. Whether a check comes to its end is seen
by its time, which before the first is that of the start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from allocator import metrics
from allocator.store import fetch_whole
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.audit_store import AuditStore
    from services.postgres import Database

_SQL = queries("allocator", "invariants.sql")
_log = structlog.get_logger("allocator.invariants")

# On a large day a check reads millions of rows: it may take this share of the time, and the others theirs.
_SHARE = 0.005
# How long after the last a check is made: at first, and at the most, however dear it is. The alert
# MusterInvariantUnchecked waits for longer than that.
ROUND_SECONDS = 30.0, 1800.0
AUDIT_SECONDS = 3600.0, 7200.0
_SAMPLED_ALLOCATIONS = 10_000
_SAMPLED_REQUESTS = 1000


class Invariants:
    """Checks the invariants.

    Args:
        database: The allocator's database.
        audit: Verifies the audit chains.
    """

    def __init__(self, database: Database, audit: AuditStore) -> None:
        self._database = database
        self._audit = audit
        self._checks: dict[str, tuple[Callable[[], Awaitable[int]], tuple[float, float]]] = {
            "quota": (lambda: self._by_day("quota"), ROUND_SECONDS),
            "exit_cap": (lambda: self._whole("exit_cap"), ROUND_SECONDS),
            "one_lease": (lambda: self._whole("one_lease"), ROUND_SECONDS),
            "counters": (lambda: self._by_day("counters"), ROUND_SECONDS),
            "result_kept": (lambda: self._by_day("result_kept", _SAMPLED_ALLOCATIONS), ROUND_SECONDS),
            "acknowledged_kept": (self._lost_requests, ROUND_SECONDS),
            "audit_chain": (self._broken_chains, AUDIT_SECONDS),
        }
        self._due = dict.fromkeys(self._checks, 0.0)
        # A check that never comes to its end is then seen as one that stopped doing so.
        for name in self._checks:
            metrics.CHECKED_AT.labels(name).set_to_current_time()

    async def check(self, name: str) -> int:
        """Checks one invariant by its name and returns how many rows break it.

        Raises:
            DatabaseUnavailable: the database does not answer, or not within 30 s.
        """
        run, (period_seconds, longest_seconds) = self._checks[name]
        begun = time.monotonic()
        try:
            broken = await run()
        finally:
            # What was given up took its share too.
            wait_seconds = max(period_seconds, (time.monotonic() - begun) / _SHARE)
            self._due[name] = begun + min(wait_seconds, longest_seconds)
        metrics.VIOLATIONS.labels(name).set(broken)
        metrics.CHECKED_AT.labels(name).set_to_current_time()
        if broken:
            _log.error("an invariant is broken", invariant=name, rows=broken)
        return broken

    async def check_all(self) -> dict[str, int]:
        """Checks all of them, due or not. Raises: DatabaseUnavailable."""
        return {name: await self.check(name) for name in self._checks}

    async def check_for_ever(self) -> None:
        """Checks each when it is due; waits while the database is away."""
        while True:
            for name in self._checks:
                if time.monotonic() < self._due[name]:
                    continue
                try:
                    await self.check(name)
                except DatabaseUnavailable as error:
                    # The next one may be cheaper; this one's time of check says that it did not come to an end.
                    _log.warning("an invariant could not be checked", invariant=name, error=error.message)
            await asyncio.sleep(1.0)

    async def _whole(self, statement: str) -> int:
        return int((await fetch_whole(self._database, _SQL[statement]))[0])

    async def _lost_requests(self) -> int:
        return int(await self._database.fetchval(_SQL["acknowledged_kept"], _SAMPLED_REQUESTS))

    async def _by_day(self, statement: str, *arguments: int) -> int:
        broken = 0
        for row in await self._database.fetch(_SQL["invariant_days"]):
            broken += int(await self._database.fetchval(_SQL[statement], *row, *arguments))
        return broken

    async def _broken_chains(self) -> int:
        broken = 0
        for organization_id in await self._audit.organizations():
            if fault := await self._audit.verify(organization_id):
                _log.error("an audit chain is broken", organization=str(organization_id), fault=fault)
                broken += 1
        return broken
