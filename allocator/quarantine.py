"""Quarantine: results that came after their unit was handed out again, kept whole until an operator decides."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class QuarantinedResult:
    """A result that waits.

    Attributes:
        allocation_key: Its allocation.
        slot_id: Its slot.
        work_date: The day it would count on.
        client_id: Who submitted it.
        quarantined_at: When it came.
        status: How its unit ended: 2 succeeded, 3 failed, 4 blocked.
        products: How many it carries.
        result: The result as it was submitted, a JSON object.
    """

    allocation_key: UUID
    slot_id: UUID
    work_date: date
    client_id: str
    quarantined_at: datetime
    status: int
    products: int
    result: str
