"""Pooled exits: how a run reaches its target, counted against a cap.

A use is taken with its lease, under the exit's epoch. It is given back only within that epoch: always when the lease
expires, is released or withdrawn, and in mode CONCURRENT also when its result comes. A new epoch begins

- with a toggle: the count starts from 0; of a CONCURRENT exit the leases that live move over and go on counting, so
  that there are never more of them at once than its cap;
- when an import changes the mode: the count is carried over, or becomes the leases that live when the exit turns
  CONCURRENT, so that no change of mode forgets uses as only a toggle does;
- with the first use after a window of PER_WINDOW has ended: the count starts from 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from uuid import UUID

DEFAULT_CAP = 20
_ENDPOINT = re.compile(
    r"(?:https?|socks[45])://(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})\Z"
)


class CapMode(IntEnum):
    """When a use is given back, as in the contract and in the database."""

    UNTIL_TOGGLE = 1
    CONCURRENT = 2
    PER_WINDOW = 3


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What an operator says of an exit: its address, the region it leaves from, and the most uses.

    `window_seconds` is set in mode PER_WINDOW only, to 1 to 86,400.
    """

    endpoint: str
    region: str = ""
    cap_mode: CapMode = CapMode.UNTIL_TOGGLE
    cap: int = DEFAULT_CAP
    window_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """An exit as stored; `use_count` is never above `cap`, and 0 once a window of PER_WINDOW has ended."""

    exit_id: UUID
    endpoint: str
    region: str
    cap_mode: int
    cap: int
    window_seconds: int | None
    use_count: int
    toggle_epoch: int
    enabled: bool
    toggled_at: datetime | None
    created_at: datetime
    window_ends_at: datetime | None


@dataclass(frozen=True, slots=True)
class ExitToggle:
    """One toggle: who said when that the exit has a new address, and the uses that were counted until then."""

    toggle_id: UUID
    exit_id: UUID
    toggled_at: datetime
    actor: str
    reason: str
    use_count_before: int


def is_endpoint(value: str) -> bool:
    """Whether a text is scheme://host:port with scheme http, https, socks4 or socks5."""
    match = _ENDPOINT.match(value)
    return match is not None and 1 <= int(match["port"]) <= 65535
