"""A client process: it does what it is told on its standard input, one JSON object a line, and answers likewise.

An order names a shape:

- `stream`: each connection has a WorkStream with `in_flight` requests unanswered, and asks again at each answer.
- `cycle`: likewise, and what was given is submitted before more is asked for.
- `unary`: each connection has `in_flight` calls of AllocateWork open.
- `paced`: requests go out on the streams at a fixed rate, whether or not earlier ones are answered; the time of each is
  counted from when it should have gone out.
- `drain`: as `stream`, until a connection has heard "no work" several times in a row.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2, work_pb2_grpc

# A connection that hears "no work" so many times in a row has emptied the stock.
_LAST_NO_WORK = 5
_TWO_SECONDS = Duration(seconds=2)


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. Times are of `time.monotonic`, which processes of one machine share.

    Attributes:
        shape: See the module.
        targets: Addresses; connections are dealt to them in turn.
        key: The API key.
        connections: How many.
        in_flight: Requests that each keeps open.
        items: Units that each asks for.
        begin: When to begin to count.
        seconds: For how long. Requests go out from the start on.
        rate: Requests a second, for `paced`.
    """

    shape: str
    targets: list[str]
    key: str
    connections: int
    in_flight: int
    items: int
    begin: float
    seconds: float
    rate: float = 0.0


@dataclass(slots=True)
class Tally:
    """What came of it: `units` handed out (or, in cycles, recorded) in each second; answers; refusals.

    `latencies` are seconds, of `paced` only. `last_grant` is when the last request that got units went out, and
    `first_no_work` when the first that got none was answered.
    """

    units: list[int] = field(default_factory=list)
    calls: int = 0
    no_work: int = 0
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    last_grant: float = 0.0
    first_no_work: float = float("inf")


class Client:
    """Carries out one order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._until = order.begin + order.seconds
        self._metadata = (("authorization", f"Bearer {order.key}"),)
        self.tally = Tally(units=[0] * max(1, round(order.seconds)))

    async def run(self) -> Tally:
        """Runs until the order's time is over."""
        order = self._order
        async with _Channels(order) as channels:
            connections = [self._connection(number, channel) for number, channel in enumerate(channels)]
            await asyncio.gather(*connections)
        return self.tally

    async def _connection(self, number: int, channel: grpc.aio.Channel) -> None:
        stub = work_pb2_grpc.WorkServiceStub(channel)
        client = work_pb2.ClientIdentity(client_id=f"bench-{os.getpid()}-{number}", instance_number=number)
        match self._order.shape:
            case "unary":
                await asyncio.gather(*(self._unary(stub, client) for _ in range(self._order.in_flight)))
            case "paced":
                await self._paced(stub, client, number)
            case shape:
                await self._stream(stub, client, shape)

    async def _unary(self, stub: Any, client: work_pb2.ClientIdentity) -> None:
        while (now := time.monotonic()) < self._until:
            answer = await stub.AllocateWork(self._ask(client), metadata=self._metadata, timeout=30)
            self._count(answer, now)

    async def _stream(self, stub: Any, client: work_pb2.ClientIdentity, shape: str) -> None:
        call = stub.WorkStream(metadata=self._metadata)
        numbers = itertools.count(1)
        sent: dict[int, float] = {}
        no_work_in_a_row = 0

        async def send(**request: Any) -> None:
            sequence = next(numbers)
            sent[sequence] = time.monotonic()
            await call.write(work_pb2.WorkStreamRequest(sequence=sequence, **request))

        for _ in range(self._order.in_flight):
            await send(allocate=self._ask(client))
        while sent:
            answer = await call.read()
            at = sent.pop(answer.sequence)
            going_on = time.monotonic() < self._until
            match answer.WhichOneof("answer"):
                case "allocate":
                    given = answer.allocate.allocations
                    no_work_in_a_row = 0 if given else no_work_in_a_row + 1
                    self._count(answer.allocate, at, recorded=shape == "cycle")
                    if shape == "drain":
                        going_on = going_on and no_work_in_a_row < _LAST_NO_WORK
                    if shape == "cycle" and given:
                        await send(submit=_results(client, given))
                        continue
                case "submit":
                    self._count_recorded(answer.submit)
                case _:
                    self.tally.refused += 1
            if going_on:
                await send(allocate=self._ask(client))
        await call.done_writing()

    async def _paced(self, stub: Any, client: work_pb2.ClientIdentity, number: int) -> None:
        order = self._order
        call = stub.WorkStream(metadata=self._metadata)
        due: dict[int, float] = {}
        between = order.connections / order.rate
        # Begins a second early, to be warm; only what is due within the window counts.
        first = order.begin - 1.0 + number / order.rate

        async def read() -> None:
            async for answer in call:
                at = due.pop(answer.sequence)
                if at >= order.begin:
                    self.tally.latencies.append(time.monotonic() - at)
                self._count(answer.allocate, at)

        reader = asyncio.create_task(read())
        for sequence in itertools.count(1):
            at = first + (sequence - 1) * between
            if at >= self._until:
                break
            if (early := at - time.monotonic()) > 0:
                await asyncio.sleep(early)
            due[sequence] = at
            await call.write(work_pb2.WorkStreamRequest(sequence=sequence, allocate=self._ask(client)))
        await call.done_writing()
        await reader

    def _ask(self, client: work_pb2.ClientIdentity) -> work_pb2.AllocateWorkRequest:
        return work_pb2.AllocateWorkRequest(
            request_id=str(uuid.UUID(bytes=os.urandom(16))), client=client, max_items=self._order.items
        )

    def _count(self, answer: work_pb2.AllocateWorkResponse, sent_at: float, *, recorded: bool = False) -> None:
        given = len(answer.allocations)
        now = time.monotonic()
        if given:
            self.tally.last_grant = max(self.tally.last_grant, sent_at)
        else:
            self.tally.no_work += 1
            self.tally.first_no_work = min(self.tally.first_no_work, now)
        if not recorded:
            self._add(given, now)

    def _count_recorded(self, answer: work_pb2.SubmitResultsResponse) -> None:
        done = sum(result.disposition == work_pb2.RESULT_DISPOSITION_RECORDED for result in answer.results)
        self.tally.refused += len(answer.results) - done
        self._add(done, time.monotonic())

    def _add(self, units: int, now: float) -> None:
        second = int(now - self._order.begin) if now >= self._order.begin else -1
        if 0 <= second < len(self.tally.units):
            self.tally.units[second] += units
            self.tally.calls += 1


class _Channels:
    """The connections of an order, each of its own."""

    def __init__(self, order: Order) -> None:
        # Without a pool of its own, channels to one address share one connection.
        own = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = [
            grpc.aio.insecure_channel(order.targets[number % len(order.targets)], options=own)
            for number in range(order.connections)
        ]

    async def __aenter__(self) -> list[grpc.aio.Channel]:
        return self._channels

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()


def _results(client: work_pb2.ClientIdentity, given: Any) -> work_pb2.SubmitResultsRequest:
    return work_pb2.SubmitResultsRequest(
        client=client,
        results=[
            work_pb2.WorkResult(
                lease=work_pb2.Lease(allocation_key=unit.allocation_key, lease_token=unit.lease_token),
                outcome=work_pb2.WORK_OUTCOME_SUCCEEDED,
                execution_time=_TWO_SECONDS,
            )
            for unit in given
        ],
    )


def main() -> None:
    for line in sys.stdin:
        tally = uvloop.run(Client(Order(**json.loads(line))).run())
        print(json.dumps(asdict(tally)), flush=True)


if __name__ == "__main__":
    main()
