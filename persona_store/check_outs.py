"""Check-outs: leases on personas, taken in batches, renewed and ended by their holders."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from typing import TYPE_CHECKING
from uuid import UUID

from persona_store import metrics
from persona_store.errors import PersonaCheckedOut, PersonaNotFound
from persona_store.personas import Persona
from services.coalesce import Coalescer
from services.errors import DomainError, Overloaded

if TYPE_CHECKING:
    from persona_store.check_out_store import CheckOutStore

# Each repetition means that another replica got somewhere, so this many in a row mean that it gets everything.
_ATTEMPTS = 20


class Mode(IntEnum):
    """What a holder may do; the numbers are the database's and the contract's."""

    EXCLUSIVE = 1
    READ_ONLY = 2


class UseOutcome(IntEnum):
    """How a use ended; the numbers are the contract's."""

    NOT_USED = 1
    SUCCEEDED = 2
    FAILED = 3
    BLOCKED = 4


@dataclass(frozen=True, slots=True)
class Criteria:
    """What a persona to pick must be. Only active ones are picked.

    Attributes:
        tags: Sorted; it has all of them.
        region: Empty for any.
        min_aging_level: 0 to 100.
        cool_down: How long it has rested since its last use.
    """

    tags: tuple[str, ...]
    region: str
    min_aging_level: int
    cool_down: timedelta


@dataclass(frozen=True, slots=True)
class Order:
    """A wish for a check-out.

    Attributes:
        organization_id: The tenant.
        holder: Who will hold it.
        selection: A persona's id, or what to pick by.
        mode: What the holder may do.
        duration: How long it lives unless it is renewed.
    """

    organization_id: UUID
    holder: str
    selection: UUID | Criteria
    mode: Mode
    duration: timedelta


@dataclass(frozen=True, slots=True)
class Lease:
    """A check-out as the database has it; `lease_token` is 16 random bytes."""

    organization_id: UUID
    holder: str
    persona_id: UUID
    mode: Mode
    lease_token: bytes
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class CheckOut:
    """A check-out and the persona as it was then."""

    lease: Lease
    persona: Persona


@dataclass(frozen=True, slots=True)
class Attempt:
    """A persona proposed for an order, with a fresh token."""

    order: Order
    persona_id: UUID
    lease_token: bytes


class CheckOuts:
    """Takes check-outs, gathered into batches over all callers.

    A batch proposes personas and takes them by inserting leases; the unique indexes have the last word. A pick that
    loses its persona to another replica is repeated, so "none matches" is only said when a fresh look found none.

    Args:
        store: Where leases stand.
        batch_items: The most orders of one transaction.
        waiting_items: The most orders that may wait.
    """

    def __init__(self, store: CheckOutStore, *, batch_items: int, waiting_items: int) -> None:
        self._store = store
        self._coalescer: Coalescer[Order, CheckOut] = Coalescer(
            "persona check-outs", self._take, max_batch=batch_items, max_waiting=waiting_items
        )

    async def take(self, order: Order) -> CheckOut:
        """Returns a check-out; the same one again when the holder has it already.

        Raises:
            PersonaNotFound: the named persona does not stand, or is discarded.
            PersonaCheckedOut: another holder has the named persona, or this holder has another check-out.
            NoPersonaMatches: nothing idle matches.
            Overloaded: too many orders wait.
        """
        try:
            check_out = await self._coalescer.submit(order)
        except DomainError as error:
            metrics.CHECK_OUTS.labels(error.reason.lower()).inc()
            raise
        metrics.CHECK_OUTS.labels("taken").inc()
        return check_out

    async def close(self) -> None:
        """Waits for the batches in hand."""
        await self._coalescer.close()

    async def _take(self, orders: Sequence[Order]) -> Sequence[CheckOut | BaseException]:
        results: dict[int, CheckOut | BaseException] = {}
        waiting = dict(enumerate(orders))
        for _ in range(_ATTEMPTS):
            # A holder that asks twice at once gets its answers one after the other.
            turn: dict[tuple[UUID, str], int] = {}
            for index, order in waiting.items():
                turn.setdefault((order.organization_id, order.holder), index)
            answers = await self._store.take([waiting[index] for index in turn.values()])
            for index, answer in zip(turn.values(), answers, strict=True):
                if answer is None:
                    metrics.CONFLICTS.labels("pick").inc()
                    continue
                results[index] = answer
                del waiting[index]
            if not waiting:
                break
        for index in waiting:
            results[index] = Overloaded(
                "other replicas took every persona that was picked", retry_after_seconds=0.25, queue="check-outs"
            )
        return [results[index] for index in range(len(orders))]


def proposed(order: Order, persona_id: UUID) -> Attempt:
    """Returns an attempt with a fresh token."""
    return Attempt(order, persona_id, secrets.token_bytes(16))


def refusal(
    order: Order, existing: Lease | None, held_until: datetime | None, *, found: bool
) -> PersonaNotFound | PersonaCheckedOut | None:
    """Returns why a named persona was not to be had, or None when it should be by now.

    Args:
        order: What was asked for; its selection is an id.
        existing: The live check-out of the order's holder.
        held_until: When the persona's exclusive check-out ends; None when there is none, or it is no hindrance.
        found: Whether the persona stands and is not discarded.
    """
    assert isinstance(order.selection, UUID)
    if existing is not None:
        return None if is_same(order, existing) else other_check_out(existing)
    if not found:
        return PersonaNotFound(order.selection)
    if held_until is not None:
        return PersonaCheckedOut(order.selection, held_until)
    return None


def other_check_out(existing: Lease) -> PersonaCheckedOut:
    """Returns the refusal of a holder that has another check-out than it asks for."""
    return PersonaCheckedOut(
        existing.persona_id,
        existing.expires_at,
        f"this holder has the persona {existing.persona_id} ({existing.mode.name.lower()}): check that in first",
    )


def is_same(order: Order, existing: Lease) -> bool:
    """Whether an order asks for the check-out its holder has."""
    fits = isinstance(order.selection, Criteria) or order.selection == existing.persona_id
    return fits and order.mode is existing.mode
