"""AdminService: translates and validates; the acts decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from muster.allocator.v1 import admin_pb2, admin_pb2_grpc, work_pb2

from allocator.acts import Acts, Items
from allocator.positions import time_position, uuid_position
from allocator.translation import act_of, day_text, moment
from services import pages
from services.status import Context, code_number
from services.validate import Checks

if TYPE_CHECKING:
    from allocator.audit_store import AuditStore
    from allocator.clients import Clients
    from allocator.quarantine_store import QuarantineStore

_MOST_LEASES = 1000
_MOST_RESULTS = 256
_MOST_BY_AGE = 10_000
_MOST_UNITS = 1_000_000
_DAY_SECONDS = 86400.0


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """What operators do by hand."""

    def __init__(self, acts: Acts, quarantine: QuarantineStore, audit: AuditStore, clients: Clients) -> None:
        self._acts = acts
        self._quarantine = quarantine
        self._audit = audit
        self._clients = clients

    async def RevokeLeases(
        self, request: admin_pb2.RevokeLeasesRequest, context: Context
    ) -> admin_pb2.RevokeLeasesResponse:
        """Ends leases without their holders."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "RevokeLeases")
        keys = _keys(checks, request.allocation_keys, _MOST_LEASES)
        checks.done()
        items = await self._acts.revoke_leases(principal.organization_id, act, keys)
        return admin_pb2.RevokeLeasesResponse(leases=_answers(keys, items))

    async def ReleaseByAge(
        self, request: admin_pb2.ReleaseByAgeRequest, context: Context
    ) -> admin_pb2.ReleaseByAgeResponse:
        """Revokes leases that were granted long ago."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "ReleaseByAge")
        older_than = checks.duration(request, "older_than", least=0, most=_DAY_SECONDS, required=True)
        slot_id = checks.uuid("slot_id", request.slot_id) if request.slot_id else None
        client_id = checks.identifier("client_id", request.client_id, required=False) or None
        at_most = checks.number("at_most", request.at_most or 1000, least=1, most=_MOST_BY_AGE)
        checks.done()
        released = await self._acts.release_by_age(
            principal.organization_id,
            act,
            older_than_seconds=older_than or 0.0,
            slot_id=slot_id,
            client_id=client_id,
            at_most=at_most,
        )
        return admin_pb2.ReleaseByAgeResponse(
            released=released.released,
            example_keys=[str(key) for key in released.example_keys],
            remaining=released.remaining,
        )

    async def ReopenQuota(
        self, request: admin_pb2.ReopenQuotaRequest, context: Context
    ) -> admin_pb2.ReopenQuotaResponse:
        """Lets a slot's day hand out more units."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "ReopenQuota")
        slot_id = checks.uuid("slot_id", request.slot_id)
        day = checks.day("work_date", request.work_date, required=False)
        units = checks.number("units", request.units, least=0, most=_MOST_UNITS)
        checks.done()
        reopened = await self._acts.reopen_quota(principal.organization_id, act, slot_id, day, units)
        return admin_pb2.ReopenQuotaResponse(
            quota_before=reopened.quota_before, quota=reopened.quota, room=max(0, reopened.room)
        )

    async def ListQuarantinedResults(
        self, request: admin_pb2.ListQuarantinedResultsRequest, context: Context
    ) -> admin_pb2.ListQuarantinedResultsResponse:
        """Pages through results in quarantine."""
        checks = Checks()
        size = checks.page(request.page_size)
        slot_id = checks.uuid("slot_id", request.slot_id) if request.slot_id else None
        checks.done()
        principal = await self._clients.caller()
        scope = f"ListQuarantinedResults {principal.organization_id} {slot_id}"
        after = uuid_position(pages.decode(request.page_token, scope))
        results = await self._quarantine.page(principal.organization_id, slot_id, after, size)
        token = pages.encode([str(results[-1].allocation_key)], scope) if len(results) == size else ""
        return admin_pb2.ListQuarantinedResultsResponse(
            results=[
                admin_pb2.QuarantinedResult(
                    allocation_key=str(result.allocation_key),
                    slot_id=str(result.slot_id),
                    work_date=day_text(result.work_date),
                    client_id=result.client_id,
                    quarantined_at=moment(result.quarantined_at),
                    outcome=work_pb2.WorkOutcome.ValueType(result.status - 1),
                    product_count=result.products,
                    result_json=result.result,
                )
                for result in results
            ],
            next_page_token=token,
        )

    async def AcceptQuarantinedResults(
        self, request: admin_pb2.AcceptQuarantinedResultsRequest, context: Context
    ) -> admin_pb2.AcceptQuarantinedResultsResponse:
        """Records results that came too late to count."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "AcceptQuarantinedResults")
        keys = _keys(checks, request.allocation_keys, _MOST_RESULTS)
        checks.done()
        items = await self._acts.accept_quarantined(principal.organization_id, act, keys)
        return admin_pb2.AcceptQuarantinedResultsResponse(results=_answers(keys, items))

    async def DiscardQuarantinedResults(
        self, request: admin_pb2.DiscardQuarantinedResultsRequest, context: Context
    ) -> admin_pb2.DiscardQuarantinedResultsResponse:
        """Gives results up that came too late to count."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "DiscardQuarantinedResults")
        keys = _keys(checks, request.allocation_keys, _MOST_RESULTS)
        checks.done()
        items = await self._acts.discard_quarantined(principal.organization_id, act, keys)
        return admin_pb2.DiscardQuarantinedResultsResponse(results=_answers(keys, items))

    async def ListAuditEntries(
        self, request: admin_pb2.ListAuditEntriesRequest, context: Context
    ) -> admin_pb2.ListAuditEntriesResponse:
        """Pages through what was done."""
        checks = Checks()
        size = checks.page(request.page_size)
        action = checks.text("action", request.action, max_length=64)
        checks.done()
        principal = await self._clients.caller()
        scope = f"ListAuditEntries {principal.organization_id} {action}"
        before = time_position(pages.decode(request.page_token, scope))
        entries = await self._audit.page(principal.organization_id, action or None, before, size)
        token = ""
        if len(entries) == size:
            token = pages.encode([entries[-1].at.isoformat(), str(entries[-1].entry_id)], scope)
        return admin_pb2.ListAuditEntriesResponse(
            entries=[
                admin_pb2.AuditEntry(
                    entry_id=str(entry.entry_id),
                    at=moment(entry.at),
                    actor=entry.actor,
                    action=entry.action,
                    resource=entry.resource,
                    reason=entry.reason,
                    payload_sha256=entry.payload_sha256,
                    entry_sha256=entry.entry_sha256,
                )
                for entry in entries
            ],
            next_page_token=token,
        )


def _keys(checks: Checks, texts: Sequence[str], most: int) -> list[UUID]:
    checks.count("allocation_keys", texts, least=1, most=most)
    keys = [checks.uuid(f"allocation_keys[{number}]", text) for number, text in enumerate(texts[:most])]
    # By value, since a UUID may be written in capitals; those that are wrong already were said to be.
    checks.unique("allocation_keys", (str(key) for key in keys if key.int))
    return keys


def _answers(keys: Sequence[UUID], items: Items) -> list[admin_pb2.ItemAnswer]:
    answers = []
    for key in keys:
        answer = admin_pb2.ItemAnswer(allocation_key=str(key))
        if (refusal := items.refused.get(key)) is not None:
            answer.error.CopyFrom(
                work_pb2.ItemError(
                    code=code_number(refusal.reason),
                    reason=refusal.reason,
                    message=refusal.message,
                    metadata=refusal.metadata,
                )
            )
        answers.append(answer)
    return answers
