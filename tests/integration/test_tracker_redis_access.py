"""Who may use the store: a user with just the rights that the guide gives is enough, and sees nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from session_tracker.commands import CommandKind
from session_tracker.sessions import Lease
from tests.support.redis import RedisServer
from tests.support.replicas import ACME, Replica, replicas, until

GUIDE = Path(__file__).parents[2] / "session_tracker" / "README.md"
PASSWORD = "of-the-test"
LEASE = Lease("123e4567-e89b-12d3-a456-426614174000", b"sixteen bytes ok")


async def test_the_rights_in_the_guide_are_enough_and_grant_nothing_else(redis_server: RedisServer) -> None:
    (rights,) = re.findall(r"^    (user muster .+?)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    user = rights.replace("<password>", PASSWORD).removeprefix("user ").split()
    assert redis_server.call("ACL", "SETUSER", *user) == b"+OK\r\n"
    redis_server.call("ACL", "LOG", "RESET")
    url = redis_server.url.replace("unix://", f"unix://muster:{PASSWORD}@")
    async with replicas(url, 2) as (here, there):
        here.start("a", "b", lease=LEASE)
        here.report("a", 1, 1)
        await until(lambda: here.view() == there.view() and len(there.view()) == 2, "both agree")
        session = there.session("a")
        assert session is not None
        assert there.acme.command(session, CommandKind.PAUSE, "night")
        here.acme.drop("b")
        there.acme.complete("a", 3)
        await until(lambda: here.view() == there.view() and len(there.view()) == 1, "both agree again")
        late = Replica(url)
        try:
            await late.engine.start()
            await until(lambda: late.view() == here.view() and late.engine.whole, "the late one has all")
        finally:
            await late.engine.close()
        connection = here.engine._connection
        assert connection is not None
        await connection._store.sweep(ACME)
        assert await connection._store.read(ACME, ["a"]), "it is to be seen for a while"
    refused = set(re.findall(rb"\$6\r\nobject\r\n\$\d+\r\n(.+?)\r\n", redis_server.call("ACL", "LOG")))
    # The client library introduces itself, and does not mind to be refused.
    assert refused <= {b"client|setinfo", b"client"}, refused
    assert redis_server.call("ACL", "DRYRUN", "muster", "GET", "muster:epoch") == b"+OK\r\n"
    for other in ("GET other", "HGET other x", "PUBLISH other x", "FLUSHALL", "KEYS *", "CONFIG GET *", "MONITOR"):
        assert b"permissions" in redis_server.call("ACL", "DRYRUN", "muster", *other.split()), other


async def test_whoever_reads_the_store_reads_the_tokens_of_live_leases(redis_server: RedisServer) -> None:
    """What the guide warns of."""
    async with replicas(redis_server.url, 1) as (here,):
        here.start("a", lease=LEASE)
        here.report("a", 1, 1)
        key = f"muster:{{{ACME}}}:records"
        await until(lambda: redis_server.call("HEXISTS", key, "a") == b":1\r\n", "it is written")
        assert LEASE.lease_token.hex().encode() in redis_server.call("HGET", key, "a")
