"""For how long no final result could be committed: what the alert on waiting results goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from services.errors import DatabaseUnavailable
from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.organizations import Organizations
from session_tracker.results import Outcome, RecordedResult, Result, Results
from session_tracker.sessions import State

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
OUTCOME = Outcome("s", State.COMPLETED, "", 1, 0, 0, NOON, "", "")


@dataclass(slots=True)
class Store:
    """Records results unless it is away."""

    away: bool = False

    async def record(self, results: Sequence[Result]) -> list[tuple[RecordedResult, bool]]:
        if self.away:
            raise DatabaseUnavailable("away", retry_after_seconds=1.0)
        return [
            (RecordedResult(**asdict(result), completed_at=NOON, execution_time_seconds=0.0), True)
            for result in results
        ]

    async def find(self, organization_id: UUID, session_id: str) -> RecordedResult | None:
        return None


def oldest() -> float | None:
    return REGISTRY.get_sample_value("muster_tracker_results_oldest_seconds")


async def test_the_age_grows_while_commits_fail_and_ends_with_the_first_that_succeeds() -> None:
    now, store = 1000.0, Store()
    clock = Clock(monotonic=lambda: now, wall=lambda: NOON)
    results = Results(Organizations(SessionsConfig(), clock), store, clock)
    acme = UUID(int=1)
    await results.complete(acme, OUTCOME)
    assert oldest() == 0.0
    store.away = True
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable):
            await results.complete(acme, OUTCOME)
        now += 30.0
    assert oldest() == 90.0
    # Whoever still wanted it would have tried again by now.
    now += 100.0
    assert oldest() == 0.0
    with pytest.raises(DatabaseUnavailable):
        await results.complete(acme, OUTCOME)
    assert oldest() == 190.0
    store.away = False
    await results.complete(acme, OUTCOME)
    assert oldest() == 0.0
    await results.close()
