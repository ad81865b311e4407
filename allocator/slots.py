"""Work slots: what is to be done, how often, when, and by what kind of persona."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from services.errors import FieldViolation

Setting = bool | int | float | str

# What an operator may change; an external site's id is for ever.
CHANGEABLE = (
    "keyword",
    "code",
    "target",
    "start_date",
    "end_date",
    "daily_quota",
    "settings",
    "is_active",
    "priority",
    "weight",
    "without_exit",
    "persona",
    "pacing",
    "exit_region",
    "exit_provider",
)


class Pacing(StrEnum):
    """When the units of a day become available: all at midnight, or one after another until the next."""

    ASAP = "asap"
    EVEN = "even"


@dataclass(frozen=True, slots=True)
class PersonaNeed:
    """Which personas may do a slot's work: all of `tags` (sorted), of `region` ('' for any), and rested."""

    tags: tuple[str, ...] = ()
    region: str = ""
    min_aging_level: int = 0
    cool_down_seconds: int = 0

    def to_json(self) -> str:
        """Returns the canonical text: equal needs have equal texts."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | None) -> PersonaNeed | None:
        """Returns the need of a canonical text, None for None."""
        if text is None:
            return None
        values = json.loads(text)
        return cls(**{**values, "tags": tuple(values["tags"])})


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What an operator says of a slot. The servicer has checked the limits of the contract.

    `exit_region` is '' for any, `exit_provider` '' for the pool.
    """

    keyword: str
    start_date: date
    end_date: date
    daily_quota: int
    code: str = ""
    target: str = ""
    settings: dict[str, Setting] = field(default_factory=dict)
    is_active: bool = True
    priority: int = 0
    weight: int = 1
    without_exit: bool = False
    persona: PersonaNeed | None = None
    external_id: str = ""
    pacing: Pacing = Pacing.ASAP
    exit_region: str = ""
    exit_provider: str = ""

    def sha256(self) -> bytes:
        """Returns the digest of the contents, by which a repeated intake is recognised."""
        values = _values(self)
        # Left out while they say nothing, so that the digests of slots from before they existed stay good.
        for name, nothing in (("pacing", Pacing.ASAP), ("exit_region", ""), ("exit_provider", "")):
            if values[name] == nothing:
                del values[name]
        return hashlib.sha256(_text(values).encode()).digest()

    def contradictions(self) -> list[FieldViolation]:
        """Returns the fields that do not go together, by their paths in the contract."""
        found = []
        if self.end_date < self.start_date:
            found.append(FieldViolation("spec.end_date", "must not be before start_date"))
        if self.without_exit and self.exit_region:
            found.append(FieldViolation("spec.exit_region", "must be empty with without_exit"))
        if self.without_exit and self.exit_provider:
            found.append(FieldViolation("spec.exit_provider", "must be empty with without_exit"))
        return found


@dataclass(frozen=True, slots=True)
class Tracking:
    """One slot's day, in units."""

    work_date: date
    quota: int
    allocated: int
    succeeded: int
    failed: int
    blocked: int
    expired: int
    released: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as stored; `today` is None while nothing was allocated on it."""

    slot_id: UUID
    spec: SlotSpec
    version: int
    spec_sha256: bytes
    created_at: datetime
    updated_at: datetime
    today: Tracking | None

    @property
    def etag(self) -> str:
        """The version as callers see it."""
        return str(self.version)

    def answers(self, sha256: bytes) -> bool:
        """Whether asking for a spec of this digest asks for this slot: it was made so, or is so by now."""
        # By digests, since 1 == 1.0 == True.
        return sha256 in (self.spec_sha256, self.spec.sha256())


@dataclass(frozen=True, slots=True)
class SlotFilter:
    """Which slots a list shows: '' and None mean any."""

    target: str = ""
    is_active: bool | None = None
    keyword_prefix: str = ""
    code: str = ""
    external_id: str = ""


@dataclass(frozen=True, slots=True)
class SlotChange:
    """One change of a slot; `difference` is a JSON object of field name to [old, new]."""

    change_id: UUID
    changed_at: datetime
    actor: str
    reason: str
    difference: str


def changed(spec: SlotSpec, given: dict[str, Any]) -> tuple[SlotSpec, str | None]:
    """Returns `spec` with the given fields, and what differs as JSON, None when nothing does."""
    new = replace(spec, **given)
    before, after = _values(spec), _values(new)
    # Compared as text, since 1 == 1.0 == True in Python but not in a setting.
    difference = {name: [before[name], after[name]] for name in given if _text(before[name]) != _text(after[name])}
    return new, _text(difference) if difference else None


def _values(spec: SlotSpec) -> dict[str, Any]:
    # Not asdict, which copies all settings: most of the time of an import.
    values = {one.name: getattr(spec, one.name) for one in fields(spec)}
    return {**values, "persona": asdict(spec.persona) if spec.persona else None}


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
