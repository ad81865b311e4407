"""The clock of live progress. Leases and results go by the database's; what only lives in memory goes by this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


def _wall() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Clock:
    """Two readings of the time.

    Intervals are reckoned on `monotonic`, since a wall clock that is set right would make every session lost at once.

    Attributes:
        monotonic: Seconds since some moment, never falling.
        wall: The time of day, aware.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], datetime] = _wall

    def moment(self, reading: float) -> datetime:
        """Returns the time of day that belongs to a reading of `monotonic`."""
        return self.wall() - timedelta(seconds=self.monotonic() - reading)
