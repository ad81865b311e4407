"""What the persona store refuses, by the reasons of the contract."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from services.errors import DomainError


class PersonaNotFound(DomainError):
    """The organization has no such persona, or has discarded it for ever."""

    reason = "PERSONA_NOT_FOUND"

    def __init__(self, persona_id: UUID) -> None:
        super().__init__(f"there is no persona {persona_id}", persona_id=str(persona_id))


class FingerprintExists(DomainError):
    """Another persona of the organization has this fingerprint."""

    reason = "FINGERPRINT_EXISTS"

    def __init__(self, persona_id: UUID) -> None:
        super().__init__(f"the persona {persona_id} has this fingerprint already", persona_id=str(persona_id))


class PersonaCheckedOut(DomainError):
    """Another holder has the persona, or this holder has another check-out."""

    reason = "PERSONA_CHECKED_OUT"

    def __init__(self, persona_id: UUID, until: datetime, message: str = "") -> None:
        super().__init__(
            message or f"the persona {persona_id} is held until {until.isoformat()} unless that is renewed",
            persona_id=str(persona_id),
            until=until.isoformat(),
        )


class CheckOutLost(DomainError):
    """The check-out ended, or the token is not its token."""

    reason = "CHECK_OUT_LOST"

    def __init__(self, *, holder: str = "", persona_id: str = "") -> None:
        super().__init__("the check-out ended, or the token is not its token: stop using the persona")
        self.metadata = {"holder": holder} if holder else {"persona_id": persona_id}


class CheckOutReadOnly(DomainError):
    """A read-only check-out cannot save."""

    reason = "CHECK_OUT_READ_ONLY"

    def __init__(self, persona_id: UUID) -> None:
        super().__init__("this check-out is read-only: check the persona out exclusively", persona_id=str(persona_id))


class StatusTransitionRefused(DomainError):
    """The status machine has no such step."""

    reason = "STATUS_TRANSITION_REFUSED"

    def __init__(self, before: str, after: str) -> None:
        super().__init__(f"a persona does not go from {before} to {after}")
        # The contract's `from` is a keyword of Python's.
        self.metadata = {"from": before, "to": after}


class NoPersonaMatches(DomainError):
    """No idle persona matches. `cooling` is counted up to 1000."""

    reason = "NO_PERSONA_MATCHES"

    def __init__(self, held: int, cooling: int) -> None:
        super().__init__(
            f"no idle persona matches; {held} that match are held, {cooling} rest",
            held=str(held),
            cooling=str(cooling),
        )


class GenerationNotFound(DomainError):
    """The persona does not have this generation, or not any more."""

    reason = "GENERATION_NOT_FOUND"

    def __init__(self, persona_id: UUID, generation: int) -> None:
        super().__init__(
            f"the persona {persona_id} has no generation {generation}, or not any more",
            persona_id=str(persona_id),
            generation=str(generation),
        )


class PartTooLarge(DomainError):
    """A part, or all of them together, are larger than allowed; sizes in bytes."""

    reason = "PART_TOO_LARGE"

    def __init__(self, part: str, size: int, limit: int, advice: str = "") -> None:
        super().__init__(
            f"{part} has {size} bytes, {limit} are allowed{advice}", part=part, size=str(size), limit=str(limit)
        )


class PartCorrupt(DomainError):
    """A stored part is not what was saved."""

    reason = "PART_CORRUPT"

    def __init__(self, persona_id: UUID, generation: int, part: str) -> None:
        super().__init__(
            f"the stored {part} is not what was saved; an older generation may be whole",
            persona_id=str(persona_id),
            generation=str(generation),
            part=part,
        )
