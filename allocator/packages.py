"""What a demand asks for and what it gets: the package of one unit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

from allocator.slots import PersonaNeed, Setting


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


@dataclass(frozen=True, slots=True)
class Pick:
    """A unit that is proposed: one of this slot, through this exit; None when the slot uses none."""

    slot_id: UUID
    exit_id: UUID | None


@dataclass(frozen=True, slots=True)
class AssignedExit:
    """The way to the target."""

    exit_id: UUID
    endpoint: str
    region: str


@dataclass(frozen=True, slots=True)
class AssignedPersona:
    """The identity to work as, checked out under the allocation's key; `generation` 0 when it has no bundle."""

    persona_id: UUID
    lease_token: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Package:
    """Everything a worker needs to do one unit."""

    key: UUID
    token: UUID
    expires_at: datetime
    renewable_until: datetime
    slot_id: UUID
    work_date: date
    keyword: str
    code: str
    target: str
    settings: dict[str, Setting]
    exit: AssignedExit | None
    need: PersonaNeed | None
    persona: AssignedPersona | None
    traceparent: str

    @property
    def is_complete(self) -> bool:
        """Whether it has the persona it needs."""
        return self.need is None or self.persona is not None

    def own_traceparent(self) -> str:
        """Returns a W3C traceparent for the unit: a child of the caller's, or the root of a trace of its own.

        Derived from the key, so that a retry gets the same.
        """
        trace, flags = self.key.hex, "01"
        if self.traceparent:
            _, trace, _, flags = self.traceparent.split("-")
        return f"00-{trace}-{self.key.hex[16:]}-{flags}"
