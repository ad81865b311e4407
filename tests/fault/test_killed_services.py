"""A fleet works while services and the database are killed; afterwards its history is checked against what is stored.

Runs for `MUSTER_FAULT_SECONDS` (20 by default; `make fault` for five minutes). Every acknowledgement a client got is in
the history; the checker knows nothing else. Nothing is injected: processes get SIGKILL.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

import asyncpg
import muster
import pytest

from services.config import read_secret
from services.launcher.suite import Ports, Suite

SECONDS = float(os.environ.get("MUSTER_FAULT_SECONDS", "20"))
SEED = int(os.environ.get("MUSTER_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
CLIENTS = 6
SLOTS, QUOTA = 12, 40
LEASE_SECONDS = 3
VICTIMS = ("allocator", "persona_store", "session_tracker", "postgres")
# Long enough for a service to come back twice; a call that is not answered by then is a failure of the suite.
PATIENCE = muster.RetryPolicy(call_seconds=5, total_seconds=60)


@dataclass(slots=True)
class History:
    """What the clients were told."""

    leased: dict[str, str] = field(default_factory=dict)
    tokens: Counter[bytes] = field(default_factory=Counter)
    submitted: dict[str, set[str]] = field(default_factory=dict)
    outcomes: dict[str, muster.WorkOutcome] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    saved: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    operations: int = 0


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    environ = {
        "MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": str(LEASE_SECONDS),
        "MUSTER_ALLOCATOR__LEASES__SWEEP_SECONDS": "0.2",
        "MUSTER_SESSION_TRACKER__RENEWAL__INTERVAL_SECONDS": "1",
    }
    suite = Suite(tmp_path / "suite", Ports(0, 0), environ=environ, on_event=lambda _: None)
    await suite.start()
    yield suite
    await suite.stop()


async def test_nothing_acknowledged_is_lost_or_counted_twice(suite: Suite) -> None:
    print(f"MUSTER_FAULT_SEED={SEED} MUSTER_FAULT_SECONDS={SECONDS:g}")
    chance = random.Random(SEED)
    history = History()
    async with _client(suite) as client:
        await _furnish(client)
        end = asyncio.get_running_loop().time() + SECONDS
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(_work(suite, history, number, random.Random(chance.random()), end))
            group.create_task(_kill(suite, history, chance, end))
        await _settled(client)
        await _check(suite, client, history)
    print(f"{history.operations} operations, {sum(history.kills.values())} kills: {dict(history.kills)}")
    print(f"{len(history.leased)} leases, {len(history.submitted)} results, refused: {dict(history.refused)}")
    assert history.kills.total() >= 3
    assert len(history.submitted) > 10


def _client(suite: Suite) -> muster.Client:
    endpoints = {name: endpoint.grpc for name, endpoint in suite.endpoints.items()}
    return muster.Client(
        api_key=read_secret(suite.operator_key_file),
        allocator=endpoints["allocator"],
        persona_store=endpoints["persona_store"],
        session_tracker=endpoints["session_tracker"],
        archiver=endpoints["archiver"],
        policy=PATIENCE,
    )


async def _furnish(client: muster.Client) -> None:
    for number in range(SLOTS):
        await client.slots.create(
            muster.SlotSpec(
                keyword=f"keyword {number}",
                start_date=date(2020, 1, 1),
                end_date=date(2099, 12, 31),
                daily_quota=QUOTA,
                persona=muster.PersonaNeed() if number % 2 else None,
            )
        )
    await client.exits.add([muster.ExitSpec(endpoint=f"http://10.0.0.{n}:3128", cap=100) for n in range(1, 9)])
    for number in range(20):
        await client.personas.create(b'{"number": %d}' % number)


async def _work(suite: Suite, history: History, number: int, chance: random.Random, end: float) -> None:
    """One client: takes work, and submits it, twice, late, never, or gives it back."""
    me = muster.ClientIdentity(client_id=f"client-{number}", instance_number=number)
    clock = asyncio.get_running_loop().time
    async with _client(suite) as client:
        while clock() < end:
            got = await client.work.allocate(me, max_items=chance.randint(1, 4))
            history.operations += 1
            if not got.allocations:
                await asyncio.sleep(0.1)
            for allocation in got.allocations:
                assert allocation.allocation_key not in history.leased, "a key was handed out twice"
                history.leased[allocation.allocation_key] = allocation.slot_id
                history.tokens[allocation.lease.lease_token] += 1
                await _one(client, history, me, allocation, chance)


async def _one(
    client: muster.Client,
    history: History,
    me: muster.ClientIdentity,
    allocation: muster.Allocation,
    chance: random.Random,
) -> None:
    key, fate = allocation.allocation_key, chance.random()
    history.operations += 1
    if fate < 0.1:
        return
    if fate < 0.2:
        [released] = await client.work.release([allocation.lease])
        if released.error is None:
            history.released.add(key)
        else:
            history.refused[released.error.reason] += 1
        return
    if fate < 0.3:
        await client.work.renew([allocation.lease])
    if fate > 0.9:
        await asyncio.sleep(LEASE_SECONDS * 1.2)
    if allocation.persona is not None:
        await _save(client, history, allocation)
    outcome = chance.choice(list(muster.WorkOutcome)[1:])
    result = muster.WorkResult(
        lease=allocation.lease,
        outcome=outcome,
        execution_time=timedelta(seconds=1),
        block_type="captcha" if outcome is muster.WorkOutcome.BLOCKED else "",
        persona_used=allocation.persona is not None,
    )
    for _ in range(chance.randint(1, 2)):
        [answer] = await client.work.submit(me, [result])
        history.operations += 1
        if answer.error is not None:
            history.refused[answer.error.reason] += 1
            return
        history.submitted.setdefault(key, set()).add(f"{answer.disposition.name} {answer.recorded_at}")
        history.outcomes[key] = outcome
    session = await client.sessions.complete(
        muster.SessionEnd(key, muster.SessionState.COMPLETED, started_at=answer.recorded_at)
    )
    history.completed.add(session.session_id)


async def _save(client: muster.Client, history: History, allocation: muster.Allocation) -> None:
    assert allocation.persona is not None
    state = b'{"key": "%s"}' % allocation.allocation_key.encode()
    persona = allocation.persona
    try:
        made = await client.bundles.save(persona.persona_id, persona.lease_token, {"state.json": state})
    except muster.CheckOutLost:
        history.refused["CHECK_OUT_LOST"] += 1
        return
    before = history.saved.get(persona.persona_id, (0, b""))
    assert made.generation != before[0], "two saves got the same generation"
    if made.generation > before[0]:
        history.saved[persona.persona_id] = (made.generation, state)


async def _kill(suite: Suite, history: History, chance: random.Random, end: float) -> None:
    """Kills one of the processes every few seconds, and waits for none of them; they are down a third of the time."""
    clock = asyncio.get_running_loop().time
    while clock() < end - 2:
        await asyncio.sleep(chance.uniform(2.0, 4.0))
        victim = chance.choice(VICTIMS)
        suite.kill(victim)
        history.kills[victim] += 1


async def _settled(client: muster.Client) -> None:
    async with asyncio.timeout(60):
        while (totals := await client.insight.totals()).leased or totals.check_ins_pending:
            await asyncio.sleep(0.2)


async def _check(suite: Suite, client: muster.Client, history: History) -> None:
    connection = await asyncpg.connect(suite.dsn(), server_settings={"search_path": "allocator"})
    try:
        rows = {str(row["allocation_key"]): row for row in await connection.fetch("SELECT * FROM work_allocations")}
        results = Counter(
            str(row["allocation_key"]) for row in await connection.fetch("SELECT allocation_key FROM work_results")
        )
        kept = {
            str(row["allocation_key"])
            for row in await connection.fetch("SELECT allocation_key FROM quarantined_results")
        }
        days = await connection.fetch("SELECT * FROM daily_work_tracking")
        sessions = {
            row["session_id"]
            for row in await connection.fetch("SELECT session_id FROM session_tracker.crawling_results")
        }
    finally:
        await connection.close()

    # One lease, one key, one token; none that a client holds is unknown.
    assert set(history.leased) <= set(rows)
    assert max(history.tokens.values()) == 1
    # Twice the same result is one count and the same acknowledgement.
    assert {key: told for key, told in history.submitted.items() if len(told) != 1} == {}
    assert max(results.values()) == 1
    for key, told in history.submitted.items():
        disposition = next(iter(told)).split()[0]
        if disposition == "QUARANTINED":
            assert key in kept
            continue
        assert results[key] == 1
        assert rows[key]["status"] == int(history.outcomes[key]) + 1
        assert rows[key]["late"] == (disposition == "RECORDED_LATE")
    assert all(rows[key]["status"] == 6 for key in history.released)
    # Quotas, at the end and by the sum of what was ever counted; counters equal the rows they count.
    for day in days:
        assert day["allocated"] - day["expired"] - day["released"] <= day["quota"]
    counts: dict[tuple[str, date], Counter[int]] = {}
    for row in rows.values():
        counts.setdefault((str(row["slot_id"]), row["work_date"]), Counter())[row["status"]] += 1
    for day in days:
        counted = counts.get((str(day["slot_id"]), day["work_date"]), Counter())
        told_by_tracking = [day[name] for name in ("succeeded", "failed", "blocked", "expired", "released")]
        assert told_by_tracking == [counted[status] for status in (2, 3, 4, 5, 6)]
        assert day["allocated"] == counted.total()
    assert history.completed <= sessions
    # What was acknowledged as saved is what is loaded, unless a later save stands, whose answer a client never got.
    for persona_id, (generation, state) in history.saved.items():
        bundle = await client.bundles.load(persona_id)
        assert bundle.generation >= generation
        if bundle.generation == generation:
            assert bundle.parts["state.json"] == state
    async for persona in client.personas.list():
        assert not persona.held_by
