"""Clients: registered and updated at every contact, offline after ten minutes, their leases freed when they die."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from muster.allocator.v1 import work_pb2

from services.call import Role
from services.postgres import queries
from tests.support.acts import Office, act, identity
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test, and whose leases outlast ten minutes."""
    leases = {"sweep_seconds": 60, "duration_seconds": 3600}
    return await Allocator.of(await start_service("allocator", leases=leases))


@pytest.fixture
async def office(allocator: Allocator) -> Office:
    return await Office.of(allocator)


async def ask(allocator: Allocator, client: work_pb2.ClientIdentity, items: int = 1) -> list[work_pb2.Allocation]:
    request = work_pb2.AllocateWorkRequest(request_id=str(uuid.uuid4()), client=client, max_items=items)
    return list((await allocator.work.AllocateWork(request, metadata=allocator.worker)).allocations)


async def beat(allocator: Allocator, client: work_pb2.ClientIdentity) -> None:
    await allocator.work.Heartbeat(work_pb2.HeartbeatRequest(client=client), metadata=allocator.worker)


async def silence(allocator: Allocator, minutes: float, client: str = "pc-1") -> None:
    """Lets a client and its instances have spoken last so long ago."""
    for table in ("clients", "client_instances"):
        await allocator.sql(
            f"UPDATE {table} SET last_seen_at = now() - $1::float8 * interval '1 minute' WHERE client_id = $2",
            minutes,
            client,
        )


async def test_a_client_is_registered_at_its_first_contact_and_updated_at_every_later_one(
    allocator: Allocator, office: Office
) -> None:
    await allocator.slot()
    await ask(allocator, identity("pc-1", 3, client_name="first", client_ip="10.0.0.1", user_folder_number=7))
    (client,) = (await office.list_clients()).clients
    assert (client.client_id, client.client_name, client.client_ip) == ("pc-1", "first", "10.0.0.1")
    assert client.online
    assert not client.draining
    (instance,) = client.instances
    assert (instance.instance_number, instance.user_folder_number, instance.online) == (3, 7, True)
    assert (instance.leases, client.leases) == (1, 1)
    first_seen = client.first_seen_at.ToMicroseconds()

    # Another address, another folder, another process, and no name: the id is the same, so the client is.
    await beat(allocator, identity("pc-1", 3, client_ip="10.0.0.2", user_folder_number=8))
    await beat(allocator, identity("pc-1", 4, client_ip="10.0.0.2"))
    (client,) = (await office.list_clients()).clients
    assert (client.client_name, client.client_ip) == ("first", "10.0.0.2")
    assert [(i.instance_number, i.user_folder_number) for i in client.instances] == [(3, 8), (4, 0)]
    assert client.first_seen_at.ToMicroseconds() == first_seen
    assert client.last_seen_at.ToMicroseconds() > first_seen


async def test_two_clients_behind_one_address_are_two(allocator: Allocator, office: Office) -> None:
    for name in ("pc-1", "pc-2"):
        await beat(allocator, identity(name, client_ip="10.0.0.1"))
    assert [client.client_id for client in (await office.list_clients()).clients] == ["pc-1", "pc-2"]


async def test_a_client_is_offline_after_ten_minutes_of_silence_and_online_again_when_it_speaks(
    allocator: Allocator, office: Office
) -> None:
    for name in ("pc-1", "pc-2"):
        await beat(allocator, identity(name))
    await silence(allocator, 9.9)
    assert all(client.online for client in (await office.list_clients()).clients)
    await silence(allocator, 10.1)
    client, other = (await office.list_clients()).clients
    assert (client.online, client.instances[0].online, other.online) == (False, False, True)
    assert [c.client_id for c in (await office.list_clients(online=False)).clients] == ["pc-1"]
    assert [c.client_id for c in (await office.list_clients(online=True)).clients] == ["pc-2"]
    await beat(allocator, identity("pc-1", client_ip="10.0.0.9"))
    assert (await office.list_clients(online=False)).clients == []


async def test_pages_of_clients_hold_each_once(allocator: Allocator, office: Office) -> None:
    names = [f"pc-{number}" for number in range(7)]
    for name in names:
        await beat(allocator, identity(name))
    seen, token = [], ""
    while True:
        page = await office.list_clients(page_size=3, page_token=token)
        seen += [client.client_id for client in page.clients]
        token = page.next_page_token
        if not token:
            break
    assert seen == names
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await office.list_clients(page_size=3, page_token=token or "x")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_leases_of_an_instance_that_fell_silent_are_freed_by_the_service(
    allocator: Allocator, office: Office
) -> None:
    slot = await allocator.slot(daily_quota=3, without_exit=False)
    await allocator.add_exits(1, cap=3)
    silent = await ask(allocator, identity("pc-1", 1), 2)
    (other,) = await ask(allocator, identity("pc-2"))
    await silence(allocator, 12)

    async def freed() -> bool:
        return len(await allocator.sql("SELECT FROM leases")) == 1

    # The leases have almost an hour to live: nothing but the silence frees them.
    await until(freed, seconds=15)
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["allocated"], counters["released"], counters["expired"]) == (3, 0, 2)
    (exit_,) = await allocator.sql("SELECT use_count FROM exits")
    assert exit_["use_count"] == 1
    answers = await allocator.renew(*map(lease, silent), lease(other))
    assert [answer.error.reason for answer in answers] == ["LEASE_LOST", "LEASE_LOST", ""]
    # It was only slow: what it did is late and not lost.
    first, second = silent
    (recorded,) = await allocator.submit(result(first))
    assert recorded.disposition == work_pb2.RESULT_DISPOSITION_RECORDED_LATE
    # By the time of its other result others got the unit.
    assert len(await ask(allocator, identity("pc-3"))) == 1
    (kept,) = await allocator.submit(result(second))
    assert kept.disposition == work_pb2.RESULT_DISPOSITION_QUARANTINED
    await allocator.check_invariants()


async def test_looking_for_silent_holders_does_not_read_all_who_ever_were(allocator: Allocator) -> None:
    await allocator.slot()
    await ask(allocator, identity("pc-1"))
    organization_id = await allocator.service.organization_id()
    await allocator.sql(
        "INSERT INTO client_instances (organization_id, client_id, instance_number, user_folder_number, last_seen_at) "
        "SELECT $1, 'pod-' || n, 0, 0, now() - n * interval '2 minutes' FROM generate_series(1, 20000) n",
        organization_id,
    )
    await allocator.sql(
        "INSERT INTO leases (allocation_key, organization_id, lease_token, work_date, slot_id, client_id, "
        "instance_number, granted_at, expires_at, renewable_until, sweep_at) "
        "SELECT gen_random_uuid(), $1, gen_random_uuid(), now()::date, gen_random_uuid(), 'live-' || n, 0, now(), at, "
        "at, at FROM generate_series(1, 20000) n, (SELECT now() + interval '1 hour' AS at) a",
        organization_id,
    )
    await allocator.sql("ANALYZE client_instances, leases")
    statement = queries("allocator", "clients.sql")["silent_holders"]
    door = await allocator.connect()
    # In a transaction, since the service would free the lease meanwhile.
    async with door.transaction():
        await door.execute(
            "UPDATE client_instances SET last_seen_at = now() - interval '12 m' WHERE client_id = $1", "pc-1"
        )
        found = await door.fetch(statement, 660.0, 7200.0, 200)
        explained = await door.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {statement}", 660.0, 7200.0, 200)
    await door.close()
    assert [row["client_id"] for row in found] == ["pc-1"]

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    plan = list(nodes(json.loads(explained)[0]["Plan"]))
    read = [
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in plan
        if node.get("Relation Name") == "client_instances"
    ]
    # One every two minutes in two hours.
    assert 0 < sum(read) <= 60


async def test_a_renewal_on_its_behalf_keeps_a_silent_instance_alive(allocator: Allocator, office: Office) -> None:
    await allocator.slot()
    (unit,) = await ask(allocator, identity("pc-1", 1))
    await beat(allocator, identity("pc-1", 2))
    await silence(allocator, 30)
    tracker = await allocator.service.metadata(Role.WORKER)
    request = work_pb2.RenewLeasesRequest(leases=[lease(unit)])
    (renewed,) = (await allocator.work.RenewLeases(request, metadata=tracker)).leases
    assert renewed.HasField("expires_at")
    (client,) = (await office.list_clients()).clients
    assert client.online
    assert [instance.online for instance in client.instances] == [True, False]


async def test_renewals_are_noted_at_most_once_a_minute(allocator: Allocator) -> None:
    await allocator.slot()
    (unit,) = await ask(allocator, identity("pc-1"))
    await allocator.renew(lease(unit))
    await silence(allocator, 1)
    before = await allocator.sql("SELECT last_seen_at FROM client_instances")
    for _ in range(5):
        await allocator.renew(lease(unit))
    assert await allocator.sql("SELECT last_seen_at FROM client_instances") == before


async def test_an_operator_declares_an_instance_dead(allocator: Allocator, office: Office) -> None:
    await allocator.slot()
    units = await ask(allocator, identity("pc-1", 1), 3)
    await ask(allocator, identity("pc-1", 2))
    assert await office.declare_dead(act(), "pc-1", 1) == 3
    assert await office.declare_dead(act(), "pc-1", 1) == 0
    (client,) = (await office.list_clients()).clients
    assert [(i.instance_number, i.online, i.leases) for i in client.instances] == [(1, False, 0), (2, True, 1)]
    assert (await allocator.renew(lease(units[0])))[0].error.reason == "LEASE_LOST"
    # It lives after all: its very next call registers it anew.
    await beat(allocator, identity("pc-1", 1))
    (client,) = (await office.list_clients()).clients
    assert client.instances[0].online
    for name, number in (("pc-1", 9), ("nobody", 1)):
        with pytest.raises(grpc.aio.AioRpcError, match="there is no client") as refused:
            await office.declare_dead(act(), name, number)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    keys = ", ".join(sorted(unit.allocation_key for unit in units))
    assert [(entry.action, entry.resource) for entry in await office.entries()] == [
        ("DeclareInstanceDead", "pc-1 instance 1, 0 leases"),
        ("DeclareInstanceDead", f"pc-1 instance 1, 3 leases: {keys}"),
    ]
    await allocator.check_invariants()


async def test_a_retry_of_a_declared_death_frees_nothing_that_was_leased_since(
    allocator: Allocator, office: Office
) -> None:
    await allocator.slot()
    instance = identity("pc-1", 1)
    await ask(allocator, instance, 2)
    assert await office.declare_dead(act(dry_run=True), "pc-1", 1) == 2
    assert await office.entries() == []
    the_act = act(reason="it does not answer")
    assert await office.declare_dead(the_act, "pc-1", 1) == 2
    (unit,) = await ask(allocator, instance)
    assert await office.declare_dead(the_act, "pc-1", 1) == 2
    assert (await allocator.renew(lease(unit)))[0].HasField("expires_at")
    (entry,) = await office.entries()
    assert (entry.action, entry.reason) == ("DeclareInstanceDead", "it does not answer")
    with pytest.raises(grpc.aio.AioRpcError, match="request_id stands for another request"):
        await office.declare_dead(the_act, "pc-1", 2)


async def test_an_instance_that_says_goodbye_is_forgotten_until_it_speaks_again(
    allocator: Allocator, office: Office
) -> None:
    await allocator.slot()
    gone = identity("pc-1", 1)
    (unit,) = await ask(allocator, gone)
    await beat(allocator, identity("pc-1", 2))
    for _ in range(2):
        request = work_pb2.HeartbeatRequest(client=gone, goodbye=True)
        await allocator.work.Heartbeat(request, metadata=allocator.worker)
        (client,) = (await office.list_clients()).clients
        assert [instance.instance_number for instance in client.instances] == [2]
    (answer,) = await allocator.renew(lease(unit))
    assert answer.error.metadata["status"] == "released"
    # At once, however short the time since it was noted last.
    await beat(allocator, gone)
    (client,) = (await office.list_clients()).clients
    assert [instance.instance_number for instance in client.instances] == [1, 2]


async def test_a_draining_client_finishes_what_it_holds_and_takes_nothing_new(
    allocator: Allocator, office: Office
) -> None:
    await allocator.slot()
    (unit,) = await allocator.take()
    drained = await office.drain("pc-1")
    assert (drained.draining, drained.leases) == (True, 1)
    assert (await allocator.heartbeat()).drain
    # At once on this replica: it has outdated its own index.
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_CLIENT_DRAINING
    assert (await allocator.renew(lease(unit)))[0].HasField("expires_at")
    assert len((await allocator.ask(client="pc-2")).allocations) == 1
    await allocator.release(lease(unit))
    assert (await office.drain("pc-1")).leases == 0
    assert not (await office.drain("pc-1", False)).draining
    assert not (await allocator.heartbeat()).drain
    assert len((await allocator.ask()).allocations) == 1
    with pytest.raises(grpc.aio.AioRpcError, match="there is no client nobody"):
        await office.drain("nobody")


async def test_a_client_idle_for_thirty_days_is_forgotten_unless_it_holds_something(
    allocator: Allocator, office: Office
) -> None:
    await allocator.slot()
    for name in ("holder", "idle", "late"):
        for number in (0, 1):
            await beat(allocator, identity(name, number))
    await ask(allocator, identity("holder", 1))
    for name in ("holder", "idle"):
        await silence(allocator, 31 * 24 * 60, name)
    await silence(allocator, 29 * 24 * 60, "late")

    async def forgotten() -> bool:
        return [client.client_id for client in (await office.list_clients()).clients] == ["holder", "late"]

    await until(forgotten, seconds=15)
    rows = await allocator.sql("SELECT client_id, instance_number FROM client_instances ORDER BY 1, 2")
    assert [tuple(row) for row in rows] == [("holder", 1), ("late", 0), ("late", 1)]


async def test_clients_of_another_organization_are_not_there(allocator: Allocator, office: Office) -> None:
    await beat(allocator, identity("pc-1"))
    stranger = await Allocator.of(allocator.service)
    stranger.operator = await allocator.service.metadata(Role.OPERATOR, "rival")
    rival = await Office.of(stranger, "rival")
    assert (await rival.list_clients()).clients == []
    for attempt in (rival.drain("pc-1"), rival.declare_dead(act(), "pc-1")):
        with pytest.raises(grpc.aio.AioRpcError, match="there is no client"):
            await attempt
    (client,) = (await office.list_clients()).clients
    assert (client.online, client.draining) == (True, False)
    assert await rival.entries() == []
