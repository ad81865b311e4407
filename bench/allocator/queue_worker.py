"""A PgQueuer worker with an empty handler: python -m bench.allocator.queue_worker DSN install | enqueue N | run."""

from __future__ import annotations

import sys
import time
from array import array

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain.types import QueueExecutionMode
from pgqueuer.models import Job

_ENTRY = "work"
_PIECE = 1000


async def install(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await Queries(AsyncpgDriver(connection)).install()


async def enqueue(connection: asyncpg.Connection[asyncpg.Record], jobs: int) -> None:
    queries = Queries(AsyncpgDriver(connection))
    for begin in range(0, jobs, _PIECE):
        size = min(_PIECE, jobs - begin)
        await queries.enqueue([_ENTRY] * size, [b"x"] * size, [0] * size)


async def run(connection: asyncpg.Connection[asyncpg.Record]) -> float:
    """Returns the seconds from the first job to the last; what the worker does before and after is not counted."""
    worker = PgQueuer.from_asyncpg_connection(connection)
    times = array("d")

    @worker.entrypoint(_ENTRY)
    async def handle(_: Job) -> None:
        times.append(time.monotonic())

    await worker.run(batch_size=100, mode=QueueExecutionMode.drain)
    return times[-1] - times[0]


async def main(dsn: str, act: str, jobs: int) -> None:
    connection = await asyncpg.connect(dsn)
    match act:
        case "install":
            await install(connection)
        case "enqueue":
            await enqueue(connection, jobs)
        case _:
            seconds = await run(connection)
            after = await asyncpg.connect(dsn)
            assert await after.fetchval("SELECT count(*) FROM pgqueuer") == 0
            print(seconds)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0))
