"""The loops: sweeping check-outs that ran out, and collecting objects that no generation refers to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from persona_store import metrics
from persona_store.bundle_store import BundleStore
from persona_store.check_out_store import CheckOutStore
from persona_store.parts import object_key
from persona_store.store import PersonaStore
from services.errors import DomainError
from services.objects import ObjectStore

_log = structlog.get_logger("collector")


class Collector:
    """Deletes objects past their grace; safe to run on several replicas, and after a kill at any point.

    An object is doomed in the database before it is deleted, so that no commit can take it in any more, and its
    announcement ends after that, so that a kill in between only means deleting it again.
    """

    def __init__(self, store: BundleStore, personas: PersonaStore, objects: ObjectStore) -> None:
        self._store = store
        self._personas = personas
        self._objects = objects

    async def collect(self) -> int:
        """Deletes everything whose time has come and returns how many objects that was.

        Raises:
            DatabaseUnavailable, ObjectStoreUnavailable: what was doomed is taken up next time.
        """
        collected = 0
        while doomed := await self._store.doom():
            await self._objects.delete([object_key(one.persona_id, one.written, one.kind) for one in doomed])
            await self._store.forget(doomed)
            collected += len(doomed)
            metrics.OBJECTS_COLLECTED.inc(len(doomed))
        metrics.OBJECTS_PENDING.set(await self._store.pending())
        await self._personas.forget_requests()
        return collected


class Sweeper:
    """Ends check-outs that ran out and counts the live ones."""

    def __init__(self, store: CheckOutStore) -> None:
        self._store = store

    async def sweep(self) -> None:
        """Sweeps once. Raises: DatabaseUnavailable."""
        while await self._store.sweep():
            pass
        for mode, count in (await self._store.live()).items():
            metrics.CHECK_OUTS_LIVE.labels(mode.name.lower()).set(count)


def every(seconds: float, name: str, work: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
    """Returns a loop that does `work` every so often, and goes on when a dependency is away for a while."""

    async def loop() -> None:
        while True:
            try:
                await work()
            except DomainError as error:
                _log.warning("put off", loop=name, reason=error.reason, message=error.message)
            await asyncio.sleep(seconds)

    return loop
