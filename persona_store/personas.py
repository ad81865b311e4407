"""Personas: their metadata and their life."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from uuid import UUID


class PersonaStatus(IntEnum):
    """Where a persona stands in its life; the numbers are the database's and the contract's."""

    AGING = 1
    ACTIVE = 2
    DORMANT = 3
    BLOCKED = 4
    DISCARDED = 5

    def may_become(self, after: PersonaStatus) -> bool:
        """Whether the status machine has the step from here to `after`."""
        return after in _STEPS[self]


_STEPS: dict[PersonaStatus, frozenset[PersonaStatus]] = {
    PersonaStatus.AGING: frozenset({PersonaStatus.ACTIVE, PersonaStatus.BLOCKED, PersonaStatus.DISCARDED}),
    PersonaStatus.ACTIVE: frozenset({PersonaStatus.DORMANT, PersonaStatus.BLOCKED, PersonaStatus.DISCARDED}),
    PersonaStatus.DORMANT: frozenset({PersonaStatus.ACTIVE, PersonaStatus.BLOCKED, PersonaStatus.DISCARDED}),
    PersonaStatus.BLOCKED: frozenset({PersonaStatus.DORMANT, PersonaStatus.DISCARDED}),
    PersonaStatus.DISCARDED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Persona:
    """A persona as it stands.

    Attributes:
        persona_id: A UUIDv7.
        status: Where it stands.
        fingerprint_sha256: Digest of the canonical fingerprint, 32 bytes.
        base_profile: The profile it was derived from.
        aging_level: 0 to 100.
        region: May be empty.
        tags: Sorted.
        generation: The newest committed one.
        total_uses: Check-ins after real use.
        success_count: Of those, successes.
        blocked_count: Of those, blocks.
        last_used_at: None for never.
        held_by: Who holds it exclusively; empty when nobody does.
    """

    persona_id: UUID
    status: PersonaStatus
    fingerprint_sha256: bytes
    base_profile: str
    aging_level: int
    region: str
    tags: tuple[str, ...]
    generation: int
    total_uses: int
    success_count: int
    blocked_count: int
    last_used_at: datetime | None
    held_by: str

    @property
    def created_at(self) -> datetime:
        """When it was made, to the millisecond: the first 48 bits of its id."""
        return datetime.fromtimestamp((self.persona_id.int >> 80) / 1000, UTC)


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list is narrowed to; empty values narrow nothing."""

    status: PersonaStatus | None
    region: str
    tag: str


@dataclass(frozen=True, slots=True)
class NewPersona:
    """A persona to be made.

    Attributes:
        fingerprint: The JSON as it came, stored unchanged.
        fingerprint_sha256: Digest of its canonical form.
        base_profile: Up to 20 characters.
        aging_level: 0 to 100.
        status: AGING or ACTIVE.
        region: Up to 64 characters.
        tags: Sorted, each once.
    """

    fingerprint: bytes
    fingerprint_sha256: bytes
    base_profile: str
    aging_level: int
    status: PersonaStatus
    region: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mutation:
    """Who asks for a change, under which request id.

    Attributes:
        organization_id: The tenant.
        method: The method's name.
        request_id: The caller's id for the request, repeated on a retry.
        request_sha256: Digest of the request, by which a retry is told from another one.
    """

    organization_id: UUID
    method: str
    request_id: UUID
    request_sha256: bytes
