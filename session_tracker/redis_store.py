"""What replicas share in Redis: its keys, the scripts that guard them, and what they tell each other.

Keys, with the configured prefix before each; those of an organization carry its id as hash tag, so that a script meets
all of its keys on one node of a cluster:

    {<organization>}:counters   hash: session → its order and counters, packed
    {<organization>}:records    hash: session → all of it, as JSON
    {<organization>}:commands   hash: session → its newest command, by number
    {<organization>}:ends       sorted set: what ended sessions leave behind, by when it goes
    {<organization>}:changes    channel: what was written, in the order in which it was
    organizations               set: those that have ever been live here
    epoch                       names the life of what the store holds: another one, or none, says that all is lost
    replica:<id>                a replica lives, until its time runs out
    heir:<id>                   who takes the sessions of a replica that died
    replicas                    channel: signs of life
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from importlib import resources
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# Longer than any answer takes that is still worth waiting for: a batch is written in some milliseconds.
_ANSWER_SECONDS = 2.0
# Sessions read at a time: some hundred KB.
_SLICE_SESSIONS = 500
# Remnants removed in one go: the store answers nobody else meanwhile.
_SWEEP = 1000
# Ended sessions leave a trace for as long as memory keeps one.
_REMEMBERED_SECONDS = 600

STATES, COMMANDS, DROPS, ENDS = b"S", b"C", b"D", b"E"
BEAT, BYE = b"B", b"X"

Stored = tuple[str, bytes, bytes]


class StoreUnavailable(Exception):
    """Redis did not answer, or refused what it was asked; says why, for people."""


class _Unavailable:
    """Turns whatever the client raises into `StoreUnavailable`."""

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, RedisError | OSError | TimeoutError):
            raise StoreUnavailable(f"{type(error).__name__}: {error}") from error
        task = asyncio.current_task()
        if error is None and task is not None and task.cancelling():
            # The client's own timeouts swallow a cancellation that comes with them: seen with redis-py 8.1.
            raise asyncio.CancelledError


_unavailable = _Unavailable()


class RedisStore:
    """A connection to what replicas share. Every method raises `StoreUnavailable`.

    Args:
        url: Where Redis is.
        prefix: Before every key.
        replica: This replica's id, 8 characters.
        keep_seconds: How long the state of an organization stays that nobody writes to.
        finished_seconds: How long a final state stays readable.
    """

    def __init__(self, url: str, prefix: str, replica: str, keep_seconds: float, finished_seconds: float) -> None:
        self._prefix = prefix
        self._replica = replica.encode()
        self._keep_milliseconds = round(keep_seconds * 1000)
        self._finished_seconds = round(finished_seconds)
        # Its annotations do not know that answers are bytes unless they are to be decoded.
        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=_ANSWER_SECONDS,
            socket_connect_timeout=_ANSWER_SECONDS,
            # Whoever holds this begins anew after a failure; trying again underneath would only hide how long it takes.
            retry=Retry(NoBackoff(), 0),
        )
        self._scripts: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        try:
            with _unavailable:
                for name in ("merge", "command", "drop", "sweep"):
                    text = resources.files("session_tracker").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
                    self._scripts[name] = await self._redis.script_load(text)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await _closed(self._redis.aclose())

    async def _run(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        # A server that lost the script lost all else too: that is an error, after which all begins anew.
        return await self._redis.evalsha(self._scripts[name], len(keys), *keys, *arguments)

    def _key(self, organization_id: UUID, kind: str) -> str:
        return f"{self._prefix}{{{organization_id}}}:{kind}"

    def _keys(self, organization_id: UUID, *kinds: str) -> list[str]:
        return [self._key(organization_id, kind) for kind in kinds]

    async def write(self, organization_id: UUID, chunks: Sequence[bytes]) -> list[str]:
        """Writes states that are newer than what stands, tells the other replicas, and returns the ids it refused.

        Refused are older states, and counters alone of what does not stand as the same owner's. What stands already is
        neither written nor refused.

        Args:
            organization_id: Whose.
            chunks: Packed entries, at most some hundred a chunk; all go in one pipeline.
        """
        keys = self._keys(organization_id, "counters", "records", "ends")
        rest = (self._keep_milliseconds, self._finished_seconds, self._finished_seconds + _REMEMBERED_SECONDS)
        channel, head = self._key(organization_id, "changes"), STATES + self._replica
        with _unavailable:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for chunk in chunks:
                    pipeline.evalsha(self._scripts["merge"], len(keys), *keys, channel, head, chunk, *rest)
                return [session_id.decode() for refused in await pipeline.execute() for session_id in refused]

    async def command(self, organization_id: UUID, entries: bytes) -> None:
        """Keeps the newest commands of sessions and tells the other replicas."""
        with _unavailable:
            await self._run(
                "command",
                self._keys(organization_id, "commands"),
                [self._key(organization_id, "changes"), COMMANDS + self._replica, entries, self._keep_milliseconds],
            )

    async def drop(self, organization_id: UUID, ids: bytes) -> None:
        """Removes sessions that were forgotten here, if this replica owns them still, and tells the others."""
        with _unavailable:
            await self._run(
                "drop",
                self._keys(organization_id, "counters", "records", "commands"),
                [self._key(organization_id, "changes"), DROPS + self._replica, ids, self._replica],
            )

    async def say_ended(self, organization_id: UUID, ids: bytes) -> None:
        """Tells the other replicas of sessions that are on record as completed, to whoever has them as live."""
        with _unavailable:
            await self._redis.publish(self._key(organization_id, "changes"), ENDS + self._replica + ids)

    async def sweep(self, organization_id: UUID) -> None:
        """Removes what is left of ended sessions when its time has come."""
        with _unavailable:
            keys = self._keys(organization_id, "ends", "counters", "records", "commands")
            while await self._run("sweep", keys, [_SWEEP]) == _SWEEP:
                pass

    async def read(self, organization_id: UUID, ids: Sequence[str]) -> list[Stored]:
        """Returns those of some sessions that stand, each with its counters and its record.

        The record is empty of one that has ended so long ago that only this is left of it.
        """
        found: list[Stored] = []
        with _unavailable:
            for begin in range(0, len(ids), _SLICE_SESSIONS):
                some = list(ids[begin : begin + _SLICE_SESSIONS])
                counters = await self._redis.hmget(self._key(organization_id, "counters"), some)
                records = await self._redis.hmget(self._key(organization_id, "records"), some)
                found += [
                    (session_id, state, record or b"")
                    for session_id, state, record in zip(some, counters, records, strict=True)
                    if state is not None
                ]
        return found

    async def sessions(self, organization_id: UUID) -> AsyncIterator[list[Stored]]:
        """Yields all sessions that stand, some at a time; one that changes meanwhile may come twice."""
        cursor = 0
        while True:
            with _unavailable:
                cursor, page = await self._redis.hscan(
                    self._key(organization_id, "counters"), cursor, count=_SLICE_SESSIONS
                )
            yield await self.read(organization_id, [session_id.decode() for session_id in page])
            if not cursor:
                return

    async def commands(self, organization_id: UUID) -> list[tuple[str, bytes]]:
        """Returns the newest command of each session that was given one: the entry without its id."""
        with _unavailable:
            found = await self._redis.hgetall(self._key(organization_id, "commands"))
        return [(session_id.decode(), entry) for session_id, entry in found.items()]

    async def organizations(self, known: Sequence[UUID]) -> list[UUID]:
        """Adds the organizations that are known here to those that the store knows, and returns them all."""
        key = f"{self._prefix}organizations"
        with _unavailable:
            if known:
                await self._redis.sadd(key, *map(str, known))
            return [UUID(found.decode()) for found in await self._redis.smembers(key)]

    async def beat(self, life_seconds: float, epoch: str, fresh: str) -> str:
        """Says that this replica lives, and that it holds all of `epoch`; returns the store's epoch.

        Args:
            life_seconds: How long that is believed.
            epoch: Empty while this replica has not rewritten and read all.
            fresh: Becomes the epoch, where there is none.
        """
        with _unavailable:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.set(f"{self._prefix}replica:{self._replica.decode()}", epoch, px=round(life_seconds * 1000))
                pipeline.set(f"{self._prefix}epoch", fresh, nx=True)
                pipeline.get(f"{self._prefix}epoch")
                pipeline.publish(f"{self._prefix}replicas", BEAT + self._replica + epoch.encode())
                answers = await pipeline.execute()
        found: bytes = answers[2]
        return found.decode()

    async def confirm(self, epoch: str) -> None:
        """Does nothing but raise if the store has lost what it held in an epoch."""
        with _unavailable:
            found = await self._redis.get(f"{self._prefix}epoch")
        if found != epoch.encode():
            raise StoreUnavailable("it lost what it held")

    async def leave(self) -> None:
        """Says that this replica is going, so that its sessions are taken over at once."""
        with _unavailable:
            await self._redis.delete(f"{self._prefix}replica:{self._replica.decode()}")
            await self._redis.publish(f"{self._prefix}replicas", BYE + self._replica)

    async def lives(self, replica: str) -> bool:
        """Whether a replica has said in time that it lives."""
        with _unavailable:
            return bool(await self._redis.exists(f"{self._prefix}replica:{replica}"))

    async def inherit(self, replica: str, seconds: float) -> bool:
        """Whether this replica, and for `seconds` no other, is to take the sessions of one that died."""
        with _unavailable:
            return bool(
                await self._redis.set(f"{self._prefix}heir:{replica}", self._replica, nx=True, px=round(seconds * 1000))
            )

    async def subscribe(self) -> Subscription:
        """Returns what the replicas say from now on."""
        pubsub = self._redis.pubsub()
        with _unavailable:
            try:
                await pubsub.psubscribe(f"{self._prefix}{{*}}:changes", f"{self._prefix}replicas")
            except BaseException:
                await pubsub.aclose()
                raise
        return Subscription(pubsub, self._prefix, self._replica)


class Subscription:
    """What the replicas say. To be closed."""

    def __init__(self, pubsub: PubSub, prefix: str, replica: bytes) -> None:
        self._pubsub = pubsub
        self._replica = replica
        # Of `<prefix>{<organization>}:changes`.
        self._tag = slice(len(prefix) + 1, len(prefix) + 37)
        self._replicas = f"{prefix}replicas".encode()

    async def next(self, seconds: float) -> tuple[UUID | None, bytes, str, bytes]:
        """Returns what is said next: of which organization, its kind, the sender and the body.

        This replica's own signs of life come too, and nothing else of its own.

        Raises:
            StoreUnavailable: nothing was said for `seconds`, so not even a sign of life of this replica came through.
        """
        while True:
            with _unavailable:
                message = await self._pubsub.get_message(timeout=seconds)
            if message is None:
                raise StoreUnavailable(f"nothing was heard for {seconds:g} s, not even of this replica")
            if message["type"] != "pmessage":
                continue
            data: bytes = message["data"]
            kind, sender = data[:1], data[1:9]
            channel: bytes = message["channel"]
            if channel == self._replicas:
                return None, kind, sender.decode(), data[9:]
            if sender != self._replica:
                return UUID(channel.decode()[self._tag]), kind, sender.decode(), data[9:]

    async def close(self) -> None:
        """Ends it."""
        await _closed(self._pubsub.aclose())  # type: ignore[no-untyped-call]


async def _closed(closing: Coroutine[Any, Any, None]) -> None:
    """Closes to the end, also when this is cancelled meanwhile: half closed, a connection would never be closed."""
    task = asyncio.ensure_future(closing)
    try:
        with suppress(RedisError, OSError):
            await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(RedisError, OSError):
            await task
        raise
