"""Several replicas as one: each holds every session in memory, and Redis carries what one of them learns to the others.

    away ──subscribed, all read and written──> joined ──all others too──> whole
      ^─────────────── the store fails, or lost what it held ──────────────┘

Every replica serves reports, watchers, lists and totals from its own memory, in whichever state it is; only in `whole`
is its view not marked as rebuilding. A session is owned by the replica that took its last report, which alone judges
its silence and writes it; when that replica dies, exactly one of the others takes its sessions over.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from contextlib import suppress
from functools import partial

import structlog

from session_tracker.clock import Clock
from session_tracker.config import EngineConfig, SessionsConfig
from session_tracker.metrics import ENGINE_UP
from session_tracker.organizations import Organization, Organizations
from session_tracker.redis_connection import Connection
from session_tracker.redis_replicas import Replicas
from session_tracker.redis_store import RedisStore, StoreUnavailable

_log = structlog.get_logger("redis engine")

_UP = ENGINE_UP.labels("redis")
# How long a start waits for the store before the service serves without it.
_START_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0


class RedisEngine:
    """Keeps the sessions of all organizations here and at the other replicas the same.

    Args:
        organizations: Those here.
        config: The store.
        sessions: How long what nobody writes to is to stay.
        clock: The clock.

    Attributes:
        replica: This replica's id, another one after each start.
        whole: Whether all that any replica knows is known here.
    """

    def __init__(
        self, organizations: Organizations, config: EngineConfig, sessions: SessionsConfig, clock: Clock
    ) -> None:
        self.replica = secrets.token_hex(4)
        self.whole = False
        self._organizations = organizations
        self._config = config
        self._keep_seconds = sessions.lost_after_seconds + sessions.forget_lost_after_seconds
        self._finished_seconds = sessions.finished_seconds
        self._clock = clock
        self._replicas = Replicas(clock, config.replica_life_seconds)
        self._connection: Connection | None = None
        self._settled = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        for organization in organizations:
            organization.name_replica(self.replica)
        organizations.on_new.append(self._on_new)

    async def start(self) -> None:
        """Begins, and waits until all is read, or for some seconds if the store does not answer."""
        self._task = asyncio.create_task(self._run(), name="redis engine")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), _START_SECONDS)

    async def loop(self) -> None:
        """Returns when the engine has failed, which is a fault in it: losing the store is none."""
        assert self._task is not None
        # Not cancelled with this loop: what is completed while the service stops is still to be written.
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Writes what is left and hands the sessions over."""
        self._closing = True
        if self._task is not None:
            if self._connection is not None:
                self._connection.leave()
            else:
                self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def set_whole(self, whole: bool) -> None:
        """Marks every organization's view as whole or as rebuilding."""
        self.whole = whole
        for organization in self._organizations:
            organization.store_rebuilding = not whole

    def _on_new(self, organization: Organization) -> None:
        organization.name_replica(self.replica)
        organization.store_rebuilding = True
        if self._connection is not None:
            self._connection.add(organization)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            self.set_whole(False)
            try:
                # In a task of its own: a group that failed leaves its task marked as cancelled, before Python 3.13.
                await asyncio.create_task(self._connect(), name="redis connection")
                return
            except StoreUnavailable as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # The connection failed while it was being ended: its failure must not hide the end.
                    raise asyncio.CancelledError from None
                if self._closing:
                    _log.warning("the other replicas take over when they miss this one", reason=str(error))
                    return
                if self._connection is not None and self._connection.epoch:
                    pause = _FIRST_PAUSE_SECONDS
                _log.warning("the store is away: this replica goes on with what it knows", reason=str(error))
            finally:
                self._connection = None
                _UP.set(0)
            self._settled.set()
            # Not all replicas at the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 2)

    async def _connect(self) -> None:
        """Serves on one connection until it fails, or until this replica has left.

        Raises:
            StoreUnavailable: it failed.
        """
        config = self._config
        store = RedisStore(
            config.resolved_url(), config.prefix, self.replica, self._keep_seconds, self._finished_seconds
        )
        async with store:
            subscription = await store.subscribe()
            _UP.set(1)
            try:
                self._connection = Connection(
                    self.replica,
                    store,
                    subscription,
                    self._organizations,
                    self._replicas,
                    self._clock,
                    config,
                    self._settled.set,
                    partial(self.set_whole, True),
                )
                await self._connection.serve()
            finally:
                await subscription.close()
