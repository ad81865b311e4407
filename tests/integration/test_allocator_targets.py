"""TargetService: policies, holds and resumptions as an operator asks for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import target_pb2, target_pb2_grpc

from allocator import target_store
from allocator.allocation_store import AllocationStore
from allocator.partitions import Partitions
from allocator.target_store import TargetStore
from allocator.upkeep import Upkeep
from services.call import Role
from services.config import PostgresConfig
from services.postgres import Database
from tests.support.allocator import Allocator
from tests.support.services import StartService


class Desk:
    """The calls of an operator on targets."""

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.stub = target_pb2_grpc.TargetServiceStub(allocator.service.channel)
        self.metadata = allocator.operator

    async def policy(self, target: str, **values: Any) -> target_pb2.TargetState:
        """Sets a policy."""
        policy = target_pb2.TargetPolicy(**values)
        request = target_pb2.SetTargetPolicyRequest(target=target, policy=policy)
        return (await self.stub.SetTargetPolicy(request, metadata=self.metadata)).target

    async def hold(self, target: str, seconds: int, reason: str = "") -> target_pb2.TargetState:
        """Holds a target."""
        request = target_pb2.HoldTargetRequest(target=target, duration=Duration(seconds=seconds), reason=reason)
        return (await self.stub.HoldTarget(request, metadata=self.metadata)).target

    async def resume(self, target: str) -> target_pb2.TargetState:
        """Resumes a target."""
        request = target_pb2.ResumeTargetRequest(target=target)
        return (await self.stub.ResumeTarget(request, metadata=self.metadata)).target

    async def page(self, **values: Any) -> target_pb2.ListTargetsResponse:
        """Lists a page."""
        return await self.stub.ListTargets(target_pb2.ListTargetsRequest(**values), metadata=self.metadata)


@pytest.fixture
async def desk(start_service: StartService) -> Desk:
    """A service to ask."""
    return Desk(await Allocator.of(await start_service("allocator")))


@pytest.fixture
async def database(desk: Desk) -> AsyncIterator[Database]:
    """The allocator's, by a connection of the test's own."""
    postgres = PostgresConfig.model_validate({"dsn": desk.allocator.service.dsn})
    database = await Database.connect(postgres, "targets", search_path="allocator")
    yield database
    await database.close()


async def test_a_policy_is_kept_as_it_was_last_set(desk: Desk) -> None:
    first = await desk.policy("shop.example", max_in_flight=3, min_delay=Duration(seconds=1, nanos=500_000_000))
    assert (first.target, first.policy.max_in_flight, first.policy.min_delay.ToMilliseconds()) == (
        "shop.example",
        3,
        1500,
    )
    assert first.policy.auto_pause
    assert (first.in_flight, first.pauses, first.reason) == (0, 0, "")
    for field in ("crawl_delay", "held_until", "paused_at", "probe_at"):
        assert not first.HasField(field)
    second = await desk.policy("shop.example", auto_pause=False)
    assert (second.policy.max_in_flight, second.policy.min_delay.ToMilliseconds()) == (0, 0)
    assert not second.policy.auto_pause
    assert list((await desk.page()).targets) == [second]


async def test_units_in_flight_are_counted_where_a_policy_limits_them(desk: Desk) -> None:
    await desk.allocator.slot(target="shop.example")
    await desk.policy("shop.example", max_in_flight=10)
    await desk.policy("other.example", max_in_flight=10)
    await desk.allocator.take(4)
    states = {state.target: state.in_flight for state in (await desk.page()).targets}
    assert states == {"shop.example": 4, "other.example": 0}


async def test_a_hold_takes_the_end_that_was_said_last_and_a_resumption_ends_it(desk: Desk) -> None:
    long = await desk.hold("shop.example", 86_400)
    assert 86_390 < long.held_until.ToSeconds() - time.time() < 86_410
    assert long.reason == "held by an operator"
    short = await desk.hold("shop.example", 60, "the shop's sale")
    assert 50 < short.held_until.ToSeconds() - time.time() < 70
    assert short.reason == "the shop's sale"
    assert [state.target for state in (await desk.page(only_stopped=True)).targets] == ["shop.example"]
    for _ in range(2):
        state = await desk.resume("shop.example")
        assert not state.HasField("held_until")
        assert state.reason == ""
    assert not (await desk.page(only_stopped=True)).targets
    await desk.hold("shop.example", 60)
    await desk.allocator.sql("UPDATE targets SET blocked_until = now() - interval '1 second'")
    (passed,) = (await desk.page()).targets
    assert (passed.HasField("held_until"), passed.reason) == (False, "")


async def test_a_resumption_ends_a_pause_without_a_probe(desk: Desk) -> None:
    await desk.hold("shop.example", 60)
    await desk.allocator.sql(
        "UPDATE targets SET paused_at = now(), probe_at = now() + interval '1 hour', pauses = 3, probe_key = $1",
        uuid.uuid4(),
    )
    (paused,) = (await desk.page(only_stopped=True)).targets
    assert (paused.HasField("paused_at"), paused.HasField("probe_at"), paused.pauses) == (True, True, 3)
    state = await desk.resume("shop.example")
    assert (state.HasField("paused_at"), state.HasField("probe_at"), state.pauses) == (False, False, 0)
    (row,) = await desk.allocator.sql(
        "SELECT probe_key, counted_from > now() - interval '1 minute' AS anew FROM targets"
    )
    assert (row["probe_key"], row["anew"]) == (None, True)


async def test_a_slot_without_a_target_is_held_under_its_own_name(desk: Desk) -> None:
    slot = await desk.allocator.slot()
    state = await desk.hold(f"slot:{slot.slot_id.upper()}", 60)
    assert state.target == f"slot:{slot.slot_id}"
    assert (await desk.resume(state.target)).target == state.target


async def test_targets_are_paged_by_name_within_their_organization(desk: Desk) -> None:
    for name in ("b", "a", "d", "c", "하나"):
        await desk.policy(name)
    first = await desk.page(page_size=3)
    rest = await desk.page(page_size=3, page_token=first.next_page_token)
    names = [state.target for page in (first, rest) for state in page.targets]
    assert sorted(names) == ["a", "b", "c", "d", "하나"]
    assert names[:4] == ["a", "b", "c", "d"]
    assert rest.next_page_token == ""
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await desk.page(page_size=3, page_token=first.next_page_token, only_stopped=True)
    desk.metadata = await desk.allocator.service.metadata(Role.OPERATOR, "rival")
    assert not (await desk.page()).targets
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await desk.resume("a")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await desk.page(page_size=3, page_token=first.next_page_token)


async def test_one_target_is_read_by_its_name(desk: Desk) -> None:
    slot = await desk.allocator.slot()
    for name in ("a", "ab", "b"):
        await desk.policy(name)
    await desk.hold(f"slot:{slot.slot_id}", 60)
    assert [state.target for state in (await desk.page(target="a")).targets] == ["a"]
    (own,) = (await desk.page(target=f"slot:{slot.slot_id.upper()}")).targets
    assert own.target == f"slot:{slot.slot_id}"
    assert not (await desk.page(target="c")).targets
    assert not (await desk.page(target="a", only_stopped=True)).targets
    first = await desk.page(page_size=1, target="a")
    assert not (await desk.page(page_size=1, target="a", page_token=first.next_page_token)).targets
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await desk.page(page_size=1, target="b", page_token=first.next_page_token)


async def test_a_target_is_forgotten_when_nothing_of_it_is_in_force_for_a_day(desk: Desk, database: Database) -> None:
    organization_id = await desk.allocator.service.organization_id()
    await desk.allocator.sql(
        """INSERT INTO targets (organization_id, target, max_in_flight, min_delay_ms, auto_pause, crawl_delay_ms,
          paused_at, probe_at, blocked_until, updated_at)
        SELECT $1, u.name, CASE WHEN u.name = 'limited' THEN 1 END, CASE WHEN u.name = 'slow' THEN 1 ELSE 0 END,
          u.name <> 'never paused', CASE WHEN u.name = 'asks for a delay' THEN 1 ELSE 0 END,
          CASE WHEN u.name = 'paused' THEN now() - interval '2 days' END,
          CASE WHEN u.name = 'paused' THEN now() - interval '2 days' END,
          CASE WHEN u.name = 'held' THEN now() + interval '1 hour' ELSE now() - interval '2 days' END,
          now() - CASE WHEN u.name = 'young' THEN interval '23 hours' ELSE interval '25 hours' END
        FROM unnest($2::text[]) AS u (name)""",
        organization_id,
        ["idle", "limited", "slow", "never paused", "asks for a delay", "paused", "held", "young"],
    )
    partitions = Partitions(database)
    await Upkeep(database, AllocationStore(database, partitions), partitions).round()
    kept = {state.target for state in (await desk.page()).targets}
    assert kept == {"limited", "slow", "never paused", "asks for a delay", "paused", "held", "young"}


async def test_a_bounded_number_of_targets_is_forgotten_at_once(
    desk: Desk, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_store, "_FORGOTTEN", 2)
    await desk.allocator.sql(
        """INSERT INTO targets (organization_id, target, updated_at)
        SELECT $1, 'slot:' || n, now() - interval '25 hours' FROM generate_series(1, 9) n""",
        await desk.allocator.service.organization_id(),
    )
    store = TargetStore(database, Partitions(database))
    await store.forget()
    # The service's own upkeep may have come too.
    assert len((await desk.page()).targets) in (5, 7)
    # A row in use is passed over.
    door = await desk.allocator.connect()
    try:
        async with door.transaction():
            await door.execute("SELECT FROM targets FOR UPDATE")
            await store.forget()
        assert len((await desk.page()).targets) >= 5
    finally:
        await door.close()


_FAULTS: list[tuple[str, Any, str]] = [
    ("SetTargetPolicy", {"policy": {}}, "target"),
    ("SetTargetPolicy", {"target": "x" * 129, "policy": {}}, "target"),
    ("SetTargetPolicy", {"target": "a\x00", "policy": {}}, "target"),
    ("SetTargetPolicy", {"target": "slot:a", "policy": {}}, "target"),
    ("SetTargetPolicy", {"target": "a"}, "policy"),
    ("SetTargetPolicy", {"target": "a", "policy": {"max_in_flight": 1_000_001}}, "policy.max_in_flight"),
    ("SetTargetPolicy", {"target": "a", "policy": {"min_delay": Duration(seconds=3601)}}, "policy.min_delay"),
    ("SetTargetPolicy", {"target": "a", "policy": {"min_delay": Duration(seconds=-1)}}, "policy.min_delay"),
    ("ListTargets", {"page_size": 1001}, "page_size"),
    ("ListTargets", {"target": "x" * 129}, "target"),
    ("ListTargets", {"target": "slot:a"}, "target"),
    ("HoldTarget", {"duration": Duration(seconds=1)}, "target"),
    ("HoldTarget", {"target": "slot:not-an-id", "duration": Duration(seconds=1)}, "target"),
    ("HoldTarget", {"target": "a"}, "duration"),
    ("HoldTarget", {"target": "a", "duration": Duration()}, "duration"),
    ("HoldTarget", {"target": "a", "duration": Duration(seconds=-1)}, "duration"),
    ("HoldTarget", {"target": "a", "duration": Duration(seconds=30 * 86_400 + 1)}, "duration"),
    ("HoldTarget", {"target": "a", "duration": Duration(seconds=1), "reason": "x" * 257}, "reason"),
    ("ResumeTarget", {}, "target"),
    ("ResumeTarget", {"target": "x" * 129}, "target"),
    ("ResumeTarget", {"target": f"slot:{'x' * 36}"}, "target"),
]


async def test_a_wrong_field_is_named_and_nothing_is_changed(desk: Desk) -> None:
    for method, values, field in _FAULTS:
        if isinstance(values.get("policy"), dict):
            values = {**values, "policy": target_pb2.TargetPolicy(**values["policy"])}
        request = getattr(target_pb2, f"{method}Request")(**values)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(desk.stub, method)(request, metadata=desk.metadata)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (method, values)
        faults = error_details_pb2.BadRequest()
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert any(detail.Unpack(faults) for detail in status.details)
        assert [fault.field for fault in faults.field_violations] == [field], (method, values)
    assert not await desk.allocator.sql("SELECT FROM targets")


async def test_a_worker_may_not_administer_targets(desk: Desk) -> None:
    desk.metadata = desk.allocator.worker
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await desk.policy("a")
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
