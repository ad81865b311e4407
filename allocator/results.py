"""Results: what came of a unit, counted exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.clients import ClientIdentity
from allocator.leases import LeaseName, PersonaUse, Status
from allocator.metrics import BATCH_SECONDS, RESULTS
from allocator.slots import Setting
from services.coalesce import Coalescer
from services.errors import DomainError

if TYPE_CHECKING:
    from allocator.clients import Clients
    from allocator.result_store import ResultStore

_BATCH_CALLS = 64
_BATCH_RESULTS = 1024
_WAITING_CALLS = 4096


class Disposition(IntEnum):
    """What was done with a result, as in the contract."""

    RECORDED = 1
    RECORDED_LATE = 2
    QUARANTINED = 3


@dataclass(frozen=True, slots=True)
class Product:
    """One thing found; `rank` is from 1, or 0 for none."""

    product_id: str
    title: str
    url: str
    rank: int
    attributes: dict[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Submission:
    """What a client says came of one unit; `status` is SUCCEEDED, FAILED or BLOCKED."""

    name: LeaseName
    client: ClientIdentity
    status: Status
    block_type: str
    execution_time_ms: int
    applied_settings: dict[str, Setting]
    exit_ip: str
    products: tuple[Product, ...]
    retry_after_ms: int | None
    error_message: str
    persona_used: bool

    @property
    def use(self) -> PersonaUse:
        """What the persona store is told."""
        return PersonaUse(int(self.status)) if self.persona_used else PersonaUse.NOT_USED


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What was done with a result and when, the first time."""

    disposition: Disposition
    recorded_at: datetime
    repeated: bool = False


Answer = Acknowledgement | DomainError


class Results:
    """Takes results; calls that arrive while a batch commits share the next one."""

    def __init__(self, store: ResultStore, clients: Clients) -> None:
        self._store = store
        self._clients = clients
        self._queues: dict[UUID, Coalescer[Sequence[Submission], list[Answer]]] = {}

    async def submit(
        self, organization_id: UUID, client: ClientIdentity, submissions: Sequence[Submission]
    ) -> list[Answer]:
        """Returns what was done with each result, or why it was refused.

        AllocationNotFound, LeaseTokenMismatch and LeaseLost (the unit was released) refuse single results.

        Raises:
            Overloaded: too many calls wait.
            DatabaseUnavailable: nothing of the call was recorded, or its acknowledgement was lost.
        """
        await self._clients.meet(organization_id, client)
        queue = self._queues.get(organization_id)
        if queue is None:

            async def run(calls: Sequence[Sequence[Submission]]) -> Sequence[list[Answer]]:
                return await self._run(organization_id, calls)

            queue = self._queues[organization_id] = Coalescer(
                "submit", run, max_batch=_BATCH_CALLS, max_waiting=_WAITING_CALLS
            )
        return await queue.submit(submissions)

    async def close(self) -> None:
        """Waits for what was submitted."""
        for queue in self._queues.values():
            await queue.close()

    async def _run(self, organization_id: UUID, calls: Sequence[Sequence[Submission]]) -> list[list[Answer]]:
        answers: list[list[Answer | None]] = [[None] * len(call) for call in calls]
        waiting = [
            (submission, number, place) for number, call in enumerate(calls) for place, submission in enumerate(call)
        ]
        while waiting:
            batch: dict[UUID, tuple[Submission, int, int]] = {}
            later = []
            for entry in waiting:
                # The same key twice: the second meets what the first has left.
                if entry[0].name.key in batch or len(batch) == _BATCH_RESULTS:
                    later.append(entry)
                else:
                    batch[entry[0].name.key] = entry
            with BATCH_SECONDS.labels("submit").time():
                given = await self._store.submit(organization_id, [submission for submission, _, _ in batch.values()])
            for (_, number, place), answer in zip(batch.values(), given, strict=True):
                answers[number][place] = answer
                if isinstance(answer, Acknowledgement) and not answer.repeated:
                    RESULTS.labels(answer.disposition.name.lower()).inc()
            waiting = later
        return [[answer for answer in call if answer is not None] for call in answers]
