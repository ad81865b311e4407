"""A real fleet on two replicas, under faults; then the proof that no limit was passed and nothing was lost.

Runs for `MUSTER_FAULT_SECONDS` (60 by default; `make fault-allocator` for five minutes). `MUSTER_FAULT_SEED` repeats
what was done to whom; what comes of it depends on the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import exit_pb2, target_pb2

from tests.fault.allocator import history, tables
from tests.fault.allocator.caller import Call, Caller
from tests.fault.allocator.checker import Facts, check, judged
from tests.fault.allocator.evidence import Evidence, ExitFacts
from tests.fault.allocator.faults import Faults
from tests.fault.allocator.fleet import Fleet
from tests.fault.allocator.operators import FleetOperator

SECONDS = float(os.environ.get("MUSTER_FAULT_SECONDS", "60"))
SEED = int(os.environ.get("MUSTER_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
LEASE_SECONDS = 2.0
WORKERS = 4
NARROW = 3
EXITS = (ExitFacts(1, 40), ExitFacts(1, 15), ExitFacts(2, 3), ExitFacts(2, 5), ExitFacts(3, 6, 2.0))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, lease_seconds=LEASE_SECONDS, workers=WORKERS, seed=SEED)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def test_a_fleet_under_faults_leaves_a_sound_history(fleet: Fleet) -> None:
    print(f"MUSTER_FAULT_SEED={SEED} MUSTER_FAULT_SECONDS={SECONDS:g}")
    chance = random.Random(SEED)
    keys = await fleet.keys()
    exits, slots = await asyncio.to_thread(_furnish, fleet, keys["operator"])
    end = time.time() + SECONDS
    fleet.begin(keys=keys, slots=slots, exits=[name for name, facts in exits.items() if facts.mode == 1], end=end)
    faults = Faults(fleet, chance)
    await faults.until(end - 1)
    await fleet.wait(90)
    stored = await _settled(fleet)
    evidence = Evidence.of(history.read(fleet.history))
    violations = check(evidence, stored, Facts(exits, {"narrow": NARROW}))
    print(_summary(faults, fleet, evidence, stored))
    assert not violations, "\n".join(f"{one.kind}: {one.text}" for one in violations[:20])
    _enough(faults, evidence)


def _furnish(fleet: Fleet, key: str) -> tuple[dict[str, ExitFacts], list[str]]:
    """Makes exits, targets and slots; returns the exits, and the slots that the operator may change."""
    journal = history.Journal(fleet.history, "furnisher")
    caller = Caller(fleet.addresses, key, journal, random.Random(SEED))
    try:
        specs = [
            exit_pb2.ExitSpec(
                endpoint=f"http://10.0.0.{number}:3128",
                cap_mode=exit_pb2.ExitCapMode.ValueType(facts.mode),
                cap=facts.cap,
                window_seconds=int(facts.window_seconds),
            )
            for number, facts in enumerate(EXITS, 1)
        ]
        imported = caller.call(
            Call(
                "import",
                "/muster.allocator.v1.ExitService/ImportExits",
                exit_pb2.ImportExitsRequest(exits=specs),
                exit_pb2.ImportExitsResponse,
                {},
                lambda _: {},
            )
        )
        for target, most in (("open", 0), ("narrow", NARROW)):
            policy = target_pb2.TargetPolicy(max_in_flight=most, min_delay=Duration(), auto_pause=False)
            caller.call(
                Call(
                    "policy",
                    "/muster.allocator.v1.TargetService/SetTargetPolicy",
                    target_pb2.SetTargetPolicyRequest(target=target, policy=policy),
                    target_pb2.SetTargetPolicyResponse,
                    {},
                    lambda _: {},
                )
            )
        operator = FleetOperator(caller, random.Random(SEED), [], [])
        for number in range(4):
            operator.create(f"steady {number}", target="open", quota=20 * (number + 1))
        changing = [
            operator.create(
                f"changing {number}",
                target=("open", "narrow")[number % 2],
                quota=40,
                steady=False,
                with_exit=number % 4 != 0,
            )
            for number in range(8)
        ]
        return {exit_.exit_id: facts for exit_, facts in zip(imported.exits, EXITS, strict=True)}, changing
    finally:
        caller.close()
        journal.close()


async def _settled(fleet: Fleet) -> Any:
    """Waits until every lease has ended, and reads the tables."""
    connection = await asyncpg.connect(fleet.dsn, server_settings={"search_path": "allocator"})
    try:
        async with asyncio.timeout(60):
            while await connection.fetchval("SELECT count(*) FROM leases"):
                await asyncio.sleep(0.2)
        return await tables.read(connection)
    finally:
        await connection.close()


def _summary(faults: Faults, fleet: Fleet, evidence: Evidence, stored: Any) -> str:
    by_kind: dict[str, Counter[str]] = {}
    for attempt in evidence.attempts:
        outcome = str(attempt.end)
        if attempt.end == "ok" and attempt.kind == "allocate":
            outcome = "units" if attempt.told["units"] else attempt.told["no_work"].lower()
        elif attempt.end == "ok" and any(attempt.told.get("errors", ())):
            outcome = attempt.told["errors"][0].lower()
        elif attempt.end == "ok" and attempt.kind == "submit":
            outcome = attempt.told["disposition"].lower()
        elif attempt.end == "fail":
            outcome = attempt.told["reason"].lower()
        by_kind.setdefault(attempt.kind, Counter())[outcome] += 1
    lines = [f"faults: {faults.done.total()}", *(f"  {kind}: {count}" for kind, count in sorted(faults.done.items()))]
    lines.append(f"starts that failed: {fleet.failed_starts}")
    lines.append(f"attempts: {len(evidence.attempts)}")
    for kind, outcomes in sorted(by_kind.items()):
        lines.append(f"  {kind}: {outcomes.total()} ({', '.join(f'{n} {name}' for name, n in outcomes.most_common())})")
    lines.append(
        f"units acknowledged: {len(evidence.units)} of {len(stored.allocations)} granted; results: "
        f"{len(stored.results)}, in quarantine: {len(stored.quarantined)}; steady slots: {len(evidence.steady)}; "
        f"no work judged: {len({attempt.name for attempt, *_ in judged(evidence)})}"
    )
    return "\n".join(lines)


def _enough(faults: Faults, evidence: Evidence) -> None:
    """A run in which little happened proves little."""
    assert faults.done.total() >= SECONDS / 8, faults.done
    if SECONDS >= 50:
        assert len(faults.done) == 7, faults.done
    done = Counter(attempt.kind for attempt in evidence.attempts if attempt.end == "ok")
    for kind, least in (("allocate", 1), ("submit", 1), ("release", 0.1), ("renew", 0.1), ("toggle", 0.05)):
        assert done[kind] >= SECONDS * least, (kind, done)
    told = Counter(attempt.told.get("disposition") for attempt in evidence.of_kind("submit"))
    assert told["RECORDED"] > SECONDS / 2, told
    assert told["RECORDED_LATE"] > 0, told
    assert any(judged(evidence)), "nobody was told that there was no work"
    assert sum(attempt.end == "unknown" for attempt in evidence.attempts) > 0
