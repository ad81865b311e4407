"""The audit chain: an entry for every act, and tampering with any of them is found."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from muster.allocator.v1 import admin_pb2

from allocator.audit_store import AuditStore
from allocator.partitions import Partitions
from services.postgres import Database
from tests.support.acts import Office, act
from tests.support.allocator import Allocator
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


@pytest.fixture
async def office(allocator: Allocator) -> Office:
    return await Office.of(allocator)


@pytest.fixture
async def audit(allocator: Allocator) -> AsyncIterator[AuditStore]:
    """The service's own store, by which it verifies."""
    postgres = allocator.service.chassis.config.postgres
    database = await Database.connect(postgres, "audit", search_path="allocator")
    yield AuditStore(database, Partitions(database))
    await database.close()


async def verdict(allocator: Allocator, audit: AuditStore) -> str:
    return await audit.verify(await allocator.service.organization_id())


async def some_acts(allocator: Allocator, office: Office, count: int = 5) -> None:
    slot = await allocator.slot()
    for number in range(count):
        await office.reopen(act(reason=f"number {number}"), slot.slot_id, units=1)


async def test_an_entry_says_who_did_what_when_to_what_and_why(allocator: Allocator, office: Office) -> None:
    slot = await allocator.slot()
    (unit,) = await allocator.take()
    await office.revoke(act(reason="stuck since noon"), unit.allocation_key)
    await office.drain("pc-1")
    await office.reopen(act(reason="a good day"), slot.slot_id, units=3)
    entries = await office.entries()
    assert [(entry.action, entry.reason) for entry in entries] == [
        ("ReopenQuota", "a good day"),
        ("SetClientDraining", ""),
        ("RevokeLeases", "stuck since noon"),
    ]
    (today,) = await allocator.sql("SELECT (now() AT TIME ZONE 'UTC')::date AS day")
    assert [entry.resource for entry in entries] == [
        f"{slot.slot_id} on {today['day']}: quota 100 to 103",
        "pc-1: draining",
        f"1 leases: {unit.allocation_key}",
    ]
    actors = {entry.action: entry.actor for entry in entries}
    assert actors["RevokeLeases"] == actors["ReopenQuota"] != actors["SetClientDraining"]
    assert all(len(entry.payload_sha256) == len(entry.entry_sha256) == 32 for entry in entries)
    assert [entry.at.ToMicroseconds() for entry in entries] == sorted(
        (entry.at.ToMicroseconds() for entry in entries), reverse=True
    )
    assert [entry.action for entry in await office.entries(action="RevokeLeases")] == ["RevokeLeases"]


async def test_an_entry_about_many_things_names_the_first_ten(allocator: Allocator, office: Office) -> None:
    await allocator.slot()
    keys = [unit.allocation_key for unit in await allocator.take(12)]
    await office.revoke(act(), *keys)
    (entry,) = await office.entries()
    assert entry.resource == f"12 leases: {', '.join(sorted(keys)[:10])} and 2 more"


async def test_pages_of_entries_hold_each_once(allocator: Allocator, office: Office) -> None:
    await some_acts(allocator, office, 7)
    seen, token = [], ""
    while True:
        request = admin_pb2.ListAuditEntriesRequest(page_size=3, page_token=token)
        page = await office.admin.ListAuditEntries(request, metadata=office.administrator)
        seen += [entry.reason for entry in page.entries]
        token = page.next_page_token
        if not token:
            break
    assert seen == [f"number {number}" for number in range(6, -1, -1)]


async def test_the_chain_holds_under_concurrent_acts(allocator: Allocator, office: Office, audit: AuditStore) -> None:
    slots = [await allocator.slot() for _ in range(4)]
    await asyncio.gather(*(office.reopen(act(), slots[n % 4].slot_id, units=1) for n in range(40)))
    assert len(await office.entries()) == 40
    assert await verdict(allocator, audit) == ""


async def test_a_chain_without_entries_holds(allocator: Allocator, audit: AuditStore) -> None:
    assert await audit.verify(uuid.uuid4()) == ""


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("UPDATE audit_log SET reason = 'nothing to see' WHERE reason = 'number 2'", "was changed"),
        ("UPDATE audit_log SET actor = 'somebody else' WHERE reason = 'number 0'", "was changed"),
        ("UPDATE audit_log SET at = at - interval '1 microsecond' WHERE reason = 'number 3'", "was changed"),
        ("UPDATE audit_log SET payload_sha256 = sha256('x') WHERE reason = 'number 4'", "was changed"),
        ("UPDATE audit_log SET entry_sha256 = sha256('x') WHERE reason = 'number 4'", "was changed"),
        ("DELETE FROM audit_log WHERE reason = 'number 0'", "one before it was removed"),
        ("DELETE FROM audit_log WHERE reason = 'number 2'", "one before it was removed"),
        ("DELETE FROM audit_log WHERE reason = 'number 4'", "the last entries were removed"),
        ("DELETE FROM audit_log", "the last entries were removed"),
        ("DELETE FROM audit_heads", "the head was removed"),
    ],
)
async def test_tampering_is_found(
    allocator: Allocator, office: Office, audit: AuditStore, tampering: str, found: str
) -> None:
    await some_acts(allocator, office)
    assert await verdict(allocator, audit) == ""
    await allocator.sql(tampering)
    assert found in await verdict(allocator, audit)
