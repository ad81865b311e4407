"""Personas for packages: checked out for the lease's whole life, under its key."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from allocator.blockers import BlockerKind, NoWork
from allocator.failures import Failures
from allocator.leases import PersonaUse
from allocator.packages import AssignedPersona, Package
from allocator.slots import PersonaNeed
from services.coalesce import Coalescer
from services.errors import Overloaded

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.availability import Availability
    from allocator.lease_store import LeaseStore

# What the persona store takes in one call.
_BATCH = 256
_WAITING = 65_536
# A check-out outlives its lease by this much, so that the last save and the check-in find it.
_MARGIN_SECONDS = 600.0
# Stands for every need: nobody answers.
_ALL = "*"


class PersonaStoreUnavailable(Exception):
    """The persona store does not answer, or is not configured."""


class PersonaStore(Protocol):
    """The other service, as this one needs it."""

    @property
    def is_configured(self) -> bool:
        """Whether there is one to ask."""

    async def check_out(
        self, organization_id: UUID, needs: Sequence[tuple[UUID, PersonaNeed]], duration_seconds: float
    ) -> list[AssignedPersona | None]:
        """Checks out a persona for each holder, or None where none matches. Raises: PersonaStoreUnavailable."""

    async def check_in(self, organization_id: UUID, uses: Sequence[tuple[UUID, PersonaUse]]) -> None:
        """Ends check-outs by holder. Safe to repeat. Raises: PersonaStoreUnavailable."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What could not be completed: the needs to avoid, and what to tell a caller who gets nothing else."""

    needs: frozenset[str]
    no_work: NoWork


_Answer = AssignedPersona | BlockerKind


class Personas:
    """Completes packages with personas.

    Args:
        store: Notes check-outs on leases.
        leases: Takes back units whose need cannot be met.
        availability: Is told of them.
        peer: The persona store.
        greatest_age_seconds: How long a lease can live.
    """

    def __init__(
        self,
        store: AllocationStore,
        leases: LeaseStore,
        availability: Availability,
        peer: PersonaStore,
        *,
        greatest_age_seconds: float,
    ) -> None:
        self._store = store
        self._leases = leases
        self._availability = availability
        self._peer = peer
        self._duration_seconds = greatest_age_seconds + _MARGIN_SECONDS
        self._queues: dict[UUID, Coalescer[Package, _Answer]] = {}
        self._failures: Failures[str] = Failures()

    def failing(self, organization_id: UUID) -> frozenset[str]:
        """Returns the needs that could not be met a moment ago."""
        return self._failures.avoided(organization_id)

    def unavailable(self, organization_id: UUID) -> frozenset[str]:
        """Returns the needs that cannot be met, '*' for all, as far as this replica has tried within a minute."""
        return self._failures.told(organization_id) if self._peer.is_configured else frozenset({_ALL})

    async def complete(
        self, organization_id: UUID, request_id: UUID, packages: Sequence[Package]
    ) -> tuple[list[Package], Failed]:
        """Returns the packages with their personas; those that get none are withdrawn, and `Failed` says why.

        If the process ends in between, a retry of the request completes the packages, or their leases expire. The lease
        of one that another call of the same request completes at this moment stands.

        Args:
            organization_id: The tenant.
            request_id: Is forgotten if none of its leases is left, so that the demand can be served otherwise.
            packages: Of one request.

        Raises:
            Overloaded: all that is left stands and lacks its persona here; a retry of the request completes it.
            DatabaseUnavailable: a retry completes the packages.
        """
        lacking = [package for package in packages if not package.is_complete]
        if not lacking:
            return list(packages), _NONE_FAILED
        answers = await self._answers(organization_id, lacking)
        ready = []
        for package in packages:
            answer = answers.get(package.key)
            if isinstance(answer, AssignedPersona):
                ready.append(replace(package, persona=answer))
            elif answer is None:
                ready.append(package)
        unmet = [package for package in lacking if not isinstance(answers[package.key], AssignedPersona)]
        # Of those that the store did not answer it may hold check-outs, or make them yet.
        unsure = [package.key for package in unmet if answers[package.key] is BlockerKind.PERSONA_STORE_UNAVAILABLE]
        met = (p.need.to_json() for p in lacking if p.need and isinstance(answers[p.key], AssignedPersona))
        self._failures.succeeded(organization_id, met if unsure else itertools.chain(met, (_ALL,)))
        if not unmet:
            return ready, _NONE_FAILED
        keys = [package.key for package in unmet]
        held = unsure if self._peer.is_configured else ()
        standing = await self._leases.withdraw(organization_id, request_id, keys, personas=held)
        self._availability.outdate(organization_id, wake=False)
        if standing and not ready:
            raise Overloaded(
                "no persona was to be had for units whose leases stand: repeat the request",
                retry_after_seconds=1.0,
                queue="personas",
            )
        needs = {_ALL} if unsure else {package.need.to_json() for package in unmet if package.need}
        self._failures.failed(organization_id, needs)
        return ready, Failed(frozenset(needs), _UNAVAILABLE if unsure else _NO_MATCH)

    async def close(self) -> None:
        """Waits for what was begun."""
        for queue in self._queues.values():
            await queue.close()

    async def _answers(self, organization_id: UUID, packages: Sequence[Package]) -> dict[UUID, _Answer]:
        if not packages:
            return {}
        queue = self._queues.get(organization_id)
        if queue is None:

            async def run(batch: Sequence[Package]) -> Sequence[_Answer]:
                return await self._check_out(organization_id, batch)

            queue = self._queues[organization_id] = Coalescer("check_out", run, max_batch=_BATCH, max_waiting=_WAITING)
        answers = await asyncio.gather(*(queue.submit(package) for package in packages))
        return {package.key: answer for package, answer in zip(packages, answers, strict=True)}

    async def _check_out(self, organization_id: UUID, batch: Sequence[Package]) -> list[_Answer]:
        needs = [(package.key, package.need) for package in batch if package.need is not None]
        try:
            found = await self._peer.check_out(organization_id, needs, self._duration_seconds)
        except PersonaStoreUnavailable:
            return [BlockerKind.PERSONA_STORE_UNAVAILABLE] * len(batch)
        given = [(key, persona) for (key, _), persona in zip(needs, found, strict=True) if persona is not None]
        noted = await self._store.attach_personas(organization_id, given) if given else set()
        personas = {key: persona for key, persona in given if key in noted}
        return [personas.get(package.key, BlockerKind.NO_PERSONA) for package in batch]


_NO_MATCH = NoWork(
    BlockerKind.NO_PERSONA,
    "no persona that matches is idle: add personas, or wait until some are checked in",
    retry_after_seconds=2.0,
)
_NONE_FAILED = Failed(frozenset(), _NO_MATCH)
_UNAVAILABLE = NoWork(
    BlockerKind.PERSONA_STORE_UNAVAILABLE,
    "the persona store does not answer: start it, or correct persona_store.target",
    retry_after_seconds=2.0,
)
