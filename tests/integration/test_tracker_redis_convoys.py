"""Batches that wait for the next like them, at replicas that share their sessions: elsewhere the newest is seen."""

from __future__ import annotations

from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.reception import Reception
from tests.support.redis import RedisServer
from tests.support.replicas import Replica, replicas, until

NAMES = [f"s{number:03}" for number in range(40)]


class Stream:
    """A report stream at one replica."""

    def __init__(self, replica: Replica) -> None:
        self._reception = Reception(replica.acme)
        self._batch = 0

    def report(self, page: int) -> tuple[int, int]:
        """Reports a page of every session; returns how many reports were taken, and how many stale."""
        self._batch += 1
        size = len(NAMES)
        packed = pb.PackedUpdates(
            handle=range(size), sequence=[200 + page] * size, current_page=[page] * size, total_pages=[90] * size
        )
        names = NAMES if self._batch == 1 else []
        request = pb.ReportStreamRequest(batch=self._batch, names=names, packed=packed)
        answer = self._reception.take(request.SerializeToString(), None)
        return answer.taken, answer.stale


async def test_the_newest_batch_is_what_other_replicas_see_and_a_stream_may_move(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start(*NAMES, total_pages=90)
        stream = Stream(here)
        for page in range(1, 30):
            assert stream.report(page) == (40, 0)
        await until(lambda: there.session("s039") and here.view() == there.view(), "both agree")
        assert here.acme.totals().pages == there.acme.totals().pages == 40 * 29
        moved = Stream(there)
        assert moved.report(29) == (0, 40)
        # Both have convoys of these sessions for a moment, and what is newer stands at both in the end.
        for page in range(30, 60):
            assert moved.report(page) == (40, 0)
        await until(lambda: here.view() == there.view(), "both agree on what came at the other")
        assert stream.report(45) == (0, 40), "late at the first replica"
        assert {session.owner for session in here.acme.sessions.values()} == {there.engine.replica}
        assert here.acme.totals().pages == 40 * 59
        for page in range(60, 70):
            assert stream.report(page) == (40, 0)
        await until(lambda: here.view() == there.view(), "both agree after it came back")
        assert {session.owner for session in there.acme.sessions.values()} == {here.engine.replica}
        assert there.acme.totals().pages == 40 * 69
