"""Sessions that a crawl reports from in three lines, against a scripted tracker."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import grpc
import pytest
from muster import (
    CheckpointPolicy,
    Client,
    LiveSession,
    NotConfigured,
    RetryPolicy,
    SessionEnd,
    SessionStart,
    SessionState,
    follow,
    progress,
)
from muster.progress import Reporter
from muster.session_tracker.v1 import session_pb2

from services.errors import FieldViolation, InvalidField
from services.status import abort
from tests.support.house import COMPLETE, REPORT, START, House, client_of
from tests.support.scripted import Status
from tests.support.scripted_tracker import RUNNING, ScriptedTracker, packed_size

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PAUSED = session_pb2.SESSION_STATE_PAUSED


@pytest.fixture
async def client(house: House) -> AsyncIterator[Client]:
    async with client_of(house) as made:
        yield made


@pytest.fixture
def tracker(house: House) -> ScriptedTracker:
    return ScriptedTracker(house)


async def test_three_lines_follow_a_run_and_record_its_result(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    """B3-25: registered, reported in full once and then packed, and completed when the body is left."""
    policy = CheckpointPolicy(every_pages=5)
    async with client.session(
        "run-7",
        total_pages=3,
        stage="list",
        slot_id="slot",
        client_id="pc",
        tags=["a"],
        settings={"depth": 2},
        checkpoint=policy,
        traceparent=TRACE,
    ) as session:
        for page in range(1, 4):
            assert await session.permit()
            session.page(products=3)
            await tracker.until(lambda page=page: tracker.at("run-7").current_page == page)
    await client.close()
    (start,) = house.calls[START]
    assert (start.session_id, start.total_pages, start.stage, start.traceparent) == ("run-7", 3, "list", TRACE)
    assert (start.slot_id, start.client_id, list(start.tags)) == ("slot", "pc", ["a"])
    assert (start.config_snapshot_json, start.checkpoint.every_pages) == ('{"depth": 2}', 5)
    first, *later = house.calls[REPORT]
    assert [update.session_id for update in first.updates] == ["run-7"]
    assert later
    assert not any(batch.updates for batch in later)
    assert [name for batch in later for name in batch.names] == ["run-7"]
    (end,) = house.calls[COMPLETE]
    assert (end.state, end.total_pages, end.products_found) == (session_pb2.SESSION_STATE_COMPLETED, 3, 9)
    assert (end.slot_id, end.client_id, end.config_snapshot_json) == ("slot", "pc", '{"depth": 2}')
    assert end.started_at == start.started_at


async def test_an_exception_fails_the_session_and_goes_on_and_a_cancelled_one_is_stopped(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    with pytest.raises(RuntimeError, match="no page"):
        async with client.session("failed"):
            raise RuntimeError("\x1b[31mno page")
    with pytest.raises(asyncio.CancelledError):
        async with client.session("cancelled"):
            raise asyncio.CancelledError
    async with client.session("said") as session:
        session.finish(SessionState.FAILED, "nothing found")
    await client.close()
    ends = {end.session_id: (end.state, end.message) for end in house.calls[COMPLETE]}
    assert ends == {
        "failed": (session_pb2.SESSION_STATE_FAILED, "RuntimeError:  [31mno page"),
        "cancelled": (session_pb2.SESSION_STATE_STOPPED, "cancelled"),
        "said": (session_pb2.SESSION_STATE_FAILED, "nothing found"),
    }


async def test_a_pause_is_acknowledged_when_the_crawl_waits_and_a_resume_when_it_goes_on(
    client: Client, tracker: ScriptedTracker
) -> None:
    async with client.session("s") as session:
        session.page()
        await tracker.until(lambda: tracker.taken["s"])
        tracker.tell("s", session_pb2.COMMAND_KIND_PAUSE, 5, message="night")
        async with asyncio.timeout(10):
            while not session.paused:
                session.page()
                await asyncio.sleep(0)
        # It has heard of it, but the crawl has not asked: it goes on, and says so.
        assert not session.stopping
        session.progress(1_000_000)
        await tracker.until(lambda: tracker.at("s").current_page == 1_000_000)
        assert tracker.at("s").acknowledged_command == 0
        waiting = asyncio.create_task(session.permit())
        await tracker.until(lambda: tracker.at("s").acknowledged_command == 5)
        assert (tracker.at("s").state, tracker.at("s").reason) == (PAUSED, "night")
        assert not waiting.done()
        tracker.tell("s", session_pb2.COMMAND_KIND_RESUME, 6)
        async with asyncio.timeout(10):
            assert await waiting
        await tracker.until(lambda: tracker.at("s").acknowledged_command == 6)
        assert tracker.at("s").state == RUNNING


async def test_a_stop_ends_the_run_even_while_it_is_paused(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    pages = 0
    async with client.session("s") as session:
        while await session.permit():
            pages += 1
            session.page()
            await tracker.until(lambda: tracker.taken["s"] >= 1)
            tracker.tell("s", session_pb2.COMMAND_KIND_PAUSE, 1)
            tracker.tell("s", session_pb2.COMMAND_KIND_STOP, 2, message="enough")
            async with asyncio.timeout(10):
                while not session.stopping:
                    await asyncio.sleep(0)
        await tracker.until(lambda: tracker.at("s").acknowledged_command == 2)
    await client.close()
    assert pages == 1
    (end,) = house.calls[COMPLETE]
    assert (end.state, end.message) == (session_pb2.SESSION_STATE_STOPPED, "enough")


async def test_a_speed_limit_paces_the_permits_and_is_lifted_at_once(client: Client, tracker: ScriptedTracker) -> None:
    clock = asyncio.get_running_loop().time
    async with client.session("s") as session:
        await session.permit()
        await tracker.until(lambda: tracker.taken["s"])
        tracker.tell("s", session_pb2.COMMAND_KIND_SPEED_LIMIT, 1, pages_per_minute=600.0)
        async with asyncio.timeout(10):
            while not session.pages_per_minute:
                await asyncio.sleep(0)
        began = clock()
        for _ in range(5):
            assert await session.permit()
        # The first is free, and four wait for 0.1 s each.
        assert 0.39 < clock() - began < 2.0
        tracker.tell("s", session_pb2.COMMAND_KIND_SPEED_LIMIT, 2, pages_per_minute=0.001)
        async with asyncio.timeout(10):
            while session.pages_per_minute != 0.001:
                await asyncio.sleep(0)
            assert await session.permit()
            slow = asyncio.create_task(session.permit())
            await tracker.until(lambda: tracker.at("s").acknowledged_command == 2)
            tracker.tell("s", session_pb2.COMMAND_KIND_SPEED_LIMIT, 3, pages_per_minute=0.0)
            assert await slow


async def test_a_lost_lease_ends_the_permits(house: House, client: Client, tracker: ScriptedTracker) -> None:
    async with client.session("s") as session:
        session.page()
        await tracker.until(lambda: tracker.taken["s"])
        tracker.tell("s", session_pb2.COMMAND_KIND_LEASE_LOST, 0, message="expired")
        await asyncio.wait_for(session.lease_lost.wait(), 10)
        assert not await session.permit()
        assert session.stopping
    await client.close()
    (end,) = house.calls[COMPLETE]
    assert (end.state, end.message) == (session_pb2.SESSION_STATE_STOPPED, "the lease is lost: expired")


async def test_errors_are_counted_by_class_and_the_newest_ten_kept(client: Client, tracker: ScriptedTracker) -> None:
    async with client.session("s") as session:
        session.page()
        for number in range(30):
            session.error(f"http_{500 + number % 20}", f"busy {number}")
        session.error(ValueError("x" * 300))
        await tracker.until(lambda: tracker.taken["s"] and tracker.at("s").errors_count == 31)
        update = tracker.at("s")
        counts = {entry.error_class: entry.count for entry in update.errors_by_class}
        assert len(counts) == 16
        assert counts["http_500"] == 2
        # Classes beyond the fifteenth, twice five of them and the last one, less what had no second turn.
        assert counts["other"] == sum(counts.values()) - sum(counts[f"http_{500 + n}"] for n in range(15))
        assert sum(counts.values()) == 31
        assert [entry.message for entry in update.last_errors][:9] == [f"busy {number}" for number in range(21, 30)]
        assert (len(update.last_errors[9].message), update.last_errors[9].page) == (256, 1)
        assert update.last_errors[9].error_class == "other"
        session.error("http_500", "once more")
        await tracker.until(lambda: tracker.at("s").errors_count == 32)
        assert tracker.at("s").last_errors[9].message == "once more"


async def test_a_thread_reports_and_asks(client: Client, tracker: ScriptedTracker) -> None:
    def crawl(session: LiveSession) -> int:
        pages = 0
        while pages < 2000 and session.wait_permit():
            pages += 1
            session.page(products=2)
            for _ in range(10):
                session.progress(pages, 2000, pages * 2, stage="thread")
        return pages

    async with client.session("s") as session:
        with pytest.raises(RuntimeError, match="await permit"):
            session.wait_permit()
        async with asyncio.timeout(20):
            assert await asyncio.to_thread(crawl, session) == 2000
        await tracker.until(lambda: tracker.at("s").current_page == 2000)
    assert (tracker.at("s").products_found, tracker.at("s").stage) == (4000, "thread")
    # Far fewer reports than news: each carried the latest.
    assert tracker.taken["s"] < 200


async def test_nothing_waits_while_the_tracker_is_away_and_all_is_told_when_it_is_back(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    away = Status(grpc.StatusCode.UNAVAILABLE)
    house.on(START, *[away] * 5, session_pb2.StartSessionResponse())
    house.on(COMPLETE, *[away] * 5, session_pb2.CompleteSessionResponse())
    clock = asyncio.get_running_loop().time
    began = clock()
    async with client.session("short") as short:
        short.page(products=1)
    async with client.session("long") as session:
        for _ in range(20_000):
            session.page(products=1)
        assert clock() - began < 5
        await tracker.until(lambda: tracker.taken["long"] and tracker.at("long").current_page == 20_000)
        await house.came(COMPLETE, 6)
    assert house.calls[COMPLETE][5].session_id == "short"
    assert tracker.taken["long"] <= 3


async def test_an_id_that_an_earlier_process_reported_goes_on_above_its_sequence(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    found = session_pb2.Session(session_id="s", sequence=500, current_page=90)
    house.on(START, session_pb2.StartSessionResponse(session=found))
    async with client.session("s") as session:
        session.page()
        await tracker.until(lambda: tracker.taken["s"])
        first = tracker.at("s").sequence
        session.page()
        await tracker.until(lambda: tracker.at("s").current_page == 2)
        assert 500 < first < tracker.at("s").sequence


async def test_thousands_of_sessions_go_in_batches_and_none_is_passed_over(
    house: House, client: Client, tracker: ScriptedTracker
) -> None:
    sessions = [client.session(f"s-{number}") for number in range(2500)]
    for session in sessions:
        session.begin()
        session.page()
    done = asyncio.Event()

    async def busy() -> None:
        while not done.is_set():
            for session in sessions[:1200]:
                session.page()
            await asyncio.sleep(0.01)

    pages = asyncio.create_task(busy())
    await tracker.until(lambda: len(tracker.latest) == 2500, 20)
    done.set()
    await pages
    sizes = [len(batch.updates) + packed_size(batch) for batch in house.calls[REPORT]]
    assert max(sizes) == 1000


async def test_a_session_without_news_is_reported_all_the_same(
    client: Client, tracker: ScriptedTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0.3)
    async with client.session("s") as session:
        session.page()
        await tracker.until(lambda: tracker.taken["s"] >= 3)
        assert tracker.at("s").current_page == 1


async def test_a_malformed_session_is_dropped_and_the_others_go_on(house: House, client: Client) -> None:
    async def strict(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        async for batch in batches:
            for index, update in enumerate(batch.updates):
                if update.session_id == "bad":
                    await abort(context, InvalidField([FieldViolation(f"updates[{index}].stage", "no")]), "strict")
            yield session_pb2.ReportStreamResponse(batch=batch.batch, taken=1)

    house.on(REPORT, strict)
    async with client.session("bad") as bad, client.session("good") as good:
        bad.page()
        good.page()
        await house.came(REPORT, 2)
        good.page()
        calls = await house.came(REPORT, 3)
    await client.close()
    assert [update.session_id for update in calls[1].updates] == ["good"]
    assert {end.session_id for end in house.calls[COMPLETE]} == {"good", "bad"}


async def test_final_results_wait_in_a_bounded_queue(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(client.sessions, 1.0)
    with caplog.at_level(logging.ERROR, "muster.progress"):
        for number in range(1001):
            start = SessionStart(f"s-{number}")
            reporter.begin(start, lambda: None, lambda command: None)
            reporter.end(SessionEnd(start.session_id, SessionState.COMPLETED))
    assert len(reporter._ended) == 1000
    assert not reporter._live
    assert "session s-0: its final result is given up" in caplog.text


@pytest.mark.parametrize(
    ("settings", "snapshot"),
    [
        ({"since": date(2026, 1, 31)}, '{"since": "2026-01-31"}'),
        ({"long": "x" * 2**14}, ""),
        ({"ratio": float("nan")}, ""),
        ({"half": "\ud800"}, ""),
    ],
)
async def test_settings_that_would_be_refused_are_left_out(
    house: House, client: Client, settings: dict[str, Any], snapshot: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with client.session("s", settings=settings, stage="x" * 70 + "\x00"):
        await house.came(START)
    assert (house.calls[START][0].config_snapshot_json, house.calls[START][0].stage) == (snapshot, "x" * 64)
    assert bool(snapshot) != ("its settings are not recorded" in caplog.text)


async def test_no_tracker_at_all_is_no_hindrance() -> None:
    policy = RetryPolicy(call_seconds=1, total_seconds=1)
    async with Client(api_key="k" * 40, policy=policy) as client, client.session("s") as session:
        assert await session.permit()
        session.page()


async def test_a_crawl_without_an_event_loop_follows_its_run(
    house: House, tracker: ScriptedTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("MUSTER_")]:
        monkeypatch.delenv(name)

    def crawl() -> None:
        with follow("s", client=client_of(house), total_pages=3) as session:
            for _ in range(3):
                assert session.wait_permit()
                session.page(products=2)

    def fail() -> None:
        with follow("bad", client=client_of(house)):
            raise ValueError("no page")

    async with asyncio.timeout(20):
        await asyncio.to_thread(crawl)
        with pytest.raises(ValueError, match="no page"):
            await asyncio.to_thread(fail)
        with pytest.raises(NotConfigured):
            await asyncio.to_thread(follow("s").__enter__)
    ends = {end.session_id: (end.state, end.total_pages, end.message) for end in house.calls[COMPLETE]}
    assert ends == {
        "s": (session_pb2.SESSION_STATE_COMPLETED, 3, ""),
        "bad": (session_pb2.SESSION_STATE_FAILED, 0, "ValueError: no page"),
    }
