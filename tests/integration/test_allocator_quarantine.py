"""Results that came too late: kept, paged, accepted or discarded, each once, and answered as the first time."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

from allocator.errors import QuarantinedResultNotFound
from allocator.quarantine import QuarantinedResult
from allocator.quarantine_store import QuarantineStore
from services import pages
from services.config import PostgresConfig
from services.errors import DomainError
from services.postgres import Database
from tests.support.acts import Office
from tests.support.allocator import Allocator, result
from tests.support.services import StartService

QUARANTINED = work_pb2.RESULT_DISPOSITION_QUARANTINED


class House:
    """An allocator and its quarantine."""

    def __init__(self, allocator: Allocator, database: Database, organization_id: uuid.UUID) -> None:
        self.allocator = allocator
        self.database = database
        self.organization_id = organization_id
        self.store = QuarantineStore(database)

    async def settle(
        self, act: str, units: Sequence[work_pb2.Allocation], *, undo: bool = False
    ) -> list[DomainError | None]:
        """Accepts or discards, in a transaction of the caller's that may be rolled back."""
        keys = [uuid.UUID(unit.allocation_key) for unit in units]
        async with self.database.connection() as connection:
            transaction = connection.transaction()
            await transaction.start()
            answers = await getattr(self.store, act)(connection, self.organization_id, keys)
            await (transaction.rollback() if undo else transaction.commit())
        return [answers[key] for key in keys]

    async def page(
        self, slot_id: uuid.UUID | None = None, after: uuid.UUID | None = None, size: int = 10
    ) -> list[QuarantinedResult]:
        """Returns a page of what is in quarantine."""
        found, _ = await self.store.page(self.organization_id, slot_id, after, size, pages.MOST_BYTES)
        return found

    async def too_late(self, count: int, slot_id: str, **values: Any) -> list[work_pb2.Allocation]:
        """Units whose leases ran out, whose day was used up by others, and whose results came then."""
        units = await self.allocator.take(count)
        await self.allocator.run_out(*units)
        await self.allocator.swept(*units)
        room = (await self.allocator.tracking(slot_id))["quota"]
        await self.allocator.take(min(count, room))
        answers = await self.allocator.submit(*(result(unit, **values) for unit in units))
        assert [answer.disposition for answer in answers] == [QUARANTINED] * count
        return units


@pytest.fixture
async def house(start_service: StartService) -> AsyncIterator[House]:
    """One whose sweep comes at once."""
    service = await start_service("allocator", leases={"sweep_seconds": 0.02})
    allocator = await Allocator.of(service)
    config = PostgresConfig.model_validate({"dsn": service.dsn, "pool_min": 0})
    database = await Database.connect(config, "quarantine test", search_path="allocator")
    yield House(allocator, database, await service.organization_id())
    await database.close()


async def test_what_the_target_asked_for_is_heeded_although_the_result_is_kept_apart(house: House) -> None:
    allocator = house.allocator
    slot = await allocator.slot(daily_quota=1, target="shop.example")
    await house.too_late(1, slot.slot_id, outcome=work_pb2.WORK_OUTCOME_FAILED, retry_after=Duration(seconds=3600))
    await allocator.slot(target="shop.example")
    answer = await allocator.ask()
    assert not answer.allocations
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_TARGET_HELD


async def test_one_of_two_late_results_gets_the_last_room_whatever_their_order(house: House) -> None:
    allocator = house.allocator
    slot = await allocator.slot(daily_quota=2)
    late = await allocator.take(2)
    await allocator.run_out(*late)
    await allocator.swept(*late)
    await allocator.take()
    answers = await allocator.submit(*(result(unit) for unit in (late[1], late[0], late[1])))
    assert [answer.allocation_key for answer in answers] == [
        unit.allocation_key for unit in (late[1], late[0], late[1])
    ]
    assert sorted(answer.disposition for answer in answers[:2]) == [
        work_pb2.RESULT_DISPOSITION_RECORDED_LATE,
        QUARANTINED,
    ]
    assert answers[2] == answers[0]
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["allocated"], counters["succeeded"], counters["expired"]) == (3, 1, 1)
    await allocator.check_invariants()


async def test_an_accepted_result_counts_as_late_and_its_day_grows_by_what_it_lacks(house: House) -> None:
    allocator = house.allocator
    slot = await allocator.slot(daily_quota=2, target="shop.example")
    product = work_pb2.Product(product_id="p1", title="하나", url="http://x/1", rank=7)
    product.attributes["price"].double_value = 10.0
    settings = {"block_mercury": work_pb2.SettingValue(bool_value=True)}
    units = await house.too_late(
        2,
        slot.slot_id,
        products=[product, product],
        applied_settings=settings,
        exit_ip="203.0.113.9",
        retry_after=Duration(seconds=0),
        exit_signal=work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR,
    )
    # One of the two units in flight comes back, so one late result has room of its own.
    await allocator.sql("UPDATE daily_work_tracking SET quota = 3; ")
    assert await house.settle("accept", units) == [None, None]
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["quota"], counters["succeeded"], counters["expired"]) == (4, 2, 0)
    rows = await allocator.sql("SELECT * FROM work_results")
    assert [(row["late"], row["target"], row["exit_ip"], row["exit_signal"]) for row in rows] == [
        (True, "shop.example", "203.0.113.9", 3)
    ] * 2
    assert [(row["outcome"], row["execution_time_ms"], row["product_count"]) for row in rows] == [(2, 2000, 2)] * 2
    assert [json.loads(row["applied_settings"]) for row in rows] == [{"block_mercury": True}] * 2
    assert [row["client_ip"] for row in rows] == ["127.0.0.1"] * 2
    products = await allocator.sql("SELECT * FROM product_results ORDER BY allocation_key, position")
    assert [(row["position"], row["title"], row["rank"]) for row in products] == [(0, "하나", 7), (1, "하나", 7)] * 2
    assert [row["attributes"] for row in products] == ['{"price": 10.0}'] * 4
    # The activity log has known of them since they came.
    assert len(await allocator.sql("SELECT FROM client_activity_logs")) == 2
    assert not await allocator.sql("SELECT FROM quarantined_results")
    await allocator.check_invariants()


async def test_acceptance_takes_the_room_that_is_there_before_it_makes_any(house: House) -> None:
    slot = await house.allocator.slot(daily_quota=1)
    units = await house.too_late(1, slot.slot_id)
    await house.allocator.update(slot.slot_id, daily_quota=5)
    await house.allocator.sql("UPDATE daily_work_tracking SET quota = 5")
    assert await house.settle("accept", units) == [None]
    assert (await house.allocator.tracking(slot.slot_id))["quota"] == 5
    await house.allocator.check_invariants()


@pytest.mark.parametrize("act", ["accept", "discard"])
async def test_each_is_settled_once_and_its_worker_is_answered_as_the_first_time(house: House, act: str) -> None:
    slot = await house.allocator.slot(daily_quota=1)
    (unit,) = await house.too_late(1, slot.slot_id)
    first = await house.allocator.submit(result(unit))
    unknown = work_pb2.Allocation(allocation_key=str(uuid.uuid4()))
    settled, refused = await house.settle(act, [unit, unknown])
    assert settled is None
    assert isinstance(refused, QuarantinedResultNotFound)
    for again in ("accept", "discard"):
        (answer,) = await house.settle(again, [unit])
        assert isinstance(answer, QuarantinedResultNotFound)
    assert await house.allocator.submit(result(unit)) == first
    assert first[0].disposition == QUARANTINED
    accepted = int(act == "accept")
    assert len(await house.allocator.sql("SELECT FROM work_results")) == accepted
    counters = await house.allocator.tracking(slot.slot_id)
    assert (counters["succeeded"], counters["expired"], counters["quota"]) == (accepted, 1 - accepted, 1 + accepted)
    await house.allocator.check_invariants()


@pytest.mark.parametrize("act", ["accept", "discard"])
async def test_an_act_that_is_rolled_back_answers_alike_and_changes_nothing(house: House, act: str) -> None:
    slot = await house.allocator.slot(daily_quota=1)
    units = await house.too_late(1, slot.slot_id)
    before = await house.allocator.tracking(slot.slot_id)
    assert await house.settle(act, units, undo=True) == [None]
    assert await house.allocator.tracking(slot.slot_id) == before
    assert len(await house.page()) == 1
    assert not await house.allocator.sql("SELECT FROM work_results")
    assert await house.settle(act, units) == [None]
    await house.allocator.check_invariants()


async def test_results_are_paged_oldest_first_within_their_organization(house: House) -> None:
    slot = await house.allocator.slot(daily_quota=3)
    units = await house.too_late(3, slot.slot_id, outcome=3)
    keys = sorted(uuid.UUID(unit.allocation_key) for unit in units)
    first = await house.page(uuid.UUID(slot.slot_id), size=2)
    rest = await house.page(after=first[-1].allocation_key, size=2)
    assert [entry.allocation_key for entry in (*first, *rest)] == keys
    assert (first[0].status, first[0].products, first[0].client_id) == (4, 0, "pc-1")
    assert json.loads(first[0].result)["block_type"] == "captcha"
    assert units[0].lease_token.hex() not in first[0].result.replace("-", "")
    assert not await house.page(uuid.uuid4())
    stranger = House(house.allocator, house.database, uuid.uuid4())
    assert not await stranger.page()
    assert all(isinstance(answer, QuarantinedResultNotFound) for answer in await stranger.settle("accept", units))


async def test_a_page_ends_before_its_results_are_more_than_a_message_holds(house: House) -> None:
    slot = await house.allocator.slot(daily_quota=4)
    units = await house.too_late(4, slot.slot_id)
    keys = sorted(uuid.UUID(unit.allocation_key) for unit in units)
    sizes = (1_000_000, 1_500_000, 3_500_000, 1)
    for key, size in zip(keys, sizes, strict=True):
        await house.allocator.sql(
            "UPDATE quarantined_results SET result = result || jsonb_build_object('error_message', repeat('x', $2)) "
            "WHERE allocation_key = $1",
            key,
            size,
        )
    office = await Office.of(house.allocator)
    found, token = [], ""
    while True:
        page = await office.quarantined(page_token=token)
        found.append([uuid.UUID(result.allocation_key) for result in page.results])
        token = page.next_page_token
        if not token:
            break
    # The third is larger than a page by itself, and comes all the same.
    assert found == [keys[:2], keys[2:3], keys[3:]]


async def test_a_result_whose_allocation_the_archive_has_taken_can_still_be_accepted(house: House) -> None:
    slot = await house.allocator.slot(daily_quota=1)
    (unit,) = await house.too_late(1, slot.slot_id)
    await house.allocator.sql("DELETE FROM work_allocations WHERE quarantined")
    await house.allocator.sql("UPDATE quarantined_results SET quarantined_at = now() - interval '200 days'")
    assert await house.settle("accept", [unit]) == [None]
    (row,) = await house.allocator.sql(
        "SELECT late, now() - created_at < interval '29 days' AS stands FROM work_results"
    )
    assert (row["late"], row["stands"]) == (True, True)
