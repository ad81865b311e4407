"""The audit chain in the database. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import uuid_utils.compat as uuids

from allocator.audit import GENESIS, AuditEntry, Deed, entry_sha256, first_break, payload_sha256
from allocator.store import Store
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "audit.sql")

_PAGE = 1000


async def append(
    connection: Connection, organization_id: UUID, deed: Deed, resource: str, changed: dict[str, Any]
) -> None:
    """Adds an entry within the transaction in hand, last of all: it locks the organization's head to its end.

    Args:
        connection: A connection in a transaction.
        organization_id: The tenant.
        deed: What is done, by whom and why.
        resource: To what.
        changed: What it changed, a JSON object; only its digest is kept.
    """
    previous: bytes = await connection.fetchval(_SQL["lock_audit_head"], organization_id, GENESIS)
    entry = AuditEntry(
        entry_id=uuids.uuid7(),
        at=await connection.fetchval(_SQL["next_audit_time"], organization_id),
        actor=deed.actor,
        action=deed.action,
        resource=resource,
        reason=deed.reason,
        payload_sha256=payload_sha256(deed.request_sha256, changed),
        previous_sha256=previous,
        entry_sha256=b"",
    )
    entry = replace(entry, entry_sha256=entry_sha256(organization_id, entry))
    await connection.execute(
        _SQL["append_audit_entry"],
        organization_id,
        entry.at,
        entry.entry_id,
        entry.actor,
        entry.action,
        entry.resource,
        entry.reason,
        entry.payload_sha256,
        entry.previous_sha256,
        entry.entry_sha256,
    )


class AuditStore(Store):
    """Reads and verifies what `append` wrote."""

    async def page(
        self, organization_id: UUID, action: str | None, before: tuple[datetime, UUID] | None, size: int
    ) -> list[AuditEntry]:
        """Returns entries, the newest first; of one action, or all."""
        at, entry_id = before or (None, None)
        rows = await self.database.fetch(_SQL["page_of_audit_entries"], organization_id, at, entry_id, size, action)
        return [AuditEntry(**row) for row in rows]

    async def verify(self, organization_id: UUID) -> str:
        """Walks an organization's chain from its beginning, in pages.

        Returns:
            '' when every entry follows from the one before and the last is the head's; else what is wrong, with the
            entry's id. An entry that is added meanwhile is walked too, or not yet missed.
        """
        head: bytes | None = await self.database.fetchval(_SQL["audit_head"], organization_id)
        previous, seen = GENESIS, head in (None, GENESIS)
        at: datetime | None = None
        entry_id: UUID | None = None
        while True:
            rows = await self.database.fetch(_SQL["audit_entries_after"], organization_id, at, entry_id, _PAGE)
            entries = [AuditEntry(**row) for row in rows]
            if not entries:
                break
            if broken := first_break(organization_id, previous, entries):
                return f"entry {broken.entry_id} was changed, or one before it was removed"
            seen = seen or any(entry.entry_sha256 == head for entry in entries)
            previous, at, entry_id = entries[-1].entry_sha256, entries[-1].at, entries[-1].entry_id
        if head is None and at is not None:
            # Unless the first entry was written after the head was read.
            head = await self.database.fetchval(_SQL["audit_head"], organization_id)
            return "" if head is not None else "the head was removed"
        return "" if seen else "the head is of an entry that is not there: the last entries were removed"

    async def organizations(self) -> list[UUID]:
        """Returns the organizations that have a chain."""
        return [row["organization_id"] for row in await self.database.fetch(_SQL["audited_organizations"])]
