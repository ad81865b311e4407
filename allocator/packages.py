"""What a demand asks for and what it gets: the package of one unit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.slots import PersonaNeed, Setting

if TYPE_CHECKING:
    from allocator.exit_pool import AvailableExit
    from allocator.slot_windows import SlotClass

# Slots whose tasks are kept between their turns, about 1 KB each: as many as go round within seconds at full speed.
TASKS = 32_768


@dataclass(frozen=True, slots=True)
class Demand:
    """One call for work.

    Attributes:
        request_id: Makes a retry safe.
        digest: Of the request, by which a retry is told from another request.
        client_id: The machine.
        instance_number: The process on it.
        max_items: 1 to 256.
        target: Only slots with this target; '' for any.
        region: Only exits of this region; '' for any.
        traceparent: W3C, of the caller; '' for none.
    """

    request_id: UUID
    digest: bytes
    client_id: str
    instance_number: int
    max_items: int
    target: str
    region: str
    traceparent: str


# Never changed, as a package is not, but not frozen: that would triple the time to make one.
@dataclass(slots=True)
class Pick:
    """A unit that is proposed: one of this slot, through this pooled exit; None when the slot uses none.

    `place` is where the slot's row of the day was seen, if it is known.
    """

    slot_id: UUID
    slot_class: SlotClass
    exit: AvailableExit | None
    place: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class SimulatedUnit:
    """A unit that would be handed out: `exit_id` is None when it uses no pooled exit."""

    slot_id: UUID
    keyword: str
    target: str
    exit_id: UUID | None
    exit_provider: str
    needs_persona: bool


@dataclass(frozen=True, slots=True, eq=False)
class AssignedExit:
    """The way to the target. Told apart by identity, as a task is.

    Attributes:
        exit_id: Of a pooled exit; None for an external one.
        endpoint: Where to connect.
        region: May be ''.
        provider: Of an external exit; '' for a pooled one.
        exit_ip: The address the target sees, as the provider says; '' when it did not.
    """

    exit_id: UUID | None
    endpoint: str
    region: str
    provider: str = ""
    exit_ip: str = ""


@dataclass(frozen=True, slots=True)
class AssignedPersona:
    """The identity to work as, checked out under the allocation's key; `generation` 0 when it has no bundle."""

    persona_id: UUID
    lease_token: bytes
    generation: int


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What all units of a slot have in common at the moment of a batch; shared by its packages.

    Told apart by identity, so that its encoded form is made once however many units it gives.
    """

    slot_id: UUID
    keyword: str
    code: str
    target: str
    settings: dict[str, Setting]
    need: PersonaNeed | None
    exit_region: str
    exit_provider: str


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What all leases of a batch have in common, likewise."""

    work_date: date
    expires_at: datetime
    renewable_until: datetime


@dataclass(slots=True)
class Package:
    """Everything a worker needs to do one unit."""

    key: UUID
    token: UUID
    task: Task
    terms: Terms
    demand: Demand
    exit: AssignedExit | None = None
    persona: AssignedPersona | None = None

    @property
    def need(self) -> PersonaNeed | None:
        """The persona it needs."""
        return self.task.need

    @property
    def exit_provider(self) -> str:
        """The external provider of its exit; '' for the pool, or when it uses none."""
        return self.task.exit_provider

    @property
    def exit_region(self) -> str:
        """The region its exit must be of, by the slot or else by the demand; '' for any."""
        return self.task.exit_region or self.demand.region

    @property
    def is_complete(self) -> bool:
        """Whether it has the persona it needs."""
        return self.task.need is None or self.persona is not None

    def own_traceparent(self) -> str:
        """Returns a W3C traceparent for the unit: a child of the caller's, or the root of a trace of its own.

        Derived from the key, so that a retry gets the same.
        """
        own = self.key.hex
        if not self.demand.traceparent:
            return f"00-{own}-{own[16:]}-01"
        _, trace, _, flags = self.demand.traceparent.split("-")
        return f"00-{trace}-{own[16:]}-{flags}"
