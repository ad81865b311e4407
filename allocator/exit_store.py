"""Exits in the database. Every method is bound to one organization. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import uuid_utils.compat as uuids

from allocator.errors import ExitLimitReached, ExitNotFound
from allocator.exits import Exit, ExitSpec, ExitToggle
from allocator.store import Store
from services import requests
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "exits.sql")


class ExitStore(Store):
    """Keeps exits and their toggles."""

    async def import_exits(self, organization_id: UUID, specs: Sequence[ExitSpec], *, limit: int) -> list[Exit]:
        """Registers exits by endpoint, all or none; returns them in the order given.

        One that stands keeps its counters and takes region and cap, but the cap does not fall below the uses that
        count already.

        Args:
            organization_id: The tenant.
            specs: With distinct endpoints.
            limit: The most exits an organization may have.

        Raises:
            ExitLimitReached: there would be more; nothing was changed.
        """
        endpoints = [spec.endpoint for spec in specs]

        async def work(connection: Connection) -> list[Exit]:
            await connection.execute(_SQL["lock_exit_imports"], organization_id)
            held = await connection.fetchval(_SQL["count_exits_after"], organization_id, endpoints)
            if held > limit:
                raise ExitLimitReached(limit, held)
            await connection.fetch(_SQL["lock_exits"], organization_id, endpoints)
            await connection.execute(
                _SQL["import_exits"],
                organization_id,
                [uuids.uuid7() for _ in specs],
                endpoints,
                [spec.region for spec in specs],
                [spec.cap for spec in specs],
            )
            rows = await connection.fetch(_SQL["exits_by_endpoint"], organization_id, endpoints)
            found = {row["endpoint"]: Exit(**row) for row in rows}
            return [found[endpoint] for endpoint in endpoints]

        return await self.atomically(work)

    async def page(self, organization_id: UUID, after: UUID | None, size: int) -> list[Exit]:
        """Returns exits by id."""
        return [Exit(**row) for row in await self.database.fetch(_SQL["page_of_exits"], organization_id, after, size)]

    async def set_enabled(self, organization_id: UUID, exit_id: UUID, enabled: bool) -> Exit:
        """Takes an exit out of use or back. Raises: ExitNotFound."""

        async def work(connection: Connection) -> Exit:
            row = await connection.fetchrow(_SQL["set_exit_enabled"], organization_id, exit_id, enabled)
            if row is None:
                raise ExitNotFound(exit_id)
            return Exit(**row)

        return await self.atomically(work)

    async def toggle(
        self, organization_id: UUID, exit_id: UUID, request_id: UUID, digest: bytes, *, actor: str, reason: str
    ) -> Exit:
        """Starts an exit's count afresh and logs it, once for a request id; a retry gets the exit as it is by now.

        Raises:
            ExitNotFound: there is no such exit.
            RequestIdReused: the id stands for another request.
        """

        async def work(connection: Connection) -> Exit:
            again = await requests.claim(connection, organization_id, "ToggleExit", request_id, digest)
            if again is None:
                arguments = (organization_id, exit_id, uuids.uuid7(), actor, reason)
                row = await connection.fetchrow(_SQL["toggle_exit"], *arguments)
            else:
                row = await connection.fetchrow(_SQL["exit_by_id"], organization_id, exit_id)
            if row is None:
                raise ExitNotFound(exit_id)
            return Exit(**row)

        return await self.atomically(work)

    async def page_of_toggles(
        self, organization_id: UUID, exit_id: UUID | None, before: tuple[datetime, UUID] | None, size: int
    ) -> list[ExitToggle]:
        """Returns toggles, newest first; of one exit, or of all."""
        at, toggle_id = before or (None, None)
        rows = await self.database.fetch(_SQL["page_of_toggles"], organization_id, exit_id, at, toggle_id, size)
        return [ExitToggle(**row) for row in rows]
