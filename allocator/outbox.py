"""The outbox: check-ins that the persona store must hear of, delivered at least once.

A check-in is written in the transaction that ends its lease. It names its holder, so hearing it twice changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.leases import PersonaUse
from allocator.metrics import CHECK_INS
from allocator.personas import PersonaStoreUnavailable
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.personas import PersonaStore
    from services.postgres import Database

_SQL = queries("allocator", "upkeep.sql")
_log = structlog.get_logger("allocator.outbox")

# What the persona store takes in one call.
_BATCH = 1000
_LOOK_SECONDS = 0.5


class Outbox:
    """Delivers check-ins. Replicas share the work: whoever takes a row has it alone until it is due again."""

    def __init__(self, database: Database, peer: PersonaStore) -> None:
        self._database = database
        self._peer = peer

    async def deliver(self) -> int:
        """Delivers what is due; returns how many. What cannot be delivered comes up again, later each time.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        rows = await self._database.fetch(_SQL["take_check_ins"], _BATCH)
        by_organization: dict[UUID, list[tuple[int, UUID, PersonaUse]]] = {}
        for row in rows:
            entry = (row["outbox_id"], row["holder"], PersonaUse(row["outcome"]))
            by_organization.setdefault(row["organization_id"], []).append(entry)
        delivered = 0
        for organization_id, entries in by_organization.items():
            try:
                await self._peer.check_in(organization_id, [(holder, use) for _, holder, use in entries])
            except PersonaStoreUnavailable:
                # An organization the store refuses must not hold up the others.
                _log.warning("check-ins wait", organization=str(organization_id), check_ins=len(entries))
                continue
            await self._database.execute(_SQL["delete_check_ins"], organization_id, [entry[0] for entry in entries])
            CHECK_INS.inc(len(entries))
            delivered += len(entries)
        return delivered

    async def deliver_for_ever(self) -> None:
        """Delivers until the process ends; waits while a part is away."""
        while True:
            try:
                delivered = await self.deliver()
            except DatabaseUnavailable as error:
                _log.warning("the outbox waits for the database", error=error.message)
                delivered = 0
            if delivered < _BATCH:
                await asyncio.sleep(_LOOK_SECONDS)
