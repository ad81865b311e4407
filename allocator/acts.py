"""Acts: what operators do by hand to leases, instances, days and late results; tried or done, once, and audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.audit import Deed
from allocator.leases import Status

if TYPE_CHECKING:
    from allocator.act_store import ActStore
    from allocator.availability import Availability
    from allocator.leases import Leases
    from allocator.report_cache import ReportCache


@dataclass(frozen=True, slots=True)
class Act:
    """One act: an act that is only tried answers as it would and changes nothing, nor uses its request id up."""

    request_id: UUID
    deed: Deed
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one item of an act was refused: a reason of the contract, a message, and metadata."""

    reason: str
    message: str
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Items:
    """What became of the items of an act: those that were `refused`, by key; the `done` others are counted."""

    done: int
    refused: dict[UUID, Refusal]


@dataclass(frozen=True, slots=True)
class Released:
    """Leases that were ended by age, up to 100 of their keys, and how many more match."""

    released: int
    example_keys: tuple[UUID, ...]
    remaining: int


@dataclass(frozen=True, slots=True)
class Reopened:
    """A day's quota before and after, and the units it can hand out by then."""

    quota_before: int
    quota: int
    room: int


class Acts:
    """Does what operators ask for. A retry under the same request id is answered as the first time.

    Every method raises RequestIdReused when the id stands for another request, and DatabaseUnavailable when nothing
    was done, or the answer of the commit was lost.

    Args:
        store: The database.
        leases: Is told of units that came back.
        availability: Is told of quota that was reopened.
        reports: Is told of counters that moved.
    """

    def __init__(self, store: ActStore, leases: Leases, availability: Availability, reports: ReportCache) -> None:
        self._store = store
        self._leases = leases
        self._availability = availability
        self._reports = reports

    async def revoke_leases(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> Items:
        """Ends leases without their tokens; AllocationNotFound and LeaseLost refuse single ones."""
        items, changed = await self._store.revoke_leases(organization_id, act, keys)
        if changed:
            self._leases.gave_back(organization_id, items.done, Status.EXPIRED)
        return items

    async def release_by_age(
        self,
        organization_id: UUID,
        act: Act,
        *,
        older_than_seconds: float,
        slot_id: UUID | None,
        client_id: str | None,
        at_most: int,
    ) -> Released:
        """Ends live leases that were granted longer ago, the oldest first; of one slot or client, or of any."""
        released, changed = await self._store.release_by_age(
            organization_id,
            act,
            older_than_seconds=older_than_seconds,
            slot_id=slot_id,
            client_id=client_id,
            at_most=at_most,
        )
        if changed:
            self._leases.gave_back(organization_id, released.released, Status.EXPIRED)
        return released

    async def declare_dead(self, organization_id: UUID, act: Act, client_id: str, instance_number: int) -> int:
        """Ends the leases of an instance and counts it as offline; returns how many leases. Raises: ClientNotFound."""
        ended, changed = await self._store.declare_dead(organization_id, act, client_id, instance_number)
        if changed:
            self._leases.gave_back(organization_id, ended, Status.EXPIRED)
        return ended

    async def reopen_quota(
        self, organization_id: UUID, act: Act, slot_id: UUID, work_date: date | None, units: int
    ) -> Reopened:
        """Lets a slot's day hand out more units.

        Args:
            organization_id: The tenant.
            act: The act.
            slot_id: The slot.
            work_date: Today or later; None for today in the organization's time zone.
            units: By how many; 0 for as many beyond the slot's own quota as failed or were blocked on that day.

        Raises:
            InvalidField: the day is past.
            SlotNotFound: there is no such slot.
            SlotDayNotFound: the slot has no counters on that day.
        """
        reopened, changed = await self._store.reopen_quota(organization_id, act, slot_id, work_date, units)
        if changed:
            self._availability.outdate(organization_id)
            self._reports.outdate(organization_id)
        return reopened

    async def accept_quarantined(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> Items:
        """Records late results after all; QuarantinedResultNotFound refuses single ones."""
        items, changed = await self._store.accept_quarantined(organization_id, act, keys)
        if changed:
            self._reports.outdate(organization_id)
        return items

    async def discard_quarantined(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> Items:
        """Gives late results up; QuarantinedResultNotFound refuses single ones."""
        items, _ = await self._store.discard_quarantined(organization_id, act, keys)
        return items
