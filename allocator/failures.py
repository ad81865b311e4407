"""What was not to be had of personas and external exits lately, as far as this replica has tried.

It is remembered for a moment to choose other work, and for longer to explain why there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar
from uuid import UUID

Kind = TypeVar("Kind", bound=Hashable)

# How long other work goes first. Whoever would get nothing else tries again all the same.
_AVOIDED_SECONDS = 1.0
# How long an operator hears of it, who asks long after the worker. A worker that waits tries again within seconds, so
# that an end of it is known by then.
_TOLD_SECONDS = 60.0


class Failures(Generic[Kind]):
    """The kinds that failed, by organization.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._avoided: dict[UUID, dict[Kind, float]] = {}
        self._told: dict[UUID, dict[Kind, float]] = {}

    def failed(self, organization_id: UUID, kinds: Iterable[Kind]) -> None:
        """Notes kinds that were not to be had."""
        now = self._clock()
        for kind in kinds:
            self._avoided.setdefault(organization_id, {})[kind] = now + _AVOIDED_SECONDS
            self._told.setdefault(organization_id, {})[kind] = now + _TOLD_SECONDS

    def succeeded(self, organization_id: UUID, kinds: Iterable[Kind]) -> None:
        """Notes kinds that were. They are avoided no shorter: of few, one may be had and the next not."""
        if told := self._told.get(organization_id):
            for kind in kinds:
                told.pop(kind, None)

    def avoided(self, organization_id: UUID) -> frozenset[Kind]:
        """Returns what was not to be had a moment ago."""
        return self._live(self._avoided.get(organization_id, {}))

    def told(self, organization_id: UUID) -> frozenset[Kind]:
        """Returns what was not to be had within the last minute, nor since."""
        return self._live(self._told.get(organization_id, {}))

    def _live(self, known: dict[Kind, float]) -> frozenset[Kind]:
        now = self._clock()
        for kind in [kind for kind, until in known.items() if until < now]:
            del known[kind]
        return frozenset(known)
