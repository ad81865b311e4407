"""Handing out work: proposals from the index, decided by the database, completed with personas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.availability import OrganizationIndex, Selection
from allocator.clients import ClientIdentity
from allocator.explanation import BlockerKind, NoWork
from allocator.metrics import BATCH_SECONDS, NO_WORK, UNITS
from allocator.packages import Demand, Package, Pick
from services.coalesce import Coalescer
from services.errors import DomainError, Overloaded

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.availability import Availability
    from allocator.clients import Clients
    from allocator.explanation import Explanation
    from allocator.personas import Personas

_BATCH_CALLS = 256
_BATCH_UNITS = 1024
_WAITING_CALLS = 4096
# How often a proposal may be beaten by other replicas before the caller is asked to come again.
_TRIES = 8
# How often those who wait for work look again when nothing on this replica tells them to.
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A demand, and the persona needs that cannot be met for it now."""

    demand: Demand
    avoid: frozenset[str] = frozenset()


Outcome = list[Package] | NoWork


class Allocation:
    """Hands out work. Calls that arrive while a batch commits share the next one.

    Args:
        store: The database.
        availability: Proposes.
        explanation: Says why there is nothing.
        personas: Completes packages.
        clients: Registers who asks.
        duration_seconds: How long a lease lasts.
        greatest_age_seconds: How old renewals may make it.
        draining: Ends the waiting when the service stops.
    """

    def __init__(
        self,
        store: AllocationStore,
        availability: Availability,
        explanation: Explanation,
        personas: Personas,
        clients: Clients,
        *,
        duration_seconds: float,
        greatest_age_seconds: float,
        draining: asyncio.Event,
    ) -> None:
        self._store = store
        self._availability = availability
        self._explanation = explanation
        self._personas = personas
        self._clients = clients
        self.duration_seconds = duration_seconds
        self._greatest_age_seconds = greatest_age_seconds
        self._draining = draining
        self._queues: dict[UUID, Coalescer[_Attempt, Outcome]] = {}

    async def allocate(
        self, organization_id: UUID, client: ClientIdentity, demand: Demand, wait_seconds: float
    ) -> Outcome:
        """Returns up to `demand.max_items` packages, or why there are none after `wait_seconds`.

        Raises:
            RequestIdReused: the request id stands for another request, or its leases have ended.
            Overloaded: too many calls wait, or other replicas were faster every time.
            DatabaseUnavailable: what may have been handed out is found again by its request id, or expires.
        """
        await self._clients.meet(organization_id, client)
        index = self._availability.of(organization_id)
        until = time.monotonic() + wait_seconds
        while True:
            changed = index.changed
            outcome = await self._serve(organization_id, demand)
            left = until - time.monotonic()
            if not isinstance(outcome, NoWork) or left <= 0 or self._draining.is_set():
                break
            try:
                await asyncio.wait_for(changed.wait(), min(left, _LOOK_SECONDS))
            except TimeoutError:
                continue
        if isinstance(outcome, NoWork):
            NO_WORK.labels(outcome.blocker.name.lower()).inc()
        else:
            UNITS.inc(len(outcome))
        return outcome

    async def close(self) -> None:
        """Waits for what was begun."""
        for queue in self._queues.values():
            await queue.close()

    async def _serve(self, organization_id: UUID, demand: Demand) -> Outcome:
        """Allocates, and once more from other slots for every kind of persona that is not to be had."""
        lately = self._personas.failing(organization_id)
        avoid = frozenset(lately)
        missed: NoWork | None = None
        while True:
            outcome = await self._queue(organization_id).submit(_Attempt(demand, avoid))
            if isinstance(outcome, NoWork):
                if lately:
                    # Others failed for a persona a moment ago; before this caller hears so, it is tried for it.
                    avoid -= lately
                    lately = frozenset()
                    continue
                return missed or outcome
            ready, failed = await self._personas.complete(organization_id, demand.request_id, outcome)
            if ready:
                return ready
            avoid |= failed.needs
            missed = failed.no_work

    def _queue(self, organization_id: UUID) -> Coalescer[_Attempt, Outcome]:
        queue = self._queues.get(organization_id)
        if queue is None:

            async def run(attempts: Sequence[_Attempt]) -> Sequence[Outcome | BaseException]:
                with BATCH_SECONDS.labels("allocate").time():
                    return await self._run(organization_id, attempts)

            queue = self._queues[organization_id] = Coalescer(
                "allocate", run, max_batch=_BATCH_CALLS, max_waiting=_WAITING_CALLS
            )
        return queue

    async def _run(self, organization_id: UUID, attempts: Sequence[_Attempt]) -> list[Outcome | BaseException]:
        outcomes: dict[int, Outcome | BaseException] = {}
        waiting = list(range(len(attempts)))
        tries = 0
        while waiting:
            batch, later = _fitting(attempts, waiting)
            fresh = time.monotonic() if tries else None
            await self._try(organization_id, attempts, batch, outcomes, fresh)
            beaten = [number for number in batch if number not in outcomes]
            tries = tries + 1 if beaten else 0
            if tries == _TRIES:
                for number in beaten:
                    outcomes[number] = Overloaded(
                        "other calls took the work each time: come again", retry_after_seconds=0.1, queue="allocate"
                    )
                beaten, tries = [], 0
            waiting = beaten + later
        return [outcomes[number] for number in range(len(attempts))]

    async def _try(
        self,
        organization_id: UUID,
        attempts: Sequence[_Attempt],
        batch: Sequence[int],
        outcomes: dict[int, Outcome | BaseException],
        fresh: float | None,
    ) -> None:
        """Settles what it can of a batch; what it proposed for in vain stays open."""
        index = self._availability.of(organization_id)
        begun = time.monotonic()
        picks, blank = [], set()
        untracked: set[UUID] = set()
        for number in batch:
            proposal = await self._propose(index, attempts[number], (fresh, begun), untracked)
            picks.append(proposal)
            if not proposal:
                blank.add(number)
        if untracked:
            await self._store.ensure_tracking(organization_id, sorted(untracked))
        answers = await self._store.allocate(
            organization_id,
            [attempts[number].demand for number in batch],
            picks,
            duration_seconds=self.duration_seconds,
            greatest_age_seconds=self._greatest_age_seconds,
        )
        reasons: dict[tuple[str, str], NoWork | None] = {}
        for number, answer in zip(batch, answers, strict=True):
            if isinstance(answer, DomainError) or answer:
                outcomes[number] = answer
            elif number in blank:
                # Asked after the batch has committed, so that what the batch itself took counts.
                no_work = await self._why(organization_id, index, attempts[number], reasons)
                if no_work is not None:
                    outcomes[number] = no_work

    async def _propose(
        self,
        index: OrganizationIndex,
        attempt: _Attempt,
        moments: tuple[float | None, float],
        untracked: set[UUID],
    ) -> list[Pick]:
        """Returns the picks for a demand; none only if what the database held since the last moment is used up."""
        for since in moments:
            await index.refresh_exits(since)
            if attempt.demand.client_id in index.draining_clients:
                return []
            picks = await self._pick(index, attempt, since, untracked)
            if picks:
                return picks
        return []

    async def _pick(
        self, index: OrganizationIndex, attempt: _Attempt, since: float | None, untracked: set[UUID]
    ) -> list[Pick]:
        demand = attempt.demand
        region = demand.region or None
        selection = Selection(demand.target or None, avoid=attempt.avoid)
        picks: list[Pick] = []
        while len(picks) < demand.max_items:
            if not index.has_exit(region):
                # What is left must need none.
                selection = replace(selection, exitless=True)
            await index.refresh_slots(selection, since)
            for slot in index.slots(selection):
                if not slot.tracked:
                    untracked.add(slot.slot_id)
                    slot.tracked = True
                exit_ = None if slot.without_exit else index.take_exit(region)
                if exit_ is None and not slot.without_exit:
                    break
                picks.append(Pick(slot.slot_id, exit_.exit_id if exit_ else None))
                if len(picks) == demand.max_items:
                    break
            else:
                break
        return picks

    async def _why(
        self,
        organization_id: UUID,
        index: OrganizationIndex,
        attempt: _Attempt,
        reasons: dict[tuple[str, str], NoWork | None],
    ) -> NoWork | None:
        """Returns why there is nothing; None when by now there is something. `reasons` holds the batch's answers."""
        demand = attempt.demand
        if demand.client_id in index.draining_clients:
            return NoWork(BlockerKind.CLIENT_DRAINING, "the client is told to drain", retry_after_seconds=30.0)
        if attempt.avoid:
            # Slots whose personas are not to be had were left out: the caller hears of the personas.
            return NoWork(BlockerKind.NO_PERSONA, "no persona that matches is idle", retry_after_seconds=2.0)
        asked = (demand.target, demand.region)
        if asked not in reasons:
            reasons[asked] = await self._explanation.no_work(
                organization_id, demand.target or None, demand.region or None
            )
        return reasons[asked]


def _fitting(attempts: Sequence[_Attempt], waiting: Sequence[int]) -> tuple[list[int], list[int]]:
    """Splits off what fits into one transaction: a bounded number of units, and each request id once."""
    batch: list[int] = []
    later: list[int] = []
    seen: set[UUID] = set()
    units = 0
    for number in waiting:
        demand = attempts[number].demand
        if demand.request_id in seen or (batch and units + demand.max_items > _BATCH_UNITS):
            later.append(number)
            continue
        seen.add(demand.request_id)
        units += demand.max_items
        batch.append(number)
    return batch, later
