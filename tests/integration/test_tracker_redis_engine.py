"""Replicas that share their sessions through a real Redis: they agree, and one that dies hands over."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.clock import Clock
from session_tracker.commands import CommandKind
from session_tracker.organizations import STALE, TAKEN
from session_tracker.sessions import LOST, RUNNING, STALLED, CheckpointPolicy, Lease, State
from tests.support.redis import RedisServer
from tests.support.replicas import ACME, Replica, replicas, until


async def test_what_one_replica_learns_all_know(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a", slot_id="s", tags=("x", "y"), stage="list", total_pages=9)
        here.report("a", 1, 3, total_pages=9, errors_by_class=[pb.ErrorCount(error_class="timeout", count=2)])
        await until(lambda: here.view() == there.view() and there.session("a"), "both agree")
        session = there.session("a")
        assert session is not None
        assert (session.current_page, session.state, session.owner) == (3, RUNNING, here.engine.replica)
        for sequence in range(2, 50):
            assert here.report("a", sequence, sequence, total_pages=9) == TAKEN
        await until(lambda: there.view() == here.view(), "both agree on counters")
        assert here.acme.totals("s").pages == there.acme.totals("s").pages == 49


async def test_a_replica_that_begins_later_has_all(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 1) as (here,):
        here.start(*(f"s{number}" for number in range(1200)), stage="list")
        for number in range(1200):
            here.report(f"s{number}", 1, number)
        late = Replica(redis_server.url)
        try:
            await late.engine.start()
            await until(lambda: late.view() == here.view() and late.engine.whole, "the late one has all")
        finally:
            await late.engine.close()


async def test_a_session_moves_with_its_worker(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        here.report("a", 1, 1)
        await until(lambda: there.session("a"), "it is known there")
        assert there.report("a", 1, 1) == STALE
        assert there.report("a", 2, 2) == TAKEN
        await until(lambda: here.view() == there.view(), "both agree")
        session = here.session("a")
        assert session is not None
        assert (session.owner, session.current_page) == (there.engine.replica, 2)
        # A report that was late on the way to the first replica changes nothing there.
        assert here.report("a", 2, 1) == STALE


async def test_reports_of_one_session_at_two_replicas_at_once_end_the_same_everywhere(
    redis_server: RedisServer,
) -> None:
    async with replicas(redis_server.url, 3) as three:
        three[0].start("a", "b")
        await until(lambda: all(replica.session("b") for replica in three), "all know both")
        for sequence in range(1, 200):
            three[sequence % 3].report("a", sequence, sequence)
            three[sequence % 2].report("b", sequence, sequence, stage=f"stage {sequence % 5}")
            if sequence % 20 == 0:
                await asyncio.sleep(0)
        await until(lambda: three[0].view() == three[1].view() == three[2].view(), "all agree")
        session = three[0].session("a")
        assert session is not None
        assert session.current_page == 199


async def test_a_late_write_moves_no_session_back(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        here.report("a", 5, 5)
        await until(lambda: there.session("a"), "it is known there")
        connection = here.engine._connection
        assert connection is not None
        outgoing = connection._joined[ACME].outgoing
        late = outgoing._pack(["a"], [], [])
        there.report("a", 6, 6)
        await until(lambda: here.view() == there.view(), "both agree")
        assert await connection._store.write(ACME, [late]) == ["a"]
        here.report("a", 7, 7)
        await until(lambda: there.view() == here.view(), "both agree")
        session = there.session("a")
        assert session is not None
        assert session.current_page == 7


async def test_exactly_one_replica_takes_over_from_one_that_died(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 3) as (first, second, third):
        first.start(*(f"s{number}" for number in range(50)))
        for number in range(50):
            first.report(f"s{number}", 1, 1)
        await until(lambda: first.view() == second.view() == third.view(), "all agree")
        await first.vanish()
        await until(
            lambda: (
                second.view() == third.view()
                and all(view[-1] != first.engine.replica for view in second.view().values())
            ),
            "its sessions are somebody else's",
        )
        assert len({view[-1] for view in second.view().values()}) == 1
        # The worker comes back anywhere, and is known there.
        assert third.report("s7", 2, 2) == TAKEN


async def test_when_a_replica_dies_the_others_doubt_their_own_sessions(redis_server: RedisServer) -> None:
    """The dead one owned nothing, but may have taken the result of any session."""
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        here.report("a", 1, 1)
        await until(lambda: there.session("a"), "it is known there")
        await there.vanish()

        def is_suspect() -> bool:
            here.acme.suspect_doubted()
            return here.acme.suspects == ["a"]

        await until(is_suspect, "it is a suspect")


async def test_a_replica_that_leaves_hands_over_at_once(redis_server: RedisServer) -> None:
    # A sign of life would be believed for 16 s.
    async with replicas(redis_server.url, 2, beat_seconds=0.2) as (here, there):
        here.start("a")
        here.report("a", 1, 1)
        await here.engine.close()
        await until(lambda: (session := there.session("a")) and not session.owner, "it is taken over", seconds=1.2)


async def test_a_frozen_replica_that_comes_back_bows_to_its_heir(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        here.report("a", 1, 1)
        await until(lambda: there.session("a"), "it is known there")
        task = here.engine._task
        assert task is not None
        await here.vanish()
        await until(lambda: (session := there.session("a")) and not session.owner, "it is taken over")
        here.engine._task = asyncio.create_task(here.engine._run())
        await until(lambda: here.view() == there.view(), "both agree")
        session = here.session("a")
        assert session is not None
        assert session.owner == there.engine.replica
        assert here.report("a", 2, 2) == TAKEN
        await until(lambda: (session := there.session("a")) and session.owner == here.engine.replica, "it moves back")


async def test_silence_is_judged_by_the_owner_and_goes_on_after_its_death(redis_server: RedisServer) -> None:
    seconds = [1000.0]
    clock = Clock(lambda: seconds[0] + asyncio.get_running_loop().time())
    async with replicas(
        redis_server.url, 2, clock, stalled_after_seconds=100, lost_after_seconds=200, forget_lost_after_seconds=300
    ) as (here, there):
        here.start("a")
        here.report("a", 1, 1)
        await until(lambda: there.session("a"), "it is known there")
        mirrored, owned = there.session("a"), here.session("a")
        assert mirrored is not None
        assert owned is not None
        await here.vanish()
        await until(lambda: not mirrored.owner, "it is taken over")
        seconds[0] += 150
        there.acme.mark_silence(mirrored)
        assert mirrored.state == STALLED
        seconds[0] += 150
        there.acme.mark_silence(mirrored)
        assert mirrored.state == LOST


async def test_what_is_completed_anywhere_ends_everywhere(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2, finished_seconds=1) as (here, there):
        here.start("a", "b")
        here.report("a", 1, 1)
        await until(lambda: there.session("a") and there.session("b"), "both are known there")
        there.acme.complete("a", 4, State.FAILED, reason="gave up")
        await until(lambda: (session := here.session("a")) and session.finished, "it is final here")
        session = here.session("a")
        assert session is not None
        assert (session.state, session.current_page, session.reason) == (State.FAILED, 4, "gave up")
        # A report that is late, and one whose write was late, change nothing.
        assert here.report("a", 2, 9) == STALE
        assert here.acme.totals().live == there.acme.totals().live == 1
        assert here.view() == there.view()

        def left(replica: Replica) -> bool:
            replica.acme.expire()
            return replica.session("a") is None

        await until(lambda: left(here) and left(there), "it leaves")
        await until(lambda: b"$-1" in redis_server.call("HGET", f"muster:{{{ACME}}}:records", "a"), "its record goes")
        assert here.session("b") is not None


async def test_what_its_owner_forgets_is_forgotten_everywhere(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a", "b")
        await until(lambda: there.session("a") and there.session("b"), "both are known there")
        # Not by a mirror that is dropped: it is not this replica's to forget.
        there.acme.drop("b")
        here.acme.drop("a")
        await until(lambda: there.session("a") is None, "it is forgotten there")
        assert here.session("b") is not None
        assert redis_server.call("HLEN", f"muster:{{{ACME}}}:counters") == b":1\r\n"
        assert int(redis_server.call("PTTL", f"muster:{{{ACME}}}:counters")[1:-2]) > 0


class Stream:
    """What a report stream is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def tell(self, command: object) -> None:
        self.told.append((command.kind, command.number))  # type: ignore[attr-defined]


async def test_a_command_given_anywhere_reaches_the_worker(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 3) as (here, there, third):
        here.start("a")
        stream = Stream()
        here.acme.report([pb.ProgressUpdate(session_id="a", sequence=1, current_page=1)], stream)
        await until(lambda: there.session("a") and third.session("a"), "all know it")
        session = there.session("a")
        assert session is not None
        assert there.acme.command(session, CommandKind.SPEED_LIMIT, "slower", 30.0)
        command = session.rarities.command
        assert command is not None
        await until(lambda: stream.told == [(CommandKind.SPEED_LIMIT, command.number)], "the worker is told")
        await until(lambda: here.view() == there.view() == third.view(), "all know the command")
        here.report("a", 2, 2, acknowledged_command=command.number)
        await until(
            lambda: all(
                (known := replica.session("a")) and known.rarities.command is None for replica in (here, there, third)
            ),
            "all know that it was carried out",
        )
        assert stream.told == [(CommandKind.SPEED_LIMIT, command.number)]


@pytest.mark.parametrize("given_to_the_owner", [True, False])
async def test_two_commands_of_one_millisecond_end_as_one(redis_server: RedisServer, given_to_the_owner: bool) -> None:
    second = time.time()
    async with replicas(redis_server.url, 3, Clock(wall=lambda: datetime.fromtimestamp(second, UTC))) as three:
        owner, other, third = three
        owner.start("a")
        stream = Stream()
        owner.acme.report([pb.ProgressUpdate(session_id="a", sequence=1, current_page=1)], stream)
        await until(lambda: other.session("a") and third.session("a"), "all know it")
        places = (owner, other) if given_to_the_owner else (other, third)
        numbers = set()
        for replica, kind in zip(places, (CommandKind.PAUSE, CommandKind.STOP), strict=True):
            session = replica.session("a")
            assert session is not None
            assert replica.acme.command(session, kind, ""), "both operators hear that it will be told"
            assert session.rarities.command is not None
            numbers.add(session.rarities.command.number)
        assert len(numbers) == 1
        await until(lambda: stream.told, "the worker is told")
        await until(
            lambda: all((seen := replica.session("a")) and seen.rarities.command is not None for replica in three),
            "all know one of them",
        )
        if given_to_the_owner:
            assert stream.told[0][0] == CommandKind.PAUSE, "the owner keeps its own"
        owner.report("a", 2, 2, acknowledged_command=numbers.pop())
        await until(
            lambda: all((seen := replica.session("a")) and seen.rarities.command is None for replica in three),
            "the acknowledgement ends both",
        )
        assert len(stream.told) == 1, "the worker hears of one"


async def test_a_command_outlives_the_owner(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        await until(lambda: there.session("a"), "it is known there")
        await here.vanish()
        session = there.session("a")
        assert session is not None
        there.acme.command(session, CommandKind.STOP, "enough")
        await until(lambda: not session.owner, "it is taken over")
        batch = there.acme.report([pb.ProgressUpdate(session_id="a", sequence=1, current_page=1)])
        assert [command.kind for command in batch.commands] == [CommandKind.STOP]


def test_every_key_of_an_organization_is_on_one_node_of_a_cluster() -> None:
    from redis.crc import key_slot

    kinds = ("counters", "records", "commands", "ends")
    assert len({key_slot(f"muster:{{{ACME}}}:{kind}".encode()) for kind in kinds}) == 1


async def test_all_replicas_die_and_a_later_one_takes_over(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a", stage="list")
        there.start("b")
        here.report("a", 7, 7)
        await until(lambda: here.view() == there.view() and len(here.view()) == 2, "both agree")
        session = here.session("a")
        assert session is not None
        here.acme.command(session, CommandKind.STOP, "enough")
        await until(lambda: (known := there.session("a")) and known.rarities.command, "the command is known")
        await asyncio.gather(here.vanish(), there.vanish())
        async with replicas(redis_server.url, 1) as (late,):
            await until(
                lambda: [view[-1] for view in late.view().values()] == [late.engine.replica] * 2, "it owns both"
            )
            batch = late.acme.report([pb.ProgressUpdate(session_id="a", sequence=8, current_page=8)])
            assert batch.verdicts == [TAKEN]
            assert [command.kind for command in batch.commands] == [CommandKind.STOP]


async def test_leases_and_checkpoints_go_on_at_the_heir(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        lease = Lease("11111111-1111-1111-1111-111111111111", b"t" * 16)
        here.start("a", lease=lease, checkpoint=CheckpointPolicy(1, 0.0))
        here.report("a", 1, 1)
        await until(lambda: there.session("a"), "it is known there")
        mirror = there.session("a")
        assert mirror is not None
        # A mirror is neither renewed nor saved.
        assert not there.acme.live.moved
        assert not there.acme.live.unsaved
        await here.vanish()
        await until(lambda: not mirror.owner, "it is taken over")
        assert "a" in there.acme.live.unsaved
        there.report("a", 2, 2)
        there.acme.settle()
        assert [session.lease for session in there.acme.live.moved] == [lease]
