"""Pooled exits: how a run reaches its target, counted against a cap until the next toggle."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

DEFAULT_CAP = 20


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What an operator says of an exit: its address, the region it leaves from, and the most uses until a toggle."""

    endpoint: str
    region: str = ""
    cap: int = DEFAULT_CAP


@dataclass(frozen=True, slots=True)
class Exit:
    """An exit as stored; `use_count` is never above `cap`."""

    exit_id: UUID
    endpoint: str
    region: str
    cap: int
    use_count: int
    toggle_epoch: int
    enabled: bool
    toggled_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ExitToggle:
    """One toggle: who said when that the exit has a new address, and the uses that were counted until then."""

    toggle_id: UUID
    exit_id: UUID
    toggled_at: datetime
    actor: str
    reason: str
    use_count_before: int
