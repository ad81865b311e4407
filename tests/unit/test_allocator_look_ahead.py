"""Reading ahead: what a batch will need is at hand before it asks, and nothing that is outdated is relied on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime
from typing import cast
from uuid import UUID

import pytest

from allocator.allocation_store import AllocationStore
from allocator.availability import OrganizationIndex
from allocator.dealing import Basics, Wish
from allocator.exit_pool import AvailableExit
from allocator.slot_windows import AvailableSlot, SlotClass
from services.errors import DatabaseUnavailable

_DAY = datetime(2026, 11, 20, tzinfo=UTC).date()
_PART = 1024


class _Store:
    """A class of very many slots, of which each reading shows the next part; counts the readings."""

    def __init__(self) -> None:
        self.readings = 0
        self.ended = 0
        self.fails = False
        self._class = SlotClass(1, "", 0, True, "", "", "")

    async def basics(self, organization_id: UUID) -> tuple[Basics, list[SlotClass]]:
        return Basics(work_date=_DAY), [self._class]

    async def exits_with_room(self, organization_id: UUID) -> list[AvailableExit]:
        return []

    async def windows(
        self, organization_id: UUID, work_date: date, places: Sequence[tuple[int, float, UUID]], size: int
    ) -> dict[int, tuple[list[AvailableSlot], tuple[float, UUID]]]:
        assert size == _PART
        self.readings += 1
        try:
            await asyncio.sleep(0)
            if self.fails:
                raise DatabaseUnavailable("away")
            first = self.readings * _PART
            slots = [AvailableSlot(UUID(int=first + number), 10.0, 0, 10) for number in range(_PART)]
            return {1: (slots, (0.0, slots[-1].slot_id))}
        finally:
            self.ended += 1


@pytest.fixture
def store() -> _Store:
    return _Store()


@pytest.fixture
async def index(store: _Store) -> AsyncIterator[OrganizationIndex]:
    index = OrganizationIndex(uuid.uuid4(), cast("AllocationStore", store))
    yield index
    await index.close()


async def _take(index: OrganizationIndex, units: int) -> set[int]:
    """Takes units as a batch does; returns the parts that they are of."""
    async with index.choosing:
        index.begin_batch()
        picks = await index.choose(Wish(), units, 1)
        index.look_ahead()
    assert len({pick.slot_id for pick in picks}) == units
    return {pick.slot_id.int // _PART for pick in picks}


async def _ended(store: _Store, readings: int) -> None:
    for _ in range(100):
        if store.ended == readings:
            break
        await asyncio.sleep(0)
    # Whoever waits for the reading goes on.
    await asyncio.sleep(0)
    assert (store.readings, store.ended) == (readings, readings)


async def test_the_next_part_is_read_when_half_of_one_is_used_and_no_batch_waits_for_it(
    index: OrganizationIndex, store: _Store
) -> None:
    assert await _take(index, 500) == {1}
    await _ended(store, 1)
    assert await _take(index, 100) == {1}
    await _ended(store, 2)
    # All that is left of the first part, and some of the next, which is at hand.
    assert await _take(index, 600) == {1, 2}
    assert store.readings == 2


async def test_a_part_that_was_read_before_a_change_is_not_relied_on(index: OrganizationIndex, store: _Store) -> None:
    await _take(index, 600)
    await _ended(store, 2)
    index.outdate()
    assert await _take(index, 100) == {3}


async def test_a_batch_reads_itself_when_reading_ahead_failed(index: OrganizationIndex, store: _Store) -> None:
    store.fails = True
    with pytest.raises(DatabaseUnavailable):
        await _take(index, 1)
    store.fails = False
    await _take(index, 600)
    store.fails = True
    await _ended(store, 3)
    store.fails = False
    assert len(await _take(index, 500)) == 2
