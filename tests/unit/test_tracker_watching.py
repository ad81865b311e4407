"""Watchers in memory: whatever happens, they hold what stands; and what they cost while they do not read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from session_tracker import pieces
from session_tracker.clock import Clock
from session_tracker.filters import Filter
from session_tracker.metrics import WATCH_LAG, WATCH_MERGED
from session_tracker.pieces import Span, View
from session_tracker.sessions import State
from tests.support.watched_memory import WALL, Tracker, Watcher, comparable


@pytest.fixture(params=[12, 4000], ids=["many pieces", "one piece"])
def piece_weight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cuts what six sessions fill into several pieces, between which much happens; or into one, as usual."""
    monkeypatch.setattr(pieces, "_PIECE_WEIGHT", request.param)
    return int(request.param)


NAMES = st.sampled_from([f"s{number}" for number in range(6)])
FILTERS = (
    Filter(),
    Filter(states=frozenset({State.RUNNING, State.STALLED})),
    Filter(states=frozenset({State.PAUSED, State.COMPLETED})),
    Filter(stage="list"),
    Filter(slot_id="slot-0"),
    Filter(client_id="client-1", tag="odd"),
)
WISHES = st.tuples(st.sampled_from(FILTERS), st.booleans())
STEPS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.integers(0, 1)),
    st.tuples(st.just("report"), st.lists(NAMES, min_size=1, max_size=4, unique=True), st.sampled_from([0, 2, 3, 4])),
    st.tuples(st.just("page"), st.lists(NAMES, min_size=1, max_size=6, unique=True), st.integers(1, 60)),
    st.tuples(st.just("stage"), NAMES, st.sampled_from(["list", "detail"])),
    st.tuples(st.just("end"), NAMES, st.just(0)),
    st.tuples(st.just("drop"), NAMES, st.just(0)),
    st.tuples(st.just("pass"), st.sampled_from([0.01, 1.5, 31.0, 61.0, 121.0, 700.0]), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, 4), st.integers(1, 3)),
    st.tuples(st.just("read"), st.integers(0, 4), st.integers(1, 3)),
    st.tuples(st.just("leave"), st.integers(0, 4), st.just(0)),
)


# Long runs: watchers fall behind only when much happens between what they read.
@given(steps=st.lists(STEPS, min_size=30, max_size=80), wishes=st.lists(WISHES, min_size=2, max_size=2))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_watchers_hold_what_stands(
    piece_weight: int, steps: list[tuple[str, Any, Any]], wishes: list[tuple[Filter, bool]]
) -> None:
    async def run() -> None:
        tracker = Tracker()
        # Several with the same wish share what is encoded, each at its own pace.
        one, other = (tracker.wish(wanted, packed=packed) for wanted, packed in wishes)
        watchers = [Watcher(tracker, wish) for wish in (one, one, one, other, other)]
        for step in steps:
            act(tracker, step)
            if step[0] == "read":
                for _ in range(step[2]):
                    await watchers[step[1]].read()
            elif step[0] == "leave":
                await watchers[step[1]].leave()
        # Two that match all filters between them: who has been told of them has been told of all before.
        tracker.start("last-1", slot_id="slot-0", client_id="client-1", tags=("odd",))
        tracker.start("last-2", slot_id="slot-0", client_id="client-1", tags=("odd",))
        tracker.report("last-1", page=1, stage="list")
        tracker.report("last-2", page=1, stage="list", state=3)
        for watcher in watchers:
            paused = watcher.wish.filter.states and State.PAUSED in watcher.wish.filter.states
            await watcher.read_past("last-2" if paused else "last-1")
        for watcher in watchers:
            assert {name: comparable(session) for name, session in watcher.held.items()} == watcher.expected()
            await watcher.leave()
        assert not tracker.feeds.open
        assert not tracker.organization.changes.watched

    asyncio.run(run())


def act(tracker: Tracker, step: tuple[str, Any, Any]) -> None:
    kind, what, how = step
    match kind, what:
        case "start", str(name):
            number = int(name[1:])
            tags = ("odd",) if number % 2 else ("even", "red")
            tracker.start(name, slot_id=f"slot-{(number + how) % 2}", client_id=f"client-{number % 3}", tags=tags)
        case "report", list(names):
            tracker.report(*names, state=how, page=tracker.sequence % 40)
        case "page", list(names):
            tracker.report(*names, page=how)
        case "stage", str(name):
            tracker.report(name, stage=how, page=tracker.sequence)
        case "end", str(name):
            tracker.organization.complete(name, 7, State.COMPLETED)
        case "drop", str(name):
            tracker.organization.drop(name)
        case "pass", float(seconds):
            tracker.passes(seconds)


async def test_a_change_is_encoded_once_for_all_who_stand_at_the_same_place() -> None:
    tracker = Tracker()
    names = [f"s{number}" for number in range(50)]
    for name in names:
        tracker.start(name)
    watchers = [Watcher(tracker, tracker.wish(packed=True)) for _ in range(20)]
    streams: list[set[int]] = []
    for page in range(5):
        datas = []
        for watcher in watchers:
            if watcher.stream is None:
                watcher.stream = tracker.watching.answers(watcher.wish, "", 0)
            datas.append(asyncio.ensure_future(anext(watcher.stream)))
        tracker.report(*names, page=page + 1)
        streams.append({id(data) for data in await asyncio.gather(*datas)})
    assert [len(stream) for stream in streams] == [1] * 5
    for watcher in watchers:
        await watcher.leave()


async def test_counters_come_packed_and_all_else_in_full() -> None:
    tracker = Tracker()
    tracker.start("a", slot_id="slot")
    tracker.start("b")
    packed, plain = Watcher(tracker, tracker.wish(packed=True)), Watcher(tracker, tracker.wish())
    for watcher in (packed, plain):
        await watcher.read()
        await watcher.read()
    tracker.report("a", "b", page=1)
    await packed.read()
    assert {session.session_id for session in packed.answers[-1].sessions} == {"a", "b"}, "both entered a state"
    tracker.seconds += 0.25
    tracker.report("a", page=2)
    tracker.report("b", page=2, stage="list")
    await packed.read()
    answer = packed.answers[-1]
    assert [session.session_id for session in answer.sessions] == ["b"]
    assert list(answer.packed.number) == [packed.held["a"].number]
    assert (packed.held["a"].current_page, packed.held["a"].products_found) == (2, 4)
    while plain.answers[-1].offset < answer.offset:
        await plain.read()
    assert all(not seen.packed.number for seen in plain.answers)
    assert comparable(plain.held["a"]) == comparable(packed.held["a"])
    # One that comes later has seen neither.
    late = Watcher(tracker, tracker.wish(packed=True))
    await late.read()
    assert sorted(session.session_id for session in late.answers[0].sessions) == ["a", "b"]
    for watcher in (packed, plain, late):
        await watcher.leave()


async def test_one_that_missed_turns_is_told_of_what_matches_no_more() -> None:
    tracker = Tracker()
    wish = tracker.wish(Filter(states=frozenset({State.RUNNING})), packed=True)
    slow, quick = Watcher(tracker, wish), Watcher(tracker, wish)
    tracker.start("a")
    tracker.start("b")
    tracker.report("a", "b", page=1)
    for watcher in (slow, quick):
        await watcher.read()
    tracker.report("a", page=2, state=3)
    await quick.read()
    for page in (3, 4):
        tracker.report("b", page=page)
        await quick.read()
    assert set(slow.held) == {"a", "b"}
    await slow.read_past("b")
    assert len(slow.answers) < len(quick.answers)
    for watcher in (slow, quick):
        assert set(watcher.held) == {"b"}
        assert watcher.held["b"].current_page == 4
        await watcher.leave()


async def test_one_that_came_back_is_told_when_what_it_held_all_along_matches_no_more() -> None:
    tracker = Tracker()
    watcher = Watcher(tracker, tracker.wish(Filter(states=frozenset({State.RUNNING}))))
    tracker.start("a")
    tracker.report("a", page=1)
    await watcher.read()
    await watcher.leave()
    assert await watcher.read()
    assert not watcher.answers[-1].snapshot
    tracker.report("a", page=2, state=3)
    await watcher.read_past("a")
    assert not watcher.held
    await watcher.leave()


def test_what_is_shown_for_what_came_after_the_turn_is_known_to_be_held() -> None:
    tracker = Tracker()
    clock = Clock(lambda: tracker.seconds, lambda: WALL)
    organization = tracker.organization
    view = View(organization, Filter(states=frozenset({State.RUNNING})), lambda piece: b"", clock, packed=False)
    tracker.start("a")
    tracker.report("a", page=1)
    view.matching()
    tracker.report("a", page=2, state=3)
    span = Span(view, 1, 2, 1, view.concerned({"a"}, 2))
    assert span.length == 1
    tracker.report("a", page=3)
    assert not span.part(0).empty, "it runs again by the time that this is encoded"
    tracker.report("a", page=4, state=3)
    assert view.concerned({"a"}, 4) == ["a"]


async def test_forecasts_come_with_packed_changes_at_times() -> None:
    tracker = Tracker()
    names = [f"s{number}" for number in range(64)]
    for name in names:
        tracker.start(name, stage="list")
    watcher = Watcher(tracker, tracker.wish(packed=True))
    for page in range(1, 41):
        tracker.seconds += 0.5
        tracker.report(*names, page=page)
        await watcher.read()
    await watcher.read_past(names[0])
    in_full = [len(answer.sessions) for answer in watcher.answers[3:]]
    # In 19 s each came once or twice in full, which is not at once: 64 sessions over 20 answers.
    assert 64 <= sum(in_full) <= 2 * 64
    assert max(in_full) < 10
    assert {session.pages_per_second for session in watcher.held.values()} == {2.0}
    await watcher.leave()


async def test_one_that_does_not_read_costs_nothing_more_however_much_happens() -> None:
    tracker = Tracker()
    names = [f"s{number:04}" for number in range(1200)]
    for name in names:
        tracker.start(name)
    slow, quick = Watcher(tracker, tracker.wish()), Watcher(tracker, tracker.wish())
    while len(quick.held) < len(names):
        await quick.read()
    await slow.read()
    merged, (feed,) = WATCH_MERGED._value.get(), tracker.feeds.open.values()
    sizes = []
    for page in range(1, 21):
        tracker.report(*names, page=page)
        while quick.held[names[-1]].current_page < page or quick.offset < tracker.organization.changes.offset:
            await quick.read()
        sizes.append(feed.kept_bytes)
    assert max(sizes) < 4 * 1024 * 1024
    assert len(slow.held) == 250
    while not (len(slow.held) == 1200 and all(session.current_page == 20 for session in slow.held.values())):
        assert await slow.read()
    # What was left of the snapshot, and the latest of each: not the twenty states in between.
    assert len(slow.answers) <= 11
    assert WATCH_MERGED._value.get() - merged == 19 * 1200
    await slow.leave()
    await quick.leave()


async def test_watchers_are_told_of_rebuilding_without_a_change() -> None:
    tracker = Tracker()
    tracker.start("a")
    watcher = Watcher(tracker, tracker.wish(Filter(slot_id="other")))
    await watcher.read()
    assert not watcher.rebuilding
    for rebuilding in (True, False):
        tracker.organization.store_rebuilding = rebuilding
        tracker.organization.changes.stirred.set()
        while watcher.rebuilding != rebuilding:
            await watcher.read()
    assert len(watcher.answers) == 3
    await watcher.leave()


async def test_the_lag_is_measured_from_the_report() -> None:
    tracker = Tracker()
    tracker.start("a")
    watcher = Watcher(tracker, tracker.wish(packed=True))
    await watcher.read()
    tracker.report("a", page=1)
    await watcher.read()
    tracker.report("a", page=2)
    tracker.seconds += 3.0
    before = WATCH_LAG._sum.get()
    await watcher.read()
    # What is noted when the transport has taken the answer, and asks for the next.
    await watcher.read()
    assert WATCH_LAG._sum.get() - before == pytest.approx(3.0)
    await watcher.leave()


async def test_a_turn_that_fails_ends_its_watchers(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    tracker.start("a")
    watcher = Watcher(tracker, tracker.wish())
    await watcher.read()
    assert not await watcher.read()

    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(View, "concerned", fails)
    tracker.report("a", page=1)
    with pytest.raises(RuntimeError, match="broken"):
        await watcher.read()


async def test_draining_ends_those_who_wait_and_those_who_are_busy() -> None:
    tracker = Tracker()
    waiting, busy = Watcher(tracker, tracker.wish()), Watcher(tracker, tracker.wish(interval=30.0))
    for watcher in (waiting, busy):
        await watcher.read()
    assert not await waiting.read()
    tracker.drain()
    for watcher in (waiting, busy):
        assert watcher.stream is not None
        reading = watcher.reading or asyncio.ensure_future(anext(watcher.stream))
        watcher.reading = None
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(5):
                await reading
    assert not tracker.feeds.open
