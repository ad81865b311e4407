"""Why a slot, or an organization, gets no work: the allocator's own predicates, read from the database."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.errors import SlotNotFound

if TYPE_CHECKING:
    from allocator.insight_store import InsightStore


class BlockerKind(IntEnum):
    """What stands in the way, as in the contract."""

    NO_SLOT = 1
    SLOT_INACTIVE = 2
    SLOT_OUT_OF_DATE = 3
    QUOTA_EXHAUSTED = 4
    NO_EXIT = 5
    EXIT_EXHAUSTED = 6
    NO_PERSONA = 7
    PERSONA_STORE_UNAVAILABLE = 8
    CLIENT_DRAINING = 9


# When asking again may be worth it: quota and exit uses come back as leases end, the rest as operators act.
_RETRY_SECONDS = {
    BlockerKind.NO_SLOT: 15.0,
    BlockerKind.SLOT_INACTIVE: 15.0,
    BlockerKind.SLOT_OUT_OF_DATE: 60.0,
    BlockerKind.QUOTA_EXHAUSTED: 2.0,
    BlockerKind.NO_EXIT: 15.0,
    BlockerKind.EXIT_EXHAUSTED: 2.0,
}


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing in the way: `count` of `of` slots or exits are held back by it."""

    kind: BlockerKind
    count: int
    of: int
    examples: tuple[UUID, ...]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class NoWork:
    """Why nothing is handed out, and when to ask again."""

    blocker: BlockerKind
    message: str
    retry_after_seconds: float


@dataclass(frozen=True, slots=True)
class SlotStanding:
    """How far slots come on the way to being handed out."""

    slots: int
    active: int
    eligible: int
    with_room: int
    units_without_exit: int
    units_with_exit: int
    slots_with_exit: int
    inactive_examples: tuple[UUID, ...]
    out_of_date_examples: tuple[UUID, ...]
    exhausted_examples: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class ExitStanding:
    """How far exits come; `room` is what the enabled ones have left together."""

    exits: int
    enabled: int
    room: int
    disabled_examples: tuple[UUID, ...]
    exhausted_examples: tuple[UUID, ...]


class Explanation:
    """Explains by counts of the same views that allocation reserves from."""

    def __init__(self, store: InsightStore) -> None:
        self._store = store

    async def explain(
        self, organization_id: UUID, slot_id: UUID | None, target: str | None, region: str | None
    ) -> tuple[list[Blocker], int]:
        """Returns the blockers, the nearest first, and the units that could be handed out now.

        Args:
            organization_id: The tenant.
            slot_id: Only this slot; None for all.
            target: Only slots with this target; None for any.
            region: Only exits of this region; None for any.

        Raises:
            SlotNotFound: there is no such slot.
            DatabaseUnavailable: the database does not answer.
        """
        slots, exits = await self._store.standing(organization_id, slot_id, target, region)
        if slot_id is not None and not slots.slots and target is None:
            raise SlotNotFound(slot_id)
        units = slots.units_without_exit + min(slots.units_with_exit, exits.room)
        if units:
            return [], units
        blockers = [blocker for blocker in (_slot_blocker(slots), _exit_blocker(slots, exits)) if blocker]
        return blockers, 0

    async def no_work(self, organization_id: UUID, target: str | None, region: str | None) -> NoWork | None:
        """Returns the first blocker for a caller; None when there is work by now."""
        blockers, _ = await self.explain(organization_id, None, target, region)
        if not blockers:
            return None
        first = blockers[0]
        return NoWork(first.kind, f"{first.message}: {first.remedy}", _RETRY_SECONDS[first.kind])


def _slot_blocker(slots: SlotStanding) -> Blocker | None:
    """The step at which the last slots fall out; each step asks something only of what passed the one before."""
    if not slots.slots:
        return Blocker(BlockerKind.NO_SLOT, 0, 0, (), "there is no such slot", "create one")
    if not slots.active:
        return Blocker(
            BlockerKind.SLOT_INACTIVE,
            slots.slots,
            slots.slots,
            slots.inactive_examples,
            f"none of {slots.slots} slots is active",
            "activate one",
        )
    if not slots.eligible:
        return Blocker(
            BlockerKind.SLOT_OUT_OF_DATE,
            slots.active,
            slots.active,
            slots.out_of_date_examples,
            f"today lies outside the dates of all {slots.active} active slots",
            "change their dates",
        )
    if not slots.with_room:
        return Blocker(
            BlockerKind.QUOTA_EXHAUSTED,
            slots.eligible,
            slots.eligible,
            slots.exhausted_examples,
            f"today's quota of all {slots.eligible} eligible slots is taken",
            "raise a daily quota, or wait for leases to end or for midnight",
        )
    return None


def _exit_blocker(slots: SlotStanding, exits: ExitStanding) -> Blocker | None:
    if exits.room or not slots.slots_with_exit or slots.units_without_exit:
        return None
    if not exits.enabled:
        return Blocker(
            BlockerKind.NO_EXIT,
            exits.exits,
            exits.exits,
            exits.disabled_examples,
            f"none of {exits.exits} exits is enabled",
            "import exits, or enable one",
        )
    return Blocker(
        BlockerKind.EXIT_EXHAUSTED,
        exits.enabled,
        exits.enabled,
        exits.exhausted_examples,
        f"all {exits.enabled} enabled exits have reached their cap",
        "toggle one, or wait for leases to end unworked",
    )
