"""Watchers that come at once: how often a session is encoded for them, counted and not timed."""

from __future__ import annotations

from typing import Any

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker import packing
from session_tracker.filters import Filter
from session_tracker.messages import SessionMessages
from session_tracker.sessions import Session
from tests.support.watched_memory import Tracker, Watcher, comparable

SESSIONS = 300
NAMES = [f"s{number:03}" for number in range(SESSIONS)]
# What consoles differ in: how often they want to hear, whether packed, and what they look at.
FILTERS = (Filter(), Filter(slot_id="slot"), Filter(stage="list"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the sessions whose message was made, each time that it was."""
    made: list[str] = []
    of = SessionMessages.of

    def noted(messages: SessionMessages, session: Session) -> pb.Session:
        made.append(session.session_id)
        return of(messages, session)

    monkeypatch.setattr(SessionMessages, "of", noted)
    return made


@pytest.fixture
def tracker() -> Tracker:
    made = Tracker()
    for name in NAMES:
        made.start(name, slot_id="slot", stage="list")
    return made


def burst(tracker: Tracker, count: int = 100) -> list[Watcher]:
    def wish(number: int) -> Any:
        return tracker.wish(FILTERS[number % 3], packed=number % 2 == 0, interval=number / 100)

    return [Watcher(tracker, wish(number)) for number in range(count)]


async def snapshot(watcher: Watcher) -> None:
    while len(watcher.held) < SESSIONS:
        await watcher.read()


async def test_a_hundred_that_come_at_once_have_each_session_encoded_once(tracker: Tracker, encoded: list[str]) -> None:
    watchers = burst(tracker)
    for watcher in watchers:
        await snapshot(watcher)
    assert sorted(encoded) == NAMES
    for watcher in watchers:
        assert {name: comparable(session) for name, session in watcher.held.items()} == watcher.expected()
        await watcher.leave()


async def test_what_changes_between_them_is_encoded_anew_and_nothing_else(tracker: Tracker, encoded: list[str]) -> None:
    watchers = burst(tracker)
    for number, watcher in enumerate(watchers):
        tracker.report(NAMES[number], page=number + 1)
        await snapshot(watcher)
        assert watcher.held[NAMES[number]].current_page == number + 1, "as it stands when it is asked for"
    # Each once for the first, and the one of a hundred turns that changed. Those who joined and read on are told of
    # the changes by the same bytes.
    assert len(encoded) <= SESSIONS + len(watchers)
    for watcher in watchers:
        await watcher.leave()


async def test_a_second_later_all_is_encoded_anew(tracker: Tracker, encoded: list[str]) -> None:
    first, second = burst(tracker, 2)
    await snapshot(first)
    tracker.seconds += 1.0
    await snapshot(second)
    assert len(encoded) == 2 * SESSIONS, "a forecast is never older than that"
    for watcher in (first, second):
        await watcher.leave()


async def test_what_is_kept_is_bounded(tracker: Tracker, encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_SHARED_BYTES", 100 * 400)
    watchers = burst(tracker, 10)
    for watcher in watchers:
        await snapshot(watcher)
    kept = len(encoded) - SESSIONS
    # What did not fit is encoded for each feed.
    assert 9 * (SESSIONS - 200) < kept < 9 * (SESSIONS - 80)
    for watcher in watchers:
        assert {name: comparable(session) for name, session in watcher.held.items()} == watcher.expected()
        await watcher.leave()
