"""How slots and exits stand on the way to being handed out: what the database says, and what follows from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from allocator.blockers import BlockerKind

# Of personas that failed: nobody answers.
ANY_NEED = "*"


@dataclass(frozen=True, slots=True)
class Moment:
    """When the rest was read.

    Attributes:
        now: The database's clock.
        midnight: The organization's next one; None before its first contact.
        leased: Whether leases live, whose units may come back.
        draining: Whether the client in question is told to drain.
    """

    now: datetime
    midnight: datetime | None
    leased: bool
    draining: bool


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Slots that stand alike.

    Attributes:
        kind: What holds them back, 0 for nothing of their own or their target's. The rest of what they need is told
            apart only then.
        target: '' for slots without one.
        without_exit: They use none.
        exit_region: '' for any.
        exit_provider: '' for the pool.
        persona_need: '' for none.
        slots: How many; the number of classes where slots were not counted.
        units: What they could hand out now; 0 where it was not counted.
        room: What their target allows now; None for any number.
        until: When the first of them may be held back no more; None when that is not known.
        examples: Up to 5 ids.
        targets: Some of the targets that hold them back.
    """

    kind: int
    target: str
    without_exit: bool
    exit_region: str
    exit_provider: str
    persona_need: str
    slots: int
    units: int
    room: int | None
    until: datetime | None
    examples: tuple[UUID, ...]
    targets: tuple[str, ...]

    def uses_pool(self) -> bool:
        """Whether they need a pooled exit."""
        return not self.without_exit and not self.exit_provider


@dataclass(frozen=True, slots=True)
class SlotStanding:
    """One slot, with everything that may hold it back; times are None when they have passed."""

    slot_id: UUID
    target: str
    is_active: bool
    in_date: bool
    taken: int
    quota: int
    open_units: int
    next_unit_at: datetime | None
    without_exit: bool
    exit_region: str
    exit_provider: str
    persona_need: str
    room: int | None
    held_until: datetime | None
    is_paused: bool
    probe_at: datetime | None
    probe_is_out: bool
    next_at: datetime | None
    is_full: bool
    reason: str

    def as_group(self) -> SlotGroup:
        """Returns it as a group of its own, open."""
        return SlotGroup(
            kind=0,
            target=self.target,
            without_exit=self.without_exit,
            exit_region=self.exit_region,
            exit_provider=self.exit_provider,
            persona_need=self.persona_need,
            slots=1,
            units=self.open_units,
            room=self.room,
            until=None,
            examples=(self.slot_id,),
            targets=(),
        )


@dataclass(frozen=True, slots=True)
class RegionExits:
    """Pooled exits of one region; `usable` are enabled and have room, `room` is theirs together."""

    region: str
    exits: int
    enabled: int
    usable: int
    room: int
    # When the first window without room ends.
    until: datetime | None
    disabled: tuple[UUID, ...]
    exhausted: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class CoolingExits:
    """Usable exits of one region that cool down for one target, '' for slots without one."""

    target: str
    region: str
    exits: int
    room: int
    until: datetime
    examples: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class ExitsFor:
    """The pooled exits that slots of one target and region may use, summed up."""

    exits: int
    enabled: int
    usable: int
    cooling: int
    room: int
    until: datetime | None
    cooling_until: datetime | None
    disabled: tuple[UUID, ...]
    exhausted: tuple[UUID, ...]
    cool: tuple[UUID, ...]

    def blocker(self) -> BlockerKind | None:
        """Returns what holds back slots that need one of them."""
        if not self.enabled:
            return BlockerKind.NO_EXIT
        if not self.usable:
            return BlockerKind.EXIT_EXHAUSTED
        if self.cooling >= self.usable:
            return BlockerKind.EXIT_COOLING
        return None


@dataclass(frozen=True, slots=True)
class Supply:
    """What slots need besides themselves, as far as this replica knows.

    Attributes:
        regions: Pooled exits.
        cooling: Those that cool down.
        failing_sources: External providers and the regions asked of them that give no exit.
        failing_needs: Persona needs that cannot be met; `ANY_NEED` when the store does not answer.
        region: The one that was asked for, for slots of any; '' for any.
    """

    regions: Sequence[RegionExits]
    cooling: Sequence[CoolingExits]
    failing_sources: frozenset[tuple[str, str]]
    failing_needs: frozenset[str]
    region: str = ""

    def exits_for(self, groups: Collection[SlotGroup]) -> ExitsFor:
        """Returns the pooled exits for groups of slots; for several, an exit that cools for two targets counts once."""
        wanted, targets = {group.exit_region for group in groups}, {group.target for group in groups}
        regions = [held for held in self.regions if "" in wanted or held.region in wanted]
        cooling = [held for held in self.cooling if held.target in targets and ("" in wanted or held.region in wanted)]
        usable = sum(held.usable for held in regions)
        return ExitsFor(
            exits=sum(held.exits for held in regions),
            enabled=sum(held.enabled for held in regions),
            usable=usable,
            cooling=min(usable, sum(held.exits for held in cooling)),
            room=max(0, sum(held.room for held in regions) - sum(held.room for held in cooling)),
            until=min((held.until for held in regions if held.until), default=None),
            cooling_until=min((held.until for held in cooling), default=None),
            disabled=tuple(key for held in regions for key in held.disabled)[:5],
            exhausted=tuple(key for held in regions for key in held.exhausted)[:5],
            cool=tuple(dict.fromkeys(key for held in cooling for key in held.examples))[:5],
        )

    def blocker(self, group: SlotGroup) -> BlockerKind | None:
        """Returns what holds an open group back; None when its work would be handed out."""
        if group.uses_pool():
            blocker = self.exits_for([group]).blocker()
            if blocker is not None:
                return blocker
        elif (group.exit_provider, group.exit_region or self.region) in self.failing_sources:
            return BlockerKind.EXIT_UNAVAILABLE
        if group.persona_need and ANY_NEED in self.failing_needs:
            return BlockerKind.PERSONA_STORE_UNAVAILABLE
        if group.persona_need in self.failing_needs:
            return BlockerKind.NO_PERSONA
        return None

    def units(self, groups: Iterable[SlotGroup]) -> int:
        """Returns how many units of open groups could go out together.

        Regions and their union are the only sets of exits that slots ask for, so what fits into each of them fits
        together. Exits that cool down for one target and not for another may make it less.
        """
        by_target: dict[str, int] = {}
        pooled: dict[str, int] = {}
        others = 0
        for group in groups:
            left = by_target.get(group.target, group.room if group.room is not None else group.units)
            units = group.units if group.room is None else min(group.units, left)
            if group.uses_pool():
                units = min(units, self.exits_for([group]).room)
                pooled[group.exit_region] = pooled.get(group.exit_region, 0) + units
            else:
                others += units
            if group.room is not None:
                by_target[group.target] = left - units
        rooms = {held.region: held.room for held in self.regions}
        bound = sum(min(units, rooms.get(region, 0)) for region, units in pooled.items() if region)
        return others + min(bound + pooled.get("", 0), sum(rooms.values()))
