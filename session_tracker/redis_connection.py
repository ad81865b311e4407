"""One connection to the store, from the first word to the failure that ends it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import structlog

from session_tracker.clock import Clock
from session_tracker.config import EngineConfig
from session_tracker.metrics import TAKEN_OVER
from session_tracker.organizations import Organization, Organizations
from session_tracker.redis_incoming import Incoming
from session_tracker.redis_outgoing import Outgoing
from session_tracker.redis_packing import Packing
from session_tracker.redis_replicas import Replicas
from session_tracker.redis_store import (
    BEAT,
    BYE,
    COMMANDS,
    DROPS,
    ENDS,
    STATES,
    RedisStore,
    StoreUnavailable,
    Subscription,
)

_log = structlog.get_logger("redis engine")

# What ended sessions leave behind is looked for every so many signs of life.
_BEATS_PER_SWEEP = 10
# Sessions taken over in one go.
_SLICE_SESSIONS = 1000


class _Left(Exception):
    """This replica said that it is going."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """One organization's two directions."""

    outgoing: Outgoing
    incoming: Incoming


class Connection:
    """Keeps the organizations here and in the store the same until the store fails, or this replica leaves.

    Args:
        replica: This replica's id.
        store: Connected.
        subscription: Begun before anything is read, so that nothing is missed in between.
        organizations: Those here; those that the store knows are added.
        replicas: The other replicas.
        clock: The clock.
        config: The store's settings.
        on_joined: Called when all is read that the store has, and all is written that is this replica's.
        on_whole: Called when all that any replica knows is known here.

    Attributes:
        epoch: What the store's life is named, once it is all read and all that is ours is written; empty before.
    """

    def __init__(
        self,
        replica: str,
        store: RedisStore,
        subscription: Subscription,
        organizations: Organizations,
        replicas: Replicas,
        clock: Clock,
        config: EngineConfig,
        on_joined: Callable[[], None],
        on_whole: Callable[[], None],
    ) -> None:
        self.epoch = ""
        self._replica = replica
        self._store = store
        self._subscription = subscription
        self._organizations = organizations
        self._replicas = replicas
        self._clock = clock
        self._config = config
        self._packing = Packing(replica, clock)
        self._on_joined = on_joined
        self._on_whole = on_whole
        self._whole = False
        self._joined: dict[UUID, _Joined] = {}
        self._group: asyncio.TaskGroup | None = None
        self._leaving = asyncio.Event()
        # Held while this replica says that it lives, or that it is going.
        self._speaking = asyncio.Lock()

    async def serve(self) -> None:
        """Serves until the store fails, or until all is done that `leave` asks for.

        Raises:
            StoreUnavailable: it failed.
        """
        self._replicas.wait()
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._listen())
                self._group.create_task(self._live())
                self._group.create_task(self._leave())
        except BaseExceptionGroup as failures:
            left, others = failures.split(_Left)
            expected, faults = others.split(StoreUnavailable) if others is not None else (None, None)
            if faults is not None:
                raise
            if left is not None or expected is None:
                return
            first: BaseException = expected
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None
        finally:
            self._group = None
            for joined in self._joined.values():
                joined.outgoing.close()

    def add(self, organization: Organization) -> None:
        """Takes in an organization that was not known before."""
        if self._group is not None:
            self._group.create_task(self._join(organization))

    def leave(self) -> None:
        """Has what is left written, then has it said that this replica is going, and then has `serve` end."""
        self._leaving.set()

    async def _leave(self) -> None:
        # A task of `serve` like the others: the store is not closed under it, nor does it use one that is closed.
        await self._leaving.wait()
        for organization in self._organizations:
            joined = self._joined.get(organization.organization_id) or self._directions(organization)
            if refused := await joined.outgoing.flush():
                await joined.incoming.reconcile(refused)
                await joined.outgoing.flush()
        await self._store.organizations([organization.organization_id for organization in self._organizations])
        async with self._speaking:
            await self._store.leave()
        raise _Left

    async def _listen(self) -> None:
        while True:
            organization_id, kind, sender, body = await self._subscription.next(self._config.replica_life_seconds)
            if organization_id is None:
                if sender == self._replica:
                    continue
                if kind == BEAT:
                    self._replicas.beat(sender, body.decode())
                elif kind == BYE:
                    self._replicas.leave(sender)
                continue
            self._replicas.meet(sender)
            # Makes it known here, too: `Organizations.on_new` then has it joined, and what is said now is read then.
            organization = self._organizations.of(organization_id)
            joined = self._joined.get(organization.organization_id)
            if joined is not None:
                if kind == STATES:
                    joined.incoming.states(body)
                elif kind == COMMANDS:
                    joined.incoming.commands(body)
                elif kind == DROPS:
                    joined.incoming.drops(body)
                elif kind == ENDS:
                    joined.incoming.ends(body)
            # Messages that wait already are handed out without a pause.
            await asyncio.sleep(0)

    async def _live(self) -> None:
        """Gives signs of life, and looks for the others'; begins all else."""
        assert self._group is not None
        life = self._config.replica_life_seconds
        epoch = await self._store.beat(life, "", secrets.token_hex(8))
        self._group.create_task(self._join_all(epoch))
        beats = 0
        while True:
            await asyncio.sleep(self._config.beat_seconds)
            async with self._speaking:
                if self._leaving.is_set():
                    return
                # A name of its own each time, so that a store which lost its own never takes the same one again.
                if await self._store.beat(life, self.epoch, secrets.token_hex(8)) != epoch:
                    raise StoreUnavailable("it lost what it held")
            await self._bury()
            if self.epoch and not self._whole and self._replicas.hold(epoch):
                await self._become_whole()
            beats += 1
            if beats % _BEATS_PER_SWEEP == 0:
                for organization_id in list(self._joined):
                    await self._store.sweep(organization_id)

    async def _join_all(self, epoch: str) -> None:
        known = [organization.organization_id for organization in self._organizations]
        for organization_id in await self._store.organizations(known):
            await self._join(self._organizations.of(organization_id))
        self.epoch = epoch
        self._on_joined()
        if self._replicas.hold(epoch):
            await self._become_whole()

    async def _join(self, organization: Organization) -> None:
        """Reads all of an organization, and begins to write it."""
        organization_id = organization.organization_id
        if organization_id in self._joined or self._group is None:
            return
        joined = self._directions(organization)
        outgoing, incoming = joined.outgoing, joined.incoming
        await self._store.organizations([organization_id])
        await incoming.load()
        if refused := await outgoing.flush():
            await incoming.reconcile(refused)
        # A group that ends takes no more tasks; if this one does, it is cancelled here.
        await asyncio.sleep(0)
        self._group.create_task(self._write(outgoing, incoming))
        self._group.create_task(incoming.loop())
        if self._whole:
            organization.store_rebuilding = False

    def _directions(self, organization: Organization) -> _Joined:
        outgoing = Outgoing(organization, self._store, self._packing, self._clock, self._config.flush_seconds)
        incoming = Incoming(organization, self._store, outgoing, self._replica, self._replicas.meet)
        joined = self._joined[organization.organization_id] = _Joined(outgoing, incoming)
        return joined

    async def _write(self, outgoing: Outgoing, incoming: Incoming) -> None:
        while True:
            refused = await outgoing.next_flush()
            if refused:
                # Others know better: what they know is taken, so that all agree again.
                await incoming.reconcile(refused)

    async def _become_whole(self) -> None:
        for joined in list(self._joined.values()):
            await joined.incoming.prune(self._replicas.lives, self.epoch)
        self._whole = True
        self._on_whole()

    async def _bury(self) -> None:
        """Takes over the sessions of replicas that died, unless another one does."""
        for replica in self._replicas.silent():
            if await self._store.lives(replica):
                # Its signs of life did not come through here, or not yet.
                continue
            for organization in self._organizations:
                organization.doubt()
            if not self._owns(replica):
                self._replicas.forget(replica)
            elif await self._store.inherit(replica, 2 * self._config.replica_life_seconds):
                count = await self._take_over(replica)
                self._replicas.forget(replica)
                TAKEN_OVER.inc(count)
                _log.info("took over the sessions of a replica that is gone", replica=replica, sessions=count)

    def _owns(self, replica: str) -> bool:
        return any(
            session.owner == replica and not session.finished
            for organization in self._organizations
            for session in organization.sessions.values()
        )

    async def _take_over(self, replica: str) -> int:
        count = 0
        for organization in self._organizations:
            theirs = [session for session in organization.sessions.values() if session.owner == replica]
            for begin in range(0, len(theirs), _SLICE_SESSIONS):
                for session in theirs[begin : begin + _SLICE_SESSIONS]:
                    if session.owner == replica and not session.finished:
                        organization.take_over(session)
                        count += 1
                await asyncio.sleep(0)
        return count
