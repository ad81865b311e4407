"""What an operator says of a slot, and its form in the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import IntEnum

from muster import values
from muster.allocator.v1 import slot_pb2
from muster.values import Setting


@dataclass(frozen=True, slots=True)
class PersonaNeed:
    """Which personas may do a slot's work; without criteria any active one.

    Attributes:
        tags: It must have them all, up to 16.
        region: Its region; empty for any.
        min_aging_level: 0 to 100.
        cool_down_seconds: How long it must have rested, up to a year.
    """

    tags: Sequence[str] = ()
    region: str = ""
    min_aging_level: int = 0
    cool_down_seconds: int = 0


class Pacing(IntEnum):
    """When the units of a day become available: all at midnight, or evenly over the day. UNSPECIFIED means ASAP."""

    UNSPECIFIED = 0
    ASAP = 1
    EVEN = 2


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What an operator says of a slot.

    Attributes:
        keyword: What to work on, 1 to 200 characters.
        start_date: The first day of work.
        end_date: The last day of work.
        daily_quota: The most units a day, 1 to 1,000,000.
        code: A code of the site's own, up to 64 characters.
        target: What politeness and health are kept by, up to 128 characters.
        settings: For the worker, opaque to the service: up to 64, 16 KiB in all.
        is_active: Whether work is handed out.
        priority: Higher goes first, -1000 to 1000.
        weight: The share among slots of equal priority, 1 to 1000; 0 means 1.
        without_exit: Whether a unit needs no exit.
        persona: Which personas may do the work; None when it needs none.
        external_id: An external site's id, unique in the organization, up to 128 characters.
        pacing: How a day's quota is spread over the day.
        exit_region: Only exits of this region, up to 64 characters; empty for any.
        exit_provider: The external provider its exits come from; empty for the pool.
    """

    keyword: str
    start_date: date
    end_date: date
    daily_quota: int
    code: str = ""
    target: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    is_active: bool = True
    priority: int = 0
    weight: int = 0
    without_exit: bool = False
    persona: PersonaNeed | None = None
    external_id: str = ""
    pacing: Pacing = Pacing.UNSPECIFIED
    exit_region: str = ""
    exit_provider: str = ""


def spec_message(spec: SlotSpec) -> slot_pb2.SlotSpec:
    """Returns a slot's contents as a message.

    Raises:
        TypeError: a setting is not a bool, int, float or str.
        ValueError: a number does not fit its field, or a text is not valid Unicode.
    """
    need = spec.persona
    return slot_pb2.SlotSpec(
        keyword=spec.keyword,
        code=spec.code,
        target=spec.target,
        start_date=spec.start_date.isoformat(),
        end_date=spec.end_date.isoformat(),
        daily_quota=spec.daily_quota,
        settings=values.setting_values(spec.settings),
        is_active=spec.is_active,
        priority=spec.priority,
        weight=spec.weight,
        without_exit=spec.without_exit,
        persona=slot_pb2.PersonaNeed(
            tags=need.tags,
            region=need.region,
            min_aging_level=need.min_aging_level,
            cool_down_seconds=need.cool_down_seconds,
        )
        if need is not None
        else None,
        external_id=spec.external_id,
        pacing=slot_pb2.Pacing.ValueType(spec.pacing),
        exit_region=spec.exit_region,
        exit_provider=spec.exit_provider,
    )


def plain_spec(spec: slot_pb2.SlotSpec) -> SlotSpec:
    """Returns a message's contents."""
    need = spec.persona
    return SlotSpec(
        keyword=spec.keyword,
        start_date=date.fromisoformat(spec.start_date),
        end_date=date.fromisoformat(spec.end_date),
        daily_quota=spec.daily_quota,
        code=spec.code,
        target=spec.target,
        settings=values.plain_settings(spec.settings),
        is_active=spec.is_active,
        priority=spec.priority,
        weight=spec.weight,
        without_exit=spec.without_exit,
        persona=PersonaNeed(tuple(need.tags), need.region, need.min_aging_level, need.cool_down_seconds)
        if spec.HasField("persona")
        else None,
        external_id=spec.external_id,
        pacing=values.member(Pacing, spec.pacing),
        exit_region=spec.exit_region,
        exit_provider=spec.exit_provider,
    )
