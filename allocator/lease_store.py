"""Leases in the database.

Every method is one transaction and bound to one organization. Rows are locked in the order leases, work_allocations,
targets, daily_work_tracking, exits, each by key. Raises: DatabaseUnavailable, by every method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.leases import (
    EndedAllocation,
    Ending,
    HeldLease,
    LeaseName,
    Renewal,
    Status,
    exit_returns,
    work_dates,
)
from allocator.store import Store
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "leases.sql")

# A check-out whose answer did not come has taken effect by then, or never will.
_LATE_CHECK_IN_SECONDS = 30.0

Day = tuple[date, UUID]


@dataclass(slots=True)
class Counts:
    """How the counters of one slot's day move, in units."""

    succeeded: int = 0
    failed: int = 0
    blocked: int = 0
    expired: int = 0
    released: int = 0

    def add(self, status: int, units: int = 1) -> None:
        """Counts units that end with `status`."""
        name = Status(status).name.lower()
        setattr(self, name, getattr(self, name) + units)


class LeaseStore(Store):
    """Renews, finds and ends leases."""

    async def renew(
        self, organization_id: UUID, names: Sequence[LeaseName], duration_seconds: float
    ) -> dict[LeaseName, Renewal]:
        """Moves the expiry of those that live, with the right token, below their greatest age; returns the new ones.

        Args:
            organization_id: The tenant.
            names: Distinct.
            duration_seconds: From now, by the database's clock.
        """

        async def work(connection: Connection) -> dict[LeaseName, Renewal]:
            keys, tokens = [name.key for name in names], [name.token for name in names]
            rows = await connection.fetch(_SQL["renew_leases"], organization_id, keys, tokens, duration_seconds)
            return {
                LeaseName(row["allocation_key"], row["lease_token"]): Renewal(
                    row["expires_at"], row["client_id"], row["instance_number"]
                )
                for row in rows
            }

        return await self.atomically(work)

    async def find(
        self, organization_id: UUID, keys: Sequence[UUID]
    ) -> dict[UUID, tuple[HeldLease | None, EndedAllocation | None]]:
        """Returns where the allocations with these keys stand; unknown ones are missing."""

        async def work(
            connection: Connection,
        ) -> dict[UUID, tuple[HeldLease | None, EndedAllocation | None]]:
            return _either(
                await lock_leases(connection, organization_id, keys),
                await find_ended(connection, organization_id, keys),
            )

        return await self.atomically(work)

    async def release(
        self, organization_id: UUID, names: Sequence[LeaseName]
    ) -> tuple[set[LeaseName], dict[UUID, tuple[HeldLease | None, EndedAllocation | None]]]:
        """Releases those that live, with the right token; returns them, and where the others stand."""

        async def work(
            connection: Connection,
        ) -> tuple[set[LeaseName], dict[UUID, tuple[HeldLease | None, EndedAllocation | None]]]:
            held = await lock_leases(connection, organization_id, [name.key for name in names])
            released = {
                name
                for name in names
                if (lease := held.get(name.key)) and lease.lease_token == name.token and lease.is_live
            }
            ended = await find_ended(connection, organization_id, [name.key for name in names if name.key not in held])
            await give_back(connection, organization_id, [held[name.key] for name in released], Status.RELEASED)
            return released, _either(held, ended)

        return await self.atomically(work)

    async def expire_silent(
        self, organization_id: UUID, client_id: str, instance_number: int, silent_seconds: float
    ) -> int:
        """Ends every live lease of an instance if it was silent for longer by now; returns how many."""

        async def work(connection: Connection) -> int:
            ended = await end_instance(
                connection, organization_id, client_id, instance_number, Status.EXPIRED, silent_seconds
            )
            return len(ended)

        return await self.atomically(work)

    async def withdraw(
        self,
        organization_id: UUID,
        request_id: UUID,
        keys: Sequence[UUID],
        *,
        exits: Collection[UUID] = (),
        personas: Collection[UUID] = (),
    ) -> set[UUID]:
        """Takes back leases that nobody was told of, as if they had never been granted; returns those that stand.

        A unit is told of once it is complete. So one that is complete by now stands: a repeat of the request has
        completed it meanwhile. The others leave no row in work_allocations: while no persona is idle, every call of a
        waiting fleet would add some.

        Args:
            organization_id: The tenant.
            request_id: Of their request, which is forgotten if none of its leases is left.
            keys: The leases.
            exits: Those of them for which a provider may hold an exit that is not noted on the lease.
            personas: Those of them under which a persona may be checked out, now or in a moment.
        """

        async def work(connection: Connection) -> set[UUID]:
            held = await lock_leases(connection, organization_id, keys)
            standing = {key for key, lease in held.items() if _is_complete(lease)}
            if gone := [lease for key, lease in held.items() if key not in standing]:
                await _withdraw(connection, organization_id, gone, exits, personas)
            await connection.execute(_SQL["forget_request"], organization_id, request_id)
            return standing

        return await self.atomically(work)

    async def organizations_to_sweep(self) -> list[UUID]:
        """Returns the organizations whose leases the sweep must look at."""
        return [row["organization_id"] for row in await self.database.fetch(_SQL["organizations_to_sweep"])]

    async def expire(self, organization_id: UUID, at_most: int) -> int:
        """Ends up to `at_most` leases that ran out; returns how many. Leases in use by others are passed over."""

        async def work(connection: Connection) -> int:
            await connection.execute(_SQL["postpone_sweep"], organization_id, at_most)
            rows = await connection.fetch(_SQL["lock_expired"], organization_id, at_most)
            await give_back(connection, organization_id, [HeldLease(**row) for row in rows], Status.EXPIRED)
            return len(rows)

        return await self.atomically(work)


async def end_instance(
    connection: Connection,
    organization_id: UUID,
    client_id: str,
    instance_number: int,
    status: Status,
    silent_seconds: float | None = None,
) -> list[UUID]:
    """Ends every live lease of an instance without a result, within the transaction in hand; returns their keys.

    Args:
        connection: A connection in a transaction.
        organization_id: The tenant.
        client_id: The client.
        instance_number: Its instance.
        status: RELEASED when the instance itself gives them back, EXPIRED when others end them.
        silent_seconds: Only if it was silent for longer; None: whether or not.
    """
    rows = await connection.fetch(
        _SQL["leases_of_instance"], organization_id, client_id, instance_number, silent_seconds
    )
    held = await lock_leases(connection, organization_id, [row["allocation_key"] for row in rows])
    live = [lease for lease in held.values() if lease.is_live]
    await give_back(connection, organization_id, live, status)
    return [lease.allocation_key for lease in live]


async def lock_leases(connection: Connection, organization_id: UUID, keys: Sequence[UUID]) -> dict[UUID, HeldLease]:
    """Locks live leases in key order."""
    if not keys:
        return {}
    rows = await connection.fetch(_SQL["lock_leases"], organization_id, keys)
    return {row["allocation_key"]: HeldLease(**row) for row in rows}


async def lock_ended(
    connection: Connection, organization_id: UUID, keys: Sequence[UUID]
) -> dict[UUID, EndedAllocation]:
    """Locks ended allocations in key order."""
    return await _ended(connection, organization_id, keys, "lock_ended")


async def end_leases(connection: Connection, organization_id: UUID, endings: Sequence[Ending]) -> datetime:
    """Ends locked leases, with the check-ins of their personas; returns when. Moves no counters."""
    ended_at: datetime = await connection.fetchval(
        _SQL["end_leases"],
        organization_id,
        [ending.lease.allocation_key for ending in endings],
        [int(ending.status) for ending in endings],
        [ending.late for ending in endings],
        [int(ending.use) for ending in endings],
    )
    return ended_at


async def lock_tracking(connection: Connection, organization_id: UUID, days: Iterable[Day]) -> dict[Day, int]:
    """Locks the days of slots in order and returns the room of each; an archived day is missing."""
    wanted = sorted(set(days))
    rows = await connection.fetch(
        _SQL["lock_tracking"], organization_id, [day for day, _ in wanted], [slot for _, slot in wanted]
    )
    return {(row["work_date"], row["slot_id"]): row["room"] for row in rows}


async def count_ends(connection: Connection, organization_id: UUID, moves: dict[Day, Counts]) -> None:
    """Moves counters, days locked in order."""
    days = sorted(moves)
    columns: list[list[Any]] = [[day for day, _ in days], [slot for _, slot in days]]
    columns += [[getattr(moves[day], name) for day in days] for name in Counts.__slots__]
    await connection.execute(_SQL["count_ends"], organization_id, *columns)


async def give_back(connection: Connection, organization_id: UUID, leases: Sequence[HeldLease], status: Status) -> None:
    """Ends locked leases without a result: the quota and the exit's use return, the persona was not used."""
    if not leases:
        return
    moves: dict[Day, Counts] = {}
    for lease in leases:
        moves.setdefault((lease.work_date, lease.slot_id), Counts()).add(status)
    await count_ends(connection, organization_id, moves)
    await return_uses(connection, organization_id, leases)
    await end_leases(connection, organization_id, [Ending(lease, status) for lease in leases])


def _is_complete(lease: HeldLease) -> bool:
    """Whether a lease has the external exit and the persona that its unit needs."""
    has_exit = not lease.exit_provider or bool(lease.exit_ip)
    return has_exit and (not lease.needs_persona or lease.persona_id is not None)


async def _withdraw(
    connection: Connection,
    organization_id: UUID,
    leases: Sequence[HeldLease],
    exits: Collection[UUID],
    personas: Collection[UUID],
) -> None:
    """Takes back locked leases: targets, days and exits are as if they had never been granted."""
    # Units of one request went out at the same moment.
    targets = {lease.target or f"slot:{lease.slot_id}": lease.granted_at for lease in leases}
    await connection.execute(_SQL["withdraw_delays"], organization_id, list(targets), list(targets.values()))
    units = Counter((lease.work_date, lease.slot_id) for lease in leases)
    days = sorted(units)
    await connection.execute(
        _SQL["withdraw_units"],
        organization_id,
        [day for day, _ in days],
        [slot for _, slot in days],
        [units[day] for day in days],
    )
    await return_uses(connection, organization_id, leases)
    await connection.execute(
        _SQL["withdraw_leases"],
        organization_id,
        [lease.allocation_key for lease in leases],
        list(exits),
        list(personas),
        _LATE_CHECK_IN_SECONDS,
    )


async def return_uses(connection: Connection, organization_id: UUID, leases: Sequence[HeldLease]) -> None:
    """Gives the exits' uses of leases back, unless the exit began a new epoch since they were taken.

    Leases that expire, are released or withdrawn give their use back in every cap mode; leases that end with a result
    only those with `exit_returns`. Locks exits by id: call it after the days were counted.
    """
    if uses := exit_returns(leases):
        taken = sorted(uses)
        await connection.execute(
            _SQL["return_exit_uses"],
            organization_id,
            [exit_id for exit_id, _ in taken],
            [epoch for _, epoch in taken],
            [uses[use] for use in taken],
        )


async def find_ended(
    connection: Connection, organization_id: UUID, keys: Sequence[UUID]
) -> dict[UUID, EndedAllocation]:
    """Returns ended allocations."""
    return await _ended(connection, organization_id, keys, "find_ended")


async def _ended(
    connection: Connection, organization_id: UUID, keys: Sequence[UUID], statement: str
) -> dict[UUID, EndedAllocation]:
    days = work_dates(keys)
    if not days:
        return {}
    rows = await connection.fetch(_SQL[statement], organization_id, keys, days)
    return {row["allocation_key"]: EndedAllocation(**row) for row in rows}


def _either(
    held: dict[UUID, HeldLease], ended: dict[UUID, EndedAllocation]
) -> dict[UUID, tuple[HeldLease | None, EndedAllocation | None]]:
    return {key: (held.get(key), ended.get(key)) for key in held.keys() | ended.keys()}
