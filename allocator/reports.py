"""Reports: what came of the work, by slot, client and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.report_cache import DASHBOARD_SECONDS, STATISTICS_SECONDS, TOTALS_SECONDS
from allocator.slots import Setting, Tracking

if TYPE_CHECKING:
    from allocator.explanation import Explanation
    from allocator.insight import Totals
    from allocator.insight_store import InsightStore
    from allocator.report_cache import ReportCache
    from allocator.report_store import ReportStore

# The standard normal quantile of 97.5 %, for intervals of 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class DashboardRow:
    """One slot's day; `rate` is finished units by quota, in whole millionths."""

    slot_id: UUID
    keyword: str
    tracking: Tracking
    rate: int


@dataclass(frozen=True, slots=True)
class ClientPerformance:
    """One client's day; name and address are '' once it was purged."""

    client_id: str
    client_name: str
    client_ip: str
    active_instances: int
    tasks: int
    mean_execution_ms: float
    succeeded: int


@dataclass(frozen=True, slots=True)
class SettingsEffect:
    """What came of one combination of settings."""

    settings: Mapping[str, Setting]
    results: int
    succeeded: int
    mean_execution_ms: float

    def success_rate(self) -> float:
        """Succeeded by results, 0 to 1."""
        return self.succeeded / self.results

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the success rate."""
        return wilson_interval(self.succeeded, self.results)


@dataclass(frozen=True, slots=True)
class BlockCount:
    """Blocked results of one type, and how many clients they came from."""

    block_type: str
    count: int
    affected_clients: int


@dataclass(frozen=True, slots=True)
class ClientActivity:
    """One client's last hour."""

    client_id: str
    last_activity: datetime
    instances_used: int
    folders_used: int
    reports: int


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a rate.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927) 209-212. Unlike the normal approximation it stays within 0 and 1 and holds for
    small samples and for rates near either end.

    Args:
        successes: 0 to `trials`.
        trials: At least 1.
    """
    rate, square = successes / trials, _Z * _Z
    scale = 1 + square / trials
    middle = (rate + square / (2 * trials)) / scale
    spread = _Z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials * trials)) / scale
    return max(0.0, middle - spread), min(1.0, middle + spread)


class Reports:
    """Reads reports and keeps them for a while. Every method raises: DatabaseUnavailable.

    Args:
        store: Reads them.
        insight: Reads the live figures.
        explanation: Counts the free capacity.
        cache: Keeps them all.
    """

    def __init__(self, store: ReportStore, insight: InsightStore, explanation: Explanation, cache: ReportCache) -> None:
        self._store = store
        self._insight = insight
        self._explanation = explanation
        self._cache = cache

    async def today(self, organization_id: UUID) -> date:
        """Returns the day in the organization's time zone."""
        return await self._store.today(organization_id)

    async def totals(self, organization_id: UUID) -> Totals:
        """Returns the live figures, at most a second old unless they are dear."""

        async def read() -> Totals:
            units = await self._explanation.available_units(organization_id)
            return await self._insight.totals(organization_id, units)

        return await self._cache.get(organization_id, "totals", TOTALS_SECONDS, read)

    async def dashboard(
        self, organization_id: UUID, day: date, after: tuple[int, UUID] | None, size: int
    ) -> list[DashboardRow]:
        """Returns one day by completion, highest first."""
        return await self._cache.get(
            organization_id,
            ("dashboard", day, after, size),
            DASHBOARD_SECONDS,
            lambda: self._store.dashboard(organization_id, day, after, size),
        )

    async def client_performance(self, organization_id: UUID, day: date) -> list[ClientPerformance]:
        """Returns one day by client, the busiest first."""
        return await self._cache.get(
            organization_id,
            ("clients", day),
            STATISTICS_SECONDS,
            lambda: self._store.client_performance(organization_id, day),
        )

    async def settings_effect(
        self, organization_id: UUID, names: tuple[str, ...], target: str | None
    ) -> list[SettingsEffect]:
        """Returns the last 7 days by settings, the best first; no names for all settings, None for any target."""
        return await self._cache.get(
            organization_id,
            ("settings", names, target),
            STATISTICS_SECONDS,
            lambda: self._store.settings_effect(organization_id, names, target),
        )

    async def blocks(self, organization_id: UUID) -> list[BlockCount]:
        """Returns the last hour's blocks by type, most first."""
        return await self._cache.get(
            organization_id, "blocks", DASHBOARD_SECONDS, lambda: self._store.blocks(organization_id)
        )

    async def client_activity(
        self, organization_id: UUID, client_id: str | None, client_ip: str | None
    ) -> list[ClientActivity]:
        """Returns the last hour of a client, or of those at an address."""
        return await self._cache.get(
            organization_id,
            ("activity", client_id, client_ip),
            DASHBOARD_SECONDS,
            lambda: self._store.client_activity(organization_id, client_id, client_ip),
        )
