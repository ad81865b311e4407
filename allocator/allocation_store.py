"""Allocation in the database: what is available, the rows of a day, and the leases that come of proposals."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from allocator import reservation
from allocator.dealing import Basics
from allocator.exit_pool import AvailableExit
from allocator.packages import AssignedPersona, Demand, Package, Pick
from allocator.reservation import Names, RequestServed, Unit
from allocator.slot_windows import AvailableSlot, SlotClass
from allocator.store import Store
from services.errors import DomainError
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.partitions import Partitions
    from services.postgres import Connection, Database

_SQL = queries("allocator", "allocation.sql")
_LEASES = queries("allocator", "leases.sql")

# Slots whose rows of a day are made in one transaction: a tenth of a second's work.
_PIECE = 5000
_FIRST = UUID(int=0)
# How often a request of a batch may be served by another transaction at the very same time.
_TRIES = 5

Place = tuple[float, UUID]


class AllocationStore(Store):
    """Reads what is available and reserves it. Every method is bound to one organization."""

    def __init__(self, database: Database, partitions: Partitions) -> None:
        super().__init__(database, partitions)
        self._names = Names()

    async def basics(self, organization_id: UUID) -> tuple[Basics, list[SlotClass]]:
        """Returns what the index must know once a second, and the classes. Raises: DatabaseUnavailable."""
        async with self.database.connection() as connection:
            moment = await connection.fetchrow(_SQL["moment"], organization_id)
            classes = await connection.fetch(_SQL["classes"], organization_id)
            clients = await connection.fetch(_SQL["draining_clients"], organization_id)
            cooling = await connection.fetch(_SQL["cooling_exits"], organization_id)
            targets = await connection.fetch(_SQL["limited_targets"], organization_id)
        by_target: dict[str, set[UUID]] = {}
        for row in cooling:
            by_target.setdefault(row["target"], set()).add(row["exit_id"])
        basics = Basics(
            work_date=moment["work_date"] if moment else None,
            complete=moment is None or moment["complete"],
            draining=frozenset(row["client_id"] for row in clients),
            cooling={target: frozenset(exits) for target, exits in by_target.items()},
            rooms={row["target"]: row["room"] for row in targets},
        )
        return basics, [SlotClass(*row) for row in classes]

    async def windows(
        self, organization_id: UUID, work_date: date, places: Sequence[tuple[int, float, UUID]], size: int
    ) -> dict[int, tuple[list[AvailableSlot], Place]]:
        """Returns slots with units for now, by class, and where the next window begins. Raises: DatabaseUnavailable.

        Args:
            organization_id: The tenant.
            work_date: The day.
            places: Of each class where its window begins; behind the last slot it goes on with the first.
            size: The most slots of each. Fewer means that the class has no others.
        """
        async with self.database.transaction() as connection:
            await connection.execute(_SQL["plan_windows"])
            rows = await connection.fetch(
                _SQL["windows"],
                organization_id,
                work_date,
                [class_id for class_id, _, _ in places],
                [at for _, at, _ in places],
                [slot for _, _, slot in places],
                size,
            )
        found: dict[int, tuple[list[AvailableSlot], Place]] = {}
        for class_id, slot_id, open_at, quota, taken, units, place, weight in rows:
            slots, _ = found.get(class_id) or ([], (open_at, slot_id))
            slots.append(AvailableSlot(slot_id, quota * weight, taken, units, place))
            found[class_id] = slots, (open_at, slot_id)
        return found

    async def keywords(self, organization_id: UUID, slots: Sequence[UUID]) -> dict[UUID, str]:
        """Returns the keywords of slots. Raises: DatabaseUnavailable."""
        rows = await self.database.fetch(_SQL["keywords"], organization_id, slots)
        return {row["slot_id"]: row["keyword"] for row in rows}

    async def exits_with_room(self, organization_id: UUID) -> list[AvailableExit]:
        """Returns the exits with head-room. Raises: DatabaseUnavailable."""
        return [AvailableExit(*row) for row in await self.database.fetch(_SQL["exits_with_room"], organization_id)]

    async def track_day(self, organization_id: UUID, day: date | None = None) -> bool:
        """Makes the rows of a day for the next few thousand slots; returns whether all slots have theirs.

        One transaction, so that whoever needs the day is not held up by its whole length. Several replicas may do it at
        once: each makes another piece.

        Args:
            organization_id: The tenant.
            day: None for today.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """

        async def work(connection: Connection) -> bool:
            await connection.execute(_SQL["begin_day"], organization_id, day)
            row = await connection.fetchrow(_SQL["lock_day"], organization_id, day)
            if row is None or row["complete"]:
                return True
            # A statement after the lock: it sees every slot that was made or changed before it was granted.
            after = row["tracked_to"] or _FIRST
            slots = [
                slot["slot_id"] for slot in await connection.fetch(_SQL["next_slots"], organization_id, after, _PIECE)
            ]
            complete = len(slots) < _PIECE
            last = slots[-1] if slots else after
            await connection.execute(_SQL["track_slots"], organization_id, row["work_date"], slots, last, complete)
            return complete

        return await self.atomically(work)

    async def allocate(
        self,
        organization_id: UUID,
        work_date: date | None,
        demands: Sequence[Demand],
        picks: Sequence[Sequence[Pick]],
        *,
        duration_seconds: float,
        greatest_age_seconds: float,
    ) -> list[list[Package] | DomainError]:
        """Turns proposals into leases, as far as the database agrees; all of it in one transaction.

        Waits for rows that others hold, so what is refused is really taken. A demand whose request id was served
        before gets the leases of then that still live. One that gets nothing leaves no trace of its request id.

        Args:
            organization_id: The tenant.
            work_date: The day the proposals are of; None when there are none.
            demands: With distinct request ids.
            picks: What is proposed for each, one pick a unit.
            duration_seconds: How long a lease lasts.
            greatest_age_seconds: How old renewals may make it.

        Returns:
            For each demand its packages, maybe none, or RequestIdReused.

        Raises:
            DatabaseUnavailable: nothing was handed out, or the answer of the commit was lost.
        """
        units = [
            Unit(number, pick, pick.slot_class.target or f"slot:{pick.slot_id}")
            for number, proposal in enumerate(picks)
            for pick in proposal
        ]
        names = sorted({unit.target for unit in units})

        async def work(connection: Connection) -> list[list[Package] | DomainError]:
            begun = await reservation.begin(connection, organization_id, demands, names)
            if work_date is None:
                return [begun.answers.get(number, []) for number in range(len(demands))]
            fresh = [unit for unit in units if unit.number not in begun.answers] if begun.answers else units
            granted = await reservation.reserve(connection, organization_id, work_date, fresh, begun.targets)
            packages = await reservation.grant(
                connection,
                organization_id,
                work_date,
                demands,
                granted,
                begun.targets,
                self._names.fresh(len(granted)),
                duration_seconds,
                greatest_age_seconds,
            )
            return [
                begun.answers[number] if number in begun.answers else packages.get(number, [])
                for number in range(len(demands))
            ]

        for left in reversed(range(_TRIES)):
            try:
                return await self.atomically(work)
            except RequestServed:
                # Its answer is on record by now, or was taken back.
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def attach_personas(
        self, organization_id: UUID, personas: Sequence[tuple[UUID, AssignedPersona]]
    ) -> set[UUID]:
        """Notes check-outs on their leases; returns the keys of those that still live.

        The check-outs of the others are put into the outbox, to be ended. One transaction. Raises: DatabaseUnavailable.
        """

        async def work(connection: Connection) -> set[UUID]:
            rows = await connection.fetch(
                _SQL["attach_personas"],
                organization_id,
                [key for key, _ in personas],
                [persona.persona_id for _, persona in personas],
                [persona.lease_token for _, persona in personas],
                [persona.generation for _, persona in personas],
            )
            noted = {row["allocation_key"] for row in rows}
            if lost := [key for key, _ in personas if key not in noted]:
                await connection.execute(_LEASES["enqueue_check_ins"], organization_id, lost)
            return noted

        return await self.atomically(work)
