"""Slots of the allocator: digests that stay good, and fields that do not go together."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from allocator.slots import Pacing, SlotSpec, changed

SPEC = SlotSpec("laptop", date(2024, 1, 1), date(2024, 1, 31), 100, settings={"max_pages": 4})


def test_the_digest_of_a_slot_from_before_pacing_and_exits_is_as_it_was() -> None:
    # Taken with the release that knew neither.
    assert SPEC.sha256().hex() == "aa2fc1675d0e2bb821778c5db31d29837610b16d33a93ceb5addacbfcea9b9f6"
    others = [replace(SPEC, pacing=Pacing.EVEN), replace(SPEC, exit_region="kr"), replace(SPEC, exit_provider="vpn")]
    assert len({spec.sha256() for spec in (SPEC, *others)}) == 4


def test_a_difference_is_told_in_words() -> None:
    _, difference = changed(SPEC, {"pacing": Pacing.EVEN, "exit_region": "kr"})
    assert difference == '{"exit_region": ["", "kr"], "pacing": ["asap", "even"]}'


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, []),
        ({"exit_region": "kr", "exit_provider": "vpn"}, []),
        ({"without_exit": True, "exit_region": "kr"}, ["spec.exit_region"]),
        ({"without_exit": True, "exit_provider": "vpn"}, ["spec.exit_provider"]),
        ({"end_date": date(2023, 12, 31)}, ["spec.end_date"]),
    ],
)
def test_what_does_not_go_together(values: dict[str, object], fields: list[str]) -> None:
    found = replace(SPEC, **values).contradictions()  # type: ignore[arg-type]
    assert [violation.field for violation in found] == fields
