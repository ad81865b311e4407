"""A client process: python -m bench.tracker.load ORDER, which is JSON. It prints what came of it, likewise.

Clients are cheap, so that one core of them keeps a server busy: reports are bytes of which only numbers are exchanged,
and answers are not decoded but where they are what is measured. An order names a shape:

- `start`: sessions are started, some calls in flight.
- `packed`: each stream reports its share of the sessions in batches of `batch`, `in_flight` of them unanswered.
- `paced`: each session once a second, in a hundred batches spread over the second however many they are: for 10,000
  sessions batches of 100. The products of a report are the milliseconds of the clock when it went out.
- `unary`: `in_flight` calls of ReportProgress with one update each.
- `watch`: watchers. The first two of them read how old each report is; the others throw away what they get.
- `run`: sessions from start to end, with `pages` reports each.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import uvloop
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.varints import delimited, varint

BATCH = 100
_BATCHES_PER_SECOND = 100
_SERVICE = "/muster.session_tracker.v1.SessionService"
# Sequences of three bytes and pages of two, from the first to the last: so batches are of one size.
_FIRST_SEQUENCE, _FIRST_PAGE, _PAGES = 1 << 14, 1 << 7, (1 << 14) - (1 << 7)
_READING_WATCHERS = 2
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. Times are of `time.monotonic`, which processes of one machine share.

    Attributes:
        shape: See the module.
        target: The address.
        key: The API key.
        first: Number of the first session.
        sessions: How many.
        streams: Streams, or watchers.
        in_flight: Requests that each keeps unanswered.
        begin: When to begin to count.
        seconds: For how long. Requests go out from the start on.
        base: Sequences begin above it: each round's are above those of the one before.
        pages: Of each session, for `run`.
        batch: Updates in one request, for `packed`.
    """

    shape: str
    target: str
    key: str
    first: int
    sessions: int
    streams: int
    in_flight: int
    begin: float
    seconds: float
    base: int = 0
    pages: int = 0
    batch: int = BATCH


@dataclass(slots=True)
class Tally:
    """What came of it: updates (or calls) answered while it counted, and lags of reports in seconds."""

    updates: int = 0
    stale: int = 0
    unknown: int = 0
    lags: list[float] = field(default_factory=list)


def name(number: int) -> str:
    """Returns the id of a session: as long as a UUID."""
    return f"00000000-0000-7000-8000-{number:012x}"


class Batches:
    """The batches of one stream, round after round of its sessions."""

    def __init__(self, first: int, sessions: int, base: int, size: int) -> None:
        self._size = size
        parts = [range(begin, min(sessions, begin + size)) for begin in range(0, sessions, size)]
        self._handles = [delimited(1, b"".join(map(varint, part))) for part in parts]
        self._names = [b"".join(delimited(3, name(first + handle).encode()) for handle in part) for part in parts]
        self._last = len(parts[-1])
        self._numbers = itertools.count(1)
        self._base = _FIRST_SEQUENCE + base

    def __iter__(self) -> Iterator[bytes]:
        for turn in itertools.count():
            for place in range(len(self._handles)):
                yield self.batch(turn, place)

    def batch(self, turn: int, place: int, products: int = 5) -> bytes:
        """Returns the batch of some sessions in one round."""
        size = self._size if place + 1 < len(self._handles) else self._last
        packed = b"".join(
            (
                self._handles[place],
                delimited(2, varint(self._base + turn) * size),
                delimited(3, varint(_FIRST_PAGE + turn % _PAGES) * size),
                delimited(4, varint(20_000) * size),
                delimited(5, varint(products) * size),
                delimited(6, varint(1) * size),
            )
        )
        names = b"" if turn else self._names[place]
        return b"\x08" + varint(next(self._numbers)) + names + delimited(4, packed)


class Client:
    """Carries out one order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._until = order.begin + order.seconds
        self._metadata = (("authorization", f"Bearer {order.key}"),)
        self.tally = Tally()

    async def run(self) -> Tally:
        """Runs until the order is done."""
        order = self._order
        if order.shape in ("start", "run", "unary"):
            numbers = iter(range(order.first, order.first + order.sessions))
            async with grpc.aio.insecure_channel(order.target, options=_OPTIONS) as channel:
                work = {"start": self._start, "run": self._run, "unary": self._unary}[order.shape]
                await asyncio.gather(*(work(channel, numbers) for _ in range(order.in_flight)))
            return self.tally
        share = order.sessions // order.streams
        works = []
        for number in range(order.streams):
            match order.shape:
                case "watch":
                    works.append(self._watch(number))
                case "paced":
                    works.append(self._paced(order.first + number * share, share))
                case _:
                    works.append(self._packed(order.first + number * share, share))
        await asyncio.gather(*works)
        return self.tally

    def _stream(self, channel: grpc.aio.Channel) -> Any:
        return channel.stream_stream(f"{_SERVICE}/ReportStream")(metadata=self._metadata)

    def _take(self, data: bytes, at: float) -> None:
        answer = pb.ReportStreamResponse.FromString(data)
        self.tally.stale += answer.stale
        self.tally.unknown += len(answer.unknown_sessions)
        if self._order.begin <= at < self._until:
            self.tally.updates += answer.taken

    async def _packed(self, first: int, sessions: int) -> None:
        async with grpc.aio.insecure_channel(self._order.target, options=_OPTIONS) as channel:
            call = self._stream(channel)
            batches = iter(Batches(first, sessions, self._order.base, self._order.batch))
            open_ = 0
            while (now := time.monotonic()) < self._until:
                while open_ < self._order.in_flight:
                    await call.write(next(batches))
                    open_ += 1
                self._take(await call.read(), now)
                open_ -= 1
            await call.done_writing()
            for _ in range(open_):
                self._take(await call.read(), time.monotonic())

    async def _paced(self, first: int, sessions: int) -> None:
        async with grpc.aio.insecure_channel(self._order.target, options=_OPTIONS) as channel:
            call = self._stream(channel)
            size = max(1, sessions // _BATCHES_PER_SECOND)
            batches = Batches(first, sessions, self._order.base, size)
            places = -(-sessions // size)
            begun = time.monotonic()
            for number in itertools.count():
                due = begun + number / places
                if due >= self._until:
                    break
                if (rest := due - time.monotonic()) > 0:
                    await asyncio.sleep(rest)
                turn, place = divmod(number, places)
                await call.write(batches.batch(turn, place, int(time.monotonic() * 1000) & 0xFFFFFFF))
                self._take(await call.read(), time.monotonic())
            await call.done_writing()

    async def _watch(self, number: int) -> None:
        async with grpc.aio.insecure_channel(self._order.target, options=_OPTIONS) as channel:
            method: Any = channel.unary_stream("/muster.session_tracker.v1.WatchService/WatchSessions")
            request = pb.WatchSessionsRequest(packed=True).SerializeToString()
            call = method(request, metadata=self._metadata)
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._until - time.monotonic()):
                    async for data in call:
                        now = time.monotonic()
                        if number < _READING_WATCHERS and now >= self._order.begin:
                            answer = pb.WatchSessionsResponse.FromString(data)
                            self.tally.lags.extend(now - sent / 1000 for sent in answer.packed.products_found)
            except TimeoutError:
                call.cancel()

    async def _start(self, channel: grpc.aio.Channel, numbers: Iterator[int]) -> None:
        stub: Any = session_pb2_grpc.SessionServiceStub(channel)
        for number in numbers:
            await stub.StartSession(_registration(number), metadata=self._metadata)
            self.tally.updates += 1

    async def _unary(self, channel: grpc.aio.Channel, numbers: Iterator[int]) -> None:
        method: Any = channel.unary_unary(f"{_SERVICE}/ReportProgress")
        session = name(next(numbers))
        for sequence in itertools.count(_FIRST_SEQUENCE + self._order.base):
            update = pb.ProgressUpdate(
                session_id=session, sequence=sequence, current_page=sequence, total_pages=10**8, products_found=5
            )
            request = pb.ReportProgressRequest(updates=[update]).SerializeToString()
            if time.monotonic() >= self._until:
                return
            await method(request, metadata=self._metadata)
            if time.monotonic() >= self._order.begin:
                self.tally.updates += 1

    async def _run(self, channel: grpc.aio.Channel, numbers: Iterator[int]) -> None:
        stub: Any = session_pb2_grpc.SessionServiceStub(channel)
        for number in numbers:
            await stub.StartSession(_registration(number), metadata=self._metadata)

            async def pages(session: str = name(number)) -> AsyncIterator[pb.ReportStreamRequest]:
                for page in range(1, self._order.pages + 1):
                    update = pb.ProgressUpdate(
                        session_id=session, sequence=page, current_page=page, products_found=3 * page
                    )
                    yield pb.ReportStreamRequest(batch=page, updates=[update])

            async for answer in stub.ReportStream(pages(), metadata=self._metadata):
                self.tally.updates += answer.taken
            request = pb.CompleteSessionRequest(
                session_id=name(number),
                state=pb.SESSION_STATE_COMPLETED,
                total_pages=self._order.pages,
                products_found=3 * self._order.pages,
            )
            await stub.CompleteSession(request, metadata=self._metadata)


def _registration(number: int) -> pb.StartSessionRequest:
    return pb.StartSessionRequest(
        session_id=name(number),
        stage="listing",
        total_pages=20_000,
        slot_id=f"slot-{number % 1000}",
        client_id=f"client-{number % 50}",
        tags=["nightly", f"region-{number % 10}"],
    )


async def _main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(await Client(order).run())))


if __name__ == "__main__":
    uvloop.run(_main())
