"""Standing from the database: each look is one snapshot, bound to one organization, and changes nothing.

Raises: DatabaseUnavailable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.standing import CoolingExits, Moment, RegionExits, SlotGroup, SlotStanding
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection, Database

_SQL = queries("allocator", "standing.sql")


@dataclass(frozen=True, slots=True)
class Standing:
    """One snapshot. Pooled exits are only looked at when an open group needs one."""

    moment: Moment
    groups: tuple[SlotGroup, ...]
    regions: tuple[RegionExits, ...]
    cooling: tuple[CoolingExits, ...]


class StandingStore:
    """Reads how slots and exits stand."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_slots(
        self, organization_id: UUID, target: str | None, region: str | None, client_id: str = ""
    ) -> Standing:
        """Looks at every slot and counts; None for any target or region."""
        async with self._snapshot() as connection:
            await connection.execute(_SQL["plan_anew"])
            moment = await self._moment(connection, organization_id, client_id)
            rows = await connection.fetch(_SQL["groups_of_slots"], organization_id, None, target, region)
            return await self._standing(connection, organization_id, region, moment, rows)

    async def of_classes(self, organization_id: UUID, target: str | None, region: str | None) -> Standing:
        """Looks at one slot of each class, so that the cost does not grow with the slots; None for any."""
        async with self._snapshot() as connection:
            moment = await self._moment(connection, organization_id, "")
            rows = await connection.fetch(_SQL["groups_of_classes"], organization_id, target, region)
            return await self._standing(connection, organization_id, region, moment, rows)

    async def of_units(self, organization_id: UUID, slots: int) -> Standing:
        """Looks only at slots that may go out now, at about so many of all classes, and counts their units."""
        async with self._snapshot() as connection:
            moment = await self._moment(connection, organization_id, "")
            rows = await connection.fetch(_SQL["open_units_of_classes"], organization_id, slots)
            return await self._standing(connection, organization_id, None, moment, rows)

    async def of_slot(
        self, organization_id: UUID, slot_id: UUID, region: str | None, client_id: str
    ) -> tuple[SlotStanding | None, Standing]:
        """Looks at one slot, None if there is none; the standing has no groups."""
        async with self._snapshot() as connection:
            moment = await self._moment(connection, organization_id, client_id)
            row = await connection.fetchrow(_SQL["standing_of_slot"], organization_id, slot_id)
            exits = await self._exits(connection, organization_id, region)
            return SlotStanding(**row) if row is not None else None, Standing(moment, (), *exits)

    async def organizations(self) -> list[UUID]:
        """Returns all organizations."""
        return [row["organization_id"] for row in await self._database.fetch(_SQL["organizations"])]

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        async with (
            self._database.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield connection

    async def _standing(
        self, connection: Connection, organization_id: UUID, region: str | None, moment: Moment, rows: list[Any]
    ) -> Standing:
        groups = tuple(_of(SlotGroup, row) for row in rows)
        if any(group.kind == 0 and group.uses_pool() for group in groups):
            return Standing(moment, groups, *await self._exits(connection, organization_id, region))
        return Standing(moment, groups, (), ())

    @staticmethod
    async def _moment(connection: Connection, organization_id: UUID, client_id: str) -> Moment:
        row = await connection.fetchrow(_SQL["moment"], organization_id, client_id)
        assert row is not None
        return Moment(**row)

    @staticmethod
    async def _exits(
        connection: Connection, organization_id: UUID, region: str | None
    ) -> tuple[tuple[RegionExits, ...], tuple[CoolingExits, ...]]:
        regions = await connection.fetch(_SQL["exits_by_region"], organization_id, region)
        cooling = await connection.fetch(_SQL["cooling_by_target"], organization_id, region)
        return tuple(_of(RegionExits, row) for row in regions), tuple(_of(CoolingExits, row) for row in cooling)


def _of(kind: Any, row: Any) -> Any:
    """An aggregate over no rows is NULL where its type is an array."""
    arrays = {"examples", "targets", "disabled", "exhausted"}
    return kind(**{name: tuple(value or ()) if name in arrays else value for name, value in row.items()})
