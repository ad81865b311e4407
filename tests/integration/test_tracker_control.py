"""Commands for sessions: by ids or by filter, on the stream and with every answer, until they are carried out."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import StartService


class Fleet:
    """A running tracker as a worker and an operator see it."""

    def __init__(self, channel: grpc.aio.Channel, worker: Any, operator: Any) -> None:
        self.worker, self.operator = worker, operator
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(channel)
        self.controls: Any = session_pb2_grpc.ControlServiceStub(channel)
        self.watch: Any = session_pb2_grpc.WatchServiceStub(channel)

    async def start(self, session_id: str, **fields: Any) -> None:
        await self.sessions.StartSession(pb.StartSessionRequest(session_id=session_id, **fields), metadata=self.worker)

    async def report(self, session_id: str, sequence: int, **fields: Any) -> list[pb.SessionCommand]:
        update = pb.ProgressUpdate(session_id=session_id, sequence=sequence, **fields)
        answer = await self.sessions.ReportProgress(pb.ReportProgressRequest(updates=[update]), metadata=self.worker)
        return list(answer.commands)

    async def control(self, **fields: Any) -> pb.ControlSessionsResponse:
        answer: pb.ControlSessionsResponse = await self.controls.ControlSessions(
            pb.ControlSessionsRequest(**fields), metadata=self.operator
        )
        return answer

    async def get(self, session_id: str) -> pb.Session:
        answer = await self.watch.GetSession(pb.GetSessionRequest(session_id=session_id), metadata=self.worker)
        session: pb.Session = answer.session
        return session


@pytest.fixture
async def fleet(start_service: StartService) -> Fleet:
    service = await start_service("session_tracker")
    return Fleet(service.channel, await service.metadata(Role.WORKER), await service.metadata(Role.OPERATOR))


async def test_a_command_is_told_until_it_is_carried_out(fleet: Fleet) -> None:
    await fleet.start("a")
    assert await fleet.report("a", 1) == []
    answer = await fleet.control(session_ids=["a", "nobody"], kind=pb.COMMAND_KIND_PAUSE, reason="maintenance")
    assert (answer.told, list(answer.unknown_sessions)) == (1, ["nobody"])
    (pause,) = await fleet.report("a", 2)
    assert (pause.session_id, pause.kind, pause.message) == ("a", pb.COMMAND_KIND_PAUSE, "maintenance")
    assert await fleet.report("a", 2) == [pause], "also with a stale report"
    assert await fleet.report("a", 3, state=pb.SESSION_STATE_PAUSED) == [pause], "not yet acknowledged"
    assert await fleet.report("a", 4, state=pb.SESSION_STATE_PAUSED, acknowledged_command=pause.number) == []
    session = await fleet.get("a")
    assert (session.state, session.acknowledged_command) == (pb.SESSION_STATE_PAUSED, pause.number)
    await fleet.control(session_ids=["a"], kind=pb.COMMAND_KIND_RESUME)
    await fleet.control(session_ids=["a"], kind=pb.COMMAND_KIND_STOP, reason="enough")
    (stop,) = await fleet.report("a", 5)
    assert stop.kind == pb.COMMAND_KIND_STOP, "a newer command replaces one that was not carried out"
    assert stop.number > pause.number
    assert await fleet.report("a", 6, acknowledged_command=pause.number) == [stop], (
        "the acknowledgement of an older one"
    )
    assert await fleet.report("a", 7, acknowledged_command=stop.number) == []


async def test_a_filter_selects_who_is_told_and_the_stream_tells_at_once(fleet: Fleet) -> None:
    for name, slot in (("a", "shoes"), ("b", "shoes"), ("c", "hats")):
        await fleet.start(name, slot_id=slot)
    stream = fleet.sessions.ReportStream(metadata=fleet.worker)
    packed = pb.PackedUpdates(handle=[0, 1, 2], sequence=[1, 1, 1])
    await stream.write(pb.ReportStreamRequest(batch=1, names=["a", "b", "c"], packed=packed))
    async with asyncio.timeout(10):
        assert (await stream.read()).taken == 3
    answer = await fleet.control(
        filter=pb.SessionFilter(slot_id="shoes"), kind=pb.COMMAND_KIND_SPEED_LIMIT, pages_per_minute=30, reason="polite"
    )
    assert answer.told == 2
    told: dict[str, pb.SessionCommand] = {}
    async with asyncio.timeout(10):
        while len(told) < 2:
            pushed = await stream.read()
            assert pushed.batch == 0
            told |= {command.session_id: command for command in pushed.commands}
    assert {name: command.pages_per_minute for name, command in told.items()} == {"a": 30.0, "b": 30.0}
    packed = pb.PackedUpdates(handle=[2, 0], sequence=[2, 2], current_page=[5, 5])
    await stream.write(pb.ReportStreamRequest(batch=2, packed=packed))
    async with asyncio.timeout(10):
        answered = await stream.read()
    assert [command.session_id for command in answered.commands] == ["a"], "with the answer to each of its reports"
    assert (await fleet.get("a")).pages_per_minute_limit == 30.0
    assert (await fleet.get("c")).pages_per_minute_limit == 0.0
    update = pb.ProgressUpdate(session_id="a", sequence=3, current_page=6, acknowledged_command=told["a"].number)
    await stream.write(pb.ReportStreamRequest(batch=3, updates=[update]))
    async with asyncio.timeout(10):
        assert not (await stream.read()).commands
    await stream.done_writing()


async def test_a_finished_session_is_told_nothing(fleet: Fleet) -> None:
    await fleet.start("a")
    request = pb.CompleteSessionRequest(session_id="a", state=pb.SESSION_STATE_COMPLETED)
    await fleet.sessions.CompleteSession(request, metadata=fleet.worker)
    answer = await fleet.control(session_ids=["a"], kind=pb.COMMAND_KIND_STOP)
    assert (answer.told, list(answer.unknown_sessions)) == (0, ["a"])


async def test_workers_may_not_command_and_organizations_do_not_reach_each_other(
    fleet: Fleet, start_service: StartService
) -> None:
    await fleet.start("a")
    request = pb.ControlSessionsRequest(session_ids=["a"], kind=pb.COMMAND_KIND_STOP)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.controls.ControlSessions(request, metadata=fleet.worker)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    service = await start_service("session_tracker")
    theirs = await service.metadata(Role.OPERATOR, organization="umbrella")
    controls: Any = session_pb2_grpc.ControlServiceStub(service.channel)
    answer = await controls.ControlSessions(request, metadata=theirs)
    assert (answer.told, list(answer.unknown_sessions)) == (0, ["a"])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"session_ids": ["s"] * 1001, "kind": pb.COMMAND_KIND_STOP}, "session_ids"),
        ({"session_ids": ["s", "s"], "kind": pb.COMMAND_KIND_STOP}, "session_ids"),
        ({"session_ids": [""], "kind": pb.COMMAND_KIND_STOP}, "session_ids[0]"),
        ({"session_ids": ["x" * 129], "kind": pb.COMMAND_KIND_STOP}, "session_ids[0]"),
        ({"kind": pb.COMMAND_KIND_STOP}, "filter"),
        ({"kind": pb.COMMAND_KIND_STOP, "filter": pb.SessionFilter()}, "filter"),
        ({"session_ids": ["s"], "filter": {"tag": "t"}, "kind": pb.COMMAND_KIND_STOP}, "filter"),
        ({"filter": {"tag": "t" * 65}, "kind": pb.COMMAND_KIND_STOP}, "filter.tag"),
        ({"session_ids": ["s"]}, "kind"),
        ({"session_ids": ["s"], "kind": pb.COMMAND_KIND_LEASE_LOST}, "kind"),
        ({"session_ids": ["s"], "kind": 99}, "kind"),
        ({"session_ids": ["s"], "kind": pb.COMMAND_KIND_PAUSE, "pages_per_minute": 1}, "pages_per_minute"),
        ({"session_ids": ["s"], "kind": pb.COMMAND_KIND_SPEED_LIMIT, "pages_per_minute": -1}, "pages_per_minute"),
        ({"session_ids": ["s"], "kind": pb.COMMAND_KIND_SPEED_LIMIT, "pages_per_minute": 1e7}, "pages_per_minute"),
        (
            {"session_ids": ["s"], "kind": pb.COMMAND_KIND_SPEED_LIMIT, "pages_per_minute": float("nan")},
            "pages_per_minute",
        ),
        ({"session_ids": ["s"], "kind": pb.COMMAND_KIND_STOP, "reason": "r" * 257}, "reason"),
    ],
)
async def test_wrong_fields_are_named(fleet: Fleet, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.control(**fields)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}:" in (caught.value.details() or "")
