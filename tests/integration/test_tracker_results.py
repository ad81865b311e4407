"""Final results: committed once, before the acknowledgement, and live progress without a database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from services.postgres import queries
from tests.support.postgres import PostgresServer
from tests.support.services import RunningService, StartService

DONE, FAILED, STOPPED = pb.SESSION_STATE_COMPLETED, pb.SESSION_STATE_FAILED, pb.SESSION_STATE_STOPPED


class Tracker:
    """A running tracker and its stubs."""

    def __init__(
        self, service: RunningService, worker: tuple[tuple[str, str], ...], operator: tuple[tuple[str, str], ...]
    ) -> None:
        self.service, self.worker, self.operator = service, worker, operator
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(service.channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(service.channel)

    async def start(self, session_id: str, **fields: Any) -> pb.Session:
        request = pb.StartSessionRequest(session_id=session_id, **fields)
        session: pb.Session = (await self.sessions.StartSession(request, metadata=self.worker)).session
        return session

    async def report(self, session_id: str, sequence: int, page: int) -> list[int]:
        updates = [pb.ProgressUpdate(session_id=session_id, sequence=sequence, current_page=page)]
        request = pb.ReportProgressRequest(updates=updates)
        return list((await self.sessions.ReportProgress(request, metadata=self.worker)).verdicts)

    async def complete(
        self, session_id: str, state: Any = DONE, *, started_at: datetime | None = None, **fields: Any
    ) -> pb.CrawlingResult:
        request = pb.CompleteSessionRequest(session_id=session_id, state=state, **fields)
        if started_at is not None:
            request.started_at.FromDatetime(started_at)
        result: pb.CrawlingResult = (await self.sessions.CompleteSession(request, metadata=self.worker)).result
        return result

    async def live(self) -> int:
        return int((await self.watch.GetTotals(pb.GetTotalsRequest(), metadata=self.worker)).live)

    async def listed(self, **fields: Any) -> list[pb.CrawlingResult]:
        request = pb.ListResultsRequest(**fields)
        found: list[pb.CrawlingResult] = []
        while True:
            page = await self.watch.ListResults(request, metadata=self.operator)
            found += page.results
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def rows(self) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.service.dsn)
        try:
            return await connection.fetch("SELECT * FROM session_tracker.crawling_results ORDER BY session_id")
        finally:
            await connection.close()


async def bound(service: RunningService, organization: str = "acme") -> Tracker:
    worker = await service.metadata(Role.WORKER, organization)
    return Tracker(service, worker, await service.metadata(Role.OPERATOR, organization))


@pytest.fixture
async def tracker(start_service: StartService) -> Tracker:
    return await bound(await start_service("session_tracker"))


def details(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """Returns the reason, and whether there is a RetryInfo."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return str(info.reason), any(detail.Unpack(retry) for detail in status.details)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_result_is_the_one_row_that_stays(tracker: Tracker) -> None:
    began = datetime.now(UTC) - timedelta(seconds=100)
    request = pb.StartSessionRequest(
        session_id="run", stage="search", slot_id="slot", client_id="pc",
        config_snapshot_json=json.dumps({"pages": 10, "login": {"password": "hunter2", "user": "u"}}),
    )  # fmt: skip
    request.started_at.FromDatetime(began)
    await tracker.sessions.StartSession(request, metadata=tracker.worker)
    await tracker.report("run", 1, 10)
    result = await tracker.complete("run", total_pages=10, products_found=99, errors_count=3, message="all pages")
    (row,) = await tracker.rows()
    snapshot = {"pages": 10, "login": {"password": "[redacted]", "user": "u"}}
    assert json.loads(row["config_snapshot"]) == json.loads(result.config_snapshot_json) == snapshot
    assert {name: row[name] for name in ("session_id", "status", "stage", "message", "slot_id", "client_id")} == {
        "session_id": "run", "status": "completed", "stage": "search", "message": "all pages", "slot_id": "slot",
        "client_id": "pc",
    }  # fmt: skip
    assert (row["total_pages"], row["products_found"], row["errors_count"]) == (10, 99, 3)
    assert row["started_at"] == began == result.started_at.ToDatetime(UTC)
    assert row["completed_at"] == result.completed_at.ToDatetime(UTC)
    assert row["execution_time_seconds"] == pytest.approx((row["completed_at"] - began).total_seconds())
    assert result.execution_time.ToTimedelta().total_seconds() == pytest.approx(row["execution_time_seconds"])
    assert row["organization_id"] == await tracker.service.organization_id()
    assert await tracker.live() == 0
    assert await tracker.report("run", 2, 11) == [pb.UPDATE_VERDICT_STALE], "it is still seen in its final state"
    error = await refused(tracker.start("run"))
    assert (error.code(), details(error)) == (grpc.StatusCode.ALREADY_EXISTS, ("SESSION_ALREADY_COMPLETED", False))


async def test_the_same_result_again_gets_the_same_answer_and_another_is_refused(tracker: Tracker) -> None:
    began = datetime.now(UTC) - timedelta(hours=1)
    await tracker.start("run", stage="deep", config_snapshot_json='{"b": 1.0, "a": [2]}')
    given: dict[str, Any] = {"total_pages": 3, "products_found": 5, "message": "m"}
    first = await tracker.complete("run", FAILED, **given)
    assert await tracker.complete("run", FAILED, **given) == first, "also without a start, though it is not live"
    assert await tracker.complete("run", FAILED, **given, stage="deep") == first
    assert await tracker.complete("run", FAILED, **given, started_at=first.started_at.ToDatetime(UTC)) == first
    assert await tracker.complete("run", FAILED, **given, config_snapshot_json='{"a":[2],"b":1}') == first
    for others in (
        {**given, "total_pages": 4}, {**given, "products_found": 6}, {**given, "errors_count": 1},
        {**given, "message": "n"}, {**given, "stage": "x"}, {**given, "started_at": began},
        {**given, "state": STOPPED}, {**given, "config_snapshot_json": '{"a": 3}'},
    ):  # fmt: skip
        error = await refused(tracker.complete("run", **{"state": FAILED, **others}))
        assert (error.code(), details(error)[0]) == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_ALREADY_COMPLETED")
    assert len(await tracker.rows()) == 1


async def test_a_session_need_not_be_live(tracker: Tracker) -> None:
    error = await refused(tracker.complete("gone"))
    assert (error.code(), details(error)[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "started_at" in (error.details() or "")
    began = datetime.now(UTC) - timedelta(minutes=5)
    result = await tracker.complete("gone", STOPPED, started_at=began, config_snapshot_json='{"token": "t"}')
    assert result.execution_time.seconds >= 300
    assert json.loads(result.config_snapshot_json) == {"token": "[redacted]"}
    ahead = await tracker.complete("clock ahead", started_at=datetime.now(UTC) + timedelta(seconds=30))
    assert ahead.execution_time.ToTimedelta() == timedelta(0)


async def test_fifty_completions_of_one_session_at_once_make_one_row(tracker: Tracker) -> None:
    for name in ("same", "different"):
        await tracker.start(name)
    same = await asyncio.gather(*(tracker.complete("same", total_pages=7) for _ in range(50)))
    assert all(result == same[0] for result in same)
    different = await asyncio.gather(
        *(tracker.complete("different", total_pages=number) for number in range(50)), return_exceptions=True
    )
    won = [result for result in different if isinstance(result, pb.CrawlingResult)]
    lost = [error for error in different if isinstance(error, grpc.aio.AioRpcError)]
    assert (len(won), len(lost)) == (1, 49)
    assert {details(error)[0] for error in lost} == {"SESSION_ALREADY_COMPLETED"}
    rows = await tracker.rows()
    assert [(row["session_id"], row["total_pages"]) for row in rows] == [
        ("different", won[0].total_pages), ("same", 7),
    ]  # fmt: skip
    totals = await tracker.watch.GetTotals(pb.GetTotalsRequest(), metadata=tracker.worker)
    assert totals.results_committed == 2


async def test_two_replicas_record_a_session_once(tracker: Tracker, start_service: StartService) -> None:
    replica = await start_service("session_tracker", database=tracker.service.database)
    other = Tracker(replica, tracker.worker, tracker.operator)
    began = datetime.now(UTC)
    names = [f"s{number:02}" for number in range(40)]
    results = await asyncio.gather(
        *(tracker.complete(name, started_at=began) for name in names),
        *(other.complete(name, started_at=began) for name in reversed(names)),
    )
    assert len(await tracker.rows()) == 40
    by_id: dict[str, list[pb.CrawlingResult]] = {}
    for result in results:
        by_id.setdefault(result.session_id, []).append(result)
    assert all(one == two for one, two in by_id.values())


async def test_organizations_complete_and_list_their_own(tracker: Tracker) -> None:
    other = await bound(tracker.service, "umbrella")
    began = datetime.now(UTC)
    await tracker.complete("run", total_pages=1, started_at=began)
    await other.complete("run", total_pages=2, started_at=began)
    assert [result.total_pages for result in await tracker.listed()] == [1]
    assert [result.total_pages for result in await other.listed()] == [2]
    error = await refused(other.complete("run", total_pages=1))
    assert details(error)[0] == "SESSION_ALREADY_COMPLETED"


async def test_results_are_listed_newest_first_page_by_page_and_filtered(tracker: Tracker) -> None:
    for number in range(12):
        await tracker.start(f"s{number:02}", slot_id="odd" if number % 2 else "")
    # Four moments with three results each, so that pages begin between results of one moment.
    for moment in range(4):
        names = [f"s{number:02}" for number in range(3 * moment, 3 * moment + 3)]
        await asyncio.gather(*(tracker.complete(name, FAILED if name == "s05" else DONE) for name in names))
    connection = await asyncpg.connect(tracker.service.dsn)
    await connection.execute(
        "UPDATE session_tracker.crawling_results SET completed_at = date_trunc('hour', now())"
        " - substr(session_id, 2)::int / 3 * interval '1 hour'"
    )
    await connection.close()
    newest_first = [f"s{number:02}" for number in (2, 1, 0, 5, 4, 3, 8, 7, 6, 11, 10, 9)]
    for size in (1, 2, 4, 5, 12, 100, 0):
        assert [result.session_id for result in await tracker.listed(page_size=size)] == newest_first
    odd = [name for name in newest_first if int(name[1:]) % 2]
    assert [result.session_id for result in await tracker.listed(page_size=2, slot_id="odd")] == odd
    assert [result.session_id for result in await tracker.listed(state=FAILED)] == ["s05"]
    moments = sorted({row["completed_at"] for row in await tracker.rows()})
    window = pb.ListResultsRequest()
    window.completed_after.FromDatetime(moments[1])
    window.completed_before.FromDatetime(moments[3])
    found = await tracker.listed(
        completed_after=window.completed_after, completed_before=window.completed_before, page_size=4
    )
    assert [result.session_id for result in found] == newest_first[3:9]

    first = await tracker.watch.ListResults(pb.ListResultsRequest(page_size=2), metadata=tracker.operator)
    for request in (
        pb.ListResultsRequest(page_token=first.next_page_token, slot_id="odd"),
        pb.ListResultsRequest(page_token=first.next_page_token[:-4]),
    ):
        error = await refused(tracker.watch.ListResults(request, metadata=tracker.operator))
        assert (error.code(), details(error)[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


async def test_pages_of_results_are_read_from_their_index(tracker: Tracker) -> None:
    connection = await asyncpg.connect(tracker.service.dsn)
    try:
        await connection.execute("SET search_path = session_tracker; SET plan_cache_mode = force_generic_plan")
        await connection.execute(
            "INSERT INTO crawling_results (organization_id, session_id, status, total_pages, products_found,"
            " errors_count, started_at, completed_at, execution_time_seconds, slot_id, client_id)"
            " SELECT $1::uuid, 's' || n, 'completed', 1, 1, 0, now(), now() - n * interval '1 s', 1, 'slot' || n % 50,"
            " 'client' || n % 50"
            " FROM generate_series(1, 20000) AS n",
            await tracker.service.organization_id(),
        )
        await connection.execute("ANALYZE crawling_results")
        statements = queries("session_tracker", "results.sql")
        types = "uuid, text, timestamptz, timestamptz, timestamptz, text, bigint"
        values = f"'{await tracker.service.organization_id()}', NULL, NULL, NULL, now() - interval '1 h', 's9', 101"
        for name, more_types, more_values, index in (
            ("list_results", "", "", "crawling_results_newest"),
            ("list_results_of_slot", ", text, text", ", 'slot7', NULL", "crawling_results_of_slot"),
            ("list_results_of_client", ", text", ", 'client7'", "crawling_results_of_client"),
        ):
            await connection.execute(f"PREPARE {name} ({types}{more_types}) AS {statements[name]}")
            rows = await connection.fetch(f"EXPLAIN (ANALYZE, COSTS OFF) EXECUTE {name} ({values}{more_values})")
            plan = "\n".join(row[0] for row in rows)
            assert f"Index Scan using {index}" in plan, plan
            assert "Sort" not in plan, plan
            assert "Rows Removed" not in plan, plan
    finally:
        await connection.close()


class Wire:
    """Stands between a service and its database, and can be cut."""

    def __init__(self, server: PostgresServer) -> None:
        parts = urlsplit(server.superuser_dsn)
        host = parse_qs(parts.query).get("host", [""])[0]
        port = parse_qs(parts.query).get("port", ["5432"])[0]
        self._socket = f"{unquote(host)}/.s.PGSQL.{port}" if host.startswith("/") else ""
        self._host, self._port = parts.hostname or "", parts.port or 5432
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def dsn(self, role: str, database: str) -> str:
        return f"postgresql://{role}:{role}@127.0.0.1:{self.port}/{database}?sslmode=disable"

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._socket:
            back_reader, back_writer = await asyncio.open_unix_connection(self._socket)
        else:
            back_reader, back_writer = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, back_writer), (back_reader, writer)):
            self._writers.add(sink)
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()
            self._writers.discard(sink)


@pytest.fixture
async def wire(postgres_server: PostgresServer) -> AsyncIterator[Wire]:
    wire = Wire(postgres_server)
    await wire.mend()
    yield wire
    await wire.cut()


async def test_without_a_database_live_progress_goes_on_and_results_wait(
    tracker: Tracker, start_service: StartService, wire: Wire
) -> None:
    database = tracker.service.database
    service = await start_service(
        "session_tracker",
        database=database,
        postgres={"dsn": wire.dsn("muster_session_tracker", database), "connect_timeout_seconds": 2},
        identity={"dsn": wire.dsn("muster_identity", database), "pool_min": 0, "pool_max": 2},
    )
    cut_off = Tracker(service, tracker.worker, tracker.operator)
    await cut_off.start("before")
    assert await cut_off.listed() == []
    await wire.cut()

    await cut_off.start("during")
    assert await cut_off.report("during", 1, 5) == [pb.UPDATE_VERDICT_TAKEN]
    watching = cut_off.watch.WatchSessions(pb.WatchSessionsRequest(), metadata=tracker.worker)
    assert len((await watching.read()).sessions) == 2
    assert await cut_off.report("before", 1, 6) == [pb.UPDATE_VERDICT_TAKEN]
    assert [session.session_id for session in (await watching.read()).sessions] == ["before"]
    watching.cancel()

    async def stream() -> AsyncIterator[pb.ReportStreamRequest]:
        updates = [pb.ProgressUpdate(session_id="during", sequence=2, current_page=7)]
        yield pb.ReportStreamRequest(batch=1, updates=updates)

    answers = [answer async for answer in cut_off.sessions.ReportStream(stream(), metadata=tracker.worker)]
    assert [answer.taken for answer in answers] == [1]
    for call in (cut_off.complete("during", total_pages=7), cut_off.listed()):
        error = await refused(call)
        assert (error.code(), details(error)) == (grpc.StatusCode.UNAVAILABLE, ("DATABASE_UNAVAILABLE", True))
    assert await cut_off.live() == 2, "what is not committed is not forgotten"
    assert await tracker.rows() == []

    await wire.mend()
    result = await cut_off.complete("during", total_pages=7)
    assert [row["completed_at"] for row in await tracker.rows()] == [result.completed_at.ToDatetime(UTC)]
    assert await cut_off.live() == 1


async def test_a_caller_in_a_hurry_does_not_spoil_the_batch_of_others(tracker: Tracker) -> None:
    """Results share a commit: it must not run on the deadline of the call that happened to begin it."""
    blocker = await asyncpg.connect(tracker.service.dsn)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE session_tracker.crawling_results")
    began = datetime.now(UTC)
    request = pb.CompleteSessionRequest(session_id="hurried", state=DONE)
    request.started_at.FromDatetime(began)
    hurried = tracker.sessions.CompleteSession(request, metadata=tracker.worker, timeout=0.3)
    assert (await refused(hurried)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    patient = asyncio.ensure_future(tracker.complete("patient", started_at=began))
    await transaction.rollback()
    await blocker.close()
    async with asyncio.timeout(10):
        assert (await patient).session_id == "patient"
        # It was begun, so it was committed; the caller learns that by asking again.
        assert (await tracker.complete("hurried")).started_at == request.started_at
