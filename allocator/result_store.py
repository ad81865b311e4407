"""Results in the database. One transaction verifies the lease, counts, ends the allocation and keeps the result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.array_text import array, ids, numbers, texts
from allocator.errors import AllocationNotFound, LeaseLost, LeaseTokenMismatch
from allocator.lease_store import Counts, Day, count_ends, lock_tracking
from allocator.leases import Status, work_dates
from allocator.results import Acknowledgement, Answer, Disposition, Recorded, Submission
from allocator.store import Store
from allocator.target_store import react
from allocator.targets import BackOff, News, target_name
from services.errors import DomainError
from services.postgres import queries

if TYPE_CHECKING:
    import asyncpg

    from allocator.clients import ClientIdentity
    from allocator.exit_health import ExitHealth, Fault, Pair
    from allocator.partitions import Partitions
    from services.postgres import Connection, Database

_SQL = queries("allocator", "results.sql")


class _NotPlainError(Exception):
    """A batch has more to it than leases that end; it was rolled back."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """A result that is kept, and the row of the lease, or of the allocation that has ended, it belongs to."""

    submission: Submission
    row: asyncpg.Record

    @property
    def day(self) -> Day:
        return self.row["work_date"], self.row["slot_id"]


class ResultStore(Store):
    """Keeps results.

    Args:
        database: The allocator's database.
        partitions: Makes a partition that is found missing.
        back_off: When a target is left alone.
        health: Is told how exits served.
    """

    def __init__(self, database: Database, partitions: Partitions, back_off: BackOff, health: ExitHealth) -> None:
        super().__init__(database, partitions)
        self._back_off = back_off
        self._health = health

    async def submit(self, organization_id: UUID, submissions: Sequence[Submission]) -> Recorded:
        """Records results, all in one transaction, and answers each.

        A result on record already is answered as the first time and changes nothing. A lease that ran out but was not
        swept still counts against its quota, so there is room for its result. One that was swept is readmitted if its
        day has room for it; its exit's use was given back and is not taken again, since the cap may be reached.

        Nearly every batch tells nothing of targets and comes for leases that stand. Such a one is recorded by one
        statement. If that meets anything else, it is rolled back and the batch is taken apart.

        Args:
            organization_id: The tenant.
            submissions: With distinct keys.

        Raises:
            DatabaseUnavailable: nothing was recorded, or the answer of the commit was lost.
        """
        ordered = sorted(submissions, key=_key)

        async def plainly(connection: Connection) -> Recorded:
            ended = await self._record(connection, organization_id, ordered, [])
            if ended["recorded"] < len(ordered) or ended["has_probe"]:
                raise _NotPlainError
            return Recorded(_acknowledgements(ended, submissions), [], frees=ended["frees"])

        async def apart(connection: Connection) -> Recorded:
            return await self._take_apart(connection, organization_id, submissions, ordered)

        if any(map(_speaks, submissions)):
            return await self.atomically(apart)
        try:
            return await self.atomically(plainly)
        except _NotPlainError:
            return await self.atomically(apart)

    async def _record(
        self,
        connection: Connection,
        organization_id: UUID,
        submissions: Sequence[Submission],
        faults: Sequence[Fault],
    ) -> asyncpg.Record:
        """Ends leases by their results, in key order; returns how many stood, and what came of it."""
        row = await connection.fetchrow(_SQL["record_results"], organization_id, *_arguments(submissions))
        assert row is not None
        await _insert_products(connection, organization_id, row["recorded_at"], submissions)
        good: list[Pair] = [(exit_id, target) for exit_id, target in row["served_well"]]
        if faults or good:
            await self._health.report(connection, organization_id, faults, good)
        return row

    async def _take_apart(
        self,
        connection: Connection,
        organization_id: UUID,
        submissions: Sequence[Submission],
        ordered: Sequence[Submission],
    ) -> Recorded:
        """Records results of which some may be late, repeated or refused, or tell of targets."""
        keys = [submission.name.key for submission in ordered]
        rows = await connection.fetch(_SQL["lock_submitted"], organization_id, keys)
        held = {row["allocation_key"]: row for row in rows}
        ended: dict[UUID, asyncpg.Record] = {}
        if len(held) < len(keys):
            others = [key for key in keys if key not in held]
            rows = await connection.fetch(_SQL["lock_late"], organization_id, others, work_dates(others))
            ended = {row["allocation_key"]: row for row in rows}
        answers: dict[UUID, Answer] = {}
        standing: list[_Taken] = []
        late: list[_Taken] = []
        for submission in ordered:
            key = submission.name.key
            row = held.get(key) or ended.get(key)
            answer = _settled(submission, row, has_ended=key in ended)
            if answer is not None:
                answers[key] = answer
            elif row is not None:
                (late if key in ended else standing).append(_Taken(submission, row))
        turns = await react(connection, organization_id, _news((*standing, *late)), self._back_off)
        room: dict[Day, int] = {}
        if late:
            room = await lock_tracking(connection, organization_id, [result.day for result in (*standing, *late)])
        faults = _faults((*standing, *late))
        frees = False
        if standing:
            ending = [result.submission for result in standing]
            recorded = await self._record(connection, organization_id, ending, faults)
            frees = recorded["frees"]
            keys = [submission.name.key for submission in ending]
            answers.update(zip(keys, _acknowledgements(recorded, ending), strict=True))
        elif faults:
            await self._health.report(connection, organization_id, faults, [])
        if late:
            await _record_late(connection, organization_id, late, room, answers)
        return Recorded([answers[submission.name.key] for submission in submissions], turns, frees=frees)


def _key(submission: Submission) -> bytes:
    # Bytes are in the order of the UUIDs that they are of, and faster to compare.
    return submission.name.key.bytes


def _acknowledgements(ended: asyncpg.Record, submissions: Sequence[Submission]) -> list[Answer]:
    """Returns the answers to results that were recorded by one statement."""
    in_time = Acknowledgement(Disposition.RECORDED, ended["recorded_at"])
    if not ended["late"]:
        return [in_time] * len(submissions)
    keys = set(ended["late"])
    late = Acknowledgement(Disposition.RECORDED_LATE, ended["recorded_at"])
    return [late if submission.name.key in keys else in_time for submission in submissions]


def _speaks(submission: Submission) -> bool:
    """Whether a result tells of its target or exit."""
    return (
        submission.status is Status.BLOCKED
        or submission.exit_signal is not None
        or submission.retry_after_ms is not None
        or submission.crawl_delay_ms is not None
    )


def _settled(submission: Submission, row: asyncpg.Record | None, *, has_ended: bool) -> Answer | None:
    """Returns the answer to a result that changes nothing; None when it is to be kept."""
    name = submission.name
    refusal: DomainError | None = None
    if row is None:
        refusal = AllocationNotFound(name.key)
    elif row["lease_token"] != name.token:
        refusal = LeaseTokenMismatch(name.key)
    elif has_ended and row["recorded_at"] is not None:
        return Acknowledgement(_first_disposition(row), row["recorded_at"], repeated=True)
    elif has_ended and row["status"] == Status.RELEASED:
        refusal = LeaseLost(name.key, "released")
    return refusal


def _first_disposition(row: asyncpg.Record) -> Disposition:
    if row["was_kept"]:
        return Disposition.QUARANTINED
    return Disposition.RECORDED_LATE if row["late"] else Disposition.RECORDED


def _news(taken: Iterable[_Taken]) -> dict[str, News]:
    """Returns what the results say, by target."""
    news: dict[str, News] = {}
    for result in taken:
        submission, row = result.submission, result.row
        target = target_name(row["target"], row["slot_id"])
        heard = news.get(target)
        if heard is None:
            heard = news[target] = News(None if row["target"] else row["slot_id"])
        heard.results += 1
        if submission.status is Status.BLOCKED:
            heard.blocked += 1
        if submission.retry_after_ms:
            heard.retry_after_ms = max(heard.retry_after_ms or 0, submission.retry_after_ms)
        if submission.crawl_delay_ms is not None:
            heard.crawl_delay_ms = submission.crawl_delay_ms
        if row["is_probe"]:
            heard.probe_key = submission.name.key
            heard.probe_went_well = submission.went_well
    return news


def _faults(taken: Iterable[_Taken]) -> list[Fault]:
    """Returns what the results say of pooled exits; a late one too, since a run that hung until then says the most."""
    return [
        (result.row["exit_id"], result.row["target"], result.submission.exit_signal, result.submission.retry_after_ms)
        for result in taken
        if result.submission.exit_signal is not None and result.row["exit_id"] is not None
    ]


async def _record_late(
    connection: Connection,
    organization_id: UUID,
    late: Sequence[_Taken],
    room: dict[Day, int],
    answers: dict[UUID, Answer],
) -> None:
    """Records the results of expired allocations while their days, locked, have room; keeps the others apart."""
    moves: dict[Day, Counts] = {}
    readmitted: list[_Taken] = []
    quarantined: list[_Taken] = []
    for result in late:
        if room.get(result.day, 0) > 0:
            room[result.day] -= 1
            counts = moves.setdefault(result.day, Counts())
            counts.add(result.submission.status)
            counts.add(Status.EXPIRED, -1)
            readmitted.append(result)
        else:
            quarantined.append(result)
    if readmitted:
        await count_ends(connection, organization_id, moves)
        kept = [result.submission for result in readmitted]
        days = array(result.row["work_date"] for result in readmitted)
        at = await connection.fetchval(_SQL["readmit_late"], organization_id, *_arguments(kept), days)
        await _insert_products(connection, organization_id, at, kept)
        for result in readmitted:
            answers[result.submission.name.key] = Acknowledgement(Disposition.RECORDED_LATE, at)
    if quarantined:
        at = await connection.fetchval(
            _SQL["quarantine"],
            organization_id,
            [result.row["work_date"] for result in quarantined],
            [result.submission.name.key for result in quarantined],
            [result.row["slot_id"] for result in quarantined],
            [result.submission.client.client_id for result in quarantined],
            [_whole(result.submission) for result in quarantined],
        )
        for result in quarantined:
            answers[result.submission.name.key] = Acknowledgement(Disposition.QUARANTINED, at)


def _arguments(submissions: Sequence[Submission]) -> tuple[Any, ...]:
    """Returns the arguments of record_results from $2 on."""
    speakers: dict[ClientIdentity, int] = {}
    places = [speakers.setdefault(submission.client, len(speakers) + 1) for submission in submissions]
    return (
        ids([submission.name.key for submission in submissions]),
        ids([submission.name.token for submission in submissions]),
        array(int(submission.status) for submission in submissions),
        array(submission.execution_time_ms for submission in submissions),
        array(places),
        texts([submission.block_type for submission in submissions]),
        texts([json.dumps(s.applied_settings) if s.applied_settings else "" for s in submissions]),
        texts([submission.exit_ip for submission in submissions]),
        numbers([submission.retry_after_ms for submission in submissions]),
        texts([submission.error_message for submission in submissions]),
        numbers([submission.persona_used or None for submission in submissions]),
        numbers([len(submission.products) or None for submission in submissions]),
        numbers([submission.exit_signal for submission in submissions]),
        [client.client_id for client in speakers],
        [client.client_ip for client in speakers],
        [client.instance_number for client in speakers],
        [client.user_folder_number for client in speakers],
    )


async def _insert_products(
    connection: Connection, organization_id: UUID, at: datetime, submissions: Sequence[Submission]
) -> None:
    found = [
        (
            submission.name.key,
            position,
            product.product_id,
            product.title,
            product.url,
            product.rank,
            json.dumps(product.attributes),
        )
        for submission in submissions
        for position, product in enumerate(submission.products)
    ]
    if found:
        await connection.execute(_SQL["insert_products"], organization_id, at, *zip(*found, strict=True))


def _whole(submission: Submission) -> str:
    values = asdict(submission)
    # The token proves the lease and belongs into no report.
    del values["name"]
    return json.dumps(values, default=str)
