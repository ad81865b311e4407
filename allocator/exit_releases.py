"""Giving external exits back: the releases that leases leave behind, and the orphans that nothing here knows of.

A release is written in the transaction that ends its lease and delivered at least once. An orphan is a remote lease
without one of ours: a call that took effect although we gave up on it, after the release had been delivered already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import structlog

from allocator.exit_providers import ExitUnavailable, GuardedProvider
from allocator.metrics import EXIT_RELEASES_PENDING, PROVIDER_ORPHANS
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.external_exit_store import ExitRelease, ExternalExitStore
    from services.postgres import Connection

Found = TypeVar("Found")

_log = structlog.get_logger("allocator.exit_releases")

_BATCH = 200
_LOOK_SECONDS = 0.5


class ExitReleases:
    """Delivers releases and reconciles. Replicas share the deliveries; one at a time reconciles.

    Args:
        providers: By name.
        store: The database.
        reconcile_seconds: How often what providers hold is compared with what lives here.
        grace_seconds: How old an allocation must be to be called an orphan.
    """

    def __init__(
        self,
        providers: Mapping[str, GuardedProvider],
        store: ExternalExitStore,
        *,
        reconcile_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._providers = providers
        self._store = store
        self._reconcile_seconds = reconcile_seconds
        self._grace_seconds = grace_seconds

    async def deliver(self) -> int:
        """Delivers what is due to providers that can be told; returns how many. The rest comes up again, later.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        callable_ = [name for name, provider in self._providers.items() if not provider.is_passed_over()]
        if not callable_:
            return 0
        releases = await self._store.take_releases(callable_, _BATCH)
        told = await asyncio.gather(*(self._give_back(release) for release in releases))
        delivered = [release for release, heard in zip(releases, told, strict=True) if heard]
        if delivered:
            await self._store.delivered(delivered)
        return len(delivered)

    async def _give_back(self, release: ExitRelease) -> bool:
        try:
            await self._providers[release.provider].give_back(release.allocation_key)
        except ExitUnavailable:
            return False
        return True

    async def reconcile(self) -> None:
        """Asks every provider for its health, and releases its orphans unless another replica does.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        EXIT_RELEASES_PENDING.set(sum((await self._store.pending()).values()))
        async with self._store.reconciling() as connection:
            for provider in self._providers.values():
                try:
                    await provider.health()
                    if connection is not None:
                        await self._release_orphans(provider, connection)
                except ExitUnavailable as error:
                    _log.warning("a provider was not reconciled", provider=provider.name, error=str(error))

    async def _release_orphans(self, provider: GuardedProvider, connection: Connection) -> None:
        held = 0
        async for page in provider.pages():
            live, orphans = await self._store.sort_held(connection, page, self._grace_seconds)
            held += len(live)
            await asyncio.gather(*(self._release_orphan(provider, key) for key in orphans))
        provider.held = held

    async def _release_orphan(self, provider: GuardedProvider, key: UUID) -> None:
        try:
            await provider.give_back(key)
        except ExitUnavailable:
            # The next round finds it again.
            return
        provider.orphans_released += 1
        PROVIDER_ORPHANS.labels(provider.name).inc()
        _log.info("an orphaned external exit was released", provider=provider.name, allocation_key=str(key))

    async def pending(self) -> dict[str, int]:
        """Returns how many releases wait, by provider. Raises: DatabaseUnavailable."""
        return await self._store.pending()

    async def deliver_for_ever(self) -> None:
        """Delivers until the process ends; waits while a part is away."""
        while True:
            delivered = await self._unless_away(self.deliver(), 0)
            if delivered < _BATCH:
                await asyncio.sleep(_LOOK_SECONDS)

    async def reconcile_for_ever(self) -> None:
        """Reconciles round by round; waits while the database is away."""
        while True:
            await self._unless_away(self.reconcile(), None)
            await asyncio.sleep(self._reconcile_seconds)

    async def _unless_away(self, work: Awaitable[Found], otherwise: Found) -> Found:
        try:
            return await work
        except DatabaseUnavailable as error:
            _log.warning("external exits wait for the database", error=error.message)
            return otherwise
