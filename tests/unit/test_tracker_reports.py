"""One report stream: answers in step, and commands in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.errors import Draining
from session_tracker.commands import Command, CommandKind
from session_tracker.reports import ReportStream


def answer(data: bytes, _: ReportStream) -> pb.ReportStreamResponse:
    return pb.ReportStreamResponse(batch=pb.ReportStreamRequest.FromString(data).batch)


class Client:
    """Sends batches without end, says how many were read, and takes answers while it has room for them."""

    def __init__(self, room: int = 1000) -> None:
        self.read = 0
        self.answers: asyncio.Queue[pb.ReportStreamResponse] = asyncio.Queue(room)

    async def batches(self) -> AsyncIterator[bytes]:
        while True:
            self.read += 1
            yield pb.ReportStreamRequest(batch=self.read).SerializeToString()
            # A chance for everyone else, as waiting for the wire is.
            await asyncio.sleep(0)

    async def next(self) -> pb.ReportStreamResponse:
        async with asyncio.timeout(5):
            return await self.answers.get()


async def test_a_client_that_does_not_read_its_answers_is_not_read_from() -> None:
    client = Client(room=2)
    serving = asyncio.ensure_future(ReportStream().serve(client.batches(), client.answers.put, answer))
    assert (await client.next()).batch == 1
    for _ in range(1000):
        await asyncio.sleep(0)
    assert client.read <= 4, "two answers wait and one is on its way: reading has stopped"
    for batch in range(2, 200):
        assert (await client.next()).batch == batch
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_a_command_does_not_wait_for_the_next_batch_and_the_newest_is_told() -> None:
    silent = asyncio.Event()

    async def batches() -> AsyncIterator[bytes]:
        yield pb.ReportStreamRequest(batch=1).SerializeToString()
        await silent.wait()

    client = Client()
    stream = ReportStream()
    serving = asyncio.ensure_future(stream.serve(batches(), client.answers.put, answer))
    assert (await client.next()).batch == 1
    stream.tell(Command("s", CommandKind.PAUSE, "", 1))
    stream.tell(Command("s", CommandKind.SPEED_LIMIT, "slower", 2, 12.5))
    stream.tell(Command("t", CommandKind.LEASE_LOST, "expired"))
    told = await client.next()
    assert (told.batch, len(told.commands)) == (0, 2)
    assert told.commands[0] == pb.SessionCommand(
        session_id="s", kind=pb.COMMAND_KIND_SPEED_LIMIT, message="slower", number=2, pages_per_minute=12.5
    )
    assert (told.commands[1].session_id, told.commands[1].kind) == ("t", pb.COMMAND_KIND_LEASE_LOST)
    silent.set()
    await serving
    stream.tell(Command("s", CommandKind.STOP, "too late, and harmless", 3))
    assert client.answers.empty()


async def test_what_was_taken_before_the_drain_is_answered() -> None:
    taken = []

    def take(data: bytes, stream: ReportStream) -> pb.ReportStreamResponse:
        answered = answer(data, stream)
        taken.append(answered.batch)
        if answered.batch == 5:
            stream.drain()
        return answered

    client = Client()
    with pytest.raises(Draining):
        await ReportStream().serve(client.batches(), client.answers.put, take)
    assert [client.answers.get_nowait().batch for _ in range(client.answers.qsize())] == taken


async def test_a_client_that_breaks_off_ends_the_reader() -> None:
    client = Client()
    stream = ReportStream()
    serving = asyncio.ensure_future(stream.serve(client.batches(), client.answers.put, answer))
    await client.next()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    read = client.read
    for _ in range(100):
        await asyncio.sleep(0)
    assert client.read == read
    assert len(asyncio.all_tasks()) == 1
