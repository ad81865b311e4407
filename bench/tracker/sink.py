"""A bare grpc.aio server: it takes the tracker's reports into a dict, and answers each unary one with the same message.

python -m bench.tracker.sink, on BENCH_SINK__GRPC__LISTEN
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc


class Sink(session_pb2_grpc.SessionServiceServicer):
    """Keeps the newest counters of each session, and nothing else."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[int, int, int, int, int]] = {}
        self._answer = pb.ReportProgressResponse(verdicts=[pb.UPDATE_VERDICT_TAKEN])

    async def ReportProgress(self, request: pb.ReportProgressRequest, context: Any) -> pb.ReportProgressResponse:
        """Returns the answer, which is serialized anew for every call."""
        return self._answer

    async def ReportStream(
        self, request_iterator: AsyncIterator[pb.ReportStreamRequest], context: Any
    ) -> AsyncIterator[pb.ReportStreamResponse]:
        """Takes packed updates whose sequence is above the last."""
        sessions = self._sessions
        names: list[str] = []
        async for request in request_iterator:
            names.extend(request.names)
            packed = request.packed
            taken = 0
            for handle, sequence, page, total, products, errors in zip(
                packed.handle, packed.sequence, packed.current_page, packed.total_pages, packed.products_found,
                packed.errors_count, strict=True,
            ):  # fmt: skip
                name = names[handle]
                known = sessions.get(name)
                if known is None or sequence > known[0]:
                    sessions[name] = sequence, page, total, products, errors
                    taken += 1
            yield pb.ReportStreamResponse(batch=request.batch, taken=taken)


async def _serve(listen: str) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    session_pb2_grpc.add_SessionServiceServicer_to_server(Sink(), server)  # type: ignore[abstract]
    server.add_insecure_port(listen)
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(_serve(os.environ["BENCH_SINK__GRPC__LISTEN"]))
