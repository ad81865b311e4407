"""Replicas agree in whatever order they write, hear and lose the store; each step is played by hand on a real Redis."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from session_tracker.commands import CommandKind
from session_tracker.redis_incoming import Incoming
from session_tracker.redis_outgoing import Outgoing
from session_tracker.redis_packing import Packing
from session_tracker.redis_store import DROPS, ENDS, STATES, RedisStore, StoreUnavailable, Subscription
from session_tracker.sessions import Lease, State
from tests.support.redis import RedisServer
from tests.support.replicas import ACME, Memory, agree


class Site(Memory):
    """One replica, whose every word to the store and from it is asked for."""

    def __init__(self, name: str, store: RedisStore, subscription: Subscription) -> None:
        super().__init__(name)
        self.acme.name_replica(name)
        self.store = store
        self._subscription = subscription
        self.connect()

    def connect(self) -> None:
        """Begins anew, as after a loss of the store: all that is ours is to be written."""
        self.outgoing = Outgoing(self.acme, self.store, Packing(self.name, self.clock), self.clock, 0.0)
        self.incoming = Incoming(self.acme, self.store, self.outgoing, self.name, lambda _: None)

    async def write(self) -> list[str]:
        """Writes what changed and takes what is newer in the store; returns the ids that were refused."""
        refused = await self.outgoing.flush()
        if refused:
            await self.incoming.reconcile(refused)
        return refused

    async def hear(self) -> None:
        """Takes all that was said until now."""
        await self.store.beat(1.0, "", mark := secrets.token_hex(8))
        await self.store.beat(1.0, mark, mark)
        while True:
            organization_id, kind, _, body = await self._subscription.next(5.0)
            if organization_id is None:
                if body == mark.encode():
                    return
            elif kind == STATES:
                self.incoming.states(body)
            elif kind == DROPS:
                self.incoming.drops(body)
            elif kind == ENDS:
                self.incoming.ends(body)

    async def prune(self) -> None:
        """Forgets what its owner, who lives, has not written."""
        await self.incoming.prune(lambda _: True, await self.store.beat(1.0, "", "epoch"))

    async def join(self) -> None:
        """Reads all that the store has, and writes all that is ours."""
        self.connect()
        await self.incoming.load()
        await self.write()


async def settle(*sites: Site) -> None:
    """Lets all write and hear until nobody has anything to say."""
    for _ in range(3):
        for site in sites:
            await site.write()
        for site in sites:
            await site.hear()


@asynccontextmanager
async def sites(server: RedisServer, count: int) -> AsyncIterator[list[Site]]:
    """Gives replicas that are connected to one store."""
    async with AsyncExitStack() as stack:
        made = []
        for name in ("aaaaaaaa", "bbbbbbbb", "cccccccc")[:count]:
            store = await stack.enter_async_context(RedisStore(server.url, "muster:", name, 60.0, 60.0))
            subscription = await store.subscribe()
            stack.push_async_callback(subscription.close)
            made.append(Site(name, store, subscription))
        yield made


async def test_who_takes_a_session_over_by_its_counters_alone_brings_what_it_shows(redis_server: RedisServer) -> None:
    async with sites(redis_server, 2) as (a, b):
        a.start("s")
        a.report("s", 1, 1, stage="l")
        await settle(a, b)
        # Not said yet when the other one is reported the old stage: counters alone, to whom they are reported.
        a.report("s", 2, 2, stage="m")
        b.report("s", 3, 3, stage="l")
        await b.write()
        await a.hear()
        await settle(a, b)
        assert b.acme.get("s").stage == "l"
        assert agree(a, b)


async def test_counters_alone_do_not_stand_in_a_store_that_lost_the_rest(redis_server: RedisServer) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s")
        a.report("s", 1, 1, stage="l")
        await settle(a, b)
        redis_server.call("FLUSHALL")
        # It has not noticed yet.
        a.report("s", 2, 2)
        await a.write()
        await a.join()
        await c.join()
        await settle(a, b, c)
        assert "s" in c.view()
        await b.prune()
        assert "s" in b.view()
        assert agree(a, b, c)


async def test_counters_of_another_owner_are_not_taken_for_what_the_one_before_described(
    redis_server: RedisServer,
) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s")
        a.report("s", 1, 1, stage="l")
        await settle(a, b, c)
        # Older and written later, so that nobody hears of it.
        b.report("s", 2, 2, stage="m")
        a.report("s", 3, 3, stage="n")
        await a.write()
        await b.write()
        b.report("s", 4, 4)
        await b.write()
        await a.hear()
        await c.hear()
        assert agree(a, b, c)
        assert [site.acme.get("s").stage for site in (a, b, c)] == ["n"] * 3
        # Counters alone, which reach the store before its owner knows that all else is lost there.
        redis_server.call("FLUSHALL")
        b.report("s", 5, 5)
        assert await b.write() == ["s"]
        assert await b.write() == []
        await settle(a, b, c)
        assert agree(a, b, c)


async def test_of_two_who_know_as_much_one_is_believed(redis_server: RedisServer) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s", "t", stage="l", slot_id="x", tags=("1",))
        b.start("s", stage="m", slot_id="y", client_id="m", traceparent="00-1-2-03")
        b.report("s", 1, 1)
        a.report("s", 1, 2)
        await a.write()
        await b.write()
        await settle(a, b, c)
        assert agree(a, b, c)
        assert a.acme.get("s").owner == b.name
        assert a.acme.totals("y").by_state == b.acme.totals("y").by_state
        assert (a.acme.totals("x").live, b.acme.totals("x").live) == (1, 1)
        redis_server.call("FLUSHALL")
        a.report("s", 2, 2, stage="n")
        b.report("s", 2, 2, stage="l")
        for site in (a, b, c):
            await site.join()
        await settle(a, b, c)
        assert agree(a, b, c)
        assert a.acme.get("s").sequence == 2


@pytest.mark.parametrize("hears_first", [True, False])
async def test_an_end_by_whom_the_last_report_did_not_reach_is_the_same_for_all(
    redis_server: RedisServer, hears_first: bool
) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s")
        a.report("s", 1, 1, stage="l")
        await settle(a, b, c)
        a.report("s", 7, 7, stage="m")
        b.acme.complete("s", 9, State.FAILED, products=3, errors=1, reason="broke")
        if hears_first:
            await a.write()
            await c.hear()
        await b.write()
        await settle(a, b, c)
        assert agree(a, b, c)
        session = c.acme.get("s")
        assert (session.sequence, session.state, session.current_page, session.reason) == (7, 8, 9, "broke")
        assert c.acme.totals().live == 0


async def test_of_two_ends_one_is_believed_and_those_who_come_later_see_the_same(redis_server: RedisServer) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s")
        a.report("s", 1, 1, stage="l")
        await settle(a, b)
        a.report("s", 2, 2)
        a.acme.complete("s", 2, reason="this")
        b.acme.complete("s", 2, reason="that")
        await b.write()
        await a.write()
        await settle(a, b)
        assert agree(a, b)
        assert b.acme.get("s").reason == "this"
        redis_server.call("FLUSHALL")
        await b.join()
        await c.join()
        await a.join()
        await settle(a, b, c)
        assert agree(a, b, c)


async def test_what_was_carried_out_is_known_to_all_though_the_report_was_overtaken(redis_server: RedisServer) -> None:
    async with sites(redis_server, 3) as (a, b, c):
        a.start("s")
        a.report("s", 1, 1)
        session = a.session("s")
        assert session is not None
        a.acme.command(session, CommandKind.SPEED_LIMIT, "", 7.0)
        await settle(a, b, c)
        told = b.acme.get("s").command
        assert told is not None
        a.report("s", 2, 2, acknowledged_command=told.number)
        b.report("s", 3, 3)
        await b.write()
        await settle(a, b, c)
        assert agree(a, b, c)
        assert b.acme.get("s").command is None
        assert b.acme.get("s").sequence == 3


async def test_a_lost_lease_is_forgotten_by_all_when_another_is_given(redis_server: RedisServer) -> None:
    async with sites(redis_server, 2) as (a, b):
        a.start("s", lease=Lease("key", b"1" * 16))
        a.report("s", 1, 1)
        session = a.session("s")
        assert session is not None
        await settle(a, b)
        a.acme.lose_lease(session, "expired")
        await settle(a, b)
        assert agree(a, b)
        b.start("s", lease=Lease("key", b"2" * 16))
        await settle(a, b)
        assert agree(a, b)
        assert a.acme.get("s").command is None
        b.acme.lose_lease(b.acme.get("s"), "expired")
        await settle(a, b)
        a.start("s", lease=Lease("key", b"3" * 16))
        a.acme.command(a.acme.get("s"), CommandKind.PAUSE, "wait")
        await settle(a, b)
        assert agree(a, b)
        b.report("s", 2, 2)
        await settle(a, b)
        assert agree(a, b)


async def test_nothing_is_forgotten_by_what_a_store_lacks_that_lost_it_just_now(redis_server: RedisServer) -> None:
    async with sites(redis_server, 2) as (a, b):
        a.start("s")
        await settle(a, b)
        epoch = await b.store.beat(1.0, "", "one")
        redis_server.call("FLUSHALL")
        with pytest.raises(StoreUnavailable):
            await b.incoming.prune(lambda _: True, epoch)
        await a.store.beat(1.0, "", "two")
        with pytest.raises(StoreUnavailable):
            await b.incoming.prune(lambda _: True, epoch)
        assert "s" in b.view()


async def test_what_is_begun_again_before_the_store_knew_it_was_forgotten_stands(redis_server: RedisServer) -> None:
    async with sites(redis_server, 2) as (a, b):
        a.start("s")
        a.report("s", 5, 5)
        await settle(a, b)
        a.acme.drop("s")
        a.start("s")
        a.report("s", 1, 1)
        await settle(a, b)
        assert agree(a, b)
        assert b.acme.get("s").sequence == 1
        assert await a.write() == []


async def test_who_has_what_ended_long_ago_as_live_ends_it(redis_server: RedisServer) -> None:
    async with sites(redis_server, 2) as (a, b):
        a.start("s")
        a.acme.complete("s", 1)
        await a.write()
        # As is left of it when its record has left.
        redis_server.call("HDEL", f"muster:{{{ACME}}}:records", "s")
        b.start("s")
        assert await b.write() == ["s"]
        assert "s" not in b.view()
        assert await b.write() == []
