"""The summary: what the workers say they did, against what the database, the object store and the archive hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import muster

from demo import journal
from demo.history import History
from demo.mishaps import Mishaps

_STATUS = {"succeeded": 2, "failed": 3, "blocked": 4}


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant: whether it held, and the figures it was judged by."""

    name: str
    held: bool
    figures: str


@dataclass(slots=True)
class Evidence:
    """What the workers wrote down, sorted by kind."""

    leased: dict[str, journal.Leased] = field(default_factory=dict)
    crawled: list[journal.Crawled] = field(default_factory=list)
    saved: list[journal.Saved] = field(default_factory=list)
    submitted: dict[str, journal.Submitted] = field(default_factory=dict)

    @classmethod
    def gather(cls, folder: Path) -> Evidence:
        """Reads all journals."""
        evidence = cls()
        for entry in journal.read(folder):
            match entry:
                case journal.Leased():
                    evidence.leased[entry.allocation_key] = entry
                case journal.Crawled():
                    evidence.crawled.append(entry)
                case journal.Saved():
                    evidence.saved.append(entry)
                case journal.Submitted():
                    evidence.submitted[entry.allocation_key] = entry
        return evidence


async def judge_work(dsn: str, evidence: Evidence, mishaps: Mishaps) -> list[Check]:
    """Compares the journals with the allocator's tables.

    Args:
        dsn: The suite's database, as a role that may read everything.
        evidence: The workers' journals.
        mishaps: What was done to them.
    """
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "allocator"})
    try:
        return await _judge_work(connection, evidence, mishaps)
    finally:
        await connection.close()


async def _judge_work(connection: Any, evidence: Evidence, mishaps: Mishaps) -> list[Check]:
    checks = []
    over = await connection.fetchval(
        "SELECT count(*) FROM daily_work_tracking WHERE allocated - expired - released > quota"
    )
    day = await connection.fetchrow(
        "SELECT sum(quota) AS quota, sum(allocated) AS allocated, sum(succeeded) AS succeeded, sum(failed) AS failed, "
        "sum(blocked) AS blocked, sum(expired) AS expired, sum(released) AS released FROM daily_work_tracking"
    )
    checks.append(
        Check("no slot passed its quota", over == 0, f"{day['allocated']} allocated of a quota of {day['quota']}")
    )
    rows = {
        str(row["allocation_key"]): row
        for row in await connection.fetch(
            "SELECT allocation_key, slot_id, status, late, quarantined, allocated_at FROM work_allocations "
            "WHERE allocated_at > now() - interval '1 hour'"
        )
    }
    leases = await connection.fetchval("SELECT count(*) FROM leases")
    ended = Counter(row["status"] for row in rows.values())
    counters = {2: "succeeded", 3: "failed", 4: "blocked", 5: "expired", 6: "released"}
    held = leases == 0 and all(day[name] == ended[status] for status, name in counters.items())
    checks.append(
        Check(
            "every allocation ended once, and the counters say so",
            held and day["allocated"] == len(rows),
            ", ".join(f"{ended[status]} {name}" for status, name in counters.items()),
        )
    )
    counted = {key: entry for key, entry in evidence.submitted.items() if entry.disposition.startswith("RECORDED")}
    results = Counter(
        str(row["allocation_key"]) for row in await connection.fetch("SELECT allocation_key FROM work_results")
    )
    twice = sum(1 for number in results.values() if number > 1)
    matching = all(
        key in rows
        and rows[key]["status"] == _STATUS[entry.outcome]
        and rows[key]["late"] == (entry.disposition == "RECORDED_LATE")
        for key, entry in counted.items()
    )
    checks.append(
        Check(
            "every acknowledged result is recorded exactly once",
            twice == 0 and matching and set(counted) <= set(results),
            f"{len(counted)} acknowledged, {len(results)} recorded, {twice} twice",
        )
    )
    quarantine = {
        str(row["allocation_key"]) for row in await connection.fetch("SELECT allocation_key FROM quarantined_results")
    }
    kept = {key for key, entry in evidence.submitted.items() if entry.disposition == "QUARANTINED"}
    checks.append(Check("results out of turn are in quarantine", kept == quarantine, f"{len(quarantine)} kept"))
    products = await connection.fetchval("SELECT count(*) FROM product_results")
    said = sum(entry.products for entry in counted.values())
    checks.append(Check("all products are there", products == said, f"{said} reported, {products} stored"))

    killed = rows.get(mishaps.killed_key)
    again = killed is not None and any(
        row["slot_id"] == killed["slot_id"] and row["allocated_at"] > killed["allocated_at"] for row in rows.values()
    )
    checks.append(
        Check(
            "the killed worker's unit ran out and was handed out again",
            killed is not None and killed["status"] == 5 and again,
            "expired, then leased anew" if again else "not seen again",
        )
    )
    late = evidence.submitted.get(mishaps.late_key)
    checks.append(
        Check(
            "the stopped worker's late result was kept",
            late is not None and late.disposition in ("RECORDED_LATE", "QUARANTINED"),
            late.disposition.lower() if late else "never acknowledged",
        )
    )
    before, after = mishaps.allocator_pids
    checks.append(
        Check("the allocator was killed and came back", 0 < before != after > 0, f"process {before}, then {after}")
    )
    toggles = await connection.fetchval("SELECT count(*) FROM exit_toggle_logs")
    caps = await connection.fetch("SELECT use_count, cap FROM exits")
    checks.append(
        Check(
            "no exit passed its cap",
            all(row["use_count"] <= row["cap"] for row in caps),
            f"uses {[row['use_count'] for row in caps]} under caps {[row['cap'] for row in caps]}, {toggles} toggles",
        )
    )
    waiting = await connection.fetchval("SELECT count(*) FROM outbox")
    checks.append(Check("every check-in was delivered", waiting == 0, f"{waiting} waiting"))
    return checks


async def judge_personas(client: muster.Client, evidence: Evidence, dsn: str) -> list[Check]:
    """Compares the journals with the personas and their bundles."""
    uses = Counter[str]()
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "allocator"})
    try:
        for row in await connection.fetch("SELECT persona_id FROM work_results WHERE persona_used"):
            uses[str(row["persona_id"])] += 1
    finally:
        await connection.close()
    personas = {persona.persona_id: persona async for persona in client.personas.list()}
    counted = {key: persona.total_uses for key, persona in personas.items() if persona.total_uses}
    held = [persona for persona in personas.values() if persona.held_by]
    checks = [
        Check(
            "each use of a persona counts once",
            counted == dict(uses) and not held,
            f"{sum(uses.values())} results, {sum(counted.values())} uses, {len(held)} still held",
        )
    ]
    newest: dict[str, journal.Saved] = {}
    for entry in evidence.saved:
        if entry.persona_id not in newest or newest[entry.persona_id].generation < entry.generation:
            newest[entry.persona_id] = entry
    whole = 0
    for persona_id, entry in newest.items():
        bundle = await client.bundles.load(persona_id)
        state = bundle.state
        whole += bundle.generation == entry.generation and state["allocation_key"] == entry.allocation_key
    checks.append(
        Check(
            "every persona's newest bundle is the last one saved",
            whole == len(newest) > 0,
            f"{len(evidence.saved)} generations saved, {whole} of {len(newest)} newest loaded",
        )
    )
    return [*checks, _judge_cookies(evidence)]


def _judge_cookies(evidence: Evidence) -> Check:
    saved_before: set[str] = set()
    saved_keys = {entry.allocation_key for entry in evidence.saved}
    returning = restored = 0
    # Journals are read worker by worker; keys are UUIDv7, so they sort by time.
    for entry in sorted(evidence.crawled, key=lambda crawled: crawled.allocation_key):
        if not entry.persona_id:
            continue
        if entry.persona_id in saved_before and entry.visits:
            returning += 1
            restored += entry.visits > 1
        if entry.allocation_key in saved_keys and entry.visits:
            saved_before.add(entry.persona_id)
    return Check(
        "a persona comes back with its cookies",
        restored == returning > 0,
        f"{restored} of {returning} known to the site",
    )


async def judge_sessions(client: muster.Client, dsn: str, evidence: Evidence) -> list[Check]:
    """Compares the journals with the session tracker."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "session_tracker"})
    try:
        rows = {row["session_id"] for row in await connection.fetch("SELECT session_id FROM crawling_results")}
    finally:
        await connection.close()
    missing = set(evidence.submitted) - rows
    totals = await client.sessions.totals()
    return [
        Check(
            "every finished session has its one row",
            not missing,
            f"{len(evidence.submitted)} finished, {len(rows)} rows, {totals.live} left live",
        )
    ]


def judge_traffic(evidence: Evidence, relayed: int, visits: Mapping[str, int]) -> list[Check]:
    """Compares the journals with what the proxies relayed and the site answered."""
    requests = sum(entry.requests for entry in evidence.crawled)
    searches = sum(1 for entry in evidence.crawled if entry.visits)
    return [
        Check("all traffic went through the exits", relayed >= requests > 0, f"{requests} requests, {relayed} relayed"),
        Check(
            "the site saw every search",
            sum(visits.values()) >= searches > 0,
            f"{searches} searches, {len(visits)} visitors",
        ),
    ]


def judge_archive(
    history: History, moved: int, dropped: int, hot_left: int, cold: dict[tuple[Any, int], int]
) -> list[Check]:
    """Compares the generated history with what the archive answers.

    Args:
        history: What was generated.
        moved: Rows that the run says it moved.
        dropped: Partitions that it says it dropped.
        hot_left: Rows of the history that are still in PostgreSQL.
        cold: Rows by day and status, as a query over the archive answers.
    """
    return [
        Check(
            "old partitions were verified, archived and dropped",
            moved == history.total and dropped == len(history.partitions) and hot_left == 0,
            f"{moved} rows of {history.total} in {dropped} partitions, {hot_left} left behind",
        ),
        Check(
            "the archive answers as the database did",
            cold == history.rows,
            f"{sum(cold.values())} rows in {len(cold)} groups of day and status",
        ),
    ]
