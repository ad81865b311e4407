"""Leases on personas in the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from persona_store import metrics
from persona_store.check_outs import (
    Attempt,
    CheckOut,
    Criteria,
    Lease,
    Mode,
    Order,
    UseOutcome,
    is_same,
    other_check_out,
    proposed,
    refusal,
)
from persona_store.errors import NoPersonaMatches
from persona_store.personas import PersonaStatus
from persona_store.store import persona_of, repeated
from services.errors import DomainError
from services.postgres import Database, queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("persona_store", "check_outs.sql")
_PERSONAS = queries("persona_store", "personas.sql")

# Up to here a pick takes the first of each pool; above, it walks the organization's queue and skips strangers. A look
# into a pool costs about 5 µs.
_MERGED_POOLS = 500

Key = tuple[UUID, str]
# None: somebody else was faster, or the persona changed; ask again.
Answer = CheckOut | DomainError | None


class CheckOutStore:
    """Leases. Every method is one transaction; the database is the clock.

    All raise DatabaseUnavailable when the database does not answer.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, orders: Sequence[Order]) -> list[Answer]:
        """Takes check-outs for as many orders as can be had; each order is answered for itself.

        Args:
            orders: Of any organizations; no holder twice.

        Returns:
            One answer for each, in order. Personas are picked in turn, and a refusal is true of the moment.
        """
        # A check-out that ran out must not hold its persona until the sweeper comes.
        while await self._database.fetchval(_SQL["any_expired"]):
            await self.sweep()

        async def work() -> list[Answer]:
            async with self._database.transaction() as connection:
                return await _Taking(connection, orders).run()

        return await repeated(work)

    async def sweep(self) -> int:
        """Ends up to 1000 check-outs that ran out, and returns how many."""

        async def work() -> int:
            ended: int = await self._database.fetchval(_SQL["sweep_check_outs"])
            metrics.CHECK_OUTS_EXPIRED.inc(ended)
            return ended

        return await repeated(work)

    async def renew(self, organization_id: UUID, items: Sequence[tuple[str, bytes, timedelta]]) -> dict[str, datetime]:
        """Moves expiries of live check-outs to now plus a duration.

        Args:
            organization_id: The tenant.
            items: Holder, token and duration; no holder twice.

        Returns:
            The new expiries by holder; one that is missing has lost its check-out.
        """
        holders, tokens, durations = ([item[i] for item in items] for i in range(3))
        rows = await self._database.fetch(_SQL["renew_check_outs"], organization_id, holders, tokens, durations)
        return {row["holder"]: row["expires_at"] for row in rows}

    async def end(self, organization_id: UUID, outcomes: Mapping[str, UseOutcome]) -> set[str]:
        """Ends live check-outs and moves the counters of their personas, together and so exactly once.

        Args:
            organization_id: The tenant.
            outcomes: How the use ended, by holder.

        Returns:
            The holders whose check-out this call ended.
        """

        async def work() -> set[str]:
            async with self._database.transaction() as connection:
                ended = await connection.fetch(_SQL["end_check_outs"], organization_id, list(outcomes))
                if ended:
                    await _count_uses(connection, organization_id, ended, outcomes)
                return {row["holder"] for row in ended}

        return await repeated(work)

    async def live(self) -> dict[Mode, int]:
        """Returns how many check-outs live, by mode."""
        rows = await self._database.fetch(_SQL["count_live"])
        found = {Mode(row["mode"]): row["live"] for row in rows}
        return {mode: found.get(mode, 0) for mode in Mode}


async def _count_uses(
    connection: Connection, organization_id: UUID, ended: Sequence[asyncpg.Record], outcomes: Mapping[str, UseOutcome]
) -> None:
    uses, successes, blocks = Counter[UUID](), Counter[UUID](), Counter[UUID]()
    unused, read = set(), set()
    for row in ended:
        persona_id, outcome, mode = row["persona_id"], outcomes[row["holder"]], Mode(row["mode"])
        if outcome is UseOutcome.NOT_USED:
            if mode is Mode.EXCLUSIVE:
                unused.add(persona_id)
            continue
        uses[persona_id] += 1
        successes[persona_id] += outcome is UseOutcome.SUCCEEDED
        blocks[persona_id] += outcome is UseOutcome.BLOCKED
        if mode is Mode.READ_ONLY:
            read.add(persona_id)
    moved = sorted(uses.keys() | unused)
    if moved:
        await connection.execute(
            _SQL["count_uses"],
            organization_id,
            moved,
            [uses[persona_id] for persona_id in moved],
            [successes[persona_id] for persona_id in moved],
            [blocks[persona_id] for persona_id in moved],
            [persona_id in unused for persona_id in moved],
            [persona_id in read for persona_id in moved],
        )


class _Taking:
    """One transaction that takes check-outs."""

    def __init__(self, connection: Connection, orders: Sequence[Order]) -> None:
        self._connection = connection
        self._orders = orders
        self._answers: dict[Key, DomainError] = {}
        self._leases: dict[Key, Lease] = {}
        self._attempts: list[Attempt] = []
        # Orders for which nothing was left, by organization: true only if every attempt beside them succeeds.
        self._empty: dict[UUID, list[tuple[list[int] | None, timedelta, Sequence[Order]]]] = {}

    async def run(self) -> list[Answer]:
        existing = await self._leases_of([_key(order) for order in self._orders])
        picks: dict[tuple[UUID, Mode, Criteria], list[Order]] = {}
        for order in self._orders:
            lease = existing.get(_key(order))
            if lease is not None:
                if is_same(order, lease):
                    self._leases[_key(order)] = lease
                else:
                    self._answers[_key(order)] = other_check_out(lease)
            elif isinstance(order.selection, UUID):
                self._attempts.append(proposed(order, order.selection))
            else:
                picks.setdefault((order.organization_id, order.mode, order.selection), []).append(order)
        for (organization_id, mode, criteria), orders in picks.items():
            await self._pick(organization_id, mode, criteria, orders)
        if self._attempts:
            await self._insert()
        for organization_id in self._empty:
            if all(_key(a.order) in self._leases for a in self._attempts if a.order.organization_id == organization_id):
                await self._refuse_empty(organization_id)
        personas = await self._connection.fetch(
            _PERSONAS["find_personas"],
            [lease.organization_id for lease in self._leases.values()],
            [lease.persona_id for lease in self._leases.values()],
        )
        found = {(row["organization_id"], row["persona_id"]): persona_of(row) for row in personas}
        answers: list[Answer] = []
        for order in self._orders:
            lease = self._leases.get(_key(order))
            if lease is None:
                answers.append(self._answers.get(_key(order)))
            else:
                answers.append(CheckOut(lease, found[lease.organization_id, lease.persona_id]))
        return answers

    async def _leases_of(self, keys: Sequence[Key]) -> dict[Key, Lease]:
        rows = await self._connection.fetch(_SQL["find_holders"], [key[0] for key in keys], [key[1] for key in keys])
        return {(row["organization_id"], row["holder"]): _lease(row) for row in rows}

    async def _pick(self, organization_id: UUID, mode: Mode, criteria: Criteria, orders: Sequence[Order]) -> None:
        # Readers share; holders do not, not even within this batch.
        taken: list[UUID] = []
        if mode is Mode.EXCLUSIVE:
            taken = [
                attempt.persona_id
                for attempt in self._attempts
                if attempt.order.organization_id == organization_id and attempt.order.mode is Mode.EXCLUSIVE
            ]
        pools = await self._pools(organization_id, criteria)
        found = await self._idle(organization_id, pools, criteria.cool_down, taken, len(orders))
        if mode is Mode.READ_ONLY and found:
            found = [found[index % len(found)] for index in range(len(orders))]
        self._attempts += [proposed(order, persona_id) for order, persona_id in zip(orders, found, strict=False)]
        if len(found) < len(orders):
            left = orders[len(found) :]
            self._empty.setdefault(organization_id, []).append((pools, criteria.cool_down, left))

    async def _refuse_empty(self, organization_id: UUID) -> None:
        # Counted now, so that what this batch took counts as held.
        for pools, cool_down, orders in self._empty[organization_id]:
            held, cooling = await self._others(organization_id, pools, cool_down)
            self._answers.update({_key(order): NoPersonaMatches(held, cooling) for order in orders})

    async def _pools(self, organization_id: UUID, criteria: Criteria) -> list[int] | None:
        if not (criteria.tags or criteria.region or criteria.min_aging_level):
            return None
        rows = await self._connection.fetch(
            _SQL["matching_pools"], organization_id, criteria.region, list(criteria.tags), criteria.min_aging_level
        )
        return [row["pool_id"] for row in rows]

    async def _idle(
        self, organization_id: UUID, pools: list[int] | None, cool_down: timedelta, taken: list[UUID], wanted: int
    ) -> list[UUID]:
        """Returns up to `wanted` idle personas, in turn."""
        if pools == []:
            return []
        few = pools is not None and len(pools) <= _MERGED_POOLS
        name = "pick_from_pools" if few else "pick_from_organization"
        rows = await self._connection.fetch(_SQL[name], organization_id, pools, cool_down, taken, wanted)
        found: list[UUID] = [row["persona_id"] for row in rows]
        if cool_down and len(found) < wanted:
            left_out = [*taken, *found]
            rows = await self._connection.fetch(
                _SQL["pick_returned"], organization_id, pools, cool_down, left_out, wanted - len(found)
            )
            found += [row["persona_id"] for row in rows]
        return found

    async def _others(self, organization_id: UUID, pools: list[int] | None, cool_down: timedelta) -> tuple[int, int]:
        if pools == []:
            return 0, 0
        held: int = await self._connection.fetchval(_SQL["count_held"], organization_id, pools)
        if not cool_down:
            return held, 0
        arguments: tuple[Any, ...] = (cool_down,) if pools is None else (pools, cool_down)
        name = "count_cooling" if pools is None else "count_cooling_of_pools"
        cooling: int = await self._connection.fetchval(_SQL[name], organization_id, *arguments)
        return held, cooling

    async def _insert(self) -> None:
        attempts = self._attempts
        rows = await self._connection.fetch(
            _SQL["insert_check_outs"],
            [attempt.order.organization_id for attempt in attempts],
            [attempt.order.holder for attempt in attempts],
            [attempt.persona_id for attempt in attempts],
            [attempt.order.mode for attempt in attempts],
            [attempt.lease_token for attempt in attempts],
            [attempt.order.duration for attempt in attempts],
        )
        taken = {(row["organization_id"], row["holder"]): _lease(row) for row in rows}
        withdrawn = await self._take_turns(taken)
        self._leases.update({key: lease for key, lease in taken.items() if key not in withdrawn})
        refused = [
            attempt
            for attempt in attempts
            if _key(attempt.order) not in taken and isinstance(attempt.order.selection, UUID)
        ]
        if refused:
            await self._explain(refused)

    async def _take_turns(self, taken: Mapping[Key, Lease]) -> set[Key]:
        """Moves exclusively taken personas to the end of the queue; takes back those that may not be used any more."""
        leases = [lease for lease in taken.values() if lease.mode is Mode.EXCLUSIVE]
        if not leases:
            return set()
        rows = await self._connection.fetch(
            _SQL["take_turns"], [lease.organization_id for lease in leases], [lease.persona_id for lease in leases]
        )
        statuses = {(row["organization_id"], row["persona_id"]): PersonaStatus(row["status"]) for row in rows}
        picked = {_key(a.order) for a in self._attempts if isinstance(a.order.selection, Criteria)}
        withdrawn = set()
        for lease in leases:
            key = (lease.organization_id, lease.holder)
            status = statuses[lease.organization_id, lease.persona_id]
            if status is PersonaStatus.DISCARDED or (key in picked and status is not PersonaStatus.ACTIVE):
                withdrawn.add(key)
        if withdrawn:
            await self._connection.execute(
                _SQL["withdraw_check_outs"], [key[0] for key in withdrawn], [key[1] for key in withdrawn]
            )
        return withdrawn

    async def _explain(self, refused: Sequence[Attempt]) -> None:
        organizations = [attempt.order.organization_id for attempt in refused]
        personas = [attempt.persona_id for attempt in refused]
        holders = await self._leases_of([_key(attempt.order) for attempt in refused])
        rows = await self._connection.fetch(_SQL["find_exclusive"], organizations, personas)
        held = {(row["organization_id"], row["persona_id"]): row["expires_at"] for row in rows}
        rows = await self._connection.fetch(_PERSONAS["find_personas"], organizations, personas)
        usable = {
            (row["organization_id"], row["persona_id"]) for row in rows if row["status"] != PersonaStatus.DISCARDED
        }
        for attempt in refused:
            key = (attempt.order.organization_id, attempt.persona_id)
            until = held.get(key) if attempt.order.mode is Mode.EXCLUSIVE else None
            error = refusal(attempt.order, holders.get(_key(attempt.order)), until, found=key in usable)
            if error is not None:
                self._answers[_key(attempt.order)] = error


def _key(order: Order) -> Key:
    return (order.organization_id, order.holder)


def _lease(row: asyncpg.Record) -> Lease:
    return Lease(
        row["organization_id"],
        row["holder"],
        row["persona_id"],
        Mode(row["mode"]),
        row["lease_token"],
        row["expires_at"],
    )
