"""Crawls are followed while the session tracker and the database are killed: what they did is recorded, once and whole.

Runs for some 15 s. Nothing is injected: processes get SIGKILL, and only the client package stands between.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import muster
import pytest

from services.config import read_secret
from services.launcher.suite import Ports, Suite

SEED = int(os.environ.get("MUSTER_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
CRAWLS, ROUNDS = 20, 2
KILLS = ("session_tracker", "postgres", "session_tracker", "session_tracker")
PATIENCE = muster.RetryPolicy(call_seconds=2, total_seconds=60)

# Pages, products, errors and the state in which it ended.
Truth = tuple[int, int, int, muster.SessionState]


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    suite = Suite(tmp_path / "suite", Ports(0, 0), environ={}, on_event=lambda _: None)
    await suite.start()
    yield suite
    await suite.stop()


def client_of(suite: Suite) -> muster.Client:
    return muster.Client(
        api_key=read_secret(suite.operator_key_file),
        session_tracker=suite.endpoints["session_tracker"].grpc,
        policy=PATIENCE,
    )


async def crawl(client: muster.Client, name: str, chance: random.Random) -> Truth:
    pages = products = errors = 0
    async with client.session(name, total_pages=1000, tags=["fault"]) as session:
        for _ in range(chance.randint(150, 350)):
            assert await session.permit()
            found = chance.randint(0, 5)
            session.page(products=found)
            pages, products = pages + 1, products + found
            if chance.random() < 0.1:
                session.error(f"http_{chance.choice((429, 500, 503))}", "busy")
                errors += 1
            await asyncio.sleep(0.01)
        state = chance.choice((muster.SessionState.COMPLETED, muster.SessionState.FAILED))
        session.finish(state, "as it came")
    return pages, products, errors, state


async def test_what_crawls_did_is_recorded_once_and_whole(suite: Suite) -> None:
    print(f"MUSTER_FAULT_SEED={SEED}")
    chance = random.Random(SEED)
    truth: dict[str, Truth] = {}
    backward: list[str] = []
    kills = 0

    async def work(client: muster.Client, number: int) -> None:
        for turn in range(ROUNDS):
            name = f"crawl-{number}-{turn}"
            truth[name] = await crawl(client, name, random.Random(chance.random()))

    async def kill() -> None:
        nonlocal kills
        for victim in KILLS:
            await asyncio.sleep(chance.uniform(0.8, 1.8))
            suite.kill(victim)
            kills += 1

    async def watch(client: muster.Client) -> None:
        highest: dict[str, int] = {}
        async for view in client.watch_sessions(muster.SessionFilter(tag="fault"), interval=timedelta(seconds=0.05)):
            for name, one in view.items():
                if one.sequence < highest.get(name, 0):
                    backward.append(name)
                highest[name] = max(one.sequence, highest.get(name, 0))

    async with client_of(suite) as client, client_of(suite) as watching:
        watcher = asyncio.create_task(watch(watching))
        async with asyncio.timeout(120):
            async with asyncio.TaskGroup() as group:
                group.create_task(kill())
                for number in range(CRAWLS):
                    group.create_task(work(client, number))
            recorded: dict[str, Truth] = {}
            while len(recorded) < len(truth):
                await asyncio.sleep(0.2)
                rows = [one async for one in watching.sessions.results(page_size=1000)]
                recorded = {
                    one.session_id: (one.total_pages, one.products_found, one.errors_count, one.state) for one in rows
                }
                assert len(rows) == len(recorded)
            while (await watching.sessions.totals()).live:
                await asyncio.sleep(0.1)
        # A watch that failed would have ended.
        assert not watcher.done(), watcher.exception()
        watcher.cancel()
    assert recorded == truth
    assert not backward
    print(f"{len(truth)} crawls, {sum(pages for pages, *_ in truth.values())} pages, {kills} kills")
    assert kills == len(KILLS)
