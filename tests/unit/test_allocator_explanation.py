"""When to ask again, how exits bound units, and the gauge of the free capacity."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from allocator.blockers import STEP, BlockerKind, remedy, retry_seconds
from allocator.capacity import Capacity
from allocator.failures import Failures
from allocator.packages import AssignedPersona, Demand, Package, Task, Terms
from allocator.personas import Personas, PersonaStoreUnavailable
from allocator.slots import PersonaNeed
from allocator.standing import ANY_NEED, CoolingExits, RegionExits, SlotGroup, Supply
from services.errors import DatabaseUnavailable

_NOW = datetime(2026, 1, 2, tzinfo=UTC)


def _group(units: int = 5, **values: Any) -> SlotGroup:
    given: dict[str, Any] = {
        "kind": 0,
        "target": "",
        "without_exit": False,
        "exit_region": "",
        "exit_provider": "",
        "persona_need": "",
        "slots": 1,
        "units": units,
        "room": None,
        "until": None,
        "examples": (),
        "targets": (),
        **values,
    }
    return SlotGroup(**given)


def _region(region: str, room: int, *, usable: int = 1, enabled: int = 1) -> RegionExits:
    return RegionExits(region, 2, enabled, usable, room, None, (), ())


def _supply(regions: Sequence[RegionExits] = (), cooling: Sequence[CoolingExits] = (), **values: Any) -> Supply:
    given: dict[str, Any] = {"failing_sources": frozenset(), "failing_needs": frozenset(), **values}
    return Supply(regions, cooling, **given)


@pytest.mark.parametrize("kind", BlockerKind)
def test_every_blocker_has_its_step_its_remedy_and_a_wait_within_bounds(kind: BlockerKind) -> None:
    assert kind in STEP
    assert remedy(kind)
    for seconds in (None, -5.0, 0.01, 3.0, 3e6):
        until = None if seconds is None else _NOW + timedelta(seconds=seconds)
        for returning in (True, False):
            assert 0.1 <= retry_seconds(kind, until, _NOW, returning=returning) <= 60


def test_a_wait_follows_what_is_known() -> None:
    later = _NOW + timedelta(seconds=20)
    assert retry_seconds(BlockerKind.PACED, later, _NOW, returning=True) == 20
    # A use may come back before the window ends.
    assert retry_seconds(BlockerKind.EXIT_EXHAUSTED, later, _NOW, returning=True) == 2
    assert retry_seconds(BlockerKind.EXIT_EXHAUSTED, _NOW + timedelta(seconds=1), _NOW, returning=True) == 1
    assert retry_seconds(BlockerKind.QUOTA_EXHAUSTED, None, _NOW, returning=True) == 2
    assert retry_seconds(BlockerKind.QUOTA_EXHAUSTED, None, _NOW, returning=False) == 15


def test_units_fit_into_the_exits_of_each_region_and_of_all() -> None:
    supply = _supply([_region("eu", 4), _region("us", 6)])
    assert supply.units([_group(3)]) == 3
    assert supply.units([_group(30)]) == 10
    assert supply.units([_group(30, exit_region="eu")]) == 4
    assert supply.units([_group(30, exit_region="eu"), _group(2)]) == 6
    assert supply.units([_group(30, exit_region="eu"), _group(30, exit_region="us"), _group(30)]) == 10
    assert supply.units([_group(30, without_exit=True), _group(1, exit_provider="vpn")]) == 31


def test_units_fit_into_the_room_of_their_target() -> None:
    groups = [
        _group(4, target="shop", room=5, without_exit=True),
        _group(4, target="shop", room=5, exit_provider="vpn"),
    ]
    assert _supply().units(groups) == 5
    assert _supply().units([*groups, _group(4, target="news", without_exit=True)]) == 9


def test_exits_that_cool_for_one_target_serve_the_others() -> None:
    cooling = [CoolingExits("shop", "eu", 1, 4, _NOW, ())]
    supply = _supply([_region("eu", 4), _region("us", 6, usable=0, enabled=1)], cooling)
    assert supply.blocker(_group(target="shop")) is BlockerKind.EXIT_COOLING
    assert supply.blocker(_group(target="news")) is None
    assert supply.blocker(_group(target="news", exit_region="us")) is BlockerKind.EXIT_EXHAUSTED
    assert supply.blocker(_group(target="news", exit_region="asia")) is BlockerKind.NO_EXIT
    assert supply.blocker(_group(target="shop", without_exit=True)) is None


def test_what_failed_a_moment_ago_blocks_who_needs_it() -> None:
    supply = _supply(failing_sources=frozenset({("vpn", "eu")}), failing_needs=frozenset({"need"}))
    assert supply.blocker(_group(exit_provider="vpn", exit_region="eu")) is BlockerKind.EXIT_UNAVAILABLE
    assert supply.blocker(_group(exit_provider="vpn")) is None
    asked = _supply(failing_sources=frozenset({("vpn", "eu")}), region="eu")
    assert asked.blocker(_group(exit_provider="vpn")) is BlockerKind.EXIT_UNAVAILABLE
    assert supply.blocker(_group(without_exit=True, persona_need="need")) is BlockerKind.NO_PERSONA
    assert supply.blocker(_group(without_exit=True, persona_need="other")) is None
    away = _supply(failing_needs=frozenset({ANY_NEED}))
    assert away.blocker(_group(without_exit=True, persona_need="other")) is BlockerKind.PERSONA_STORE_UNAVAILABLE
    assert away.blocker(_group(without_exit=True)) is None


def test_a_failure_is_avoided_for_a_moment_and_told_for_longer_or_until_it_ends() -> None:
    now = 0.0
    failures: Failures[str] = Failures(clock=lambda: now)
    own, other = UUID(int=1), UUID(int=2)
    failures.failed(own, ("a", "b"))
    assert failures.avoided(own) == failures.told(own) == {"a", "b"}
    assert not failures.avoided(other) | failures.told(other)
    failures.succeeded(own, ("a", "c"))
    # One persona was had, and the next may not be.
    assert failures.avoided(own) == {"a", "b"}
    assert failures.told(own) == {"b"}
    now = 1.5
    assert failures.avoided(own) == set()
    assert failures.told(own) == {"b"}
    now = 59.0
    failures.failed(own, ("a",))
    now = 61.0
    assert failures.told(own) == {"a"}


class _Personas:
    """All that personas are completed with: a store that has as many as it is given, and a database that agrees."""

    def __init__(self) -> None:
        self.is_configured = True
        self.is_away = False
        self.idle = 0

    async def check_out(
        self, organization_id: UUID, needs: Sequence[tuple[UUID, PersonaNeed]], duration_seconds: float
    ) -> list[AssignedPersona | None]:
        if self.is_away:
            raise PersonaStoreUnavailable
        given = min(self.idle, len(needs))
        self.idle -= given
        return [AssignedPersona(UUID(int=9), b"token", 1)] * given + [None] * (len(needs) - given)

    async def attach_personas(self, organization_id: UUID, given: Sequence[tuple[UUID, AssignedPersona]]) -> set[UUID]:
        return {key for key, _ in given}

    async def withdraw(
        self, organization_id: UUID, request_id: UUID, keys: Sequence[UUID], *, personas: Sequence[UUID]
    ) -> set[UUID]:
        return set()

    def outdate(self, organization_id: UUID, *, wake: bool) -> None:
        pass


async def test_what_is_told_of_personas_follows_the_last_try() -> None:
    house: Any = _Personas()
    personas = Personas(house, house, house, house, greatest_age_seconds=60.0)
    organization_id, need = UUID(int=1), PersonaNeed(region="kr")
    task = Task(UUID(int=2), "k", "", "", {}, need, "", "")
    terms = Terms(_NOW.date(), _NOW, _NOW)
    demand = Demand(UUID(int=3), b"", "pc-1", 0, 2, "", "", "")

    async def tried() -> frozenset[str]:
        packages = [Package(UUID(int=number), UUID(int=4), task, terms, demand) for number in (5, 6)]
        await personas.complete(organization_id, demand.request_id, packages)
        return personas.unavailable(organization_id)

    assert personas.unavailable(organization_id) == set()
    house.is_away = True
    assert await tried() == {ANY_NEED}
    house.is_away = False
    assert await tried() == {need.to_json()}
    house.idle = 2
    assert await tried() == set()
    # One of two goes without: there is none for the next.
    house.idle = 1
    assert await tried() == {need.to_json()}
    house.is_configured = False
    assert personas.unavailable(organization_id) == {ANY_NEED}


class _Fleet:
    """Organizations with as many units as their ids say; away while `away`."""

    def __init__(self) -> None:
        self.away = False

    async def organizations(self) -> list[UUID]:
        if self.away:
            raise DatabaseUnavailable("away", retry_after_seconds=1.0)
        return [UUID(int=3), UUID(int=4)]

    async def available_units(self, organization_id: UUID) -> int:
        return organization_id.int


async def test_the_gauge_sums_organizations_and_outlives_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allocator.capacity._ROUND_SECONDS", 0.0)
    fleet: Any = _Fleet()
    capacity = Capacity(fleet, fleet)
    await capacity.measure()
    assert REGISTRY.get_sample_value("muster_allocator_available_units") == 7
    fleet.away = True
    loop = asyncio.create_task(capacity.measure_for_ever())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not loop.done()
    assert REGISTRY.get_sample_value("muster_allocator_available_units") == 7
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop
