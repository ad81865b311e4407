"""Reports are kept, shared and outdated as they should be, and the interval of a rate is Wilson's."""

from __future__ import annotations

import asyncio
import math
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator import report_cache
from allocator.report_cache import DASHBOARD_SECONDS, STATISTICS_SECONDS, ReportCache
from allocator.reports import wilson_interval

_ACME, _RIVAL = UUID(int=1), UUID(int=2)


class Source:
    """Answers with how often it was read; holds a reading back while `gate` is not set."""

    def __init__(self) -> None:
        self.reads = 0
        self.running = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def read(self) -> int:
        self.reads += 1
        number = self.reads
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            return number
        finally:
            self.running -= 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr("allocator.report_cache.time.monotonic", lambda: now[0])
    return now


async def test_a_report_is_kept_for_its_time(clock: list[float]) -> None:
    assert (DASHBOARD_SECONDS, STATISTICS_SECONDS) == (60, 300)
    cache, source = ReportCache(), Source()
    assert [await cache.get(_ACME, "r", 60, source.read) for _ in range(3)] == [1, 1, 1]
    clock[0] += 59.9
    assert await cache.get(_ACME, "r", 60, source.read) == 1
    clock[0] += 0.2
    assert await cache.get(_ACME, "r", 60, source.read) == 2


async def test_questions_and_organizations_are_apart() -> None:
    cache, source = ReportCache(), Source()
    assert await cache.get(_ACME, ("r", 1), 60, source.read) == 1
    assert await cache.get(_ACME, ("r", 2), 60, source.read) == 2
    assert await cache.get(_RIVAL, ("r", 1), 60, source.read) == 3
    cache.outdate(_ACME)
    assert await cache.get(_RIVAL, ("r", 1), 60, source.read) == 3
    assert await cache.get(_ACME, ("r", 1), 60, source.read) == 4


async def test_many_at_once_share_one_reading() -> None:
    cache, source = ReportCache(), Source()
    source.gate.clear()
    asked = [asyncio.create_task(cache.get(_ACME, "r", 60, source.read)) for _ in range(20)]
    await asyncio.sleep(0)
    # Whoever began it may go; the others still get it.
    asked[0].cancel()
    await asyncio.sleep(0)
    source.gate.set()
    assert set(await asyncio.gather(*asked[1:])) == {1}


async def test_a_reading_begun_before_a_write_is_not_given_to_those_who_come_after_it() -> None:
    cache, source = ReportCache(), Source()
    source.gate.clear()
    before = asyncio.create_task(cache.get(_ACME, "r", 60, source.read))
    await asyncio.sleep(0)
    after = []
    for _ in range(3):
        cache.outdate(_ACME)
        after.append(asyncio.create_task(cache.get(_ACME, "r", 60, source.read)))
        await asyncio.sleep(0)
    source.gate.set()
    assert await before == 1
    assert await asyncio.gather(*after) == [2, 2, 2]
    assert source.most == 1


async def test_a_dear_report_is_not_read_anew_for_every_write(clock: list[float]) -> None:
    cache, source = ReportCache(), Source()

    async def dear() -> int:
        clock[0] += 2.0
        return await source.read()

    assert await cache.get(_ACME, "r", 60, dear) == 1
    cache.outdate(_ACME)
    clock[0] += 17.9
    assert await cache.get(_ACME, "r", 60, dear) == 1
    # Ten times as long as the reading took have passed since it began.
    clock[0] += 0.2
    assert await cache.get(_ACME, "r", 60, dear) == 2


async def test_a_dear_report_that_should_be_young_is_not_read_back_to_back(clock: list[float]) -> None:
    cache, source = ReportCache(), Source()

    async def dear() -> int:
        clock[0] += 2.0
        return await source.read()

    assert await cache.get(_ACME, "r", 1, dear) == 1
    clock[0] += 17.9
    assert await cache.get(_ACME, "r", 1, dear) == 1
    clock[0] += 0.2
    assert await cache.get(_ACME, "r", 1, dear) == 2


async def test_a_failed_reading_is_not_kept() -> None:
    cache, source = ReportCache(), Source()
    source.error = RuntimeError("no")
    with pytest.raises(RuntimeError, match="no"):
        await cache.get(_ACME, "r", 60, source.read)
    source.error = None
    assert await cache.get(_ACME, "r", 60, source.read) == 2


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_cache, "_REPORTS", 2)
    monkeypatch.setattr(report_cache, "_ORGANIZATIONS", 1)
    cache, source = ReportCache(), Source()
    for number in range(3):
        await cache.get(_ACME, number, 60, source.read)
    assert await cache.get(_ACME, 2, 60, source.read) == 3
    assert await cache.get(_ACME, 0, 60, source.read) == 4
    await cache.get(_RIVAL, 0, 60, source.read)
    assert await cache.get(_ACME, 0, 60, source.read) == 6


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (9, 10, 0.5958, 0.9821), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_the_interval_is_the_published_one(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**9).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_the_ends_of_the_interval_are_where_the_score_test_stands(case: tuple[int, int]) -> None:
    successes, trials = case
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= rate + 1e-9
    assert rate - 1e-9 <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            score = abs(rate - end) / math.sqrt(end * (1 - end) / trials)
            assert score == pytest.approx(1.959963984540054, rel=1e-3) or abs(rate - end) < 1e-9
