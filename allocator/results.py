"""Results: what came of a unit, counted exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator.clients import ClientIdentity
from allocator.exit_health import Signal
from allocator.leases import LeaseName, PersonaUse, Status
from allocator.metrics import BATCH_SECONDS, RESULTS, RESULTS_BY_OUTCOME, TARGET_TURNS
from allocator.slots import Setting
from services.coalesce import Coalescer
from services.errors import DomainError

if TYPE_CHECKING:
    from allocator.availability import Availability
    from allocator.clients import Clients
    from allocator.report_cache import ReportCache
    from allocator.result_store import ResultStore
    from allocator.targets import Turn

_log = structlog.get_logger("allocator.results")
_SUBMIT_SECONDS = BATCH_SECONDS.labels("submit")

_BATCH_CALLS = 64
_BATCH_RESULTS = 1024
_WAITING_CALLS = 4096
# As they came; in memory they are several times as large.
_BATCH_BYTES = 16 * 2**20
_WAITING_BYTES = 64 * 2**20
# While one batch waits for the disk another is made ready, if there is enough for it.
_LANES = 2
_LEAST_BESIDE_RESULTS = 512


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


# Never changed, but not frozen: of so many fields that triples the time to make one.
@dataclass(slots=True)
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
    exit_signal: Signal | None = None
    crawl_delay_ms: int | None = None

    @property
    def use(self) -> PersonaUse:
        """What the persona store is told."""
        return PersonaUse(int(self.status)) if self.persona_used else PersonaUse.NOT_USED

    @property
    def went_well(self) -> bool | None:
        """Whether the target took the run; None when that failed for a reason of the worker's or the network's."""
        if self.exit_signal in (Signal.RATE_LIMITED, Signal.BLOCKED) or self.retry_after_ms:
            return False
        return None if self.status is Status.FAILED else self.status is Status.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What was done with a result and when, the first time."""

    disposition: Disposition
    recorded_at: datetime
    repeated: bool = False


Answer = Acknowledgement | DomainError


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch.

    Attributes:
        answers: To each submission.
        turns: Targets that stopped or go on by it.
        frees: Whether a use of an exit, or a place of a target with a limit, came back by it.
    """

    answers: list[Answer]
    turns: list[Turn]
    frees: bool


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call submits; `size_bytes` as it came."""

    submissions: Sequence[Submission]
    size_bytes: int


class Results:
    """Takes results; calls that arrive while a batch commits share the next one.

    Args:
        store: The database.
        clients: Is told who speaks.
        availability: Is told when a target stops or goes on, or an exit's use came back.
        reports: Are told when something was recorded.
    """

    def __init__(self, store: ResultStore, clients: Clients, availability: Availability, reports: ReportCache) -> None:
        self._store = store
        self._clients = clients
        self._availability = availability
        self._reports = reports
        self._queues: dict[UUID, Coalescer[_Call, list[Answer]]] = {}

    async def submit(
        self, organization_id: UUID, client: ClientIdentity, submissions: Sequence[Submission], size_bytes: int
    ) -> list[Answer]:
        """Returns what was done with each result, or why it was refused.

        AllocationNotFound, LeaseTokenMismatch and LeaseLost (the unit was released) refuse single results.

        Args:
            organization_id: The tenant.
            client: Who submits.
            submissions: Of one call.
            size_bytes: How large they were on the wire.

        Raises:
            Overloaded: too many calls wait, or too many bytes of them.
            DatabaseUnavailable: nothing of the call was recorded, or its acknowledgement was lost.
        """
        await self._clients.meet(organization_id, client)
        queue = self._queues.get(organization_id)
        if queue is None:

            async def run(calls: Sequence[_Call]) -> Sequence[list[Answer]]:
                return await self._run(organization_id, [call.submissions for call in calls])

            queue = self._queues[organization_id] = Coalescer(
                "submit",
                run,
                max_batch=_BATCH_CALLS,
                max_waiting=_WAITING_CALLS,
                lanes=_LANES,
                weigh=_results,
                least_beside=_LEAST_BESIDE_RESULTS,
                size=_size_bytes,
                max_batch_bytes=_BATCH_BYTES,
                max_waiting_bytes=_WAITING_BYTES,
            )
        return await queue.submit(_Call(submissions, size_bytes))

    async def close(self) -> None:
        """Waits for what was submitted."""
        for queue in self._queues.values():
            await queue.close()

    async def _run(self, organization_id: UUID, calls: Sequence[Sequence[Submission]]) -> list[list[Answer]]:
        given = [submission for call in calls for submission in call]
        answers: dict[int, Answer] = {}
        waiting = list(range(len(given)))
        while waiting:
            # The same key twice: the second meets what the first has left.
            first: dict[UUID, int] = {}
            for place in waiting:
                first.setdefault(given[place].name.key, place)
            batch = dict(islice(first.items(), _BATCH_RESULTS))
            later: list[int] = []
            if len(batch) < len(waiting):
                later = [place for place in waiting if batch.get(given[place].name.key) != place]
            submissions = [given[place] for place in batch.values()]
            with _SUBMIT_SECONDS.time():
                recorded = await self._store.submit(organization_id, submissions)
            answers.update(zip(batch.values(), recorded.answers, strict=True))
            self._note(organization_id, submissions, recorded)
            waiting = later
        in_order = iter([answers[place] for place in range(len(given))])
        return [list(islice(in_order, len(call))) for call in calls]

    def _note(self, organization_id: UUID, submissions: Sequence[Submission], recorded: Recorded) -> None:
        dispositions: Counter[Disposition] = Counter()
        outcomes: Counter[Status] = Counter()
        # Nearly all of a batch share one acknowledgement, and one outcome.
        alike = Counter(zip(map(id, recorded.answers), (submission.status for submission in submissions), strict=True))
        by_id = {id(answer): answer for answer in recorded.answers}
        for (which, status), count in alike.items():
            answer = by_id[which]
            if isinstance(answer, Acknowledgement) and not answer.repeated:
                dispositions[answer.disposition] += count
                if answer.disposition is not Disposition.QUARANTINED:
                    outcomes[status] += count
        if not dispositions:
            return
        for disposition, count in dispositions.items():
            RESULTS.labels(disposition.name.lower()).inc(count)
        for status, count in outcomes.items():
            RESULTS_BY_OUTCOME.labels(status.name.lower()).inc(count)
        self._reports.outdate(organization_id)
        for turn in recorded.turns:
            TARGET_TURNS.labels(turn.what).inc()
            _log.info("target turned", target=turn.target, turn=turn.what, reason=turn.reason)
        if recorded.turns:
            self._availability.outdate(organization_id)
        elif recorded.frees:
            self._availability.wake(organization_id)


def _results(call: _Call) -> int:
    return len(call.submissions)


def _size_bytes(call: _Call) -> int:
    return call.size_bytes
