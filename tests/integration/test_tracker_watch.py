"""Watching live sessions: snapshot, changes, resumption, filters, and watchers that are slow."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.organizations import Organizations
from session_tracker.sessions import Registration
from session_tracker.watching import Filter, Watch
from tests.support.services import RunningService, StartService

Metadata = tuple[tuple[str, str], ...]
AT_ONCE = Duration(seconds=0)


class Console:
    """Holds what a watcher holds: it applies every answer, and knows where it stands."""

    def __init__(self, service: RunningService, metadata: Metadata, *, channel: Any = None, **filter: Any) -> None:
        self._watch = session_pb2_grpc.WatchServiceStub(channel or service.channel)
        self._metadata = metadata
        self._filter = pb.SessionFilter(**filter)
        self.held: dict[str, pb.Session] = {}
        self.epoch, self.offset = "", 0
        self.answers: list[pb.WatchSessionsResponse] = []
        self._call: Any = None

    def open(self) -> None:
        request = pb.WatchSessionsRequest(filter=self._filter, epoch=self.epoch, offset=self.offset, interval=AT_ONCE)
        self._call = self._watch.WatchSessions(request, metadata=self._metadata)

    async def read(self) -> pb.WatchSessionsResponse:
        async with asyncio.timeout(10):
            answer: pb.WatchSessionsResponse = await self._call.read()
        if answer.snapshot:
            self.held.clear()
        for session in answer.sessions:
            self.held[session.session_id] = session
        for session_id in answer.removed:
            self.held.pop(session_id, None)
        self.epoch, self.offset = answer.epoch, answer.offset
        self.answers.append(answer)
        return answer

    async def read_until(self, done: Any) -> None:
        while not done(self.held):
            await self.read()

    def close(self) -> None:
        self._call.cancel()


class Worker:
    """Starts, reports and completes sessions."""

    def __init__(self, service: RunningService, metadata: Metadata) -> None:
        self._stub = session_pb2_grpc.SessionServiceStub(service.channel)
        self._metadata = metadata
        self._sequence = 0

    async def start(self, *session_ids: str, **fields: Any) -> None:
        for session_id in session_ids:
            await self._stub.StartSession(
                pb.StartSessionRequest(session_id=session_id, **fields), metadata=self._metadata
            )

    async def page(self, *session_ids: str, page: int, **fields: Any) -> None:
        self._sequence += 1
        updates = [
            pb.ProgressUpdate(session_id=name, sequence=self._sequence, current_page=page, **fields)
            for name in session_ids
        ]
        await self._stub.ReportProgress(pb.ReportProgressRequest(updates=updates), metadata=self._metadata)

    async def complete(self, session_id: str) -> None:
        request = pb.CompleteSessionRequest(session_id=session_id, state=pb.SESSION_STATE_COMPLETED)
        await self._stub.CompleteSession(request, metadata=self._metadata)


@pytest.fixture
async def service(start_service: StartService) -> RunningService:
    return await start_service("session_tracker")


async def test_a_snapshot_comes_first_and_then_every_change(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a", "b")
    console.open()
    first = await console.read()
    assert first.snapshot
    assert set(console.held) == {"a", "b"}
    await worker.page("a", page=3)
    await console.read_until(lambda held: held["a"].current_page == 3)
    await worker.start("c")
    await console.read_until(lambda held: "c" in held)
    await worker.complete("b")
    await console.read_until(lambda held: "b" not in held)
    assert not any(answer.snapshot for answer in console.answers[1:])
    offsets = [answer.offset for answer in console.answers]
    assert offsets == sorted(set(offsets))
    console.close()


async def test_an_empty_snapshot_is_sent_too(service: RunningService) -> None:
    console = Console(service, await service.metadata(Role.WORKER))
    console.open()
    answer = await console.read()
    assert (answer.snapshot, len(answer.sessions)) == (True, 0)
    console.close()


async def test_a_large_snapshot_comes_in_pieces_and_only_the_last_can_be_resumed_from(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    names = [f"s{number:04}" for number in range(1201)]
    await worker.start(*names)
    console.open()
    while len(console.held) < len(names):
        await console.read()
    assert [len(answer.sessions) for answer in console.answers] == [500, 500, 201]
    assert [answer.snapshot for answer in console.answers] == [True, False, False]
    assert [answer.offset for answer in console.answers] == [0, 0, 1201]
    console.close()
    # Cut off after the first piece, a watcher misses nothing when it comes back.
    console.held = {session.session_id: session for session in console.answers[0].sessions}
    console.offset = console.answers[0].offset
    console.open()
    await console.read_until(lambda held: set(held) == set(names))
    console.close()


async def test_a_watcher_goes_on_where_it_left_off(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a", "b", "c")
    console.open()
    await console.read()
    console.close()
    await worker.page("a", page=9)
    await worker.complete("b")
    console.open()
    answer = await console.read()
    assert not answer.snapshot
    assert ([session.session_id for session in answer.sessions], list(answer.removed)) == (["a"], ["b"])
    assert set(console.held) == {"a", "c"}
    console.close()
    console.open()
    answer = await console.read()
    assert (answer.snapshot, len(answer.sessions), len(answer.removed)) == (False, 0, 0), "nothing happened meanwhile"
    console.close()


async def test_after_a_restart_a_watcher_gets_a_snapshot(service: RunningService, start_service: StartService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a")
    console.open()
    await console.read()
    console.close()
    restarted = await start_service("session_tracker", database=service.database)
    again = Console(restarted, metadata)
    again.epoch, again.offset, again.held = console.epoch, console.offset, console.held
    again.open()
    assert (await again.read()).snapshot
    assert again.held == {}
    assert again.epoch != console.epoch
    again.close()


async def test_a_filter_shows_what_matches_and_removes_what_does_no_more(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    console = Console(service, metadata, states=[pb.SESSION_STATE_RUNNING], slot_id="slot")
    await worker.start("a", "b", slot_id="slot")
    await worker.start("elsewhere", slot_id="other")
    await worker.page("a", "elsewhere", page=1)
    console.open()
    await console.read()
    assert set(console.held) == {"a"}
    await worker.page("b", page=1)
    await console.read_until(lambda held: set(held) == {"a", "b"})
    await worker.page("a", page=1, state=pb.SESSION_STATE_PAUSED)
    await console.read_until(lambda held: set(held) == {"b"})
    console.close()
    await worker.page("a", page=2)
    await worker.page("b", page=2, state=pb.SESSION_STATE_PAUSED)
    console.open()
    answer = await console.read()
    assert not answer.snapshot
    assert set(console.held) == {"a"}
    assert all("elsewhere" not in answer.removed for answer in console.answers)
    console.close()


async def test_organizations_watch_their_own(service: RunningService) -> None:
    mine, theirs = await service.metadata(Role.WORKER), await service.metadata(Role.WORKER, organization="umbrella")
    console = Console(service, mine)
    console.open()
    await console.read()
    await Worker(service, theirs).start("theirs")
    await Worker(service, mine).start("mine")
    await console.read_until(lambda held: held)
    assert set(console.held) == {"mine"}
    console.close()


async def test_a_slow_watcher_gets_the_latest_and_holds_nobody_up(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    # A window that stays small, so that what the slow one does not read soon stands in nobody's buffers.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    narrow = grpc.aio.insecure_channel(service.address, options=options)
    slow, quick = Console(service, metadata, channel=narrow), Console(service, metadata)
    names = [f"s{number:03}-" + "x" * 100 for number in range(400)]
    await worker.start(*names)
    for console in (slow, quick):
        console.open()
        await console.read()
    rounds = 60
    for page in range(1, rounds + 1):
        await worker.page(*names, page=page)
        await quick.read_until(lambda held, page=page: held[names[0]].current_page == page)
    await slow.read_until(lambda held: all(session.current_page == rounds for session in held.values()))
    # Some answers stood in the transport's buffers; the rest were merged.
    assert len(slow.answers) < rounds / 2 < len(quick.answers)
    slow.close()
    quick.close()
    await narrow.close()


async def test_between_two_answers_a_watcher_holds_one_entry_per_session() -> None:
    organizations = Organizations(SessionsConfig(), Clock())
    organization = organizations.of(UUID(int=1))
    for name in ("a", "b"):
        organization.start(Registration(name))
    watch = Watch(organization, Filter(), 0.0, asyncio.Event())
    pieces = watch.pieces("", 0)
    assert (await anext(pieces)).snapshot
    for sequence in range(1, 1001):
        organization.report([pb.ProgressUpdate(session_id="a", sequence=sequence, current_page=sequence)])
    organization.complete("b", 0)
    assert len(organization.changes.dirty) == 2
    piece = await anext(pieces)
    assert [session.current_page for session in piece.sessions] == [1000]
    assert piece.removed == ["b"]
    assert piece.offset == organization.changes.offset
    await pieces.aclose()  # type: ignore[attr-defined]
    assert not organization.changes.watched
