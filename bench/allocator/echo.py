"""A bare grpc.aio server: it reads an AllocateWorkRequest and answers with the message it was given.

python -m bench.allocator.echo FILE-WITH-THE-ANSWER
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import uvloop
from muster.allocator.v1 import work_pb2, work_pb2_grpc


class Echo(work_pb2_grpc.WorkServiceServicer):
    """Answers at once."""

    def __init__(self, answer: bytes) -> None:
        self._answer = work_pb2.AllocateWorkResponse.FromString(answer)

    async def AllocateWork(self, request: work_pb2.AllocateWorkRequest, context: Any) -> work_pb2.AllocateWorkResponse:
        """Returns the answer, which is serialized anew for every call."""
        return self._answer


async def _serve(listen: str, answer: bytes) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    work_pb2_grpc.add_WorkServiceServicer_to_server(Echo(answer), server)  # type: ignore[abstract]
    server.add_insecure_port(listen)
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(_serve(os.environ["BENCH_ECHO__GRPC__LISTEN"], Path(sys.argv[1]).read_bytes()))
