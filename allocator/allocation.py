"""Handing out work: proposals from the index, decided by the database, completed with exits and personas."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.blockers import BlockerKind, NoWork
from allocator.clients import ClientIdentity
from allocator.dealing import Wish
from allocator.metrics import BATCH_SECONDS, NO_WORK, UNITS
from allocator.packages import Demand, Package, Pick, SimulatedUnit
from services.call import current
from services.coalesce import Coalescer
from services.errors import DomainError, Overloaded

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.availability import Availability, OrganizationIndex
    from allocator.clients import Clients
    from allocator.explanation import Explanation
    from allocator.external_exits import ExternalExits
    from allocator.organization_share import OrganizationShare
    from allocator.personas import Personas
    from allocator.report_cache import ReportCache

_BATCH_CALLS = 1024
_BATCH_UNITS = 1024
_WAITING_CALLS = 4096
# While one batch waits for the disk another is made ready, if there is enough for it.
_LANES = 2
_LEAST_BESIDE_UNITS = 128
# How often a proposal may be beaten by other replicas before the caller is asked to come again.
_TRIES = 8
# How often those who wait for work look again when nothing on this replica tells them to.
_LOOK_SECONDS = 1.0
# Before its caller's deadline a wait leaves the time for a last look and for the answer's way.
_ANSWER_SECONDS = 0.5
# Slots, and exits, that a batch takes its units from, and the most units that one gives it at a time. A very large
# batch takes more from fewer: each update leaves a version of its row, which while an old snapshot is held nobody may
# remove.
_SPREAD = 64
_LARGE_UNITS, _LARGE_SPREAD = 128, 16
_LONGEST_TURN = 32


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A demand, and what may serve it."""

    demand: Demand
    wish: Wish


Outcome = list[Package] | NoWork

_DRAINING = NoWork(BlockerKind.CLIENT_DRAINING, "the client is told to drain", retry_after_seconds=30.0)


class Allocation:
    """Hands out work. Calls that arrive while a batch commits share the next one.

    Args:
        store: The database.
        availability: Proposes.
        explanation: Says why there is nothing.
        external_exits: Completes packages whose slots ask for one.
        personas: Completes packages.
        clients: Registers who asks.
        reports: Is told of counters that moved.
        share: Gives the organizations their turns.
        duration_seconds: How long a lease lasts.
        greatest_age_seconds: How old renewals may make it.
        draining: Ends the waiting when the service stops.
    """

    def __init__(
        self,
        store: AllocationStore,
        availability: Availability,
        explanation: Explanation,
        external_exits: ExternalExits,
        personas: Personas,
        clients: Clients,
        reports: ReportCache,
        share: OrganizationShare,
        *,
        duration_seconds: float,
        greatest_age_seconds: float,
        draining: asyncio.Event,
    ) -> None:
        self._store = store
        self._availability = availability
        self._explanation = explanation
        self._external_exits = external_exits
        self._personas = personas
        self._clients = clients
        self._reports = reports
        self._share = share
        self.duration_seconds = duration_seconds
        self._greatest_age_seconds = greatest_age_seconds
        self._draining = draining
        self._queues: dict[UUID, Coalescer[_Attempt, Outcome]] = {}

    async def allocate(
        self, organization_id: UUID, client: ClientIdentity, demand: Demand, wait_seconds: float
    ) -> Outcome:
        """Returns up to `demand.max_items` packages, or why there are none.

        Waits for work up to `wait_seconds`, but answers before the deadline of the call in hand.

        Raises:
            RequestIdReused: the request id stands for another request, or its leases have ended.
            Overloaded: to the end too many calls waited, other replicas were faster every time, or what a unit lacks
                was not to be had for it, although its lease stands.
            DatabaseUnavailable: what may have been handed out is found again by its request id, or expires.
        """
        await self._clients.meet(organization_id, client)
        index = self._availability.of(organization_id)
        until = _end_of_wait(wait_seconds)
        before: NoWork | None = None
        while True:
            changed = index.changed
            try:
                outcome = await self._serve(organization_id, demand, before)
            except Overloaded as error:
                left = until - time.monotonic()
                if left <= 0 or self._draining.is_set():
                    raise
                await asyncio.sleep(min(left, error.retry_after_seconds or _LOOK_SECONDS))
                continue
            left = until - time.monotonic()
            if not isinstance(outcome, NoWork) or left <= 0 or self._draining.is_set():
                break
            before = outcome
            try:
                await asyncio.wait_for(changed.wait(), min(left, _LOOK_SECONDS))
            except TimeoutError:
                continue
        if isinstance(outcome, NoWork):
            NO_WORK.labels(outcome.blocker.name.lower()).inc()
        else:
            UNITS.inc(len(outcome))
        return outcome

    async def simulate(
        self, organization_id: UUID, client_id: str, max_items: int, target: str | None, region: str | None
    ) -> list[SimulatedUnit] | NoWork:
        """Returns what a client would be given now, by the same choice, or why nothing. Leases nothing.

        The database's last word is not asked for, and neither personas nor external exits are tried: those that are
        known to fail are left out, as they would be once they were tried.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        wish = Wish(target or "", region or "", self._personas.unavailable(organization_id))
        while True:
            index = self._availability.of(organization_id).preview()
            try:
                await index.refresh()
                if client_id in index.draining:
                    return _DRAINING
                chosen = await index.choose(wish, max_items, _turn(max_items))
            finally:
                await index.close()
            sources = {_source(pick, wish) for pick in chosen if pick.slot_class.exit_provider}
            failing = self._external_exits.unavailable(organization_id, sources)
            picks = [pick for pick in chosen if _source(pick, wish) not in failing]
            if picks or not chosen:
                break
            wish = replace(wish, providers=wish.providers | failing)
        no_work = None if picks else await self._explanation.expected_no_work(organization_id, target, region)
        if no_work is not None:
            return no_work
        keywords = await self._store.keywords(organization_id, [pick.slot_id for pick in picks])
        return [
            SimulatedUnit(
                slot_id=pick.slot_id,
                keyword=keywords.get(pick.slot_id, ""),
                target=pick.slot_class.target,
                exit_id=pick.exit.exit_id if pick.exit else None,
                exit_provider=pick.slot_class.exit_provider,
                needs_persona=pick.slot_class.need is not None,
            )
            for pick in picks
        ]

    async def close(self) -> None:
        """Waits for what was begun."""
        for queue in self._queues.values():
            await queue.close()

    async def _serve(self, organization_id: UUID, demand: Demand, before: NoWork | None) -> Outcome:
        """Allocates, and once more from other slots for every kind of persona or exit that is not to be had.

        Args:
            organization_id: The tenant.
            demand: What is asked for.
            before: Why there was nothing at the look before this one; None at the first look of a call.
        """
        failing, sources = self._personas.failing(organization_id), self._external_exits.failing(organization_id)
        needs: frozenset[str] = frozenset()
        providers: frozenset[tuple[str, str]] = frozenset()
        missed: NoWork | None = None
        while True:
            wish = Wish(demand.target, demand.region, needs | failing, providers | sources)
            outcome = await self._queue(organization_id).submit(_Attempt(demand, wish))
            if isinstance(outcome, NoWork):
                if not failing and not sources:
                    return missed or outcome
                if before is not None:
                    # Who waits does not try again what failed a moment ago, or all who wait would do so all the time.
                    return missed or before
                # Others failed for these a moment ago; before this caller hears so, they are tried for it.
                failing, sources = frozenset(), frozenset()
                continue
            ready, without_exit = await self._external_exits.complete(organization_id, demand.request_id, outcome)
            if without_exit.providers:
                self._reports.outdate(organization_id)
                providers |= without_exit.providers
                missed = without_exit.no_work
            if ready:
                ready, without_persona = await self._personas.complete(organization_id, demand.request_id, ready)
                if without_persona.needs:
                    self._reports.outdate(organization_id)
                if ready:
                    return ready
                needs |= without_persona.needs
                missed = without_persona.no_work

    def _queue(self, organization_id: UUID) -> Coalescer[_Attempt, Outcome]:
        queue = self._queues.get(organization_id)
        if queue is None:

            async def run(attempts: Sequence[_Attempt]) -> Sequence[Outcome | BaseException]:
                units = sum(map(_units, attempts))
                async with self._share.turn(organization_id, units):
                    with BATCH_SECONDS.labels("allocate").time():
                        return await self._run(organization_id, attempts)

            queue = self._queues[organization_id] = Coalescer(
                "allocate",
                run,
                max_batch=_BATCH_CALLS,
                max_waiting=_WAITING_CALLS,
                lanes=_LANES,
                weigh=_units,
                least_beside=_LEAST_BESIDE_UNITS,
            )
        return queue

    async def _run(self, organization_id: UUID, attempts: Sequence[_Attempt]) -> list[Outcome | BaseException]:
        outcomes: dict[int, Outcome | BaseException] = {}
        waiting = list(range(len(attempts)))
        tries = 0
        while waiting:
            batch, later = _fitting(attempts, waiting)
            fresh = time.monotonic() if tries else float("-inf")
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
        fresh: float,
    ) -> None:
        """Settles what it can of a batch; what it proposed for in vain stays open."""
        index = self._availability.of(organization_id)
        async with index.choosing:
            picks = await self._propose(index, attempts, batch, fresh)
            work_date = index.work_date
            index.look_ahead()
        answers = await self._store.allocate(
            organization_id,
            work_date,
            [attempts[number].demand for number in batch],
            [picks.get(number, []) for number in batch],
            duration_seconds=self.duration_seconds,
            greatest_age_seconds=self._greatest_age_seconds,
        )
        if picks:
            self._reports.outdate(organization_id)
        reasons: dict[tuple[str, str], NoWork | None] = {}
        for number, answer in zip(batch, answers, strict=True):
            if isinstance(answer, DomainError) or answer:
                outcomes[number] = answer
            elif number not in picks:
                # Asked after the batch has committed, so that what the batch itself took counts.
                attempt = attempts[number]
                no_work = await self._why(organization_id, index, attempt.demand.client_id, attempt.wish, reasons)
                if no_work is not None:
                    outcomes[number] = no_work

    async def _propose(
        self, index: OrganizationIndex, attempts: Sequence[_Attempt], batch: Sequence[int], fresh: float
    ) -> dict[int, list[Pick]]:
        """Returns the picks of each demand; without any only if what the database held since then is used up."""
        begun = time.monotonic()
        index.begin_batch()
        turn = _turn(sum(attempts[number].demand.max_items for number in batch))
        picks: dict[int, list[Pick]] = {}
        waiting = list(batch)
        for since in (fresh, begun):
            await index.refresh(since)
            by_wish: dict[Wish, list[int]] = {}
            for number in waiting:
                if attempts[number].demand.client_id not in index.draining:
                    by_wish.setdefault(attempts[number].wish, []).append(number)
            for wish, numbers in by_wish.items():
                units = sum(attempts[number].demand.max_items for number in numbers)
                found = await index.choose(wish, units, turn, since)
                at = 0
                for number in numbers:
                    if share := found[at : at + attempts[number].demand.max_items]:
                        picks[number] = share
                        at += len(share)
            waiting = [number for number in waiting if number not in picks]
            if not waiting:
                break
        return picks

    async def _why(
        self,
        organization_id: UUID,
        index: OrganizationIndex,
        client_id: str,
        wish: Wish,
        reasons: dict[tuple[str, str], NoWork | None],
    ) -> NoWork | None:
        """Returns why there is nothing; None when by now there is something. `reasons` holds the batch's answers."""
        if client_id in index.draining:
            return _DRAINING
        # Slots whose personas or exits are not to be had were left out: the caller hears of those.
        if wish.needs:
            return NoWork(BlockerKind.NO_PERSONA, "no persona that matches is idle", retry_after_seconds=2.0)
        if wish.providers:
            return NoWork(BlockerKind.EXIT_UNAVAILABLE, "no external exit is to be had", retry_after_seconds=2.0)
        asked = (wish.target, wish.region)
        if asked not in reasons:
            reasons[asked] = await self._explanation.no_work(organization_id, wish.target or None, wish.region or None)
        return reasons[asked]


def _source(pick: Pick, wish: Wish) -> tuple[str, str]:
    """Returns the external provider of a pick, '' for none, and the region that would be asked of it."""
    return pick.slot_class.exit_provider, pick.slot_class.exit_region or wish.region


def _end_of_wait(seconds: float) -> float:
    """Returns until when a call may wait, by the clock of `time.monotonic`."""
    until = time.monotonic() + seconds
    try:
        deadline = current().deadline
    except LookupError:
        return until
    return until if deadline is None else min(until, deadline - _ANSWER_SECONDS)


def _units(attempt: _Attempt) -> int:
    return attempt.demand.max_items


def _turn(units: int) -> int:
    """Returns how many units a slot, or an exit, gives at a time in a batch of so many."""
    spread = _SPREAD if units <= _LARGE_UNITS else _LARGE_SPREAD
    return min(_LONGEST_TURN, max(1, math.ceil(units / spread)))


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
