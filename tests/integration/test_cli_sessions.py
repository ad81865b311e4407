"""`muster session` as a process of its own, against a scripted tracker and the real one."""

import json
from asyncio import sleep, timeout
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from muster import Client, RetryPolicy
from muster.session_tracker.v1 import session_pb2

from services.call import Role
from tests.support.command import Ended, Muster
from tests.support.scripted import ScriptedServer, refusal
from tests.support.services import StartService

MOMENT = Timestamp(seconds=1_800_000_000)
CONTROL = "ControlService/ControlSessions"
LIVE = session_pb2.Session(
    session_id="s-1",
    state=session_pb2.SESSION_STATE_PAUSED,
    reason="night [bold]",
    current_page=2,
    total_pages=4,
    started_at=MOMENT,
    updated_at=MOMENT,
    state_since=MOMENT,
    number=7,
    errors_by_class=[session_pb2.ErrorCount(error_class="http_503", count=3)],
)


Run = Callable[..., Awaitable[Ended]]


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    made = ScriptedServer()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def muster(server: ScriptedServer, tmp_path: Path) -> Run:
    """Runs the command against the scripted tracker."""
    return runner(tmp_path, server.address, "k" * 40)


def runner(folder: Path, address: str, api_key: str) -> Run:
    """Gives what runs `muster session …` in a folder of its own."""
    return partial(Muster(folder, MUSTER_API_KEY=api_key, MUSTER_SESSION_TRACKER=address), "session")


async def test_list_takes_every_filter(server: ScriptedServer, muster: Run) -> None:
    server.on("WatchService/ListSessions", session_pb2.ListSessionsResponse(sessions=[LIVE]))
    listed = await muster(
        "list", "--state", "paused", "--state", "lost", "--slot", "sl", "--client", "c", "--stage", "st", "--tag", "t"
    )
    assert (listed.code, listed.err) == (0, "")
    assert "paused (night [bold])" in listed.out
    assert server.calls["WatchService/ListSessions"][0].filter == session_pb2.SessionFilter(
        states=[session_pb2.SESSION_STATE_PAUSED, session_pb2.SESSION_STATE_LOST],
        slot_id="sl",
        client_id="c",
        stage="st",
        tag="t",
    )


async def test_show_draws_the_pace_and_lists_the_errors(server: ScriptedServer, muster: Run) -> None:
    error = session_pb2.ErrorEntry(at=MOMENT, error_class="http_503", message="busy [red]", page=2)
    server.on(
        "WatchService/GetSession",
        session_pb2.GetSessionResponse(
            session=LIVE,
            last_errors=[error],
            config_snapshot_json='{"depth": 3}',
            pages_per_span=[0, 1, 8],
            span_begins=MOMENT,
        ),
        session_pb2.GetSessionResponse(session=LIVE, last_errors=[error], pages_per_span=[0, 1, 8]),
        refusal("SESSION_NOT_FOUND", "no such live session"),
    )
    shown = await muster("show", "s-1")
    assert shown.code == 0
    for said in (" ▁█ (most 8 in 10 s)", "busy [red]", '{"depth": 3}', "night [bold]", "http_503"):
        assert said in shown.out
    found = json.loads((await muster("show", "s-1", "--json")).out)
    assert found["session"]["errors_by_class"] == {"http_503": 3}
    assert found["last_errors"][0]["message"] == "busy [red]"
    assert found["pages_per_span"] == [0, 1, 8]
    gone = await muster("show", "s-2")
    assert (gone.code, gone.out) == (1, "")
    assert "SESSION_NOT_FOUND" in gone.err


async def test_watch_applies_packed_changes(server: ScriptedServer, muster: Run) -> None:
    async def changes(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        assert request.packed
        yield session_pb2.WatchSessionsResponse(epoch="e", offset=1, snapshot=True, sessions=[LIVE])
        packed = session_pb2.PackedSessions(
            number=[7],
            state=[session_pb2.SESSION_STATE_RUNNING],
            current_page=[3],
            total_pages=[4],
            products_found=[5],
            errors_count=[6],
            sequence=[9],
            updated_at_ms=[1_800_000_001_500],
        )
        yield session_pb2.WatchSessionsResponse(epoch="e", offset=2, packed=packed, rebuilding=True)

    server.on("WatchService/WatchSessions", changes)
    watched = await muster("watch", "--json")
    _, second = (json.loads(line) for line in watched.out.splitlines())
    assert second["rebuilding"] is True
    changed = second["sessions"][0]
    assert (changed["session_id"], changed["state"], changed["current_page"]) == ("s-1", "RUNNING", 3)
    assert changed["updated_at"] == "2027-01-15T08:00:01.500000+00:00"
    table = await muster("watch")
    assert table.code == 0
    assert "3/4" in table.out
    assert "rebuilding" in table.out


@pytest.mark.parametrize(
    ("arguments", "kind", "pages_per_minute"),
    [
        (("pause",), session_pb2.COMMAND_KIND_PAUSE, 0.0),
        (("resume",), session_pb2.COMMAND_KIND_RESUME, 0.0),
        (("stop",), session_pb2.COMMAND_KIND_STOP, 0.0),
        (("limit", "30.5"), session_pb2.COMMAND_KIND_SPEED_LIMIT, 30.5),
    ],
)
async def test_sessions_are_told_by_name_and_by_filter(
    server: ScriptedServer,
    muster: Run,
    arguments: tuple[str, ...],
    kind: session_pb2.CommandKind.ValueType,
    pages_per_minute: float,
) -> None:
    server.on(
        CONTROL,
        session_pb2.ControlSessionsResponse(told=1, unknown_sessions=["s-2"]),
        session_pb2.ControlSessionsResponse(told=4),
    )
    named = await muster(*arguments, "s-1", "s-2", "--reason", "why")
    assert (named.code, named.out, named.err) == (1, "1 session will be told\n", "s-2 is not live\n")
    filtered = await muster(*arguments, "--slot", "sl", "--json")
    assert json.loads(filtered.out) == {"told": 4, "unknown_sessions": []}
    first, second = server.calls[CONTROL]
    assert first == session_pb2.ControlSessionsRequest(
        session_ids=["s-1", "s-2"], kind=kind, pages_per_minute=pages_per_minute, reason="why"
    )
    assert second.filter.slot_id == "sl"
    assert not second.session_ids


async def test_totals_and_results_of_a_slot(server: ScriptedServer, muster: Run) -> None:
    server.on("WatchService/GetTotals", session_pb2.GetTotalsResponse(live=2, by_state={"LOST": 2}, rebuilding=True))
    server.on("WatchService/ListResults", session_pb2.ListResultsResponse())
    shown = await muster("totals", "--slot", "sl")
    assert shown.code == 0
    assert "live, lost" in shown.out
    assert "rebuilding" in shown.out
    assert server.calls["WatchService/GetTotals"][0].slot_id == "sl"
    assert (await muster("results", "--client", "c", "--slot", "sl")).code == 0
    asked = server.calls["WatchService/ListResults"][0]
    assert (asked.client_id, asked.slot_id) == ("c", "sl")


@pytest.mark.parametrize(
    "arguments",
    [("pause",), ("stop", "s-1", "--slot", "sl"), ("limit", "s-1"), ("limit", "--", "-1", "s-1"), ("show",)],
)
async def test_wrong_usage_is_code_2_and_calls_nobody(
    server: ScriptedServer, muster: Run, arguments: tuple[str, ...]
) -> None:
    ended = await muster(*arguments)
    assert ended.code == 2
    assert "Error:" in ended.err
    assert not server.calls


async def test_the_commands_on_the_real_tracker(start_service: StartService, tmp_path: Path) -> None:
    """An operator sees a live session, stops it, and finds its result."""
    tracker = await start_service("session_tracker")
    muster = runner(tmp_path, tracker.address, await tracker.key(Role.OPERATOR))
    policy = RetryPolicy(call_seconds=5, total_seconds=20)
    async with Client(api_key=await tracker.key(Role.WORKER), session_tracker=tracker.address, policy=policy) as client:
        async with client.session("s-1", total_pages=9, slot_id="sl", stage="list", tags=["t"]) as session:
            session.page(products=3)
            session.error("http_503", "busy")
            async with timeout(15):
                while not (await client.sessions.totals()).errors:
                    await sleep(0.01)
            listed = await muster("list", "--tag", "t", "--stage", "list")
            assert "1/9" in listed.out
            shown = await muster("show", "s-1")
            assert "busy" in shown.out
            assert (await muster("list", "--tag", "none", "--json")).out == "[]\n"
            stopped = await muster("stop", "--slot", "sl", "--reason", "enough")
            assert (stopped.code, stopped.out) == (0, "1 session will be told\n")
            async with timeout(15):
                while await session.permit():
                    await sleep(0.01)
        await client.close()
    (result,) = json.loads((await muster("results", "--slot", "sl", "--state", "stopped", "--json")).out)
    assert (result["session_id"], result["state"], result["message"]) == ("s-1", "STOPPED", "enough")
    assert "SESSION_NOT_FOUND" in (await muster("show", "s-2")).err
