"""Targets in the database. Every method is bound to one organization. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.errors import TargetNotFound
from allocator.store import Store
from allocator.targets import MOST_RESULTS, BackOff, News, TargetPolicy, TargetState, Turn
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "targets.sql")

# In one round of the upkeep, of which there is one a minute.
_FORGOTTEN = 1000
_TURNS = (
    ("begins", "paused"),
    ("is_bad", "probe_refused"),
    ("is_void", "probe_void"),
    ("is_good", "resumed"),
    ("is_held", "held"),
)


class TargetStore(Store):
    """Keeps what operators say of targets."""

    async def set_policy(self, organization_id: UUID, target: str, policy: TargetPolicy) -> TargetState:
        """Sets a policy, registering the target if need be; returns it. A delay in force becomes no longer by it."""

        async def work(connection: Connection) -> TargetState:
            await connection.execute(
                _SQL["set_target_policy"],
                organization_id,
                target,
                policy.max_in_flight,
                policy.min_delay_ms,
                policy.auto_pause,
            )
            return await _state(connection, organization_id, target)

        return await self.atomically(work)

    async def hold(self, organization_id: UUID, target: str, seconds: float, reason: str) -> TargetState:
        """Holds a target until `seconds` from now, registering it if need be; returns it."""

        async def work(connection: Connection) -> TargetState:
            await connection.execute(_SQL["hold_target"], organization_id, target, seconds, reason)
            return await _state(connection, organization_id, target)

        return await self.atomically(work)

    async def resume(self, organization_id: UUID, target: str) -> TargetState:
        """Ends hold, pause and delay and returns the target. Raises: TargetNotFound."""

        async def work(connection: Connection) -> TargetState:
            if await connection.fetchrow(_SQL["resume_target"], organization_id, target) is None:
                raise TargetNotFound(target)
            return await _state(connection, organization_id, target)

        return await self.atomically(work)

    async def page(
        self, organization_id: UUID, after: str | None, size: int, *, only: str | None, only_stopped: bool
    ) -> list[TargetState]:
        """Returns targets by name, or `only` one if it is known."""
        rows = await self.database.fetch(_SQL["page_of_targets"], organization_id, after, only_stopped, size, only)
        return [TargetState(**row) for row in rows]

    async def stopped(self) -> tuple[int, int]:
        """Returns how many targets are paused and how many held, over all organizations."""
        row = await self.database.fetchrow(_SQL["stopped_targets"])
        assert row is not None
        return row["paused"], row["held"]

    async def forget(self) -> None:
        """Forgets targets of all organizations that nothing was said of for a day; a bounded number at a time."""
        await self.database.execute(_SQL["forget_targets"], _FORGOTTEN)


async def react(
    connection: Connection, organization_id: UUID, news: Mapping[str, News], back_off: BackOff
) -> list[Turn]:
    """Moves targets by what a batch of results says of them; returns those that stopped or go on.

    The block rate is that of the results on record and those at hand. Of two batches that two replicas record at this
    moment neither sees the other; the next blocked result counts both. Locks rows of targets, by name: call it before
    the days are counted. Touches nothing when nothing changes.

    Args:
        connection: In the transaction that records the results, before they are.
        organization_id: The tenant.
        news: By target.
        back_off: When a target is left alone.
    """
    concerned = sorted(target for target, heard in news.items() if heard.matter())
    if not concerned:
        return []
    heard = [news[target] for target in concerned]
    rows = await connection.fetch(
        _SQL["standing_of_targets"],
        organization_id,
        concerned,
        [entry.slot_id for entry in heard],
        [entry.blocked > 0 for entry in heard],
        [max(0, MOST_RESULTS - entry.results) for entry in heard],
        back_off.window_seconds,
    )
    moves = []
    for row in rows:
        target, entry = row["target"], news[row["target"]]
        blocked, results = entry.blocked + row["blocked"], entry.results + row["results"]
        reason = back_off.reason(blocked, results) if row["counts"] and back_off.is_due(blocked, results) else None
        crawl_delay_ms = None if entry.crawl_delay_ms == row["crawl_delay_ms"] else entry.crawl_delay_ms
        if (reason, crawl_delay_ms, entry.retry_after_ms, entry.probe_key) != (None, None, None, None):
            moves.append((target, entry, crawl_delay_ms, reason, row["counted_from"]))
    if not moves:
        return []
    targets = [target for target, *_ in moves]
    await connection.execute(_SQL["lock_targets"], organization_id, targets)
    moved = await connection.fetch(
        _SQL["move_targets"],
        organization_id,
        targets,
        [entry.retry_after_ms for _, entry, *_ in moves],
        [crawl_delay_ms for _, _, crawl_delay_ms, *_ in moves],
        [reason for *_, reason, _ in moves],
        [counted_from for *_, counted_from in moves],
        [entry.probe_key for _, entry, *_ in moves],
        [entry.probe_went_well for _, entry, *_ in moves],
        back_off.base_seconds,
        back_off.limit_seconds,
    )
    return [Turn(row["target"], what, row["reason"]) for row in moved for column, what in _TURNS if row[column]]


async def _state(connection: Connection, organization_id: UUID, target: str) -> TargetState:
    row = await connection.fetchrow(_SQL["page_of_targets"], organization_id, None, False, 1, target)
    assert row is not None
    return TargetState(**row)
