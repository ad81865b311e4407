"""What of exits is plain arithmetic: the forecast's flow, the circuit of a provider, the form of an endpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from uuid import UUID

import pytest

from allocator.exit_forecast import WINDOW_SECONDS, Flow, Sample
from allocator.exit_providers import Circuit
from allocator.exits import CapMode, is_endpoint

ONE, TWO = UUID(int=1), UUID(int=2)


def sample(
    uses: int, *, mode: CapMode = CapMode.UNTIL_TOGGLE, epoch: int = 0, region: str = "", cap: int = 100
) -> Sample:
    return Sample(region, mode, cap, epoch, uses)


def test_nothing_is_known_before_the_second_look() -> None:
    flow = Flow()
    assert flow.pace("") == (0.0, 0.0)
    assert flow.seconds_to_empty() == math.inf
    flow.observe(100.0, {ONE: sample(50)})
    assert flow.pace("") == (0.0, 0.0)
    # What was used before it was first seen is no pace.
    flow.observe(160.0, {ONE: sample(50), TWO: sample(90)})
    assert flow.pace("") == (0.0, 60.0)
    assert flow.seconds_to_empty() == math.inf


def test_the_pool_is_empty_when_its_room_is_used_at_the_pace() -> None:
    flow = Flow()
    flow.observe(0.0, {ONE: sample(10), TWO: sample(0)})
    flow.observe(60.0, {ONE: sample(30), TWO: sample(10)})
    assert flow.pace("") == (30.0, 60.0)
    # 160 left at 30 a minute.
    assert flow.seconds_to_empty() == pytest.approx(320.0)


def test_uses_that_came_back_count_against_the_pace_and_never_make_it_negative() -> None:
    flow = Flow()
    flow.observe(0.0, {ONE: sample(40, mode=CapMode.CONCURRENT)})
    flow.observe(60.0, {ONE: sample(60, mode=CapMode.CONCURRENT)})
    flow.observe(120.0, {ONE: sample(50, mode=CapMode.CONCURRENT)})
    assert flow.pace("") == (5.0, 120.0)
    flow.observe(180.0, {ONE: sample(0, mode=CapMode.CONCURRENT)})
    assert flow.pace("") == (0.0, 180.0)
    assert flow.seconds_to_empty() == math.inf


def test_a_window_that_ended_is_a_refill_and_a_toggle_is_none() -> None:
    windowed, toggled = Flow(), Flow()
    for at, uses, epoch in ((0.0, 0, 0), (60.0, 60, 0), (120.0, 60, 1)):
        windowed.observe(at, {ONE: sample(uses, mode=CapMode.PER_WINDOW, epoch=epoch)})
        toggled.observe(at, {ONE: sample(uses, epoch=epoch)})
    # Both used 60 in each minute; the window gave 60 back by itself, and will again.
    assert windowed.pace("")[0] == 30.0
    assert toggled.pace("")[0] == 60.0


def test_only_the_window_is_looked_at() -> None:
    flow = Flow()
    flow.observe(0.0, {ONE: sample(0, cap=100_000)})
    flow.observe(15.0, {ONE: sample(9_000, cap=100_000)})
    for number in range(1, 62):
        flow.observe(15.0 + number * 15.0, {ONE: sample(9_000 + number, cap=100_000)})
    pace, observed = flow.pace("")
    assert WINDOW_SECONDS <= observed <= WINDOW_SECONDS + 15.0
    assert pace == pytest.approx(4.0)
    assert len(flow.moves) <= 62


def test_a_region_has_a_pace_of_its_own() -> None:
    flow = Flow()
    flow.observe(0.0, {ONE: sample(0, region="kr"), TWO: sample(0, region="jp")})
    flow.observe(60.0, {ONE: sample(6, region="kr"), TWO: sample(3, region="jp")})
    assert [flow.pace(region)[0] for region in ("kr", "jp", "us", "")] == [6.0, 3.0, 0.0, 9.0]


def test_an_empty_pool_is_empty_now_and_no_pool_never() -> None:
    flow = Flow()
    flow.observe(0.0, {ONE: sample(100)})
    assert flow.seconds_to_empty() == 0.0
    flow.observe(15.0, {})
    assert flow.seconds_to_empty() == math.inf


def test_a_disabled_exit_leaves_the_pool_without_being_a_use() -> None:
    flow = Flow()
    first = {ONE: sample(10), TWO: sample(10)}
    flow.observe(0.0, first)
    flow.observe(60.0, {ONE: replace(first[ONE], use_count=11)})
    assert flow.pace("")[0] == 1.0
    assert flow.pool() == (89, 100)


def test_a_circuit_opens_after_five_failures_in_a_row_and_lets_one_probe() -> None:
    now = [0.0]
    circuit = Circuit(3.0, lambda: now[0])

    def is_closed() -> bool:
        return circuit.is_closed

    for _ in range(4):
        circuit.failed()
    circuit.succeeded()
    for _ in range(4):
        circuit.failed()
    assert is_closed()
    assert not circuit.may_probe()
    circuit.failed()
    assert not is_closed()
    assert not circuit.may_probe()
    now[0] = 3.0
    assert [circuit.may_probe() for _ in range(3)] == [True, False, False]
    circuit.failed()
    assert not circuit.may_probe()
    now[0] = 6.0
    assert circuit.may_probe()
    circuit.give_up()
    assert circuit.may_probe()
    circuit.succeeded()
    assert is_closed()


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("http://127.0.0.1:3128", True),
        ("socks5://exits.example:65535", True),
        ("https://[2001:db8::1]:1", True),
        ("http://h:0", False),
        ("http://h:65536", False),
        ("http://user:secret@h:1", False),
        ("http://h:1/path", False),
        ("http://h:1\n", False),
        ("ftp://h:1", False),
        ("h:1", False),
    ],
)
def test_an_endpoint_is_scheme_host_and_port(value: str, good: bool) -> None:
    assert is_endpoint(value) is good
