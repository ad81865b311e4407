"""Slots, exits and reports of the allocator, as operators use them."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from muster.allocator.v1 import exit_pb2, insight_pb2, slot_pb2, work_pb2

from tests.support.allocator import Allocator, lease, result, spec
from tests.support.services import StartService


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One with room for few exits."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}, exits={"limit": 3}))


async def test_the_documents_slot_is_kept_as_it_was_given(allocator: Allocator) -> None:
    flags = ("cart_click_enabled", "block_mercury", "block_image_cdn", "block_img1a_cdn")
    settings = {name: work_pb2.SettingValue(bool_value=False) for name in flags}
    settings["block_thumbnail_cdn"] = work_pb2.SettingValue(bool_value=True)
    given = spec(
        keyword="노트북",
        code="12345",
        start_date="2024-01-01",
        end_date="2024-01-31",
        daily_quota=100,
        settings=settings,
        is_active=True,
        weight=1,
        persona=slot_pb2.PersonaNeed(tags=["a", "b"], region="kr", min_aging_level=3, cool_down_seconds=60),
        external_id="site-1",
        pacing=slot_pb2.PACING_ASAP,
    )
    request = slot_pb2.CreateSlotRequest(request_id=str(uuid.uuid4()), spec=given)
    slot = (await allocator.slots.CreateSlot(request, metadata=allocator.operator)).slot
    assert slot.spec == given
    assert not slot.HasField("today")
    read = await allocator.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot.slot_id), metadata=allocator.operator)
    assert read.slot == slot


async def test_a_repeated_intake_makes_one_slot(allocator: Allocator) -> None:
    request = slot_pb2.CreateSlotRequest(request_id=str(uuid.uuid4()), spec=spec(external_id="x"))
    create = allocator.slots.CreateSlot
    first = (await create(request, metadata=allocator.operator)).slot
    assert (await create(request, metadata=allocator.operator)).slot.slot_id == first.slot_id
    request.request_id = str(uuid.uuid4())
    assert (await create(request, metadata=allocator.operator)).slot.slot_id == first.slot_id
    # Still the same intake after an operator has changed the slot.
    await allocator.update(first.slot_id, daily_quota=7)
    request.request_id = str(uuid.uuid4())
    assert (await create(request, metadata=allocator.operator)).slot.spec.daily_quota == 7
    request.request_id = str(uuid.uuid4())
    request.spec.keyword = "other"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await create(request, metadata=allocator.operator)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    request.request_id = str(uuid.uuid4())
    request.spec.external_id = ""
    assert (await create(request, metadata=allocator.operator)).slot.slot_id != first.slot_id


async def test_an_update_is_fenced_by_its_etag_and_leaves_history(allocator: Allocator) -> None:
    slot = await allocator.slot(settings={"block_mercury": work_pb2.SettingValue(bool_value=False)})
    new = {"block_mercury": work_pb2.SettingValue(bool_value=True)}
    changed = await allocator.update(slot.slot_id, "look", slot.etag, settings=new, priority=5)
    assert changed.etag != slot.etag
    assert changed.spec.settings["block_mercury"].bool_value
    # The same again changes nothing; another change on the old version is refused.
    assert (await allocator.update(slot.slot_id, "look", slot.etag, settings=new, priority=5)).etag == changed.etag
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.update(slot.slot_id, "", slot.etag, priority=6)
    assert refused.value.code() is grpc.StatusCode.ABORTED
    with pytest.raises(grpc.aio.AioRpcError, match="end_date"):
        await allocator.update(slot.slot_id, end_date="2019-01-01")
    history = await allocator.slots.ListSlotHistory(
        slot_pb2.ListSlotHistoryRequest(slot_id=slot.slot_id), metadata=allocator.operator
    )
    (entry,) = history.changes
    assert entry.reason == "look"
    assert uuid.UUID(entry.actor)
    assert json.loads(entry.difference_json) == {
        "settings": [{"block_mercury": False}, {"block_mercury": True}],
        "priority": [0, 5],
    }


async def test_todays_quota_follows_but_not_below_what_counts(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=5)
    await allocator.take(3)
    lowered = await allocator.update(slot.slot_id, daily_quota=1)
    assert (lowered.spec.daily_quota, lowered.today.quota, lowered.today.allocated) == (1, 3, 3)
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await allocator.update(slot.slot_id, daily_quota=4)
    assert len((await allocator.ask(5)).allocations) == 1
    await allocator.check_invariants()


async def test_lists_page_without_gap_or_repetition(allocator: Allocator) -> None:
    ids = [(await allocator.slot(keyword=f"k{number}", target="t" * (number % 2))).slot_id for number in range(7)]
    await allocator.update(ids[0], is_active=False)
    found: list[str] = []
    token = ""
    while True:
        request = slot_pb2.ListSlotsRequest(page_size=3, page_token=token)
        page = await allocator.slots.ListSlots(request, metadata=allocator.operator)
        found += [slot.slot_id for slot in page.slots]
        token = page.next_page_token
        if not token:
            break
    assert found == sorted(ids)
    cases = (
        ({"is_active": False}, 1),
        ({"target": "t"}, 3),
        ({"keyword_prefix": "k6"}, 1),
        ({"keyword_prefix": "%"}, 0),
    )
    for values, count in cases:
        request = slot_pb2.ListSlotsRequest(**values)
        assert len((await allocator.slots.ListSlots(request, metadata=allocator.operator)).slots) == count
    first = await allocator.slots.ListSlots(slot_pb2.ListSlotsRequest(page_size=3), metadata=allocator.operator)
    request = slot_pb2.ListSlotsRequest(page_size=3, page_token=first.next_page_token, target="t")
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await allocator.slots.ListSlots(request, metadata=allocator.operator)


async def test_an_import_answers_every_row_and_is_safe_to_repeat(allocator: Allocator) -> None:
    rows = [slot_pb2.ImportSlotsRequest(row=n, spec=spec(external_id=f"e{n}", keyword=f"k{n}")) for n in range(1200)]
    rows[5].spec.keyword = ""
    rows[6].spec.external_id = ""
    rows.append(slot_pb2.ImportSlotsRequest(row=5000, spec=rows[0].spec))
    rows.append(slot_pb2.ImportSlotsRequest(row=5001, spec=spec(external_id="e0", keyword="another")))

    async def stream() -> AsyncIterator[slot_pb2.ImportSlotsRequest]:
        for row in rows:
            yield row

    for created in (1198, 0):
        answers = {
            answer.row: answer async for answer in allocator.slots.ImportSlots(stream(), metadata=allocator.operator)
        }
        assert len(answers) == 1202
        assert sum(answer.created for answer in answers.values()) == created
        assert answers[5].error.reason == answers[6].error.reason == "INVALID_FIELD"
        assert answers[5000].slot_id == answers[0].slot_id
        assert answers[5001].error.reason == "SLOT_EXISTS"
        assert answers[5001].error.metadata["slot_id"] == answers[0].slot_id
    assert (await allocator.sql("SELECT count(*) FROM work_slots"))[0]["count"] == 1198


async def test_exits_are_imported_whole_or_not_at_all(allocator: Allocator) -> None:
    exits = await allocator.add_exits(2)
    assert [(exit_.spec.cap, exit_.enabled, exit_.use_count) for exit_ in exits] == [(20, True, 0)] * 2
    again = await allocator.add_exits(2, cap=7)
    assert [exit_.exit_id for exit_ in again] == [exit_.exit_id for exit_ in exits]
    assert {exit_.spec.cap for exit_ in again} == {7}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.add_exits(4)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    listed = await allocator.exits.ListExits(exit_pb2.ListExitsRequest(page_size=2), metadata=allocator.operator)
    assert sorted(exit_.exit_id for exit_ in exits) == [exit_.exit_id for exit_ in listed.exits]


async def test_a_cap_is_not_lowered_below_the_uses_that_count(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    await allocator.add_exits(1, cap=5)
    await allocator.take(3)
    (exit_,) = await allocator.add_exits(1, cap=2)
    assert (exit_.spec.cap, exit_.use_count) == (3, 3)


async def test_a_toggle_counts_afresh_once_and_old_leases_give_nothing_back(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    (exit_,) = await allocator.add_exits(1, cap=2)
    old = await allocator.take(2)
    request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id, reason="new address")
    for _ in range(2):
        toggled = (await allocator.exits.ToggleExit(request, metadata=allocator.operator)).exit
        assert (toggled.use_count, toggled.toggle_epoch) == (0, 1)
    (new,) = await allocator.take()
    await allocator.release(lease(old[0]))
    assert (await allocator.sql("SELECT use_count FROM exits"))[0]["use_count"] == 1
    await allocator.release(lease(new))
    assert (await allocator.sql("SELECT use_count FROM exits"))[0]["use_count"] == 0
    listed = await allocator.exits.ListExitToggles(
        exit_pb2.ListExitTogglesRequest(exit_id=exit_.exit_id), metadata=allocator.operator
    )
    (entry,) = listed.toggles
    assert (entry.reason, entry.use_count_before, entry.exit_id) == ("new address", 2, exit_.exit_id)
    request.reason = "other"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.exits.ToggleExit(request, metadata=allocator.operator)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_a_disabled_exit_is_not_handed_out(allocator: Allocator) -> None:
    await allocator.slot(without_exit=False)
    (exit_,) = await allocator.add_exits(1)
    for enabled in (False, True):
        request = exit_pb2.SetExitEnabledRequest(exit_id=exit_.exit_id, enabled=enabled)
        await allocator.exits.SetExitEnabled(request, metadata=allocator.operator)
        assert bool((await allocator.ask()).allocations) == enabled
    assert (await allocator.explain()).available_units == 19


async def test_reports_agree_with_what_was_done(allocator: Allocator) -> None:
    busy = await allocator.slot(keyword="busy", daily_quota=2)
    units = await allocator.take(2)
    lazy = await allocator.slot(keyword="lazy", daily_quota=10)
    units += await allocator.take(2, client="pc-2")
    await allocator.submit(result(units[0]), result(units[1], 3), result(units[2], 2))
    page = await allocator.insight.GetDashboard(
        insight_pb2.GetDashboardRequest(page_size=1), metadata=allocator.operator
    )
    assert [(row.slot_id, row.completion_rate) for row in page.rows] == [(busy.slot_id, 1.0)]
    rest = await allocator.insight.GetDashboard(
        insight_pb2.GetDashboardRequest(page_size=5, page_token=page.next_page_token), metadata=allocator.operator
    )
    assert [(row.slot_id, row.completion_rate) for row in rest.rows] == [(lazy.slot_id, 0.1)]
    totals = MessageToDict(await allocator.totals(), preserving_proto_field_name=True)
    today = totals.pop("today")
    assert totals == {"active_slots": "2", "leased": "1", "clients": "2", "clients_online": "2", "available_units": "8"}
    del today["work_date"]
    assert today == {"quota": 12, "allocated": 4, "succeeded": 1, "failed": 1, "blocked": 1}
    keys: list[str] = []
    token = ""
    while True:
        listed = await allocator.insight.ListAllocations(
            insight_pb2.ListAllocationsRequest(page_size=3, page_token=token), metadata=allocator.operator
        )
        keys += [record.allocation_key for record in listed.allocations]
        token = listed.next_page_token
        if not token:
            break
    assert keys == sorted((unit.allocation_key for unit in units), reverse=True)
    for status, count in ((1, 1), (2, 1), (4, 1), (5, 0)):
        request = insight_pb2.ListAllocationsRequest(status=insight_pb2.AllocationStatus.ValueType(status))
        listed = await allocator.insight.ListAllocations(request, metadata=allocator.operator)
        assert [record.status for record in listed.allocations] == [status] * count


async def test_an_update_needs_a_field_that_can_change(allocator: Allocator) -> None:
    slot = await allocator.slot()
    for paths in ([], ["external_id"], ["settings.x"], ["nonsense"]):
        request = slot_pb2.UpdateSlotRequest(slot_id=slot.slot_id, spec=spec(), update_mask=FieldMask(paths=paths))
        with pytest.raises(grpc.aio.AioRpcError, match="update_mask"):
            await allocator.slots.UpdateSlot(request, metadata=allocator.operator)
