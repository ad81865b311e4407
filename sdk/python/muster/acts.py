"""What operators do to leases, days and results by hand. Every act can be tried, and leaves an audit entry."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from muster import values
from muster.allocator.v1 import admin_pb2, admin_pb2_grpc
from muster.calls import Transport, item_error
from muster.errors import MusterError
from muster.results import WorkOutcome


@dataclass(frozen=True, slots=True)
class ActedItem:
    """The answer to one item of an act: `error` is None when it was done, or would be."""

    allocation_key: str
    error: MusterError | None


@dataclass(frozen=True, slots=True)
class ReleasedByAge:
    """Leases that were released or would be, up to 100 of their keys, and how many more match."""

    released: int
    example_keys: tuple[str, ...]
    remaining: int


@dataclass(frozen=True, slots=True)
class ReopenedQuota:
    """A day's quota before and now, and the units that the day can hand out by then."""

    quota_before: int
    quota: int
    room: int


@dataclass(frozen=True, slots=True)
class QuarantinedResult:
    """A result that came after its unit was handed out again; `result_json` is what was submitted."""

    allocation_key: str
    slot_id: str
    work_date: str
    client_id: str
    quarantined_at: datetime
    outcome: WorkOutcome
    product_count: int
    result_json: str


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One act: when, by which key, what, to what and why; the digests chain the entries."""

    entry_id: str
    at: datetime
    actor: str
    action: str
    resource: str
    reason: str
    payload_sha256: bytes
    entry_sha256: bytes


class Acts:
    """`client.acts`: what is otherwise left to workers and the clock. Role: admin.

    Every act has a `reason` for the audit entry, and with `dry_run` answers as it would and changes nothing. Its
    `request_id`, a UUID, is for an act whose answer was lost: made again within 24 hours with the same one and the same
    arguments, it is done once and answered as the first time. Empty makes a fresh one.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return self._transport.stub(admin_pb2_grpc.AdminServiceStub)

    async def revoke_leases(
        self, allocation_keys: Sequence[str], *, reason: str, dry_run: bool = False, request_id: str = ""
    ) -> tuple[ActedItem, ...]:
        """Ends 1 to 1000 leases without their holders; each is answered for itself, in order.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        act = _act(reason, dry_run, request_id)
        request = admin_pb2.RevokeLeasesRequest(act=act, allocation_keys=allocation_keys)
        return _acted((await self._transport.call(self._stub.RevokeLeases, request)).leases)

    async def release_by_age(
        self,
        older_than: timedelta,
        *,
        slot_id: str = "",
        client_id: str = "",
        at_most: int = 0,
        reason: str,
        dry_run: bool = False,
        request_id: str = "",
    ) -> ReleasedByAge:
        """Revokes live leases that were granted longer ago than an age, the oldest first.

        Args:
            older_than: The age, up to 24 h.
            slot_id: Only of this slot; empty for any.
            client_id: Only of this client; empty for any.
            at_most: The most to release, up to 10,000; 0 means 1000.
            reason: For the audit entry, 1 to 256 characters.
            dry_run: Answer only.
            request_id: To make it again after a lost answer.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = admin_pb2.ReleaseByAgeRequest(
            act=_act(reason, dry_run, request_id),
            older_than=values.duration(older_than),
            slot_id=slot_id,
            client_id=client_id,
            at_most=at_most,
        )
        answer = await self._transport.call(self._stub.ReleaseByAge, request)
        return ReleasedByAge(answer.released, tuple(answer.example_keys), answer.remaining)

    async def reopen_quota(
        self,
        slot_id: str,
        *,
        work_date: date | None = None,
        units: int = 0,
        reason: str,
        dry_run: bool = False,
        request_id: str = "",
    ) -> ReopenedQuota:
        """Lets a slot's day hand out more units.

        Args:
            slot_id: Which.
            work_date: Today or later; None for today.
            units: How many more; 0 for as many as failed or were blocked on that day.
            reason: For the audit entry, 1 to 256 characters.
            dry_run: Answer only.
            request_id: To make it again after a lost answer, which would let the day grow twice.

        Raises:
            NotFound: there is no such slot, or it has no counters on that day.
            MusterError: it was refused, or did not succeed in time.
        """
        request = admin_pb2.ReopenQuotaRequest(
            act=_act(reason, dry_run, request_id),
            slot_id=slot_id,
            work_date=work_date.isoformat() if work_date else "",
            units=units,
        )
        answer = await self._transport.call(self._stub.ReopenQuota, request)
        return ReopenedQuota(answer.quota_before, answer.quota, answer.room)

    async def quarantined_results(self, *, slot_id: str = "", page_size: int = 100) -> AsyncIterator[QuarantinedResult]:
        """Yields the results that wait for a decision, the oldest first; empty for those of any slot.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = admin_pb2.ListQuarantinedResultsRequest(page_size=page_size, slot_id=slot_id)
        async for answer in self._transport.pages(self._stub.ListQuarantinedResults, request):
            for item in answer.results:
                yield QuarantinedResult(
                    item.allocation_key,
                    item.slot_id,
                    item.work_date,
                    item.client_id,
                    values.required_moment(item, "quarantined_at"),
                    values.member(WorkOutcome, item.outcome),
                    item.product_count,
                    item.result_json,
                )

    async def accept_quarantined(
        self, allocation_keys: Sequence[str], *, reason: str, dry_run: bool = False, request_id: str = ""
    ) -> tuple[ActedItem, ...]:
        """Records 1 to 256 results after all, as late; each is answered for itself, in order.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        act = _act(reason, dry_run, request_id)
        request = admin_pb2.AcceptQuarantinedResultsRequest(act=act, allocation_keys=allocation_keys)
        return _acted((await self._transport.call(self._stub.AcceptQuarantinedResults, request)).results)

    async def discard_quarantined(
        self, allocation_keys: Sequence[str], *, reason: str, dry_run: bool = False, request_id: str = ""
    ) -> tuple[ActedItem, ...]:
        """Gives 1 to 256 results up; each is answered for itself, in order.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        act = _act(reason, dry_run, request_id)
        request = admin_pb2.DiscardQuarantinedResultsRequest(act=act, allocation_keys=allocation_keys)
        return _acted((await self._transport.call(self._stub.DiscardQuarantinedResults, request)).results)

    async def audit(self, *, action: str = "", page_size: int = 100) -> AsyncIterator[AuditEntry]:
        """Yields what was done, newest first; empty for any action.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = admin_pb2.ListAuditEntriesRequest(page_size=page_size, action=action)
        async for answer in self._transport.pages(self._stub.ListAuditEntries, request):
            for item in answer.entries:
                yield AuditEntry(
                    item.entry_id,
                    values.required_moment(item, "at"),
                    item.actor,
                    item.action,
                    item.resource,
                    item.reason,
                    item.payload_sha256,
                    item.entry_sha256,
                )


def _act(reason: str, dry_run: bool, request_id: str) -> admin_pb2.Act:
    return admin_pb2.Act(request_id=request_id or str(uuid.uuid4()), reason=reason, dry_run=dry_run)


def _acted(items: Iterable[admin_pb2.ItemAnswer]) -> tuple[ActedItem, ...]:
    return tuple(
        ActedItem(item.allocation_key, item_error(item.error) if item.HasField("error") else None) for item in items
    )
