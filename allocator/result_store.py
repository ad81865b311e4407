"""Results in the database. One transaction verifies the lease, counts, ends the allocation and keeps the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.errors import AllocationNotFound, LeaseLost, LeaseTokenMismatch
from allocator.lease_store import Counts, Day, count_ends, end_leases, lock_ended, lock_leases, lock_tracking
from allocator.leases import EndedAllocation, Ending, HeldLease, Status
from allocator.results import Acknowledgement, Answer, Disposition, Submission
from allocator.store import Store
from services.errors import DomainError
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "results.sql")


@dataclass(frozen=True, slots=True)
class _Taken:
    """A result that is kept, and the allocation it belongs to."""

    submission: Submission
    allocation: HeldLease | EndedAllocation
    disposition: Disposition

    @property
    def day(self) -> Day:
        return self.allocation.work_date, self.allocation.slot_id


class ResultStore(Store):
    """Keeps results."""

    async def submit(self, organization_id: UUID, submissions: Sequence[Submission]) -> list[Answer]:
        """Records results, all in one transaction, and answers each.

        A result on record already is answered as the first time and changes nothing. A lease that ran out but was not
        swept still counts against its quota, so there is room for its result. One that was swept is readmitted if its
        day has room for it; its exit's use was given back and is not taken again, since the cap may be reached.

        Args:
            organization_id: The tenant.
            submissions: With distinct keys.

        Raises:
            DatabaseUnavailable: nothing was recorded, or the answer of the commit was lost.
        """

        async def work(connection: Connection) -> list[Answer]:
            return await _submit(connection, organization_id, submissions)

        return await self.atomically(work)


async def _submit(connection: Connection, organization_id: UUID, submissions: Sequence[Submission]) -> list[Answer]:
    keys = [submission.name.key for submission in submissions]
    held = await lock_leases(connection, organization_id, keys)
    ended = await lock_ended(connection, organization_id, [key for key in keys if key not in held])
    answers: dict[UUID, Answer] = {}
    in_time: list[_Taken] = []
    late: list[_Taken] = []
    for submission in submissions:
        name = submission.name
        answer = _settled(submission, held.get(name.key), ended.get(name.key))
        if answer is not None:
            answers[name.key] = answer
        elif (lease := held.get(name.key)) is not None:
            disposition = Disposition.RECORDED if lease.is_live else Disposition.RECORDED_LATE
            in_time.append(_Taken(submission, lease, disposition))
        else:
            late.append(_Taken(submission, ended[name.key], Disposition.RECORDED_LATE))
    if in_time or late:
        recorded_at, taken = await _keep(connection, organization_id, in_time, late)
        for result in taken:
            answers[result.submission.name.key] = Acknowledgement(result.disposition, recorded_at)
    return [answers[key] for key in keys]


def _settled(submission: Submission, lease: HeldLease | None, ended: EndedAllocation | None) -> Answer | None:
    """Returns the answer to a result that changes nothing; None when it is to be kept."""
    name = submission.name
    found = lease or ended
    refusal: DomainError | None = None
    if found is None:
        refusal = AllocationNotFound(name.key)
    elif found.lease_token != name.token:
        refusal = LeaseTokenMismatch(name.key)
    elif ended is not None and ended.recorded_at is not None:
        disposition = Disposition.QUARANTINED if ended.quarantined else Disposition(1 + ended.late)
        return Acknowledgement(disposition, ended.recorded_at, repeated=True)
    elif ended is not None and ended.status == Status.RELEASED:
        refusal = LeaseLost(name.key, "released")
    return refusal


async def _keep(
    connection: Connection, organization_id: UUID, in_time: list[_Taken], late: list[_Taken]
) -> tuple[datetime, list[_Taken]]:
    moves: dict[Day, Counts] = {}
    for result in in_time:
        moves.setdefault(result.day, Counts()).add(result.submission.status)
    readmitted: list[_Taken] = []
    quarantined: list[_Taken] = []
    if late:
        room = await lock_tracking(connection, organization_id, [result.day for result in (*in_time, *late)])
        for result in late:
            if room.get(result.day, 0) > 0:
                room[result.day] -= 1
                counts = moves.setdefault(result.day, Counts())
                counts.add(result.submission.status)
                counts.add(Status.EXPIRED, -1)
                readmitted.append(result)
            else:
                quarantined.append(_Taken(result.submission, result.allocation, Disposition.QUARANTINED))
    if moves:
        await count_ends(connection, organization_id, moves)
    recorded_at = await _end(connection, organization_id, in_time)
    if readmitted:
        await connection.execute(
            _SQL["readmit_late"],
            organization_id,
            [result.allocation.work_date for result in readmitted],
            [result.submission.name.key for result in readmitted],
            [int(result.submission.status) for result in readmitted],
            recorded_at,
        )
    if quarantined:
        await connection.execute(
            _SQL["quarantine"],
            organization_id,
            [result.allocation.work_date for result in quarantined],
            [result.submission.name.key for result in quarantined],
            [result.allocation.slot_id for result in quarantined],
            [result.submission.client.client_id for result in quarantined],
            [_whole(result.submission) for result in quarantined],
            recorded_at,
        )
    await _insert(connection, organization_id, recorded_at, in_time + readmitted, quarantined)
    return recorded_at, in_time + readmitted + quarantined


async def _end(connection: Connection, organization_id: UUID, in_time: list[_Taken]) -> datetime:
    endings = [
        Ending(
            result.allocation,
            result.submission.status,
            late=result.disposition is Disposition.RECORDED_LATE,
            use=result.submission.use,
        )
        for result in in_time
        if isinstance(result.allocation, HeldLease)
    ]
    if endings:
        return await end_leases(connection, organization_id, endings)
    now: datetime = await connection.fetchval(_SQL["clock"])
    return now


async def _insert(
    connection: Connection, organization_id: UUID, at: datetime, counted: list[_Taken], quarantined: list[_Taken]
) -> None:
    if counted:
        await connection.execute(_SQL["insert_results"], organization_id, at, *_columns(counted, _RESULT))
    found = [
        (result, position, product) for result in counted for position, product in enumerate(result.submission.products)
    ]
    if found:
        await connection.execute(
            _SQL["insert_products"],
            organization_id,
            at,
            [result.submission.name.key for result, _, _ in found],
            [position for _, position, _ in found],
            [result.allocation.slot_id for result, _, _ in found],
            [product.product_id for _, _, product in found],
            [product.title for _, _, product in found],
            [product.url for _, _, product in found],
            [product.rank for _, _, product in found],
            [json.dumps(product.attributes) for _, _, product in found],
        )
    await connection.execute(_SQL["insert_activity"], organization_id, at, *_columns(counted + quarantined, _ACTIVITY))


def _columns(results: list[_Taken], fields: Sequence[Callable[[_Taken], Any]]) -> list[list[Any]]:
    return [[value(result) for result in results] for value in fields]


# In the order of the statement's arguments.
_RESULT: tuple[Callable[[_Taken], Any], ...] = (
    lambda result: result.submission.name.key,
    lambda result: result.allocation.work_date,
    lambda result: result.allocation.slot_id,
    lambda result: result.allocation.exit_id,
    lambda result: result.allocation.persona_id,
    lambda result: result.submission.client.client_id,
    lambda result: result.submission.client.client_ip,
    lambda result: result.submission.client.instance_number,
    lambda result: int(result.submission.status),
    lambda result: result.submission.block_type,
    lambda result: result.submission.execution_time_ms,
    lambda result: json.dumps(result.submission.applied_settings),
    lambda result: result.submission.exit_ip,
    lambda result: result.submission.retry_after_ms,
    lambda result: result.submission.error_message,
    lambda result: result.submission.persona_used,
    lambda result: len(result.submission.products),
    lambda result: result.disposition is Disposition.RECORDED_LATE,
    lambda result: result.allocation.traceparent,
)
_ACTIVITY: tuple[Callable[[_Taken], Any], ...] = (
    lambda result: result.submission.name.key,
    lambda result: result.submission.client.client_id,
    lambda result: result.submission.client.client_ip,
    lambda result: result.submission.client.instance_number,
    lambda result: result.submission.client.user_folder_number,
    lambda result: result.submission.execution_time_ms,
    lambda result: 5 if result.disposition is Disposition.QUARANTINED else int(result.submission.status),
)


def _whole(submission: Submission) -> str:
    values = asdict(submission)
    # The token proves the lease and belongs into no report.
    del values["name"]
    return json.dumps(values, default=str)
