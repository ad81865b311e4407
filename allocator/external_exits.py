"""External exits for packages: taken under the allocation key, noted by their address, given back when the lease ends.

    lease committed ──PUT──> exit given ──address on the lease, if it still lives──> package complete
                       └──fails──> unit withdrawn, EXIT_UNAVAILABLE
    lease ends ──same transaction──> release waits ──DELETE, at least once──> forgotten

A unit that is withdrawn leaves a release only if its provider may hold an exit for it: not when no call was made, and
not when the answer says that nothing was taken.

If this process ends anywhere in between, the lease's end or a repeat of the request mends it; what a provider holds
without a lease here is found by the reconciliation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.blockers import BlockerKind, NoWork
from allocator.exit_providers import ExitUnavailable, GuardedProvider, RemoteExit
from allocator.failures import Failures
from allocator.packages import AssignedExit, Package
from services.errors import Overloaded

if TYPE_CHECKING:
    from allocator.availability import Availability
    from allocator.external_exit_store import ExternalExitStore
    from allocator.lease_store import LeaseStore

_log = structlog.get_logger("allocator.external_exits")

# A provider and the region asked of it, '' for any.
Source = tuple[str, str]
# What came of a package: its exit, or why it has none.
_Taken = RemoteExit | ExitUnavailable


@dataclass(frozen=True, slots=True)
class Failed:
    """What could not be completed: the sources to avoid, and what to tell a caller who gets nothing else."""

    providers: frozenset[Source]
    no_work: NoWork


class ExternalExits:
    """Completes packages with external exits.

    Args:
        providers: By the name that slots ask for.
        store: Notes exits on leases.
        leases: Takes back units that get none.
        availability: Is told of them.
        greatest_age_seconds: How long a lease can live: what is asked of the provider.
    """

    def __init__(
        self,
        providers: Mapping[str, GuardedProvider],
        store: ExternalExitStore,
        leases: LeaseStore,
        availability: Availability,
        *,
        greatest_age_seconds: float,
    ) -> None:
        self._providers = providers
        self._store = store
        self._leases = leases
        self._availability = availability
        self._duration_seconds = greatest_age_seconds
        self._failures: Failures[Source] = Failures()

    def failing(self, organization_id: UUID) -> frozenset[Source]:
        """Returns the sources that had no exit a moment ago, or lately, if their provider would not be called now."""
        out_of_use = (source for source in self._failures.told(organization_id) if self._is_out_of_use(source[0]))
        return self._failures.avoided(organization_id).union(out_of_use)

    def unavailable(self, organization_id: UUID, sources: Iterable[Source]) -> frozenset[Source]:
        """Returns those of some sources that give no exit, as far as this replica has tried within a minute.

        A provider that is not configured gives none, nor one that is passed over.
        """
        told = self._failures.told(organization_id)
        return frozenset(source for source in sources if source in told or not self._is_asked(source[0]))

    async def complete(
        self, organization_id: UUID, request_id: UUID, packages: Sequence[Package]
    ) -> tuple[list[Package], Failed]:
        """Returns the packages with their external exits; those that get none are withdrawn, and `Failed` says why.

        A package of a repeated request may have been told of before, or be completed by another call at this moment:
        its lease stands even if its provider does not answer this one, since somebody may be at work with it. Packages
        that need no external exit pass.

        Args:
            organization_id: The tenant.
            request_id: Is forgotten if none of its leases is left, so that the demand can be served otherwise.
            packages: Of one request.

        Raises:
            Overloaded: all that is left stands and lacks its exit here; a retry of the request completes it.
            DatabaseUnavailable: a retry completes the packages.
        """
        lacking = [package for package in packages if lacks_exit(package)]
        if not lacking:
            return list(packages), _NONE_FAILED
        taken = dict(zip((package.key for package in lacking), await self._take(organization_id, lacking), strict=True))
        had = (package for package in lacking if isinstance(taken[package.key], RemoteExit))
        self._failures.succeeded(organization_id, ((package.exit_provider, package.exit_region) for package in had))
        given = [
            (package.key, package.exit_provider, remote.exit_ip)
            for package in lacking
            if isinstance(remote := taken[package.key], RemoteExit)
        ]
        noted = await self._store.attach(organization_id, given) if given else set()
        ready = []
        for package in packages:
            found = taken.get(package.key)
            if found is None:
                ready.append(package)
            elif isinstance(found, RemoteExit) and package.key in noted:
                assigned = AssignedExit(
                    None, found.endpoint, found.region, provider=package.exit_provider, exit_ip=found.exit_ip
                )
                ready.append(replace(package, exit=assigned))
        unmet = [package for package in lacking if package.key not in noted]
        withdrawn = await self._withdraw(organization_id, request_id, unmet, taken)
        if len(withdrawn) < len(unmet) and not ready:
            raise Overloaded(
                "no exit was to be had for units whose leases stand: repeat the request",
                retry_after_seconds=1.0,
                queue=unmet[0].exit_provider,
            )
        sources = frozenset((package.exit_provider, package.exit_region) for package in withdrawn)
        self._failures.failed(organization_id, sources)
        return ready, Failed(sources, _UNAVAILABLE)

    async def _withdraw(
        self, organization_id: UUID, request_id: UUID, unmet: Sequence[Package], taken: Mapping[UUID, _Taken]
    ) -> list[Package]:
        """Takes units back that got no exit, but for those that may have been told of; returns what is gone."""
        # An exit that was noted before is on a package that may have been told.
        fresh = [package for package in unmet if package.exit is None]
        if not fresh:
            return []
        failures = {package.key: taken[package.key] for package in fresh}
        held = [key for key, why in failures.items() if isinstance(why, ExitUnavailable) and why.may_be_held]
        standing = await self._leases.withdraw(organization_id, request_id, list(failures), exits=held)
        self._availability.outdate(organization_id, wake=False)
        return [package for package in fresh if package.key not in standing]

    async def _take(self, organization_id: UUID, packages: Sequence[Package]) -> list[_Taken]:
        """Takes an exit for each package at once; each provider bounds how many calls are made together."""
        return await asyncio.gather(*(self._one(organization_id, package) for package in packages))

    async def _one(self, organization_id: UUID, package: Package) -> _Taken:
        provider = self._providers.get(package.exit_provider)
        if provider is None:
            _log.warning("a slot asks for a provider of exits that is not configured", provider=package.exit_provider)
            return ExitUnavailable("the provider is not configured")
        try:
            return await provider.take(package.key, organization_id, package.exit_region, self._duration_seconds)
        except ExitUnavailable as error:
            # It was logged and counted where it failed.
            return error

    def _is_out_of_use(self, name: str) -> bool:
        provider = self._providers.get(name)
        return provider is None or provider.is_resting()

    def _is_asked(self, name: str) -> bool:
        provider = self._providers.get(name)
        return provider is not None and not provider.is_passed_over()


def lacks_exit(package: Package) -> bool:
    """Whether a package waits for an external exit: none was given, or all that is known of it is its address."""
    return bool(package.exit_provider) and (package.exit is None or not package.exit.endpoint)


_UNAVAILABLE = NoWork(
    BlockerKind.EXIT_UNAVAILABLE,
    "the provider of external exits does not answer, or has none free: look at it, or correct exit_providers",
    retry_after_seconds=2.0,
)
_NONE_FAILED = Failed(frozenset(), _UNAVAILABLE)
