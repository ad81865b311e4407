"""Exits in the database. Every method is bound to one organization. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import uuid_utils.compat as uuids

from allocator.errors import ExitInUse, ExitLimitReached, ExitNotFound
from allocator.exits import CapMode, Exit, ExitSpec, ExitToggle
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

        One that stands keeps its counters and takes the other values, but the cap does not fall below the uses that
        count already. A change of its mode begins a new epoch.

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
            standing = await connection.fetch(_SQL["exits_by_endpoint"], organization_id, endpoints)
            concurrent = {spec.endpoint for spec in specs if spec.cap_mode == CapMode.CONCURRENT}
            turning = [
                row["exit_id"]
                for row in standing
                if row["endpoint"] in concurrent and row["cap_mode"] != CapMode.CONCURRENT
            ]
            if turning:
                await connection.fetch(_SQL["lock_leases_of_exits"], organization_id, turning)
            await connection.fetch(_SQL["lock_exits"], organization_id, endpoints)
            modes, windows = [int(spec.cap_mode) for spec in specs], [spec.window_seconds for spec in specs]
            await connection.execute(_SQL["change_cap_modes"], organization_id, endpoints, modes, windows)
            if turning:
                await connection.execute(_SQL["move_leases"], organization_id, turning)
            await connection.execute(
                _SQL["import_exits"],
                organization_id,
                [uuids.uuid7() for _ in specs],
                endpoints,
                [spec.region for spec in specs],
                modes,
                [spec.cap for spec in specs],
                windows,
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
            await connection.execute(_SQL["set_exit_enabled"], organization_id, exit_id, enabled)
            return await _exit(connection, organization_id, exit_id)

        return await self.atomically(work)

    async def delete(self, organization_id: UUID, exit_id: UUID) -> bool:
        """Forgets an exit with its health; its toggles stay. Returns whether there was one.

        Raises:
            ExitInUse: it is enabled, or live leases have it.
        """

        async def work(connection: Connection) -> bool:
            # Against an import that counts it, or takes it for standing.
            await connection.execute(_SQL["lock_exit_imports"], organization_id)
            enabled = await connection.fetchval(_SQL["lock_exit"], organization_id, exit_id)
            if enabled is None:
                return False
            # Nobody reserves a disabled exit that is locked, so the count only falls.
            leases = await connection.fetchval(_SQL["count_leases_of_exit"], organization_id, exit_id)
            if enabled or leases:
                raise ExitInUse(exit_id, enabled=enabled, leases=leases)
            await connection.execute(_SQL["delete_exit"], organization_id, exit_id)
            return True

        return await self.atomically(work)

    async def toggle(
        self, organization_id: UUID, exit_id: UUID, request_id: UUID, digest: bytes, *, actor: str, reason: str
    ) -> Exit:
        """Begins a new epoch of an exit and logs it, once for a request id; a retry gets the exit as it is by now.

        Raises:
            ExitNotFound: there is no such exit.
            RequestIdReused: the id stands for another request.
        """

        async def work(connection: Connection) -> Exit:
            again = await requests.claim(connection, organization_id, "ToggleExit", request_id, digest)
            if again is None:
                before = await _exit(connection, organization_id, exit_id)
                if before.cap_mode == CapMode.CONCURRENT:
                    await connection.fetch(_SQL["lock_leases_of_exits"], organization_id, [exit_id])
                arguments = (organization_id, exit_id, uuids.uuid7(), actor, reason)
                mode = await connection.fetchval(_SQL["toggle_exit"], *arguments)
                if mode == CapMode.CONCURRENT:
                    await connection.execute(_SQL["move_leases"], organization_id, [exit_id])
            return await _exit(connection, organization_id, exit_id)

        return await self.atomically(work)

    async def page_of_toggles(
        self, organization_id: UUID, exit_id: UUID | None, before: tuple[datetime, UUID] | None, size: int
    ) -> list[ExitToggle]:
        """Returns toggles, newest first; of one exit, or of all."""
        at, toggle_id = before or (None, None)
        rows = await self.database.fetch(_SQL["page_of_toggles"], organization_id, exit_id, at, toggle_id, size)
        return [ExitToggle(**row) for row in rows]


async def _exit(connection: Connection, organization_id: UUID, exit_id: UUID) -> Exit:
    row = await connection.fetchrow(_SQL["exit_by_id"], organization_id, exit_id)
    if row is None:
        raise ExitNotFound(exit_id)
    return Exit(**row)
