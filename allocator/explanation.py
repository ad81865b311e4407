"""Why a slot, or an organization, gets no work: the allocator's own predicates, read from the database."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from allocator.blockers import SHORTEST_SECONDS, STEP, Blocker, BlockerKind, NoWork, remedy, retry_seconds, when
from allocator.errors import SlotNotFound
from allocator.standing import SlotGroup, SlotStanding, Supply
from allocator.standing_store import Standing

if TYPE_CHECKING:
    from allocator.standing_store import StandingStore

# A fleet is sized by the free capacity up to some thousands of units, and by nothing beyond.
_COUNTED_SLOTS = 20_000

_STOPS = (BlockerKind.TARGET_HELD, BlockerKind.TARGET_PAUSED, BlockerKind.TARGET_BUSY)


class Sources(Protocol):
    """External exits, as far as explaining needs them."""

    def unavailable(self, organization_id: UUID, sources: Collection[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """Returns those of some providers, with the regions asked of them, that give no exit, as far as is known."""


class Needs(Protocol):
    """Personas, as far as explaining needs them."""

    def unavailable(self, organization_id: UUID) -> frozenset[str]:
        """Returns the needs that cannot be met, '*' for all, as far as is known."""


class Explanation:
    """Explains from the same views that allocation reserves from.

    Args:
        store: Reads them.
        personas: Knows which persona needs fail, as far as this replica has asked.
        external_exits: Knows which of their providers fail, likewise.
    """

    def __init__(self, store: StandingStore, personas: Needs, external_exits: Sources) -> None:
        self._store = store
        self._personas = personas
        self._external_exits = external_exits

    async def explain(
        self,
        organization_id: UUID,
        slot_id: UUID | None,
        target: str | None,
        region: str | None,
        client_id: str = "",
    ) -> tuple[list[Blocker], int]:
        """Returns the blockers, the nearest first, and the units that could be handed out now.

        For an organization each slot counts once, for the first step that it does not pass; the nearest is the last
        step that any of them reaches, since what it takes to get work is to pass it. For one slot all steps that it
        does not pass are listed, in their order.

        Args:
            organization_id: The tenant.
            slot_id: Only this slot; None for all.
            target: Only slots with this target; None for any.
            region: Only exits of this region; None for any.
            client_id: As this client sees it; '' for any.

        Raises:
            SlotNotFound: there is no such slot.
            DatabaseUnavailable: the database does not answer.
        """
        if slot_id is None:
            standing = await self._store.of_slots(organization_id, target, region, client_id)
            blockers, units = _of_all(standing, self._supply(organization_id, standing, standing.groups, region))
        else:
            slot, standing = await self._store.of_slot(organization_id, slot_id, region, client_id)
            if slot is None:
                raise SlotNotFound(slot_id)
            fits = target in (None, slot.target) and (region is None or slot.exit_region in ("", region))
            supply = self._supply(organization_id, standing, [slot.as_group()], region)
            blockers, units = _of_one(slot, supply) if fits else ([_NO_SLOT], 0)
        if standing.moment.draining:
            return [_DRAINING, *blockers], 0
        return blockers, units

    async def no_work(self, organization_id: UUID, target: str | None, region: str | None) -> NoWork | None:
        """Returns the first blocker for a caller, and when to ask again; None when there is work by now.

        Looks at one slot of each class, however many there are, so it does not count them. Counts on the rows of today
        being made.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        standing = await self._store.of_classes(organization_id, target, region)
        # What fails at times is left out: whoever asks has just tried it.
        return _no_work(standing, Supply(standing.regions, standing.cooling, frozenset(), frozenset()))

    async def expected_no_work(self, organization_id: UUID, target: str | None, region: str | None) -> NoWork | None:
        """Returns what `no_work` would for who has tried nothing: personas and external exits that fail count too.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        standing = await self._store.of_classes(organization_id, target, region)
        return _no_work(standing, self._supply(organization_id, standing, standing.groups, region))

    async def available_units(self, organization_id: UUID) -> int:
        """Returns how many units could be handed out now, if personas and external exits allow.

        Counts about 20,000 open slots at most, so that it costs the same for millions of them.
        """
        standing = await self._store.of_units(organization_id, _COUNTED_SLOTS)
        return Supply(standing.regions, standing.cooling, frozenset(), frozenset()).units(standing.groups)

    def _supply(
        self, organization_id: UUID, standing: Standing, groups: Collection[SlotGroup], region: str | None
    ) -> Supply:
        """Returns what groups of slots need besides themselves."""
        sources = {(group.exit_provider, group.exit_region or region or "") for group in groups if group.exit_provider}
        return Supply(
            standing.regions,
            standing.cooling,
            self._external_exits.unavailable(organization_id, sources),
            self._personas.unavailable(organization_id),
            region or "",
        )


def _of_all(standing: Standing, supply: Supply) -> tuple[list[Blocker], int]:
    held, free = _split(standing, supply)
    units = supply.units(free)
    if units:
        return [], units
    slots = sum(group.slots for group in standing.groups)
    if not slots:
        return [_NO_SLOT], 0
    kinds = sorted(held, key=STEP.__getitem__, reverse=True)
    return [_blocker(kind, held[kind], slots, supply) for kind in kinds], 0


def _no_work(standing: Standing, supply: Supply) -> NoWork | None:
    """Returns the first blocker of an organization, and when to ask again; None when nothing is in the way."""
    held, free = _split(standing, supply)
    if free:
        return None
    if not held:
        held = {BlockerKind.NO_SLOT: []}
    moment = standing.moment
    wait = min(
        retry_seconds(kind, _until(kind, groups, supply), moment.now, returning=moment.leased)
        for kind, groups in held.items()
    )
    if moment.midnight is not None:
        wait = min(wait, max(SHORTEST_SECONDS, (moment.midnight - moment.now).total_seconds()))
    first = max(held, key=STEP.__getitem__)
    return NoWork(first, f"{_message(first, held[first], None, supply)}: {remedy(first)}", wait)


def _of_one(slot: SlotStanding, supply: Supply) -> tuple[list[Blocker], int]:
    group = slot.as_group()
    blockers = []
    for kind, until in _steps(slot):
        alone = replace(group, kind=kind, until=until, targets=(slot.target or f"slot:{slot.slot_id}",))
        found = _blocker(kind, [alone], 1, supply)
        reason = f" ({slot.reason})" if slot.reason and kind in _STOPS else ""
        blockers.append(replace(found, message=found.message + reason))
    if (lacking := supply.blocker(group)) is not None:
        blockers.append(_blocker(lacking, [group], 1, supply))
    return blockers, 0 if blockers else supply.units([group])


def _split(standing: Standing, supply: Supply) -> tuple[dict[BlockerKind, list[SlotGroup]], list[SlotGroup]]:
    """Returns the groups that are held back, by what does, and those that are not."""
    held: dict[BlockerKind, list[SlotGroup]] = {}
    free = []
    for group in standing.groups:
        kind = BlockerKind(group.kind) if group.kind else supply.blocker(group)
        if kind is None:
            free.append(group)
        else:
            held.setdefault(kind, []).append(group)
    return held, free


def _steps(slot: SlotStanding) -> Iterator[tuple[BlockerKind, datetime | None]]:
    """Yields what of a slot's own or its target's holds it back, in order, and until when."""
    if not slot.is_active:
        yield BlockerKind.SLOT_INACTIVE, None
    if not slot.in_date:
        yield BlockerKind.SLOT_OUT_OF_DATE, None
    if slot.taken >= slot.quota:
        yield BlockerKind.QUOTA_EXHAUSTED, None
    elif slot.open_units <= 0:
        yield BlockerKind.PACED, slot.next_unit_at
    if slot.held_until is not None:
        yield BlockerKind.TARGET_HELD, slot.held_until
    if slot.is_paused and (slot.probe_at is not None or slot.probe_is_out):
        yield BlockerKind.TARGET_PAUSED, slot.probe_at
    if slot.next_at is not None or slot.is_full:
        yield BlockerKind.TARGET_BUSY, slot.next_at


def _until(kind: BlockerKind, groups: Sequence[SlotGroup], supply: Supply) -> datetime | None:
    """Returns when a blocker may end by itself; None when that is not known."""
    if kind is BlockerKind.EXIT_EXHAUSTED:
        return supply.exits_for(groups).until
    if kind is BlockerKind.EXIT_COOLING:
        return supply.exits_for(groups).cooling_until
    return min((group.until for group in groups if group.until is not None), default=None)


def _blocker(kind: BlockerKind, groups: Sequence[SlotGroup], slots: int, supply: Supply) -> Blocker:
    """Returns a blocker of counted groups, out of so many slots."""
    held = sum(group.slots for group in groups)
    message = _message(kind, groups, (held, slots), supply)
    exits = supply.exits_for(groups)
    count, of, examples = held, slots, tuple(key for group in groups for key in group.examples)[:5]
    if kind is BlockerKind.NO_EXIT:
        count, of, examples = exits.exits, exits.exits, exits.disabled
    elif kind is BlockerKind.EXIT_EXHAUSTED:
        count, of, examples = exits.enabled, exits.enabled, exits.exhausted
    elif kind is BlockerKind.EXIT_COOLING:
        count, of, examples = exits.cooling, exits.usable, exits.cool
    return Blocker(kind, count, of, examples, message, remedy(kind))


def _message(kind: BlockerKind, groups: Sequence[SlotGroup], counted: tuple[int, int] | None, supply: Supply) -> str:
    """Says what holds groups back; `counted` are the slots that it does and those that were looked at, if known."""
    who = "the slots" if counted is None else f"{counted[0]} of {counted[1]} slots"
    exits = supply.exits_for(groups)
    until = when(_until(kind, groups, supply))
    targets = ", ".join(sorted({target for group in groups for target in group.targets})[:3])
    regions = ", ".join(sorted({group.exit_region for group in groups if group.exit_region})[:3])
    providers = ", ".join(sorted({group.exit_provider for group in groups if group.exit_provider})[:3])
    where = f" of region {regions}" if regions else ""
    return {
        BlockerKind.NO_SLOT: "there is no such slot",
        BlockerKind.SLOT_INACTIVE: f"{who} are not active",
        BlockerKind.SLOT_OUT_OF_DATE: f"today lies outside the dates of {who}",
        BlockerKind.QUOTA_EXHAUSTED: f"today's quota of {who} is taken",
        BlockerKind.PACED: f"{who} pace their quota over the day and their next unit is not due{until}",
        BlockerKind.TARGET_HELD: f"{who} wait for a target that is to be left alone: {targets}{until}",
        BlockerKind.TARGET_PAUSED: f"{who} wait for a target that is paused until a probe goes well: {targets}{until}",
        BlockerKind.TARGET_BUSY: f"{who} wait for a target of which enough is in flight: {targets}{until}",
        BlockerKind.NO_EXIT: f"none of {exits.exits} exits{where} is enabled; {who} need one",
        BlockerKind.EXIT_EXHAUSTED: f"all {exits.enabled} enabled exits{where} have reached their cap; {who} need one",
        BlockerKind.EXIT_COOLING: f"all {exits.usable} exits{where} with room cool down{until}; {who} need one",
        BlockerKind.EXIT_UNAVAILABLE: f"{who} need an exit of a provider that gives none: {providers}",
        BlockerKind.NO_PERSONA: f"no persona that matches is idle; {who} need one",
        BlockerKind.PERSONA_STORE_UNAVAILABLE: f"the persona store does not answer; {who} need a persona",
    }[kind]


_NO_SLOT = Blocker(BlockerKind.NO_SLOT, 0, 0, (), "there is no such slot", remedy(BlockerKind.NO_SLOT))
_DRAINING = Blocker(
    BlockerKind.CLIENT_DRAINING, 1, 1, (), "the client is told to drain", remedy(BlockerKind.CLIENT_DRAINING)
)
