"""One report stream: bounded both ways, and commands in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.errors import Draining
from session_tracker.reports import ReportStream
from session_tracker.sessions import LeaseLost


def answer(request: pb.ReportStreamRequest, _: ReportStream) -> pb.ReportStreamResponse:
    return pb.ReportStreamResponse(batch=request.batch)


class Client:
    """Sends batches without end and says how many were read."""

    def __init__(self) -> None:
        self.read = 0

    async def batches(self) -> AsyncIterator[pb.ReportStreamRequest]:
        while True:
            self.read += 1
            yield pb.ReportStreamRequest(batch=self.read)
            # A chance for everyone else, as waiting for the wire is.
            await asyncio.sleep(0)


async def test_a_client_that_does_not_read_its_answers_is_not_read_from() -> None:
    client = Client()
    responses = ReportStream(answer).responses(client.batches())
    assert (await anext(responses)).batch == 1
    for _ in range(1000):
        await asyncio.sleep(0)
    assert client.read <= 18, "16 answers wait, and reading has stopped"
    for batch in range(2, 200):
        assert (await anext(responses)).batch == batch
    await responses.aclose()  # type: ignore[attr-defined]


async def test_a_command_does_not_wait_for_the_next_batch() -> None:
    silent = asyncio.Event()

    async def batches() -> AsyncIterator[pb.ReportStreamRequest]:
        yield pb.ReportStreamRequest(batch=1)
        await silent.wait()

    stream = ReportStream(answer)
    responses = stream.responses(batches())
    assert (await anext(responses)).batch == 1
    waiting = asyncio.ensure_future(anext(responses))
    await asyncio.sleep(0)
    stream.tell(LeaseLost("s", "expired"))
    async with asyncio.timeout(5):
        told = await waiting
    assert (told.batch, told.commands[0].session_id) == (0, "s")
    assert told.commands[0].kind == pb.COMMAND_KIND_LEASE_LOST
    silent.set()
    with pytest.raises(StopAsyncIteration):
        await anext(responses)
    stream.tell(LeaseLost("s", "too late, and harmless"))


async def test_what_was_taken_before_the_drain_is_answered() -> None:
    client = Client()
    stream = ReportStream(answer)
    responses = stream.responses(client.batches())
    assert (await anext(responses)).batch == 1
    stream.drain()
    taken = client.read
    for batch in range(2, taken + 1):
        assert (await anext(responses)).batch == batch
    with pytest.raises(Draining):
        await anext(responses)


async def test_a_client_that_breaks_off_ends_the_reader() -> None:
    client = Client()
    responses = ReportStream(answer).responses(client.batches())
    await anext(responses)
    await responses.aclose()  # type: ignore[attr-defined]
    read = client.read
    for _ in range(100):
        await asyncio.sleep(0)
    assert client.read == read
    assert len(asyncio.all_tasks()) == 1
