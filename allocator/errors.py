"""What the allocator refuses, each with its reason in the contract."""

from __future__ import annotations

from uuid import UUID

from services.errors import DomainError


class SlotNotFound(DomainError):
    """No such slot in the organization."""

    reason = "SLOT_NOT_FOUND"

    def __init__(self, slot_id: UUID) -> None:
        super().__init__(f"there is no slot {slot_id}", slot_id=str(slot_id))


class SlotExists(DomainError):
    """The external id stands for a slot with other contents."""

    reason = "SLOT_EXISTS"

    def __init__(self, external_id: str, slot_id: UUID) -> None:
        super().__init__(
            f"the external_id {external_id!r} belongs to a slot with other contents: update that one",
            slot_id=str(slot_id),
        )


class ExitNotFound(DomainError):
    """No such exit in the organization."""

    reason = "EXIT_NOT_FOUND"

    def __init__(self, exit_id: UUID) -> None:
        super().__init__(f"there is no exit {exit_id}", exit_id=str(exit_id))


class ExitInUse(DomainError):
    """The exit is enabled, or live leases have it."""

    reason = "EXIT_IN_USE"

    def __init__(self, exit_id: UUID, *, enabled: bool, leases: int) -> None:
        mend = "disable it first" if enabled else f"{leases} live lease(s) have it: wait until they have ended"
        super().__init__(
            f"the exit {exit_id} is in use: {mend}",
            exit_id=str(exit_id),
            enabled=str(enabled).lower(),
            leases=str(leases),
        )


class ExitLimitReached(DomainError):
    """The organization holds as many exits as it may."""

    reason = "EXIT_LIMIT_REACHED"

    def __init__(self, limit: int, held: int) -> None:
        super().__init__(f"at most {limit} exits, would be {held}", limit=str(limit), held=str(held))


class AllocationNotFound(DomainError):
    """No such allocation in the organization."""

    reason = "ALLOCATION_NOT_FOUND"

    def __init__(self, key: UUID) -> None:
        super().__init__(f"there is no allocation {key}", allocation_key=str(key))


class LeaseLost(DomainError):
    """The lease has ended."""

    reason = "LEASE_LOST"

    def __init__(self, key: UUID, status: str) -> None:
        super().__init__(f"the lease has ended: {status}", allocation_key=str(key), status=status)


class LeaseTokenMismatch(DomainError):
    """The token is not this lease's."""

    reason = "LEASE_TOKEN_MISMATCH"

    def __init__(self, key: UUID) -> None:
        super().__init__("the token is not this lease's", allocation_key=str(key))


class LeaseAgeExceeded(DomainError):
    """The lease is as old as renewals may make it."""

    reason = "LEASE_AGE_EXCEEDED"

    def __init__(self, key: UUID) -> None:
        super().__init__("the lease has reached its greatest age", allocation_key=str(key))


class StaleVersion(DomainError):
    """The slot changed since it was read."""

    reason = "STALE_VERSION"

    def __init__(self, slot_id: UUID, etag: str) -> None:
        super().__init__("the slot changed since it was read: read it again", slot_id=str(slot_id), etag=etag)


class TargetNotFound(DomainError):
    """Nothing is known of the target in the organization."""

    reason = "TARGET_NOT_FOUND"

    def __init__(self, target: str) -> None:
        super().__init__(f"nothing is known of the target {target!r}", target=target)


class ClientNotFound(DomainError):
    """No such client, or instance, in the organization."""

    reason = "CLIENT_NOT_FOUND"

    def __init__(self, client_id: str, instance_number: int | None = None) -> None:
        name = client_id if instance_number is None else f"{client_id} instance {instance_number}"
        super().__init__(f"there is no client {name}", client_id=client_id)


class QuarantinedResultNotFound(DomainError):
    """No result of the allocation is in quarantine."""

    reason = "QUARANTINED_RESULT_NOT_FOUND"

    def __init__(self, key: UUID) -> None:
        super().__init__(f"no result of {key} is in quarantine", allocation_key=str(key))


class SlotDayNotFound(DomainError):
    """The slot has no counters on that day."""

    reason = "SLOT_DAY_NOT_FOUND"

    def __init__(self, slot_id: UUID, day: str) -> None:
        super().__init__(f"slot {slot_id} has no counters on {day}", slot_id=str(slot_id), work_date=day)
