"""Results of the allocator: what is written of each, what their exits and targets hear, and odd batches."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import exit_pb2, target_pb2, target_pb2_grpc, work_pb2

from allocator.allocation import Allocation
from allocator.blockers import NoWork
from tests.support.allocator import Allocator, result, until
from tests.support.services import StartService

RECORDED = work_pb2.RESULT_DISPOSITION_RECORDED
BLOCKED = work_pb2.WORK_OUTCOME_BLOCKED
FAILED = work_pb2.WORK_OUTCOME_FAILED


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One whose sweep does not come within the test."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def test_what_a_run_says_of_exit_and_target_is_recorded_with_its_result(allocator: Allocator) -> None:
    slot = await allocator.slot(target="shop.example")
    units = await allocator.take(4)
    await allocator.submit(
        result(units[0]),
        result(units[1], FAILED, exit_signal=work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR),
        result(units[2], BLOCKED),
        result(units[3], BLOCKED, exit_signal=work_pb2.EXIT_SIGNAL_RATE_LIMITED, retry_after=Duration(seconds=1)),
    )
    rows = await allocator.sql("SELECT allocation_key, target, exit_signal, retry_after_ms FROM work_results")
    told = {str(row["allocation_key"]): (row["target"], row["exit_signal"], row["retry_after_ms"]) for row in rows}
    assert [told[unit.allocation_key] for unit in units] == [
        ("shop.example", 0, None),
        ("shop.example", 3, None),
        # A block speaks of the exit too, unless the run says what it was.
        ("shop.example", 2, None),
        ("shop.example", 1, 1000),
    ]
    assert {row["target"] for row in await allocator.sql("SELECT target FROM work_allocations")} == {"shop.example"}
    assert (await allocator.tracking(slot.slot_id))["blocked"] == 2
    await allocator.check_invariants()


async def test_the_address_of_an_external_exit_is_recorded_where_the_result_names_none(allocator: Allocator) -> None:
    await allocator.slot()
    told, silent, late = await allocator.take(3)
    await allocator.sql("UPDATE leases SET exit_provider = 'vpn', exit_ip = '203.0.113.7'")
    await allocator.run_out(late)
    await allocator.submit(result(told, exit_ip="203.0.113.9"), result(silent), result(late))
    rows = await allocator.sql("SELECT allocation_key, exit_ip FROM work_results")
    addresses = {str(row["allocation_key"]): row["exit_ip"] for row in rows}
    assert [addresses[unit.allocation_key] for unit in (told, silent, late)] == [
        "203.0.113.9",
        "203.0.113.7",
        "203.0.113.7",
    ]
    # Each external exit is to be given back, in the same transaction.
    assert len(await allocator.sql("SELECT FROM exit_releases WHERE provider = 'vpn'")) == 3
    assert len(await allocator.sql("SELECT FROM work_allocations WHERE exit_ip = '203.0.113.7'")) == 3


async def test_a_concurrent_exit_is_free_when_the_result_comes_and_another_is_not(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1, cap=2, cap_mode=exit_pb2.EXIT_CAP_MODE_CONCURRENT)
    for _ in range(3):
        await allocator.submit(*map(result, await allocator.take(2)))
    assert (await allocator.sql("SELECT use_count FROM exits"))[0]["use_count"] == 0
    await allocator.sql("UPDATE exits SET cap_mode = 1")
    await allocator.submit(*map(result, await allocator.take(2)))
    assert (await allocator.sql("SELECT use_count FROM exits"))[0]["use_count"] == 2
    await allocator.check_invariants()


@pytest.mark.parametrize("limited", ["exit", "target"])
async def test_who_waits_for_what_a_result_frees_is_told(
    allocator: Allocator, limited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody looks again unless told.
    monkeypatch.setattr("allocator.allocation._LOOK_SECONDS", 1000.0)
    looked = asyncio.Event()
    serve = Allocation._serve

    async def watched(*arguments: Any) -> Any:
        outcome = await serve(*arguments)
        if isinstance(outcome, NoWork):
            looked.set()
        return outcome

    monkeypatch.setattr(Allocation, "_serve", watched)
    await allocator.slot(target="shop.example", without_exit=limited == "target")
    if limited == "exit":
        await allocator.add_exits(1, cap=1, cap_mode=exit_pb2.EXIT_CAP_MODE_CONCURRENT)
    else:
        policy = target_pb2.TargetPolicy(max_in_flight=1)
        request = target_pb2.SetTargetPolicyRequest(target="shop.example", policy=policy)
        targets = target_pb2_grpc.TargetServiceStub(allocator.service.channel)
        await targets.SetTargetPolicy(request, metadata=allocator.operator)
    # Once by the way of plain results and once by that of those that tell of their target.
    ways: tuple[dict[str, Any], ...] = ({}, {"outcome": FAILED, "crawl_delay": Duration()})
    for values in ways:
        (unit,) = await allocator.take()
        looked.clear()
        waiting = asyncio.create_task(allocator.ask(wait=Duration(seconds=30)))
        await looked.wait()
        await allocator.submit(result(unit, **values))
        async with asyncio.timeout(15):
            (unit,) = (await waiting).allocations
        await allocator.submit(result(unit))


async def test_results_that_wait_are_bounded_by_their_bytes(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allocator.results._WAITING_BYTES", 1500)
    await allocator.slot()
    units = await allocator.take(3)
    door = await allocator.connect()
    try:
        async with door.transaction():
            key = uuid.UUID(units[0].allocation_key)
            await door.execute("SELECT FROM leases WHERE allocation_key = $1 FOR UPDATE", key)
            running = asyncio.create_task(allocator.submit(result(units[0])))
            await until(allocator.waits_for_a_lock)
            large = [
                asyncio.create_task(allocator.submit(result(unit, FAILED, error_message="x" * 1000)))
                for unit in units[1:]
            ]
            (refused,), (waiting,) = await asyncio.wait(large, return_when=asyncio.FIRST_COMPLETED)
        answers = [*await running, *await waiting]
    finally:
        await door.close()
    error = refused.exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert (info.reason, info.metadata["queue"], info.metadata["limit_bytes"]) == ("OVERLOADED", "submit", "1500")
    assert [answer.disposition for answer in answers] == [RECORDED] * 2


async def test_an_exit_cools_for_the_target_that_refused_it_and_recovers_with_a_good_run(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False, target="shop.example")
    await allocator.add_exits(1)
    first, second = await allocator.take(2)
    await allocator.submit(result(first, BLOCKED, exit_signal=work_pb2.EXIT_SIGNAL_RATE_LIMITED))
    (health,) = await allocator.sql("SELECT target, signal, cooling_until > now() AS cools FROM exit_health")
    assert (health["target"], health["signal"], health["cools"]) == ("shop.example", 1, True)
    await allocator.sql("UPDATE exit_health SET cooling_until = now() - interval '1 second'")
    await allocator.submit(result(second))
    assert not await allocator.sql("SELECT FROM exit_health WHERE faults > 0 AND cooling_until > now()")


async def test_texts_are_kept_letter_by_letter(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=1000)
    texts = [
        "NULL",
        "null",
        '"',
        "\\",
        '\\"',
        "{}",
        "{a,b}",
        ",",
        " leading and trailing ",
        "two\nlines\tand a tab",
        "노트북 💻",
        "$1 %s ' --",
        "x" * 64,
        "",
    ]
    units = await allocator.take(len(texts))
    results = []
    for unit, text in zip(units, texts, strict=True):
        message = result(unit, FAILED, error_message=text)
        message.applied_settings[text or "name"].string_value = text
        results.append(message)
    blocked = await allocator.take(len(texts) - 1)
    await allocator.submit(*results, *(result(u, BLOCKED, block_type=t) for u, t in zip(blocked, texts, strict=False)))
    rows = {str(row["allocation_key"]): row for row in await allocator.sql("SELECT * FROM work_results")}
    assert [rows[unit.allocation_key]["error_message"] for unit in units] == texts
    assert [json.loads(rows[unit.allocation_key]["applied_settings"]) for unit in units] == [
        {text or "name": text} for text in texts
    ]
    assert [rows[unit.allocation_key]["block_type"] for unit in blocked] == texts[:-1]


async def test_the_client_of_each_call_is_recorded_with_its_own_results(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=1000)
    units = await allocator.take(40)

    async def submit(number: int) -> None:
        client = work_pb2.ClientIdentity(
            client_id=f"pc-{number}",
            instance_number=number,
            user_folder_number=number + 1,
            client_ip=f"10.0.0.{number}",
        )
        request = work_pb2.SubmitResultsRequest(client=client, results=[result(unit) for unit in units[number::8]])
        await allocator.work.SubmitResults(request, metadata=allocator.worker)

    # They share batches.
    await asyncio.gather(*map(submit, range(8)))
    rows = await allocator.sql(
        """SELECT r.allocation_key, r.client_id, r.client_ip, r.instance_number, a.user_folder_number
        FROM work_results r JOIN client_activity_logs a USING (allocation_key, client_id, client_ip, instance_number)"""
    )
    assert {str(row["allocation_key"]): tuple(row)[1:] for row in rows} == {
        unit.allocation_key: (f"pc-{n % 8}", f"10.0.0.{n % 8}", n % 8, n % 8 + 1) for n, unit in enumerate(units)
    }


async def test_a_batch_of_every_kind_is_answered_one_by_one(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=1000)
    units = await allocator.take(255)
    strange = result(units[0])
    strange.lease.allocation_key = str(uuid.UUID(int=1))
    wanted = [1 + number % 3 for number in range(255)]
    given = [result(unit, outcome) for unit, outcome in zip(units, wanted, strict=True)]
    answers = await allocator.submit(*given, strange)
    assert [answer.disposition for answer in answers[:-1]] == [RECORDED] * 255
    assert answers[-1].error.reason == "ALLOCATION_NOT_FOUND"
    assert [answer.allocation_key for answer in answers[:-1]] == [unit.allocation_key for unit in units]
    counters = await allocator.tracking(slot.slot_id)
    assert (counters["succeeded"], counters["failed"], counters["blocked"]) == (85, 85, 85)
    await allocator.check_invariants()


async def test_many_streams_of_batches_over_shared_slots_count_each_result_once(allocator: Allocator) -> None:
    for number in range(5):
        await allocator.slot(daily_quota=1000, target=f"shop-{number}")
    batches = await asyncio.gather(*(allocator.take(32, client=f"pc-{number}") for number in range(16)))
    # Every batch is sent twice at once, and by turns forwards and backwards, so that their days lock in any order.
    turns = [list(map(result, batch))[:: -1 if number % 2 else 1] for number, batch in enumerate(batches)]
    answers = await asyncio.gather(*(allocator.submit(*batch) for batch in turns + turns))
    assert all(answer.disposition == RECORDED for batch in answers for answer in batch)
    assert answers[:16] == answers[16:]
    assert len(await allocator.sql("SELECT FROM work_results")) == 512
    assert len(await allocator.sql("SELECT FROM client_activity_logs")) == 512
    await allocator.check_invariants()


async def test_nothing_of_a_batch_is_recorded_when_a_part_of_it_cannot_be(allocator: Allocator) -> None:
    slot = await allocator.slot()
    units = await allocator.take(3)
    # As if the products' table failed.
    await allocator.sql("ALTER TABLE product_results ADD CONSTRAINT broken CHECK (product_id <> 'p2') NOT VALID")
    results = [result(unit, products=[work_pb2.Product(product_id=f"p{n}")]) for n, unit in enumerate(units)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocator.submit(*results)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    for table in ("work_results", "product_results", "client_activity_logs", "work_allocations"):
        assert not await allocator.sql(f"SELECT FROM {table}")
    assert (await allocator.tracking(slot.slot_id))["succeeded"] == 0
    await allocator.sql("ALTER TABLE product_results DROP CONSTRAINT broken")
    assert [answer.disposition for answer in await allocator.submit(*results)] == [RECORDED] * 3
    await allocator.check_invariants()


def _set(**values: Any) -> Callable[[work_pb2.WorkResult], None]:
    def change(message: work_pb2.WorkResult) -> None:
        for name, value in values.items():
            if hasattr(value, "SerializeToString"):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)

    return change


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("exit_signal", _set(exit_signal=4)),
        ("exit_signal", _set(exit_signal=-1)),
        ("crawl_delay", _set(crawl_delay=Duration(seconds=3601))),
        ("crawl_delay", _set(crawl_delay=Duration(seconds=-1))),
        ("crawl_delay", _set(crawl_delay=Duration(seconds=2**62))),
        ("retry_after", _set(retry_after=Duration(seconds=86_400, nanos=1_000_000))),
        ("retry_after", _set(retry_after=Duration(nanos=-1_000_000))),
        ("error_message", _set(error_message="a\x00b")),
        ("block_type", _set(outcome=3, block_type="")),
        ("block_type", _set(outcome=3, block_type="x" * 65)),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_recorded(
    allocator: Allocator, field: str, change: Callable[[work_pb2.WorkResult], None]
) -> None:
    await allocator.slot()
    units = await allocator.take(2)
    wrong = result(units[1])
    change(wrong)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocator.submit(result(units[0]), wrong)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    faults = error_details_pb2.BadRequest()
    assert any(detail.Unpack(faults) for detail in status.details)
    assert [fault.field for fault in faults.field_violations] == [f"results[1].{field}"]
    assert not await allocator.sql("SELECT FROM work_results")
    assert not await allocator.sql("SELECT FROM targets")
