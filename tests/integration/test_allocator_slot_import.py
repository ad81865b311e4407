"""Slots imported from files into a real allocator."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from muster import Client, InvalidField, RetryPolicy, SlotExists
from muster.slot_import import ImportedSlot
from muster.slots import Slots

from services.call import Role
from tests.support.allocator import Allocator
from tests.support.services import StartService

HEADER = "external_id,keyword,start_date,end_date,daily_quota,target,without_exit,pacing,exit_provider,setting.pages\n"
DAYS = "2020-01-01,2099-12-31"


@dataclass(frozen=True, slots=True)
class Intake:
    """Who imports, and where to."""

    slots: Slots
    allocator: Allocator

    async def count(self, table: str = "work_slots") -> int:
        """Returns how many rows a table has."""
        (row,) = await self.allocator.sql(f"SELECT count(*) FROM {table}")
        count: int = row["count"]
        return count


@pytest.fixture
async def intake(start_service: StartService) -> AsyncIterator[Intake]:
    """An operator's client and its allocator."""
    service = await start_service("allocator", leases={"sweep_seconds": 60})
    policy = RetryPolicy(call_seconds=20, total_seconds=30)
    async with Client(api_key=await service.key(Role.OPERATOR), allocator=service.address, policy=policy) as client:
        yield Intake(client.slots, await Allocator.of(service))


def rows_of(count: int, *, quota: int = 5, first: int = 0) -> io.BytesIO:
    """A CSV file of slots of several classes."""
    lines = (f"e{n},k{n},{DAYS},{quota},t{n % 3},yes,,,{n}\n" for n in range(first, first + count))
    return io.BytesIO((HEADER + "".join(lines)).encode())


async def outcome(
    answers: AsyncIterator[ImportedSlot], found: dict[int, ImportedSlot] | None = None
) -> dict[int, ImportedSlot]:
    """Returns the answers by row; they are put into `found` as they come."""
    found = {} if found is None else found
    async for answer in answers:
        assert answer.row not in found
        found[answer.row] = answer
    return found


async def test_bad_rows_are_answered_by_number_and_field_wherever_they_are_found(intake: Intake) -> None:
    lines = [
        f"a,k,{DAYS},5,shop,yes,,,4",
        f"b,k,{DAYS},many,shop,yes,,,4",  # found in the file
        f"c,k,{DAYS},0,shop,yes,,,4",  # found by the service
        f"d,k,{DAYS},5,shop,no,even,nobody,4",
        f"e,k,{DAYS},5,shop,yes,,vpn,4",
        f"a,k,{DAYS},5,shop,yes,,,4",
        "f,k",
        f'g,"k,{DAYS},5,shop,yes,,,4',
        "h,k,2021-01-01,2020-01-01,5,shop,yes,,,4",
        f"z,k,{DAYS},5,shop,yes,even,,4",
    ]
    answers = await outcome(intake.slots.import_csv(io.BytesIO((HEADER + "\n".join(lines) + "\n").encode())))
    refused = {
        row: (answer.external_id, str(answer.error)) for row, answer in answers.items() if answer.error is not None
    }
    assert sorted(answers) == list(range(2, 12))
    assert sorted(refused) == list(range(3, 11))
    for row, external_id, said in (
        (3, "b", "daily_quota: must be a whole number"),
        (4, "c", "spec.daily_quota"),
        (5, "d", "spec.exit_provider"),
        (6, "e", "spec.exit_provider"),
        (7, "a", "external_id: stands in row 2 already"),
        (8, "", "row: has 2 columns"),
        (9, "", "row: "),
        (10, "h", "spec.end_date"),
    ):
        assert refused[row][0] == external_id
        assert said in refused[row][1]
    assert all(isinstance(answer.error, InvalidField) for answer in answers.values() if answer.error)
    assert await intake.count() == 2
    stored = await intake.allocator.sql("SELECT settings::text, pacing FROM work_slots ORDER BY external_id")
    assert [(json.loads(row["settings"]), row["pacing"]) for row in stored] == [({"pages": 4}, 1), ({"pages": 4}, 2)]


async def test_an_import_can_be_repeated_and_tells_what_has_changed(intake: Intake) -> None:
    first = await outcome(intake.slots.import_csv(rows_of(1500)))
    assert len(first) == 1500
    assert all(answer.created for answer in first.values())
    assert await intake.count("daily_work_tracking") == 1500
    assert await intake.count("slot_classes") == 3
    # Longer by now: only what is new is made.
    again = await outcome(intake.slots.import_csv(rows_of(1600)))
    assert sum(answer.created for answer in again.values()) == 100
    assert {row: answer.slot_id for row, answer in again.items() if row in first} == {
        row: answer.slot_id for row, answer in first.items()
    }
    other = await outcome(intake.slots.import_csv(rows_of(3, quota=6)))
    assert all(isinstance(answer.error, SlotExists) for answer in other.values())
    # What was imported is handed out at once.
    for target in ("t0", "t1", "t2"):
        await intake.allocator.take(3, target=target)


async def test_the_same_rows_from_two_sides_at_once_make_each_slot_once(intake: Intake) -> None:
    one, other = await asyncio.gather(
        *(outcome(intake.slots.import_csv(rows_of(800, first=first))) for first in (0, 400))
    )
    assert all(answer.error is None for answer in (*one.values(), *other.values()))
    assert await intake.count() == await intake.count("daily_work_tracking") == 1200
    made = [answer.slot_id for answer in (*one.values(), *other.values()) if answer.created]
    assert len(made) == len(set(made)) == 1200


async def test_an_import_that_was_given_up_is_finished_by_the_next(intake: Intake) -> None:
    answers = intake.slots.import_csv(rows_of(1200))
    async for answer in answers:
        if answer.row > 100:
            break
    await answers.aclose()  # type: ignore[attr-defined]
    again = await outcome(intake.slots.import_csv(rows_of(1200)))
    assert len(again) == 1200
    assert all(answer.error is None for answer in again.values())
    assert await intake.count() == await intake.count("daily_work_tracking") == 1200


async def test_a_run_of_refused_rows_longer_than_the_window_does_not_stop_the_stream(intake: Intake) -> None:
    good = (
        '{"external_id": "%s", "keyword": "k", "start_date": "2020-01-01", "end_date": "2020-01-02", "daily_quota": 1}'
    )
    lines = [good % "a", *(["{"] * 2500), good % "b"]
    answers = await outcome(intake.slots.import_jsonl(io.BytesIO("\n".join(lines).encode())))
    assert len(answers) == 2502
    assert [row for row, answer in answers.items() if answer.created] == [1, 2502]


async def test_a_file_that_breaks_off_is_told_and_what_went_before_is_answered(intake: Intake) -> None:
    class Broken(io.BytesIO):
        lines: Iterator[bytes] = iter(rows_of(10).readlines())

        def readline(self, size: int | None = -1) -> bytes:
            for line in self.lines:
                return line
            raise OSError("the disk is gone")

    answered: dict[int, ImportedSlot] = {}
    with pytest.raises(OSError, match="the disk is gone"):
        await outcome(intake.slots.import_csv(Broken()), answered)
    assert all(answer.error is None for answer in answered.values())
    assert await intake.count() in range(len(answered), 11)
