"""Sessions of other replicas and roll-ups of slots, on an injected clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from session_tracker.commands import CommandKind
from session_tracker.errors import SessionAlreadyCompleted
from session_tracker.organizations import Organization, Organizations
from session_tracker.sessions import CheckpointPolicy, Lease, Registration, State
from tests.support.tracker_memory import ORGANIZATION, Hands, Report, organization
from tests.support.tracker_model import Ear


def two(hands: Hands, **settings: Any) -> tuple[Organization, Organization]:
    return organization(hands, **settings), organization(hands, **settings)


def test_a_mirror_shows_what_its_owner_knows_and_is_left_alone() -> None:
    hands = Hands()
    here, there = two(hands)
    lease = Lease(str(uuid4()), b"t" * 16)
    mine = here.start(Registration("s", stage="list", slot_id="slot", tags=("a",), lease=lease))
    here.report([Report(sequence=3, current_page=7, total_pages=9, products_found=5, errors_count=1)])
    assert there.apply_remote(here.export(mine), "here")
    mirror = there.get("s")
    assert here.export(mine) == there.export(mirror)
    assert there.totals() == replace(here.totals(), pages_per_second=there.totals().pages_per_second)
    assert (mirror.owner, there.live.moved) == ("here", []), "the owner renews"
    assert not there.apply_remote(here.export(mine), "here"), "no news"
    hands.seconds += 500
    there.mark_silence(mirror)
    assert mirror.state == State.RUNNING, "the owner judges its silence"
    here.mark_silence(mine)
    assert there.apply_remote(here.export(mine), "here"), "a change of the same sequence"
    assert (mirror.state, mirror.reason) == (State.LOST, "no report for 500 s")
    there.take_over(mirror)
    there.report([Report(sequence=4, current_page=8, total_pages=9)])
    assert there.live.moved == [mirror], "it renews what it took over"
    assert not there.apply_remote(here.export(mine), "here"), "what the other knew is older now"
    assert here.apply_remote(there.export(mirror), "there")
    assert (mine.current_page, mine.owner) == (8, "there")


def test_counters_alone_move_a_mirror_on_and_never_back() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s"))
    here.report([Report(sequence=1, current_page=1)])
    early = here.counters(mine)
    assert there.apply_counters("s", "here", early) is None, "unknown"
    there.apply_remote(here.export(mine), "here")
    here.report([Report(sequence=2, current_page=2)])
    assert there.apply_counters("s", "here", here.counters(mine)) is True
    assert there.apply_counters("s", "here", early) is False
    assert there.totals().pages == 2
    here.report([Report(sequence=3, state=State.PAUSED, current_page=2)])
    assert there.apply_counters("s", "here", here.counters(mine)) is None, "another state comes with its reason"


def test_a_report_makes_a_mirror_ones_own() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s"))
    here.report([Report(sequence=1, current_page=1)])
    there.apply_remote(here.export(mine), "here")
    there.report([Report(sequence=2, current_page=2)])
    there.settle()
    assert there.get("s").owner == ""
    assert here.apply_remote(there.export(there.get("s")), "there")
    assert mine.owner == "there"


def test_an_end_is_seen_everywhere_and_is_never_undone() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s"))
    here.report([Report(sequence=9, current_page=1)])
    before = here.export(mine)
    there.apply_remote(before, "here")
    there.complete("s", 5, State.STOPPED, reason="asked to")
    assert there.get("s").owner == "", "whoever commits the result makes it known"
    assert here.apply_remote(there.export(there.get("s")), "there")
    assert (mine.state, mine.current_page, mine.reason) == (State.STOPPED, 5, "asked to")
    assert not there.apply_remote(before, "here"), "a late record changes nothing"
    assert here.totals().live == there.totals().live == 0
    with pytest.raises(SessionAlreadyCompleted):
        here.start(Registration("s"))
    hands.seconds += 61
    here.expire()
    assert "s" not in here.sessions
    assert not here.apply_remote(before, "there"), "nor when it has left"


def test_what_a_checkpoint_says_yields_to_what_a_replica_knows() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s", checkpoint=CheckpointPolicy(every_pages=1, every_seconds=0.0)))
    here.report([Report(sequence=4, current_page=4)])
    record = here.export(mine)
    assert there.restore(record)
    restored = there.get("s")
    assert (restored.state, restored.rebuilding, there.rebuilding) == (State.LOST, True, True)
    assert not there.restore(record)
    assert not here.apply_remote(there.export(restored), "there"), "the checkpoint is no news to its owner"
    assert there.apply_remote(here.export(mine), "here")
    assert (restored.state, restored.rebuilding, there.rebuilding) == (State.RUNNING, False, False)
    assert restored.owner == "here"
    there.drop("s")
    assert not there.live.dropped, "the owner's checkpoint stands"


def test_a_command_given_anywhere_reaches_the_owners_stream() -> None:
    hands = Hands()
    here, there = two(hands)
    ear = Ear()
    mine = here.start(Registration("s"))
    here.report([Report(sequence=1)], ear)
    there.apply_remote(here.export(mine), "here")
    assert there.command(there.get("s"), CommandKind.SPEED_LIMIT, "polite", 12.0)
    here.report([Report(sequence=2)], ear)
    assert here.apply_remote(there.export(there.get("s")), "here"), "though what it says of counters is old"
    assert [(command.kind, command.pages_per_minute) for command in ear.heard] == [(CommandKind.SPEED_LIMIT, 12.0)]
    assert (mine.sequence, mine.owner, mine.rarities.pages_per_minute_limit) == (2, "", 12.0)
    assert here.report([Report(sequence=3)]).commands == ear.heard
    here.report([Report(sequence=4, acknowledged_command=ear.heard[0].number)])
    assert there.apply_remote(here.export(mine), "here")
    assert there.get("s").command is None
    assert here.report([Report(sequence=5)]).commands == []


def test_watchers_hear_of_an_acknowledgement_when_it_comes() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s"))
    here.report([Report(sequence=1)])
    there.apply_remote(here.export(mine), "here")
    mirror = there.get("s")
    assert here.command(mine, CommandKind.PAUSE, "wait")
    there.apply_remote(here.export(mine), "here")
    assert mirror.command is not None
    there.report([Report(sequence=2)])
    here.report([Report(sequence=2, acknowledged_command=mirror.command.number)])
    pending = there.changes.subscribe()
    # Of two reports with the same sequence the record of the one is not news, but what was carried out is.
    there.settle()
    there.report([Report(sequence=3)])
    there.changes.distribute()
    pending.clear()
    before, described = there.changes.offset, mirror.described
    assert there.apply_remote(here.export(mine), "here")
    assert there.get("s").command is None
    assert there.report([Report(sequence=4)]).commands == []
    there.changes.distribute()
    assert pending == {"s"}
    assert mirror.described > max(before, described), "and so do the other replicas"
    assert not there.apply_remote(here.export(mine), "here"), "no news any more"


def test_a_command_from_elsewhere_is_all_that_is_taken_with_it() -> None:
    hands = Hands()
    here, there = two(hands)
    mine = here.start(Registration("s", stage="list", checkpoint=CheckpointPolicy(1, 0.0)))
    here.report([Report(sequence=1, current_page=1)])
    assert there.restore(here.export(mine))
    assert here.command(mine, CommandKind.PAUSE, "wait")
    here.report([Report(sequence=2, current_page=2, stage="detail")])
    there.apply_command(here.export(mine))
    session = there.get("s")
    assert session.command == mine.command
    assert (session.rebuilding, session.state, session.stage, session.sequence) == (True, State.LOST, "list", 1)
    there.complete("s", 1)
    assert here.command(mine, CommandKind.PAUSE, "wait again")
    there.apply_remote(here.export(mine), "here")
    assert not there.live.commanded, "nobody is told what comes after the end"


def test_roll_ups_of_slots_and_of_the_fleet_equal_a_scan() -> None:
    hands = Hands()
    organizations = Organizations(organization(hands).live.config, hands.clock())
    tracker = organizations.of(ORGANIZATION)
    for number in range(6):
        tracker.start(Registration(f"s{number}", slot_id=("hats", "shoes", "")[number % 3]))
    for page in range(1, 4):
        hands.seconds += 1
        tracker.report([Report(f"s{n}", sequence=page, current_page=page * n, products_found=n) for n in range(6)])
    shoes = tracker.totals("shoes")
    assert (shoes.live, shoes.pages, shoes.products) == (2, 3 * 1 + 3 * 4, 1 + 4)
    assert shoes.by_state[State.RUNNING] == 2
    assert shoes.pages_per_second == pytest.approx((3 + 12) / 10)
    assert tracker.totals("nobody's").live == 0
    other = organizations.of(uuid4())
    other.start(Registration("s"))
    other.report([Report(sequence=1, current_page=10)])
    fleet = organizations.fleet()
    assert (fleet.live, fleet.pages) == (7, tracker.totals().pages + 10)
    for number in range(6):
        tracker.complete(f"s{number}", 99)
    assert tracker.totals("shoes").live == 0
    assert not tracker.live.slots, "a slot without live sessions costs nothing"
    assert (tracker.totals().pages, tracker.totals().products) == (0, 0)
