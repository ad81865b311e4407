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
from dataclasses import asdict, dataclass, field

import uvloop

from bench.allocator.wire import ALLOCATE, SUBMIT, Wire
from bench.http2 import Connection

# A connection that hears "no work" so many times in a row has emptied the stock.
_LAST_NO_WORK = 5
_STREAM = "/muster.allocator.v1.WorkService/WorkStream"
_UNARY = "/muster.allocator.v1.WorkService/AllocateWork"


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
        self._metadata = [("authorization", f"Bearer {order.key}")]
        self.tally = Tally(units=[0] * max(1, round(order.seconds)))

    async def run(self) -> Tally:
        """Runs until the order's time is over."""
        targets = itertools.cycle(self._order.targets)
        connections = [
            await Connection.open(address, self._metadata)
            for address in itertools.islice(targets, self._order.connections)
        ]
        await asyncio.gather(*(self._connection(number, open_) for number, open_ in enumerate(connections)))
        for connection in connections:
            connection.close()
        return self.tally

    async def _connection(self, number: int, connection: Connection) -> None:
        wire = Wire(f"bench-{os.getpid()}-{number}", number, self._order.items)
        match self._order.shape:
            case "unary":
                await asyncio.gather(*(self._unary(connection, wire) for _ in range(self._order.in_flight)))
            case "paced":
                await self._paced(connection, wire, number)
            case shape:
                await self._stream(connection, wire, shape)

    async def _unary(self, connection: Connection, wire: Wire) -> None:
        while (now := time.monotonic()) < self._until:
            answer = await connection.unary(_UNARY, wire.demand())
            if answer is None:
                self.tally.refused += 1
            else:
                self._count(len(wire.leases(answer, 0)), now)

    async def _stream(self, connection: Connection, wire: Wire, shape: str) -> None:
        call = connection.call(_STREAM)
        numbers = itertools.count(1)
        sent: dict[int, float] = {}
        no_work_in_a_row = 0

        def ask() -> None:
            sequence = next(numbers)
            sent[sequence] = time.monotonic()
            call.write(wire.allocate(sequence))

        for _ in range(self._order.in_flight):
            ask()
        while sent:
            answer = await call.read()
            if answer is None:
                raise SystemExit("the service ended a stream")
            sequence, field_, begin = wire.read(answer)
            at = sent.pop(sequence)
            going_on = time.monotonic() < self._until
            if field_ == ALLOCATE:
                given = wire.leases(answer, begin)
                no_work_in_a_row = 0 if given else no_work_in_a_row + 1
                self._count(len(given), at, recorded=shape == "cycle")
                if shape == "drain":
                    going_on = going_on and no_work_in_a_row < _LAST_NO_WORK
                if shape == "cycle" and given:
                    sequence = next(numbers)
                    sent[sequence] = time.monotonic()
                    call.write(wire.submit(sequence, given))
                    continue
            elif field_ == SUBMIT:
                told, done = wire.recorded(answer, begin)
                self.tally.refused += told - done
                self._add(done, time.monotonic())
            else:
                self.tally.refused += 1
            if going_on:
                ask()
        call.done_writing()

    async def _paced(self, connection: Connection, wire: Wire, number: int) -> None:
        order = self._order
        call = connection.call(_STREAM)
        due: dict[int, float] = {}
        between = order.connections / order.rate
        # Begins up to a second early, to be warm; only what is due within the window counts.
        first = max(order.begin - 1.0, time.monotonic()) + number / order.rate

        async def read() -> None:
            while (answer := await call.read()) is not None:
                sequence, _, begin = wire.read(answer)
                at = due.pop(sequence)
                if at >= order.begin:
                    self.tally.latencies.append(time.monotonic() - at)
                self._count(len(wire.leases(answer, begin)), at)

        reader = asyncio.create_task(read())
        for sequence in itertools.count(1):
            at = first + (sequence - 1) * between
            if at >= self._until:
                break
            if (early := at - time.monotonic()) > 0:
                await asyncio.sleep(early)
            due[sequence] = at
            call.write(wire.allocate(sequence))
        call.done_writing()
        await reader

    def _count(self, given: int, sent_at: float, *, recorded: bool = False) -> None:
        now = time.monotonic()
        if given:
            self.tally.last_grant = max(self.tally.last_grant, sent_at)
        else:
            self.tally.no_work += 1
            self.tally.first_no_work = min(self.tally.first_no_work, now)
        if not recorded:
            self._add(given, now)

    def _add(self, units: int, now: float) -> None:
        second = int(now - self._order.begin) if now >= self._order.begin else -1
        if 0 <= second < len(self.tally.units):
            self.tally.units[second] += units
            self.tally.calls += 1


def main() -> None:
    for line in sys.stdin:
        tally = uvloop.run(Client(Order(**json.loads(line))).run())
        print(json.dumps(asdict(tally)), flush=True)


if __name__ == "__main__":
    main()
