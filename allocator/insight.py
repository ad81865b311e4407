"""Live figures and allocations, for operators."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID

from allocator.slots import Tracking


@dataclass(frozen=True, slots=True)
class Totals:
    """An organization's live figures; `today` is None before its first contact."""

    active_slots: int
    leased: int
    clients_online: int
    clients: int
    exits: int
    exit_uses: int
    exit_capacity: int
    today: Tracking | None
    check_ins_pending: int
    quarantined: int
    available_units: int


@dataclass(frozen=True, slots=True)
class AllocationRecord:
    """An allocation as recorded; `status` as in the contract, `ended_at` None while it is leased."""

    allocation_key: UUID
    slot_id: UUID
    work_date: date
    status: int
    late: bool
    client_id: str
    instance_number: int
    exit_id: UUID | None
    persona_id: UUID | None
    allocated_at: datetime
    expires_at: datetime
    ended_at: datetime | None
