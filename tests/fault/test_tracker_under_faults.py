"""Workers and watchers on two replicas, under faults; then the proof that no result was lost and nothing went back.

Runs for `MUSTER_FAULT_SECONDS` (60 by default; `make fault-tracker` for five minutes). `MUSTER_FAULT_SEED` repeats what
was done to whom; what comes of it depends on the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg
import pytest

from session_tracker.sessions import State
from tests.fault.tracker import history
from tests.fault.tracker.checker import Row, Violation, check, held, truth, unhealed
from tests.fault.tracker.faults import Faults
from tests.fault.tracker.fleet import WATCHERS, Fleet
from tests.fault.tracker.history import Event
from tests.support.redis import RedisServer

SECONDS = float(os.environ.get("MUSTER_FAULT_SECONDS", "60"))
SEED = int(os.environ.get("MUSTER_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
WORKERS = 3
# From the last fault on: for replicas to find each other and the store again.
_HEAL_SECONDS = 4.0
# From the workers' last words on.
_AGREE_SECONDS = 20.0
_POLL_SECONDS = 0.5


@pytest.fixture
async def fleet(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, redis_server, workers=WORKERS, seed=SEED)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def test_workers_and_watchers_under_faults(fleet: Fleet) -> None:
    print(f"MUSTER_FAULT_SEED={SEED} MUSTER_FAULT_SECONDS={SECONDS:g}")
    end = time.time() + SECONDS
    fleet.begin(await fleet.keys(), end, end + _HEAL_SECONDS)
    faults = Faults(fleet, random.Random(SEED))
    # The last fault may take some seconds.
    await faults.until(end - 6)
    await fleet.wait(SECONDS + 120)
    left = await _agreed(fleet)
    events = history.read(fleet.history)
    rows = await _rows(fleet)
    violations = [*check(events, rows), *left]
    print(_summary(faults, fleet, events, rows))
    assert not violations, "\n".join(f"{one.kind}: {one.text}" for one in violations[:20])
    _enough(faults, events)


async def _agreed(fleet: Fleet) -> list[Violation]:
    """Waits until both watchers hold what the workers say; returns what differs when they do not in time."""
    until = time.monotonic() + _AGREE_SECONDS
    while True:
        events = history.read(fleet.history)
        true = truth(events)
        assert true
        left = [one for name in WATCHERS for one in unhealed(true, held(events, name), name)]
        if not left or time.monotonic() > until:
            return left
        await asyncio.sleep(_POLL_SECONDS)


async def _rows(fleet: Fleet) -> list[Row]:
    connection = await asyncpg.connect(fleet.dsn, server_settings={"search_path": "session_tracker"})
    try:
        rows = await connection.fetch(
            "SELECT session_id, status, total_pages, products_found, errors_count, message FROM crawling_results"
        )
    finally:
        await connection.close()
    return [Row(session_id, (int(State[status.upper()]), *rest)) for session_id, status, *rest in rows]


def _summary(faults: Faults, fleet: Fleet, events: Sequence[Event], rows: Sequence[Row]) -> str:
    kinds = Counter(event.kind for event in events)
    verdicts = [event.of["verdicts"] for event in events if event.kind == "reported"]
    taken, stale, unknown = (sum(counts) for counts in zip(*verdicts, strict=True))
    done = ", ".join(f"{kind} {count}" for kind, count in sorted(faults.done.items()))
    return (
        f"faults: {done}; starts that failed: {fleet.failed_starts}\n"
        f"updates: {taken} taken, {stale} stale, {unknown} of sessions to start again; calls that failed: "
        f"{kinds['failed']}; results: {kinds['completed']} acknowledged, {len(rows)} on record; refused: "
        f"{kinds['refused']}; watchers: {kinds['saw']} answers, {kinds['broken']} broken streams"
    )


def _enough(faults: Faults, events: Sequence[Event]) -> None:
    """A run in which little happened proves little."""
    kinds = Counter(event.kind for event in events)
    assert sum(faults.done.values()) >= SECONDS / 8, faults.done
    if SECONDS >= 60:
        assert len(faults.done) == 7, faults.done
    assert kinds["completed"] >= SECONDS, kinds
    assert kinds["reported"] >= 3 * SECONDS, kinds
    assert kinds["saw"] >= SECONDS, kinds
