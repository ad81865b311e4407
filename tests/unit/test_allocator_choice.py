"""The choice in memory: shares, turns, priorities, exits, targets, and the turns of organizations."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

import pytest
from muster.allocator.v1 import work_pb2

from allocator.dealing import Dealer, Wish
from allocator.exit_pool import AvailableExit, ExitPool
from allocator.organization_share import OrganizationShare
from allocator.package_bytes import packages_bytes
from allocator.packages import AssignedExit, AssignedPersona, Demand, Package, Task, Terms
from allocator.reservation import Names
from allocator.slot_windows import AvailableSlot, ClassWindow, SlotClass, window_size
from services.varints import varint


def _window(
    slots: Iterable[AvailableSlot],
    *,
    whole: bool = True,
    target: str = "",
    without_exit: bool = True,
    region: str = "",
    provider: str = "",
    need: str = "",
) -> ClassWindow:
    window = ClassWindow(SlotClass(1, target, 0, without_exit, region, provider, need))
    window.show(slots, 0.0, whole=whole)
    return window


def _slots(count: int, *, room: int = 10, share: float = 10.0, first: int = 0) -> list[AvailableSlot]:
    return [AvailableSlot(uuid.UUID(int=first + number), share, 0, room) for number in range(count)]


def _exits(count: int, *, cap: int = 20, region: str = "kr") -> list[AvailableExit]:
    return [AvailableExit(uuid.UUID(int=number), region, cap, 0) for number in range(count)]


def test_few_slots_share_by_quota_and_weight_at_every_moment() -> None:
    light, heavy = AvailableSlot(uuid.UUID(int=1), 10.0, 0, 100), AvailableSlot(uuid.UUID(int=2), 30.0, 0, 300)
    picks = Dealer().deal([_window([light, heavy])], Wish(), 40, turn=16)
    assert Counter(pick.slot_id.int for pick in picks) == {1: 10, 2: 30}
    for seen in range(4, 40, 4):
        assert abs(sum(pick.slot_id.int == 1 for pick in picks[:seen]) - seen / 4) <= 1


def test_windows_of_one_priority_are_served_as_one() -> None:
    dealer = Dealer()
    windows = [_window(_slots(3, first=first)) for first in (0, 10, 20)]
    picks = dealer.deal(windows, Wish(), 9, turn=1)
    assert len({pick.slot_id for pick in picks}) == 9
    # More than there is, and nobody beyond its room.
    picks += dealer.deal(windows, Wish(), 1000, turn=1)
    assert set(Counter(pick.slot_id for pick in picks).values()) == {10}
    assert len(picks) == 90


def test_many_slots_give_turns_and_consecutive_units_come_from_different_ones() -> None:
    picks = Dealer().deal([_window(_slots(500))], Wish(), 256, turn=4)
    assert Counter(Counter(pick.slot_id for pick in picks).values()) == {4: 64}
    for at in range(0, 256, 32):
        assert len({pick.slot_id for pick in picks[at : at + 32]}) == 32


def test_every_slot_of_a_part_gives_one_turn_and_then_the_part_is_used_up() -> None:
    window = _window(_slots(100, room=50), whole=False)
    picks = Dealer().deal([window], Wish(), 1000, turn=2)
    assert set(Counter(pick.slot_id for pick in picks).values()) == {2}
    assert len(picks) == 200
    assert window.is_used_up


def test_turns_of_a_part_are_as_long_as_shares_say() -> None:
    slots = _slots(200, room=1000, share=10.0) + _slots(200, room=1000, share=30.0, first=1000)
    picks = Dealer().deal([_window(slots, whole=False)], Wish(), 10_000, turn=8)
    light = sum(pick.slot_id.int < 1000 for pick in picks)
    assert (light, len(picks) - light) == (200 * 4, 200 * 12)


def test_exits_are_used_evenly_and_never_above_their_caps() -> None:
    pool = ExitPool(_exits(10, cap=12))
    uses = Counter(exit_.exit_id for exit_ in iter(lambda: pool.take("", "", 16), None))
    assert set(uses.values()) == {12}
    assert not pool.has_room("", "")


def test_many_exits_take_turns_and_consecutive_units_leave_through_different_ones() -> None:
    pool = ExitPool(_exits(500, cap=100))
    taken = [pool.take("", "", 8) for _ in range(512)]
    assert Counter(Counter(id(exit_) for exit_ in taken).values()) == {16: 32}
    for at in range(0, 512, 16):
        assert len({id(exit_) for exit_ in taken[at : at + 16]}) == 16
    # The next batch takes others: the rows of this one may be held until its commit.
    pool.shuffle()
    assert not {id(exit_) for exit_ in taken} & {id(pool.take("", "", 8)) for _ in range(64)}


def test_regions_share_exits_and_targets_pass_over_those_that_cool_down() -> None:
    here, there = _exits(2, cap=3, region="kr"), [AvailableExit(uuid.UUID(int=9), "jp", 3, 0)]
    pool = ExitPool(here + there, {"shop": frozenset({here[0].exit_id})})
    assert {pool.take("kr", "shop", 1) for _ in range(3)} == {here[1]}
    assert pool.take("kr", "shop", 1) is None
    assert {pool.take("kr", "bank", 1) for _ in range(3)} == {here[0]}
    assert pool.has_room("", "bank")
    assert not pool.has_room("kr", "bank")
    pool.cool({"bank": frozenset({there[0].exit_id})})
    assert not pool.has_room("", "bank")
    assert pool.has_room("", "shop")


def test_a_class_without_an_exit_is_left_out_and_the_others_go_on() -> None:
    dealer = Dealer()
    dealer.exits = ExitPool(_exits(1, cap=2))
    windows = [_window(_slots(5), without_exit=False), _window(_slots(5, first=10))]
    picks = dealer.deal(windows, Wish(), 20, turn=1)
    assert sum(pick.exit is not None for pick in picks) == 2
    assert len(picks) == 20


def test_a_target_gets_what_it_lets_out_and_a_slot_without_target_is_its_own() -> None:
    dealer = Dealer()
    own = f"slot:{uuid.UUID(int=20)}"
    dealer.limit({"shop": 3, own: 1, "held": 0})
    windows = [
        _window(_slots(5), target="shop"),
        _window(_slots(5), target="held"),
        _window(_slots(2, first=20)),
    ]
    picks = dealer.deal(windows, Wish(), 100, turn=1)
    assert Counter(pick.slot_class.target for pick in picks) == {"shop": 3, "": 11}
    assert sum(pick.slot_id.int == 20 for pick in picks) == 1
    assert dealer.is_short


@pytest.mark.parametrize(
    ("wish", "kind", "admitted"),
    [
        (Wish(target="shop"), {"target": "shop"}, True),
        (Wish(target="shop"), {"target": "bank"}, False),
        (Wish(region="kr"), {"region": "kr"}, True),
        (Wish(region="kr"), {"region": ""}, True),
        (Wish(region="kr"), {"region": "jp"}, False),
        (Wish(needs=frozenset({"{}"})), {"need": ""}, True),
        (Wish(needs=frozenset({"*"})), {"need": '{"tags":[]}'}, False),
        (Wish(needs=frozenset({'{"tags":[]}'})), {"need": '{"tags":[]}'}, False),
        (Wish(providers=frozenset({("vpn", "")})), {"provider": "vpn"}, False),
        (Wish(providers=frozenset({("vpn", "")})), {"provider": "vpn", "region": "kr"}, True),
        (Wish(region="kr", providers=frozenset({("vpn", "kr")})), {"provider": "vpn"}, False),
    ],
)
def test_a_wish_admits_classes_that_may_serve_it(wish: Wish, kind: dict[str, str], admitted: bool) -> None:
    assert wish.admits(_window([], **kind)) is admitted  # type: ignore[arg-type]


def test_windows_are_smaller_the_more_of_them_are_read() -> None:
    assert [window_size(classes) for classes in (1, 4, 8, 256)] == [1024, 1024, 512, 16]


async def test_organizations_that_wait_take_turns_by_weight_whatever_their_backlog() -> None:
    heavy, light = uuid.uuid4(), uuid.uuid4()
    share = OrganizationShare(1, {heavy: 3.0})
    served: list[uuid.UUID] = []

    async def work(organization_id: uuid.UUID) -> None:
        async with share.turn(organization_id, 10):
            served.append(organization_id)

    async with share.turn(uuid.uuid4(), 1):
        tasks = [asyncio.create_task(work(heavy)) for _ in range(60)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(work(light)) for _ in range(20)]
        # One that gives up keeps no lane.
        given_up = asyncio.create_task(work(light))
        await asyncio.sleep(0)
        given_up.cancel()
    await asyncio.gather(*tasks)
    for seen in range(8, 80, 8):
        assert abs(served[:seen].count(light) - seen / 4) <= 1
    async with share.turn(light, 1):
        pass


def test_names_are_keys_of_now_in_order_with_tokens_that_differ() -> None:
    names = Names()
    made = [name for _ in range(3) for name in names.fresh(700)]
    keys, tokens = [key for key, _ in made], {token for _, token in made}
    assert {key.version for key in keys} == {7}
    assert {key.variant for key in keys} == {uuid.RFC_4122}
    assert len({*keys}) == len(tokens) == len(made)
    assert keys[:700] == sorted(keys[:700])
    assert abs((keys[0].int >> 80) / 1000 - datetime.now(UTC).timestamp()) < 5


def test_a_package_in_bytes_is_the_message_field_by_field() -> None:
    now = datetime(2026, 11, 20, 12, 0, 0, 123000, tzinfo=UTC)
    (key, token), slot, exit_id, persona = Names().fresh(1)[0], uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    task = Task(slot, "노트북" * 60, "12", "shop", {"flag": True, "n": -1, "x": 1.5, "t": "a" * 300}, None, "", "")
    demand = Demand(uuid.uuid4(), b"", "pc", 0, 2, "", "", f"00-{'a' * 32}-{'b' * 16}-01")
    packages = [
        Package(key, token, task, Terms(now.date(), now, now), demand),
        Package(
            key,
            token,
            task,
            Terms(now.date(), now, now),
            demand,
            AssignedExit(exit_id, "http://127.0.0.1:3128", "kr"),
            AssignedPersona(persona, b"t" * 16, 7),
        ),
    ]
    plain, full = work_pb2.AllocateWorkResponse.FromString(packages_bytes(packages, 300.0)).allocations
    assert (plain.allocation_key, plain.lease_token, plain.slot_id) == (str(key), token.bytes, str(slot))
    assert (plain.keyword, plain.code, plain.target, plain.work_date) == ("노트북" * 60, "12", "shop", "2026-11-20")
    assert (plain.expires_at.ToDatetime(tzinfo=UTC), plain.renewable_until.ToDatetime(tzinfo=UTC)) == (now, now)
    assert plain.lease_duration.seconds == 300
    assert {name: value.WhichOneof("kind") for name, value in plain.settings.items()} == {
        "flag": "bool_value",
        "n": "int_value",
        "x": "double_value",
        "t": "string_value",
    }
    assert plain.traceparent == f"00-{'a' * 32}-{key.hex[16:]}-01"
    assert not plain.HasField("exit")
    assert not plain.HasField("persona")
    assert full.exit == work_pb2.AssignedExit(exit_id=str(exit_id), endpoint="http://127.0.0.1:3128", region="kr")
    assert full.persona == work_pb2.AssignedPersona(persona_id=str(persona), lease_token=b"t" * 16, generation=7)


def test_lengths_are_written_seven_bits_a_byte() -> None:
    assert [varint(value) for value in (0, 127, 128, 300, 2**21)] == [
        b"\x00",
        b"\x7f",
        b"\x80\x01",
        b"\xac\x02",
        b"\x80\x80\x80\x01",
    ]
