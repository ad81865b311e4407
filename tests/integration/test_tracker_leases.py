"""Progress renews leases, against an allocator's contract that is answered by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from muster.allocator.v1 import work_pb2, work_pb2_grpc
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import RunningService, StartService

KEY = "muster_" + "k" * 43


class Allocator(work_pb2_grpc.WorkServiceServicer):
    """Renews every lease but those in `refusals`, by key; `asked` has each call's organization and leases."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[str, list[work_pb2.Lease]]] = asyncio.Queue()
        self.refusals: dict[str, str] = {}
        self.authorizations: set[str] = set()
        self.down = False
        self.strangers: set[str] = set()

    async def RenewLeases(self, request: work_pb2.RenewLeasesRequest, context: Any) -> work_pb2.RenewLeasesResponse:
        metadata = dict(context.invocation_metadata())
        self.authorizations.add(metadata["authorization"])
        self.asked.put_nowait((metadata["muster-organization"], list(request.leases)))
        if self.down:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        if metadata["muster-organization"] in self.strangers:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such organization")
        response = work_pb2.RenewLeasesResponse()
        for lease in request.leases:
            answer = response.leases.add(allocation_key=lease.allocation_key)
            if lease.allocation_key in self.refusals:
                answer.error.reason = self.refusals[lease.allocation_key]
                answer.error.message = "it ran out"
            else:
                answer.expires_at.GetCurrentTime()
        return response

    async def next(self) -> tuple[str, list[work_pb2.Lease]]:
        async with asyncio.timeout(10):
            return await self.asked.get()


class Tracker:
    """A running tracker whose rounds follow each other quickly."""

    def __init__(self, service: RunningService, metadata: tuple[tuple[str, str], ...]) -> None:
        self.service, self.metadata = service, metadata
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(service.channel)
        self.sequence = 0

    async def start(self, key: str, token: bytes = b"t" * 16) -> None:
        request = pb.StartSessionRequest(session_id=key, allocation_key=key, lease_token=token)
        await self.sessions.StartSession(request, metadata=self.metadata)

    async def report(self, *keys: str) -> pb.ReportProgressResponse:
        request = pb.ReportProgressRequest(updates=self.updates(*keys))
        response: pb.ReportProgressResponse = await self.sessions.ReportProgress(request, metadata=self.metadata)
        return response

    def updates(self, *keys: str) -> list[pb.ProgressUpdate]:
        self.sequence += 1
        return [pb.ProgressUpdate(session_id=key, sequence=self.sequence, current_page=self.sequence) for key in keys]


@pytest.fixture
async def allocator() -> AsyncIterator[tuple[Allocator, str]]:
    allocator, server = Allocator(), grpc.aio.server()  # type: ignore[abstract]  # it is asked for nothing else
    work_pb2_grpc.add_WorkServiceServicer_to_server(allocator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield allocator, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def tracker(start_service: StartService, allocator: tuple[Allocator, str], tmp_path: Path) -> Tracker:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    service = await start_service(
        "session_tracker",
        allocator={"target": allocator[1], "key_file": key_file},
        renewal={"interval_seconds": 0.05},
    )
    return Tracker(service, await service.metadata(Role.WORKER))


async def test_only_sessions_that_moved_are_renewed_for_their_organization(
    tracker: Tracker, allocator: tuple[Allocator, str]
) -> None:
    first, second, third = (str(uuid4()) for _ in range(3))
    theirs = Tracker(tracker.service, await tracker.service.metadata(Role.WORKER, organization="umbrella"))
    await tracker.start(first, b"1" * 16)
    await tracker.start(second, b"2" * 16)
    await theirs.start(third, b"3" * 16)
    await tracker.report(first)
    organization, leases = await allocator[0].next()
    assert organization == str(await tracker.service.organization_id())
    assert [(lease.allocation_key, lease.lease_token) for lease in leases] == [(first, b"1" * 16)]
    await theirs.report(third)
    organization, leases = await allocator[0].next()
    assert organization == str(await tracker.service.organization_id("umbrella"))
    assert [lease.allocation_key for lease in leases] == [third]
    await tracker.report(first, second)
    _, leases = await allocator[0].next()
    assert {lease.allocation_key for lease in leases} == {first, second}
    assert allocator[0].authorizations == {f"Bearer {KEY}"}


@pytest.mark.parametrize("reason", ["LEASE_LOST", "LEASE_TOKEN_MISMATCH", "ALLOCATION_NOT_FOUND"])
async def test_a_lost_lease_is_told_on_the_open_stream_and_with_the_next_answers(
    tracker: Tracker, allocator: tuple[Allocator, str], reason: str
) -> None:
    lost, kept = str(uuid4()), str(uuid4())
    allocator[0].refusals[lost] = reason
    await tracker.start(lost)
    await tracker.start(kept)
    stream = tracker.sessions.ReportStream(metadata=tracker.metadata)
    await stream.write(pb.ReportStreamRequest(batch=1, updates=tracker.updates(lost, kept)))
    async with asyncio.timeout(10):
        answer = await stream.read()
        assert (answer.batch, answer.taken) == (1, 2)
        pushed = await stream.read()
    assert pushed.batch == 0
    assert [(command.session_id, command.kind) for command in pushed.commands] == [(lost, pb.COMMAND_KIND_LEASE_LOST)]
    assert reason in pushed.commands[0].message
    _, leases = await allocator[0].next()
    assert {lease.allocation_key for lease in leases} == {lost, kept}
    await stream.write(pb.ReportStreamRequest(batch=2, updates=tracker.updates(lost, kept)))
    async with asyncio.timeout(10):
        answer = await stream.read()
    assert (answer.batch, [command.session_id for command in answer.commands]) == (2, [lost])
    stream.cancel()
    response = await tracker.report(kept, lost)
    assert [command.session_id for command in response.commands] == [lost]
    _, leases = await allocator[0].next()
    assert [lease.allocation_key for lease in leases] == [kept], "a lost lease is not asked for again"


async def test_another_refusal_does_not_stop_a_session(tracker: Tracker, allocator: tuple[Allocator, str]) -> None:
    key = str(uuid4())
    allocator[0].refusals[key] = "INTERNAL_FAULT"
    await tracker.start(key)
    await tracker.report(key)
    await allocator[0].next()
    assert not (await tracker.report(key)).commands
    await allocator[0].next()


async def test_a_lease_at_its_greatest_age_is_lost_only_when_it_runs_out(
    tracker: Tracker, allocator: tuple[Allocator, str]
) -> None:
    key = str(uuid4())
    allocator[0].refusals[key] = "LEASE_AGE_EXCEEDED"
    await tracker.start(key)
    for _ in range(2):
        assert not (await tracker.report(key)).commands
        await allocator[0].next()
    allocator[0].refusals[key] = "LEASE_LOST"
    async with asyncio.timeout(10):
        while not (commands := (await tracker.report(key)).commands):
            pass
    assert [(command.session_id, command.kind) for command in commands] == [(key, pb.COMMAND_KIND_LEASE_LOST)]


async def test_when_the_allocator_is_down_the_next_round_tries_again(
    tracker: Tracker, allocator: tuple[Allocator, str]
) -> None:
    key = str(uuid4())
    allocator[0].down = True
    await tracker.start(key)
    await tracker.report(key)
    for _ in range(3):
        _, leases = await allocator[0].next()
        assert [lease.allocation_key for lease in leases] == [key]
    assert not (await tracker.report(key)).commands, "nothing is known of the lease: the session goes on"
    allocator[0].down = False
    while not allocator[0].asked.empty():
        allocator[0].asked.get_nowait()
    _, leases = await allocator[0].next()
    assert [lease.allocation_key for lease in leases] == [key]


async def test_one_refused_organization_does_not_hold_up_the_others(
    tracker: Tracker, allocator: tuple[Allocator, str]
) -> None:
    theirs = Tracker(tracker.service, await tracker.service.metadata(Role.WORKER, organization="umbrella"))
    mine = str(await tracker.service.organization_id())
    others = str(await tracker.service.organization_id("umbrella"))
    allocator[0].strangers.add(mine)
    first, second = str(uuid4()), str(uuid4())
    await tracker.start(first)
    await theirs.start(second)
    await tracker.report(first)
    assert (await allocator[0].next())[0] == mine
    await theirs.report(second)
    asked: set[str] = set()
    while others not in asked:
        asked.add((await allocator[0].next())[0])


async def test_more_than_a_thousand_leases_go_in_several_calls(
    tracker: Tracker, allocator: tuple[Allocator, str]
) -> None:
    keys = [str(uuid4()) for _ in range(1300)]
    for begin in range(0, len(keys), 100):
        await asyncio.gather(*(tracker.start(key) for key in keys[begin : begin + 100]))
    await tracker.report(*keys[:1000])
    await tracker.report(*keys[1000:])
    asked: set[str] = set()
    while len(asked) < 1300:
        _, leases = await allocator[0].next()
        assert len(leases) <= 1000
        asked |= {lease.allocation_key for lease in leases}
    assert asked == set(keys)
