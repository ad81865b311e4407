"""The free capacity of all organizations together: the signal by which a fleet of workers is sized."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from allocator.metrics import AVAILABLE_UNITS
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.explanation import Explanation
    from allocator.standing_store import StandingStore

_log = structlog.get_logger("allocator.capacity")

_ROUND_SECONDS = 10.0
# With very many organizations a round takes long, and then comes less often.
_SHARE = 0.02


class Capacity:
    """Measures what could be handed out. Every replica measures the same: take the greatest, not the sum."""

    def __init__(self, store: StandingStore, explanation: Explanation) -> None:
        self._store = store
        self._explanation = explanation

    async def measure(self) -> None:
        """Reads the gauge. Raises: DatabaseUnavailable."""
        units = 0
        for organization_id in await self._store.organizations():
            units += await self._explanation.available_units(organization_id)
        AVAILABLE_UNITS.set(units)

    async def measure_for_ever(self) -> None:
        """Reads the gauge every few seconds; it keeps its value while the database is away."""
        while True:
            begun = time.monotonic()
            try:
                await self.measure()
            except DatabaseUnavailable as error:
                _log.warning("the free capacity waits for the database", error=error.message)
            await asyncio.sleep(max(_ROUND_SECONDS, (time.monotonic() - begun) / _SHARE))
