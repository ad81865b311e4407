"""Sessions that a console watches through the client, against scripted answers."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from muster.session_tracker.v1 import session_pb2

from tests.support.house import House, client_of
from tests.support.scripted import Status

RUNNING, PAUSED = session_pb2.SESSION_STATE_RUNNING, session_pb2.SESSION_STATE_PAUSED


def live(number: int, **fields: Any) -> session_pb2.Session:
    return session_pb2.Session(session_id=f"s-{number}", number=number, state=RUNNING, stage="x", **fields)


def packed(*numbers: int, page: int) -> session_pb2.PackedSessions:
    same = [0] * len(numbers)
    return session_pb2.PackedSessions(
        number=numbers,
        state=[PAUSED] * len(numbers),
        current_page=[page] * len(numbers),
        total_pages=[99] * len(numbers),
        products_found=same,
        errors_count=same,
        sequence=same,
        updated_at_ms=same,
    )


async def test_a_view_applies_packed_changes_and_goes_on_where_it_was(house: House) -> None:
    changes = session_pb2.WatchSessionsResponse

    async def first(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield changes(epoch="e", offset=2, snapshot=True, sessions=[live(1), live(2)])
        yield changes(epoch="e", offset=3, packed=packed(2, page=7))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    async def second(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield changes(epoch="e", offset=4, packed=packed(1, 2, page=8), removed=["s-1"])
        yield changes(epoch="e", offset=5, packed=packed(1, page=9))

    async def third(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield changes(epoch="f", offset=1, snapshot=True, sessions=[live(1, current_page=4)])
        yield changes(epoch="f", offset=2, packed=packed(2, page=5))

    async def fourth(request: Any, context: Any) -> AsyncIterator[session_pb2.WatchSessionsResponse]:
        yield changes(epoch="f", offset=3, snapshot=True, sessions=[live(3)])

    watched = "WatchService/WatchSessions"
    house.on(watched, first, Status(grpc.StatusCode.UNAVAILABLE), second, third, fourth)
    async with client_of(house) as client:
        seen = [
            {name: (one.current_page, one.total_pages, one.stage) for name, one in held.items()}
            async for held in client.watch_sessions()
        ]
    assert seen == [
        {"s-1": (0, 0, "x"), "s-2": (0, 0, "x")},
        {"s-1": (0, 0, "x"), "s-2": (7, 99, "x")},
        {"s-2": (8, 99, "x")},
        {"s-1": (4, 0, "x")},
        {"s-3": (0, 0, "x")},
    ]
    requests = house.calls[watched]
    assert all(request.packed for request in requests)
    # A number that it was never shown in this epoch makes it begin anew.
    assert [(request.epoch, request.offset) for request in requests] == [("", 0), ("e", 3), ("e", 3), ("", 0), ("", 0)]
