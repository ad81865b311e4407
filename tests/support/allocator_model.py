"""A small model of one lease: quotas, caps, targets, and what became of every unit. It knows no database and no clock.

Which unit is handed out is not modelled, only what may be: the model is told what was, and says whether it could.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from muster.allocator.v1 import work_pb2

UNTIL_TOGGLE, CONCURRENT, PER_WINDOW = 1, 2, 3
# How a unit is stored while it is in a state. A unit whose lease lapsed ran out and was not swept yet.
STATUS = {
    "live": 1,
    "lapsed": 1,
    "expired": 5,
    "quarantined": 5,
    "discarded": 5,
    "released": 6,
}
_ON_LEASE = ("live", "lapsed")
_GIVEN_BACK = ("expired", "quarantined", "discarded", "released")


@dataclass(slots=True)
class ModelSlot:
    """A slot; `quota` of a day, once it has a row of its own, and by how much it was `reopened`."""

    slot_id: str
    daily: int
    target: str
    region: str
    without_exit: bool
    active: bool = True
    quota: dict[str, int] = field(default_factory=dict)
    reopened: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class ModelExit:
    """A pooled exit. A use returns only in the epoch in which it was taken; `window` is whether one is open."""

    exit_id: str
    mode: int
    cap: int
    region: str
    enabled: bool = True
    epoch: int = 0
    window: bool = False
    kept: int = 0


@dataclass(slots=True)
class ModelTarget:
    """A target's policy, and whether it is held."""

    most: int | None = None
    held: bool = False


@dataclass(slots=True)
class Unit:
    """An allocation; `outcome` once its result is recorded, in time or late."""

    allocation: work_pb2.Allocation
    client: str
    epoch: int
    state: str = "live"
    outcome: int = 0
    products: int = 0
    oldest: bool = False
    acknowledged: work_pb2.SubmittedResult | None = None

    @property
    def key(self) -> str:
        return self.allocation.allocation_key

    @property
    def slot(self) -> str:
        return self.allocation.slot_id

    @property
    def day(self) -> str:
        return self.allocation.work_date

    @property
    def status(self) -> int:
        """As stored."""
        return self.outcome + 1 if self.outcome else STATUS[self.state]


class Model:
    """One organization."""

    def __init__(self) -> None:
        self.day = ""
        self.slots: dict[str, ModelSlot] = {}
        self.exits: dict[str, ModelExit] = {}
        self.targets: dict[str, ModelTarget] = {}
        self.units: list[Unit] = []
        self.draining: set[str] = set()
        # Whose instance is on record: it spoke, and did not say goodbye since.
        self.known: set[str] = set()

    def of(self, *states: str) -> list[Unit]:
        """Returns the units in some states."""
        return [unit for unit in self.units if unit.state in states]

    def quota(self, slot: str, day: str) -> int:
        """The most units of a slot on a day."""
        return self.slots[slot].quota.get(day, self.slots[slot].daily)

    def taken(self, slot: str, day: str) -> int:
        """The units that count against it."""
        return sum(unit.slot == slot and unit.day == day and unit.state not in _GIVEN_BACK for unit in self.units)

    def room(self, slot: ModelSlot) -> int:
        """The units that a slot can hand out today as far as it goes."""
        return self.quota(slot.slot_id, self.day) - self.taken(slot.slot_id, self.day) if slot.active else 0

    def uses(self, exit_: ModelExit) -> int:
        """The uses that count against an exit's cap."""
        if exit_.mode == CONCURRENT:
            return sum(unit.allocation.exit.exit_id == exit_.exit_id for unit in self.of(*_ON_LEASE))
        if exit_.mode == PER_WINDOW and not exit_.window:
            return 0
        return exit_.kept

    def target_room(self, target: str) -> int | None:
        """The units of a target that may go out now; None for any number."""
        known = self.targets.get(target)
        if known is None:
            return None
        if known.held:
            return 0
        if known.most is None:
            return None
        return max(0, known.most - sum(unit.allocation.target == target for unit in self.of("live")))

    def fits(self, slot: ModelSlot, exit_: ModelExit, region: str) -> bool:
        """Whether a unit of a slot may go through an exit."""
        wanted = {slot.region, region} - {""}
        return exit_.enabled and self.uses(exit_) < exit_.cap and wanted <= {exit_.region}

    def most_units(self, target: str, region: str) -> int:
        """The most units that a demand can get; not 0 exactly when there is one."""
        rooms: Counter[str] = Counter()
        for slot in self.slots.values():
            if (target and slot.target != target) or (region and slot.region not in ("", region)):
                continue
            room = self.room(slot)
            if not slot.without_exit:
                room = min(room, sum(e.cap - self.uses(e) for e in self.exits.values() if self.fits(slot, e, region)))
            rooms[slot.target or f"slot:{slot.slot_id}"] += max(0, room)
        limits = {name: self.target_room(name) for name in rooms}
        return sum(room if (most := limits[name]) is None else min(room, most) for name, room in rooms.items())

    def grant(self, allocation: work_pb2.Allocation, client: str, region: str) -> None:
        """Takes a unit that was handed out. Raises: AssertionError, if it must not have been."""
        slot = self.slots[allocation.slot_id]
        assert self.room(slot) > 0, "a quota was passed"
        assert allocation.work_date == self.day
        assert not region or slot.region in ("", region), "another region's slot"
        room = self.target_room(slot.target or f"slot:{slot.slot_id}")
        assert room is None or room > 0, "a target is held, or has too many units in flight"
        epoch = 0
        assert allocation.HasField("exit") == (not slot.without_exit)
        if not slot.without_exit:
            exit_ = self.exits[allocation.exit.exit_id]
            assert self.fits(slot, exit_, region), "a cap was passed, or another exit's turn"
            epoch = self._use(exit_)
        slot.quota.setdefault(self.day, slot.daily)
        self.units.append(Unit(allocation, client, epoch))

    def _use(self, exit_: ModelExit) -> int:
        if exit_.mode == PER_WINDOW and not exit_.window:
            exit_.window, exit_.kept, exit_.epoch = True, 0, exit_.epoch + 1
        exit_.kept += 1
        return exit_.epoch

    def give_back(self, unit: Unit, state: str) -> None:
        """Ends a lease without a result: "released" by its holder, else "expired"."""
        unit.state = state
        exit_ = self.exits.get(unit.allocation.exit.exit_id)
        if exit_ is not None and unit.epoch == exit_.epoch:
            exit_.kept -= 1

    def submit(self, unit: Unit, outcome: int, products: int) -> int:
        """Takes the first result of a unit; returns what is done with it, as in the contract."""
        disposition = {"live": 1, "lapsed": 2, "expired": 2}[unit.state]
        if unit.state == "expired" and self.taken(unit.slot, unit.day) >= self.quota(unit.slot, unit.day):
            disposition = 3
        unit.state = {1: "recorded", 2: "late", 3: "quarantined"}[disposition]
        unit.products = products
        if disposition < 3:
            unit.outcome = outcome
        return disposition

    def accept(self, unit: Unit, outcome: int) -> None:
        """Records a result in quarantine after all; its day makes room for it."""
        unit.state, unit.outcome = "late", outcome
        slot = self.slots[unit.slot]
        slot.quota[unit.day] = max(self.quota(unit.slot, unit.day), self.taken(unit.slot, unit.day))

    def toggle(self, exit_: ModelExit) -> None:
        """Begins the count afresh; a concurrent exit's leases count on."""
        exit_.epoch += 1
        exit_.kept, exit_.window = 0, False

    def follow(self, slot: ModelSlot) -> None:
        """Lets today's row follow its slot, but not below what counts against it."""
        slot.quota[self.day] = max(slot.daily + slot.reopened[self.day], self.taken(slot.slot_id, self.day))

    def reopen(self, slot: ModelSlot, units: int) -> None:
        """Lets today hand out more; what is beyond the slot's own quota stays when that changes."""
        slot.quota[self.day] = self.quota(slot.slot_id, self.day) + units
        slot.reopened[self.day] = max(slot.reopened[self.day], slot.quota[self.day] - slot.daily)

    def turn(self, day: str) -> None:
        """Begins a day; what slots do from now on does not change the one before."""
        assert self.day < day
        for slot in self.slots.values():
            slot.quota.setdefault(self.day, slot.daily)
        self.day = day

    def blockers(self, client: str, target: str) -> set[str]:
        """Returns what may be named as the first thing in the way of a demand that gets nothing."""
        if client in self.draining:
            return {"CLIENT_DRAINING"}
        wanted = [slot for slot in self.slots.values() if not target or slot.target == target]
        if not wanted:
            return {"NO_SLOT"}
        if not any(slot.active for slot in wanted):
            return {"SLOT_INACTIVE"}
        if not any(self.room(slot) > 0 for slot in wanted):
            return {"QUOTA_EXHAUSTED"}
        return {"TARGET_HELD", "TARGET_BUSY", "NO_EXIT", "EXIT_EXHAUSTED", "NO_SLOT", "QUOTA_EXHAUSTED"}

    def counters(self) -> dict[tuple[str, str], list[int]]:
        """Returns quota, allocated, and the ends by status 2 to 6, of every slot and day that has units."""
        days: dict[tuple[str, str], Counter[int]] = {}
        for unit in self.units:
            days.setdefault((unit.slot, unit.day), Counter())[unit.status] += 1
        return {
            (slot, day): [self.quota(slot, day), ended.total(), *(ended[status] for status in range(2, 7))]
            for (slot, day), ended in days.items()
        }

    def results(self) -> Iterator[tuple[str, int, bool, int]]:
        """Yields key, status, whether late, and the number of products of every result that counts."""
        for unit in self.units:
            if unit.outcome:
                yield unit.key, unit.outcome + 1, unit.state == "late", unit.products


def pick(number: int, units: Iterable[Unit]) -> Unit | None:
    """Returns one of the units; None when there is none."""
    found = list(units)
    return found[number % len(found)] if found else None
