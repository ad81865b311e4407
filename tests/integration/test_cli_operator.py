"""The operators' commands as processes of their own, against scripted services."""

import asyncio
import io
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from muster.allocator.v1 import admin_pb2, exit_pb2, insight_pb2, slot_pb2, work_pb2
from muster.archiver.v1 import archive_pb2
from muster.errors import DeadlineExceeded
from muster.persona_store.v1 import persona_pb2
from muster.session_tracker.v1 import session_pb2

from services.cli.connection import told
from services.errors import FieldViolation, InvalidField
from tests.support.command import Muster
from tests.support.scripted import ScriptedServer, Status, refusal

MOMENT = Timestamp(seconds=1_800_000_000)
SLOT = slot_pb2.Slot(
    slot_id="0198c0de-0000-7000-8000-000000000001",
    spec=slot_pb2.SlotSpec(
        keyword="노트북 [bold]", start_date="2026-01-01", end_date="2026-12-31", daily_quota=100, is_active=True
    ),
    etag="e1",
    created_at=MOMENT,
    updated_at=MOMENT,
)
EXIT = exit_pb2.Exit(exit_id="e-1", spec=exit_pb2.ExitSpec(endpoint="http://10.0.0.5:3128", cap=20), use_count=7)
PERSONA = persona_pb2.Persona(
    persona_id="p-1", status=persona_pb2.PERSONA_STATUS_ACTIVE, fingerprint_sha256=b"\xab" * 32, tags=["a", "b"]
)
HEADER = "external_id,keyword,start_date,end_date,daily_quota,priority,persona,setting.max_pages,setting.on\n"


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    made = ScriptedServer()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def muster(server: ScriptedServer, tmp_path: Path) -> Muster:
    there = server.address
    return Muster(
        tmp_path,
        MUSTER_API_KEY="k" * 40,
        MUSTER_ALLOCATOR=there,
        MUSTER_PERSONA_STORE=there,
        MUSTER_SESSION_TRACKER=there,
        MUSTER_ARCHIVER=there,
    )


async def test_slots_are_made_listed_changed_and_paused(server: ScriptedServer, muster: Muster) -> None:
    server.on("SlotService/CreateSlot", slot_pb2.CreateSlotResponse(slot=SLOT))
    server.on("SlotService/ListSlots", slot_pb2.ListSlotsResponse(slots=[SLOT]))
    server.on("SlotService/GetSlot", slot_pb2.GetSlotResponse(slot=SLOT))
    server.on("SlotService/UpdateSlot", slot_pb2.UpdateSlotResponse(slot=SLOT))
    change = slot_pb2.SlotChange(changed_at=MOMENT, actor="key-1", difference_json='{"daily_quota": [1, 2]}')
    server.on("SlotService/ListSlotHistory", slot_pb2.ListSlotHistoryResponse(changes=[change]))
    dates = ("--start-date", "2026-01-01", "--end-date", "2026-12-31")
    settings = '{"on": true, "pages": 4, "pace": 0.5, "locale": "ko"}'
    ended = await muster(
        "slot",
        "create",
        "--keyword",
        "노트북",
        *dates,
        "--daily-quota",
        "100",
        "--settings",
        settings,
        "--needs-persona",
    )
    assert ended.code == 0, ended.err
    assert "노트북 [bold]" in ended.out
    spec = server.calls["SlotService/CreateSlot"][0].spec
    assert (spec.daily_quota, spec.is_active, spec.HasField("persona")) == (100, True, True)
    kinds = {name: value.WhichOneof("kind") for name, value in spec.settings.items()}
    assert kinds == {"on": "bool_value", "pages": "int_value", "pace": "double_value", "locale": "string_value"}
    (listed,) = (await muster("slot", "list", "--json", "--active")).json()
    assert listed["spec"]["keyword"] == "노트북 [bold]"
    assert listed["created_at"] == "2027-01-15T08:00:00+00:00"
    assert server.calls["SlotService/ListSlots"][0].is_active is True
    changes = (
        "--daily-quota",
        "5",
        "--pacing",
        "even",
        "--persona-tag",
        "a",
        "--persona-rest",
        "60",
        "--exit-region",
        "",
    )
    assert (await muster("slot", "update", "s-1", *changes)).code == 0
    (update,) = server.calls["SlotService/UpdateSlot"]
    assert list(update.update_mask.paths) == ["daily_quota", "exit_region", "pacing", "persona"]
    assert (update.spec.pacing, update.spec.exit_region) == (slot_pb2.PACING_EVEN, "")
    assert update.spec.persona == slot_pb2.PersonaNeed(tags=["a"], cool_down_seconds=60)
    assert update.etag == SLOT.etag
    assert (await muster("slot", "update", "s-1", "--needs-no-persona", "--persona-tag", "a")).code == 2
    assert (await muster("slot", "update", "s-1")).code == 2
    server.on("SlotService/PauseSlot", slot_pb2.PauseSlotResponse(slot=SLOT))
    assert (await muster("slot", "pause", "s-1", "--reason", "holiday")).out == "paused\n"
    assert server.calls["SlotService/PauseSlot"][0].reason == "holiday"
    assert "[1, 2]" in (await muster("slot", "history", "s-1")).out


async def test_a_csv_is_imported_row_by_row_and_a_refused_row_fails_the_command(
    server: ScriptedServer, muster: Muster
) -> None:
    async def take(rows: Any, context: Any) -> AsyncIterator[slot_pb2.ImportSlotsResponse]:
        async for row in rows:
            if row.spec.daily_quota == 0:
                wrong = work_pb2.ItemError(code=3, reason="INVALID_FIELD", message="daily_quota: must be from 1")
                yield slot_pb2.ImportSlotsResponse(row=row.row, error=wrong)
            else:
                yield slot_pb2.ImportSlotsResponse(row=row.row, slot_id="slot", created=row.row != 3)

    server.on("SlotService/ImportSlots", take)
    file = muster.folder / "slots.csv"
    good = "a,json,2026-01-01,2026-12-31,4,5,true,4,false\n"
    file.write_text("\ufeff" + HEADER + good + "b,노트북,2026-01-01,2026-12-31,4,,,,\n", encoding="utf-8")
    assert (await muster("slot", "import", "slots.csv", "--json")).json_lines() == [
        {"row": 2, "external_id": "a", "slot_id": "slot", "result": "created"},
        {"row": 3, "external_id": "b", "slot_id": "slot", "result": "stands"},
    ]
    first, second = server.calls["SlotService/ImportSlots"]
    assert first.spec.settings["max_pages"].int_value == 4
    assert first.spec.settings["on"].WhichOneof("kind") == "bool_value"
    assert (first.spec.priority, first.spec.HasField("persona")) == (5, True)
    assert (second.spec.priority, second.spec.HasField("persona"), second.spec.keyword) == (0, False, "노트북")
    rows = (
        "c,k,2026-01-01,2026-12-31,0,,,,\n"
        "d,k,tomorrow,2026-12-31,many,,maybe,,\n"
        "e,k,2026-01-01\n"
        "f,k,2026-01-01,2026-12-31,1,,,,\n"
    )
    file.write_text(HEADER + rows, encoding="utf-8")
    ended = await muster("slot", "import", "slots.csv")
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "Error: 1 created, 0 stood already, 3 refused, of 4 row(s)"
    for said in (
        "row 2 (c): INVALID_FIELD: daily_quota: must be from 1",
        "row 3 (d): INVALID_FIELD: start_date: must be a date YYYY-MM-DD, is 'tomorrow'; daily_quota: must be a whole",
        "persona: must be true or false, is 'maybe'",
        "row 4: INVALID_FIELD: row: has 3 columns, and the first line 9",
    ):
        assert said in ended.err
    assert len(server.calls["SlotService/ImportSlots"]) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"keyword,colour\n", "unknown columns colour; missing columns external_id, start_date, end_date, daily_quota"),
        (b"", "missing columns"),
        (b"\xff\xfe\x00", "unknown columns"),
        (HEADER.encode().replace(b"persona", b"setting.on"), "repeated columns setting.on"),
    ],
)
async def test_a_file_that_is_no_such_csv_is_refused_in_one_line_before_anything_is_sent(
    server: ScriptedServer, muster: Muster, content: bytes, said: str
) -> None:
    (muster.folder / "slots.csv").write_bytes(content)
    ended = await muster("slot", "import", "slots.csv")
    assert ended.code == 1
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not server.calls["SlotService/ImportSlots"]


async def test_an_import_that_breaks_off_says_how_many_rows_have_an_answer(
    server: ScriptedServer, muster: Muster
) -> None:
    async def breaks(rows: Any, context: Any) -> AsyncIterator[slot_pb2.ImportSlotsResponse]:
        async for row in rows:
            yield slot_pb2.ImportSlotsResponse(row=row.row, slot_id="slot", created=True)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    server.on("SlotService/ImportSlots", breaks)
    lines = "".join(f"x{number},k,2026-01-01,2026-12-31,1,,,,\n" for number in range(5))
    (muster.folder / "slots.csv").write_text(HEADER + lines)
    ended = await muster("slot", "import", "slots.csv", "--json")
    assert ended.code == 1
    assert "1 row(s) have an answer: import the file again" in ended.err
    assert [line["result"] for line in ended.json_lines()] == ["created"]


async def test_exits_and_the_explanation(server: ScriptedServer, muster: Muster) -> None:
    server.on("ExitService/ImportExits", exit_pb2.ImportExitsResponse(exits=[EXIT]))
    server.on("ExitService/ListExits", exit_pb2.ListExitsResponse(exits=[EXIT]))
    server.on("ExitService/ToggleExit", exit_pb2.ToggleExitResponse(exit=EXIT))
    server.on("ExitService/SetExitEnabled", exit_pb2.SetExitEnabledResponse(exit=EXIT))
    blocker = insight_pb2.Blocker(
        kind=work_pb2.BLOCKER_KIND_EXIT_EXHAUSTED, count=3, of=3, message="all used", remedy="toggle one"
    )
    server.on("InsightService/ExplainAllocation", insight_pb2.ExplainAllocationResponse(blockers=[blocker]))
    added = (
        await muster("exit", "add", "http://10.0.0.5:3128", "socks5://10.0.0.6:1080", "--cap", "5", "--json")
    ).json()
    assert added[0]["spec"]["cap_mode"] == "UNSPECIFIED"
    assert [spec.cap for spec in server.calls["ExitService/ImportExits"][0].exits] == [5, 5]
    assert "http://10.0.0.5:3128" in (await muster("exit", "list")).out
    assert (await muster("exit", "toggle", "e-1")).code == 0
    assert (await muster("exit", "disable", "e-1")).out == "disabled\n"
    assert server.calls["ExitService/SetExitEnabled"][0].enabled is False
    explained = await muster("explain", "--target", "pydoc")
    assert explained.code == 0
    assert "exit_exhausted" in explained.out
    assert "toggle one" in explained.out
    assert server.calls["InsightService/ExplainAllocation"][0].target == "pydoc"
    found = (await muster("explain", "--json")).json()
    assert found["blockers"][0]["kind"] == "EXIT_EXHAUSTED"


async def test_personas(server: ScriptedServer, muster: Muster) -> None:
    generation = persona_pb2.Generation(
        generation=3,
        committed_at=MOMENT,
        parts=[persona_pb2.PartInfo(name="state.json", size_bytes=2, sha256=b"\x01" * 32)],
    )
    server.on("PersonaService/CreatePersona", persona_pb2.CreatePersonaResponse(persona=PERSONA))
    server.on("PersonaService/SetPersonaStatus", persona_pb2.SetPersonaStatusResponse(persona=PERSONA))
    server.on("PersonaService/ForceRelease", persona_pb2.ForceReleaseResponse(released=2))
    server.on("PersonaService/RollbackBundle", persona_pb2.RollbackBundleResponse(generation=generation))
    server.on("PersonaService/ListPersonas", persona_pb2.ListPersonasResponse(personas=[PERSONA] * 3))
    (muster.folder / "fingerprint.json").write_bytes(b'{"ua": "x"}')
    made = (await muster("persona", "create", "fingerprint.json", "--tag", "a", "--tag", "b", "--json")).json()
    assert (made["status"], made["fingerprint_sha256"]) == ("ACTIVE", "ab" * 32)
    request = server.calls["PersonaService/CreatePersona"][0]
    assert (request.fingerprint_json, list(request.tags)) == (b'{"ua": "x"}', ["a", "b"])
    assert (await muster("persona", "status", "p-1", "dormant", "--reason", "idle")).code == 0
    assert server.calls["PersonaService/SetPersonaStatus"][0].status == persona_pb2.PERSONA_STATUS_DORMANT
    assert (await muster("persona", "release", "p-1", "--reason", "stuck")).out == "released: 2 check-out(s)\n"
    assert "01" * 32 in (await muster("persona", "rollback", "p-1", "2")).out
    assert len((await muster("persona", "list", "--limit", "2", "--json")).json()) == 2
    (muster.folder / "large.json").write_bytes(bytes(256 * 2**10 + 1))
    refused = await muster("persona", "create", "large.json")
    assert (refused.code, len(refused.err.splitlines())) == (1, 1)
    assert "262144" in refused.err


async def test_sessions(server: ScriptedServer, muster: Muster) -> None:
    live = session_pb2.Session(
        session_id="s-1", state=session_pb2.SESSION_STATE_RUNNING, current_page=2, total_pages=4, started_at=MOMENT
    )
    result = session_pb2.CrawlingResult(
        session_id="s-0",
        state=session_pb2.SESSION_STATE_COMPLETED,
        started_at=MOMENT,
        completed_at=MOMENT,
        execution_time=Duration(seconds=3),
    )
    server.on("WatchService/ListSessions", session_pb2.ListSessionsResponse(sessions=[live]))
    server.on("WatchService/ListResults", session_pb2.ListResultsResponse(results=[result]))
    server.on("WatchService/GetTotals", session_pb2.GetTotalsResponse(live=1, by_state={"RUNNING": 1}))

    async def changes(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield session_pb2.WatchSessionsResponse(epoch="e", offset=1, snapshot=True, sessions=[live])
        yield session_pb2.WatchSessionsResponse(epoch="e", offset=2, removed=["s-1"])

    server.on("WatchService/WatchSessions", changes)
    listed = await muster("session", "list", "--state", "running")
    assert "2/4" in listed.out
    assert list(server.calls["WatchService/ListSessions"][0].filter.states) == [session_pb2.SESSION_STATE_RUNNING]
    assert (await muster("session", "results", "--json")).json()[0]["execution_time"] == 3.0
    assert (await muster("session", "totals", "--json")).json()["by_state"] == {"RUNNING": 1}
    watched = await muster("session", "watch", "--json")
    first, second = (json.loads(line) for line in watched.out.splitlines())
    assert first["sessions"][0]["state"] == "RUNNING"
    assert second["removed"] == ["s-1"]
    assert (await muster("session", "watch")).code == 0


async def test_ctrl_c_ends_a_watch_quietly(server: ScriptedServer, muster: Muster) -> None:
    async def forever(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield session_pb2.WatchSessionsResponse(epoch="e", offset=1, snapshot=True)
        await asyncio.Event().wait()

    server.on("WatchService/WatchSessions", forever)
    process = await muster.start("session", "watch", "--json")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), 20)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 130
    assert err == b""


async def test_archive_policies_runs_and_queries(server: ScriptedServer, muster: Muster) -> None:
    policy = archive_pb2.Policy(name="allocations", source="main", interval=archive_pb2.PARTITION_INTERVAL_WEEK)
    server.on("PolicyService/PutPolicy", archive_pb2.PutPolicyResponse(policy=policy))
    server.on("PolicyService/ListPolicies", archive_pb2.ListPoliciesResponse(policies=[policy]))
    server.on("ArchiveService/MakePartitions", archive_pb2.MakePartitionsResponse(created=["a.p1", "a.p2"]))
    run = archive_pb2.Run(run_id="r", job="archive", state=archive_pb2.RUN_STATE_SUCCEEDED, started_at=MOMENT)
    server.on("ArchiveService/ListRuns", archive_pb2.ListRunsResponse(runs=[run]))

    def steps(last: archive_pb2.ArchiveStep.ValueType) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[archive_pb2.RunArchiveResponse]:
            for step in (archive_pb2.ARCHIVE_STEP_SELECTED, last):
                yield archive_pb2.RunArchiveResponse(run_id="r", partition="a.p1", step=step, rows=9, message="why")

        return answer

    server.on(
        "ArchiveService/RunArchive", steps(archive_pb2.ARCHIVE_STEP_DROPPED), steps(archive_pb2.ARCHIVE_STEP_FAILED)
    )
    put = await muster(
        "archive", "put-policy", "allocations", "--source", "main", "--table", "allocator.work_allocations",
        "--interval", "week", "--hot-days", "7", "--json",
    )  # fmt: skip
    assert put.json()[0]["interval"] == "WEEK"
    sent = server.calls["PolicyService/PutPolicy"][0].policy
    assert (sent.table, sent.hot_retention_days) == ("allocator.work_allocations", 7)
    assert "allocations" in (await muster("archive", "policies")).out
    assert "2 partition(s) made" in (await muster("archive", "make-partitions")).out
    assert (await muster("archive", "runs", "--json")).json()[0]["state"] == "SUCCEEDED"
    moved = await muster("archive", "run", "allocations")
    assert (moved.code, "1 partition(s) moved" in moved.out) == (0, True)
    failed = await muster("archive", "run", "--dry-run")
    assert failed.code == 1
    assert "1 partition(s) failed" in failed.err
    assert server.calls["ArchiveService/RunArchive"][1].dry_run

    sink = io.BytesIO()
    table = pa.table({"keyword": ["json", "노트북"], "n": [1, 2]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream = sink.getvalue()

    async def answer(request: Any, context: Any) -> AsyncIterator[archive_pb2.QueryResponse]:
        for start in range(0, len(stream), 100):
            yield archive_pb2.QueryResponse(arrow_ipc=stream[start : start + 100])
        yield archive_pb2.QueryResponse(statistics=archive_pb2.QueryStatistics(rows=2, cold_files=1))

    async def cut(request: Any, context: Any) -> AsyncIterator[archive_pb2.QueryResponse]:
        yield archive_pb2.QueryResponse(arrow_ipc=stream[:50])

    server.on("QueryService/Query", answer, answer, cut, refusal("QUERY_INVALID", "no such\ntable"))
    found = (await muster("archive", "query", "SELECT 1", "--from", "2026-01-01", "--json")).json()
    assert found["rows"] == [{"keyword": "json", "n": 1}, {"keyword": "노트북", "n": 2}]
    assert found["statistics"]["cold_files"] == 1
    assert server.calls["QueryService/Query"][0].from_date == "2026-01-01"
    shown = await muster("archive", "query", "SELECT 1")
    assert "노트북" in shown.out
    assert "1 cold file(s)" in shown.out
    assert "not whole" in (await muster("archive", "query", "SELECT 1")).err
    assert (await muster("archive", "query", "SELECT 1")).err == "Error: QUERY_INVALID: no such table\n"


async def test_a_refusal_is_one_line_with_reason_fields_and_limits(server: ScriptedServer, muster: Muster) -> None:
    wrong = InvalidField(
        [
            FieldViolation("slot_id", "must be a UUID"),
            FieldViolation("page_size", "must be from 1 to 1000, is 9999"),
        ]
    )
    server.on(
        "SlotService/GetSlot",
        wrong,
        refusal("SLOT_NOT_FOUND", "there is no such slot", slot_id="s-9"),
        refusal("INVALID_API_KEY", "no valid API key"),
        refusal("ROLE_NOT_ALLOWED", "this call needs the role operator", role="worker", needs="operator"),
        Status(grpc.StatusCode.INTERNAL, "broken\nin two"),
    )
    for said in (
        "Error: INVALID_FIELD: slot_id: must be a UUID; page_size: must be from 1 to 1000, is 9999\n",
        "Error: SLOT_NOT_FOUND: there is no such slot (slot_id=s-9)\n",
        "Error: INVALID_API_KEY: no valid API key (`muster key create` makes one)\n",
        "Error: ROLE_NOT_ALLOWED: this call needs the role operator (needs=operator, role=worker)\n",
        f"Error: INTERNAL: the allocator at {server.address}: broken in two\n",
    ):
        ended = await muster("slot", "get", "s-9")
        assert (ended.code, ended.out, ended.err) == (1, "", said)


async def test_a_service_that_is_not_there_is_named_with_its_address_and_the_mend(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    nobody = Muster(tmp_path, MUSTER_API_KEY="k" * 40, MUSTER_ALLOCATOR=f"127.0.0.1:{unused_tcp_port}")
    ended = await nobody("slot", "list")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert f"the allocator at 127.0.0.1:{unused_tcp_port}" in ended.err
    assert "start it (`muster up`" in ended.err
    unknown = await nobody("persona", "list")
    assert unknown.err == (
        "Error: the address of the persona_store is not known: set MUSTER_PERSONA_STORE, or run `muster up` here\n"
    )
    assert "no API key: set MUSTER_API_KEY" in (await Muster(tmp_path)("slot", "list")).err


def test_an_answer_that_does_not_come_in_time_is_told_as_what_it_may_be() -> None:
    late = DeadlineExceeded("DEADLINE_EXCEEDED", "", "the allocator at h:1: Deadline Exceeded")
    assert told(late) == (
        "the allocator at h:1: Deadline Exceeded: it is slow, and its log may say why; or it is not there: "
        "start it (`muster up` or `muster serve`), or correct its address"
    )


ACT = ("--reason", "r")
DATES = ("--start-date", "2026-01-01", "--end-date", "2026-12-31")
REPEATABLE: dict[str, tuple[tuple[str, ...], Message]] = {
    "AdminService/RevokeLeases": (("lease", "revoke", "a", *ACT), admin_pb2.RevokeLeasesResponse()),
    "AdminService/ReleaseByAge": (
        ("lease", "release", "--older-than", "1h", *ACT),
        admin_pb2.ReleaseByAgeResponse(),
    ),
    "AdminService/ReopenQuota": (
        ("quota", "reopen", "s", "--units", "100", *ACT),
        admin_pb2.ReopenQuotaResponse(),
    ),
    "AdminService/AcceptQuarantinedResults": (
        ("quarantine", "accept", "a", *ACT),
        admin_pb2.AcceptQuarantinedResultsResponse(),
    ),
    "AdminService/DiscardQuarantinedResults": (
        ("quarantine", "discard", "a", *ACT),
        admin_pb2.DiscardQuarantinedResultsResponse(),
    ),
    "ExitService/ToggleExit": (("exit", "toggle", "e-1"), exit_pb2.ToggleExitResponse(exit=EXIT)),
    "SlotService/CreateSlot": (
        ("slot", "create", "--keyword", "k", "--daily-quota", "5", *DATES),
        slot_pb2.CreateSlotResponse(slot=SLOT),
    ),
    "PersonaService/CreatePersona": (
        ("persona", "create", "fingerprint.json"),
        persona_pb2.CreatePersonaResponse(persona=PERSONA),
    ),
    "PersonaService/RollbackBundle": (
        ("persona", "rollback", "p-1", "2"),
        persona_pb2.RollbackBundleResponse(generation=persona_pb2.Generation(generation=3, committed_at=MOMENT)),
    ),
}


@pytest.mark.parametrize("method", REPEATABLE)
async def test_a_command_without_an_answer_says_how_it_is_repeated_and_done_once(
    server: ScriptedServer, muster: Muster, method: str
) -> None:
    (muster.folder / "fingerprint.json").write_bytes(b"{}")
    arguments, answer = REPEATABLE[method]
    server.on(method, refusal("DATABASE_UNAVAILABLE", retry_after=3600), answer)
    lost = await muster(*arguments)
    said = re.search(r"it may have been done: repeat it with (--request-id) ([0-9a-f-]{36}), ", lost.err)
    assert said is not None, lost.err
    assert (lost.code, lost.out, len(lost.err.splitlines())) == (1, "", 1)
    done = await muster(*arguments, *said.groups())
    assert done.code == 0, done.err
    first, second = server.calls[method]
    assert first == second
    assert said[2] in str(first)


async def test_a_dry_run_without_an_answer_has_done_nothing(server: ScriptedServer, muster: Muster) -> None:
    server.on("AdminService/ReopenQuota", refusal("DATABASE_UNAVAILABLE", retry_after=3600))
    assert "may have been" not in (await muster("quota", "reopen", "s", "--dry-run", *ACT)).err


async def test_the_connection_comes_from_what_muster_up_wrote(server: ScriptedServer, tmp_path: Path) -> None:
    server.on("ExitService/ListExits", exit_pb2.ListExitsResponse())
    home = tmp_path / "a home"
    home.mkdir()
    (home / "operator key").write_text("f" * 40)
    (home / "client.env").write_text(
        f"# where\nMUSTER_ALLOCATOR={server.address}\nMUSTER_API_KEY_FILE='{home}/operator key'\nOTHER=1\n"
    )
    (tmp_path / ".muster").symlink_to(home)
    other = tmp_path / "other"
    other.write_text("o" * 40 + "\n")
    assert (await Muster(tmp_path)("exit", "list")).code == 0
    assert (await Muster(tmp_path / "a home", MUSTER_HOME=str(home))("exit", "list")).code == 0
    assert (await Muster(tmp_path)("exit", "list", "--api-key-file", str(other))).code == 0
    assert (await Muster(tmp_path, MUSTER_API_KEY="e" * 40)("exit", "list")).code == 0
    shown = [metadata["authorization"] for metadata in server.metadata["ExitService/ListExits"]]
    assert shown == [f"Bearer {letter * 40}" for letter in "ffoe"]
    (home / "client.env").write_text("MUSTER_API_KEY='never closed\n")
    assert "mend or remove it" in (await Muster(tmp_path)("exit", "list")).err


@pytest.mark.parametrize(
    "arguments",
    [
        ("slot", "create"),
        ("slot", "create", "--start-date", "soon"),
        ("slot", "create", "--settings", "[1]"),
        ("slot", "update", "s-1"),
        ("quota", "reopen", "s-1", "--reason", "r", "--request-id", "again"),
        ("slot", "import", "no-such-file.csv"),
        ("exit", "add"),
        ("persona", "status", "p-1", "asleep", "--reason", "r"),
        ("archive", "put-policy", "x", "--source", "s", "--table", "t", "--interval", "year"),
        ("session", "watch", "--interval", "61"),
    ],
)
async def test_wrong_usage_is_code_2_and_calls_nobody(
    server: ScriptedServer, muster: Muster, arguments: tuple[str, ...]
) -> None:
    ended = await muster(*arguments)
    assert ended.code == 2
    assert "Error:" in ended.err
    assert not server.calls
