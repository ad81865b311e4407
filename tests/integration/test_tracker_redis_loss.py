"""A Redis that is killed, frozen, flushed or not there yet: replicas go on, say so, and agree again afterwards."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from session_tracker.commands import CommandKind
from session_tracker.errors import SessionAlreadyCompleted
from session_tracker.organizations import TAKEN, UNKNOWN
from session_tracker.redis_store import RedisStore
from session_tracker.sessions import State
from tests.support.redis import RedisServer
from tests.support.replicas import ACME, Replica, agree, replicas, until


async def test_the_store_starts_again_empty_and_heals_from_the_replicas(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a", tags=("x",))
        there.start("b")
        here.report("a", 1, 1)
        await until(lambda: here.view() == there.view() and len(here.view()) == 2, "both agree")
        redis_server.kill()
        await until(lambda: here.acme.rebuilding and there.acme.rebuilding, "both say that they rebuild")
        # What happens meanwhile is taken, and what is known is shown.
        assert here.report("a", 2, 2) == TAKEN
        assert there.report("b", 1, 5) == TAKEN
        here.start("c")
        there.acme.complete("b", 5)
        assert there.acme.totals().rebuilding
        assert here.session("b") is not None
        redis_server.start()
        await until(lambda: not here.acme.rebuilding and not there.acme.rebuilding, "both are whole again")
        await until(lambda: here.view() == there.view() and len(here.view()) == 3, "both agree")
        session = here.session("b")
        assert session is not None
        assert session.finished
        assert there.report("a", 3, 3) == TAKEN


async def test_a_flushed_store_heals(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        there.start("b")
        await until(lambda: here.view() == there.view() and len(here.view()) == 2, "both agree")
        redis_server.call("FLUSHALL")
        await until(lambda: not here.engine.whole, "it is noticed")
        await until(lambda: here.engine.whole and there.engine.whole, "both are whole again")
        assert redis_server.call("HLEN", f"muster:{{{ACME}}}:records") == b":2\r\n"
        late = Replica(redis_server.url)
        try:
            await late.engine.start()
            await until(lambda: late.view() == here.view(), "a later one has all")
        finally:
            await late.engine.close()


async def test_a_frozen_store_is_noticed_and_heals(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        await until(lambda: there.session("a"), "it is known there")
        redis_server.freeze()
        try:
            await until(lambda: here.acme.rebuilding and there.acme.rebuilding, "both say that they rebuild")
            assert here.report("a", 1, 1) == TAKEN
        finally:
            redis_server.thaw()
        await until(lambda: here.engine.whole and there.engine.whole, "both are whole again")
        await until(lambda: here.view() == there.view(), "both agree")


async def test_what_ended_while_the_store_was_away_is_forgotten_by_its_mirrors(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2, finished_seconds=0) as (here, there):
        here.start("a", "b")
        await until(lambda: there.session("a") and there.session("b"), "both are known there")
        redis_server.kill()
        await until(lambda: here.acme.rebuilding and there.acme.rebuilding, "both say that they rebuild")
        here.acme.complete("a", 1)
        here.acme.expire()
        assert here.session("a") is None
        redis_server.start()
        await until(lambda: here.engine.whole and there.engine.whole, "both are whole again")
        assert there.session("a") is None
        assert there.session("b") is not None


async def test_a_service_starts_without_its_store_and_joins_later(redis_server: RedisServer) -> None:
    redis_server.kill()
    replica = Replica(redis_server.url)
    try:
        await replica.engine.start()
        replica.start("a")
        assert replica.report("a", 1, 1) == TAKEN
        assert replica.acme.totals().rebuilding
        redis_server.start()
        await until(lambda: replica.engine.whole, "it is whole")
        assert not replica.acme.rebuilding
        assert b"a" in redis_server.call("HKEYS", f"muster:{{{ACME}}}:records")
    finally:
        await replica.engine.close()


async def test_what_was_completed_before_it_was_known_does_not_come_back(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        there.start("b")
        await until(lambda: here.session("b"), "the organization is known")
        here.start("a")
        there.acme.complete("a", 1)
        await until(lambda: here.session("a") is None, "its owner knows that it ended")
        assert there.session("a") is None
        assert here.session("b") is not None


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_all_agree_in_the_end_and_nothing_goes_back(
    redis_server: RedisServer, seed: int
) -> None:
    chance = random.Random(seed)
    names = [f"s{number}" for number in range(12)]
    sequences = dict.fromkeys(names, 0)
    taken: dict[str, tuple[int, int]] = {}
    ended: set[str] = set()
    async with replicas(redis_server.url, 3) as three:
        for _ in range(400):
            replica = chance.choice(three)
            name = chance.choice(names)
            match chance.choices(
                ("report", "start", "command", "complete", "late", "pause", "flush"), (60, 8, 6, 2, 10, 30, 0.5)
            )[0]:
                case "report":
                    sequences[name] += 1
                    told = session.command if (session := replica.session(name)) else None
                    verdict = replica.report(
                        name,
                        sequences[name],
                        chance.randrange(1000),
                        stage=chance.choice("lmn"),
                        acknowledged_command=told.number if told and chance.random() < 0.2 else 0,
                    )
                    if verdict == UNKNOWN and name not in ended:
                        # As the client does: registered again with what it has.
                        with suppress(SessionAlreadyCompleted):
                            replica.start(name)
                            replica.report(name, sequences[name], chance.randrange(1000))
                    session = replica.session(name)
                    if session is not None and session.sequence == sequences[name]:
                        taken[name] = (sequences[name], session.current_page)
                case "late" if sequences[name]:
                    before = replica.session(name)
                    sequence = chance.randrange(sequences[name] + 1)
                    if before is None or before.sequence >= sequence:
                        assert replica.report(name, sequence, 0) != TAKEN
                case "command":
                    # Always at the same one: of two commands within a millisecond neither is the newer.
                    replica = three[names.index(name) % 3]
                    session = replica.session(name)
                    if session is not None:
                        replica.acme.command(session, CommandKind.SPEED_LIMIT, "", chance.randrange(100))
                case "complete" if name in taken:
                    replica.acme.complete(name, 5, State.COMPLETED)
                    ended.add(name)
                case "flush":
                    redis_server.call("FLUSHALL")
                case _:
                    await asyncio.sleep(chance.choice((0, 0, 0.01, 0.03)))
        await until(
            lambda: all(replica.engine.whole for replica in three) and agree(*three),
            "all agree",
        )
        for name, (sequence, page) in taken.items():
            session = three[0].session(name)
            if name not in ended:
                assert session is not None
                assert (session.sequence, session.current_page) == (sequence, page)
            else:
                assert session is None or session.finished


async def test_what_a_replica_knew_that_died_with_the_store_is_kept_by_the_others(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 3) as (here, there, dead):
        dead.start("a", stage="list")
        dead.report("a", 7, 7)
        await until(lambda: here.view() == there.view() == dead.view() and here.view(), "all agree")
        mirror = there.session("a")
        redis_server.kill()
        await dead.vanish()
        await until(lambda: here.acme.rebuilding and there.acme.rebuilding, "both say that they rebuild")
        redis_server.start()
        await until(lambda: here.engine.whole and there.engine.whole, "both are whole again")
        await until(lambda: here.view() == there.view() and here.view()["a"][-1] != dead.engine.replica, "one owns it")
        # Not dropped and made again in between, which watchers would see.
        assert there.session("a") is mirror


async def test_an_end_outlives_its_owner_and_the_store(redis_server: RedisServer) -> None:
    async with replicas(redis_server.url, 2) as (here, there):
        here.start("a")
        here.acme.complete("a", 7)
        await until(lambda: (known := there.session("a")) and known.finished, "its end is known there")
        redis_server.kill()
        await here.vanish()
        redis_server.start()
        again = Replica(redis_server.url)
        try:
            await again.engine.start()
            await until(lambda: there.engine.whole and again.engine.whole, "both are whole")
            await until(lambda: (known := again.session("a")) and known.finished, "who comes new knows of the end")
            with pytest.raises(SessionAlreadyCompleted):
                again.start("a")
        finally:
            await again.engine.close()


async def test_who_leaves_while_the_store_is_lost_does_not_use_it_when_it_is_closed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pool that is closed under a command opens a connection again, which nobody closes.
    using: list[RedisStore] = []
    used_when_closed: list[bool] = []
    close = RedisStore.__aexit__

    async def leave(store: RedisStore) -> None:
        using.append(store)
        try:
            redis_server.kill()
            await until(lambda: used_when_closed, "the store is closed")
        finally:
            using.remove(store)

    async def closed(store: RedisStore, *error: object) -> None:
        await close(store, *error)
        used_when_closed.append(store in using)

    monkeypatch.setattr(RedisStore, "leave", leave)
    monkeypatch.setattr(RedisStore, "__aexit__", closed)
    async with replicas(redis_server.url, 1) as (replica,):
        replica.start("a")
        await asyncio.wait_for(replica.engine.close(), 10)
        assert used_when_closed == [False]
    assert using == []
