"""CheckOutService: translates and checks; the rest is below."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from muster.persona_store.v1 import checkout_pb2, checkout_pb2_grpc

from persona_store.check_out_store import CheckOutStore
from persona_store.check_outs import CheckOut, CheckOuts, Criteria, Mode, Order, UseOutcome
from persona_store.errors import CheckOutLost, NoPersonaMatches, PersonaCheckedOut, PersonaNotFound
from persona_store.messages import check_out_message, item_error
from persona_store.persona_servicer import check_tags
from services.call import current
from services.status import Context
from services.validate import Checks

_LONGEST_SECONDS = 86400.0
_LONGEST_COOL_DOWN_SECONDS = 365 * 86400.0


class CheckOutServicer(checkout_pb2_grpc.CheckOutServiceServicer):
    """Serves CheckOutService."""

    def __init__(self, check_outs: CheckOuts, leases: CheckOutStore) -> None:
        self._check_outs = check_outs
        self._leases = leases

    async def CheckOutPersonas(
        self, request: checkout_pb2.CheckOutPersonasRequest, context: Context
    ) -> checkout_pb2.CheckOutPersonasResponse:
        """Leases personas."""
        checks = Checks()
        checks.count("items", request.items, most=256)
        organization = current().principal.organization_id
        orders = [_order(checks, f"items[{i}]", organization, item) for i, item in enumerate(request.items[:256])]
        checks.done()
        answers = await asyncio.gather(*(self._check_outs.take(order) for order in orders), return_exceptions=True)
        return checkout_pb2.CheckOutPersonasResponse(results=[_result(answer) for answer in answers])

    async def RenewCheckOuts(
        self, request: checkout_pb2.RenewCheckOutsRequest, context: Context
    ) -> checkout_pb2.RenewCheckOutsResponse:
        """Renews check-outs."""
        checks = Checks()
        checks.count("items", request.items, most=1000)
        for i, item in enumerate(request.items[:1000]):
            checks.text(f"items[{i}].holder", item.holder, min_length=1, max_length=128)
            checks.token(f"items[{i}].lease_token", item.lease_token)
            _duration(checks, item, f"items[{i}].duration")
        checks.unique("items", (item.holder for item in request.items[:1000]))
        checks.done()
        renewed = await self._leases.renew(
            current().principal.organization_id,
            [
                (item.holder, item.lease_token, timedelta(microseconds=item.duration.ToMicroseconds()))
                for item in request.items
            ],
        )
        results = []
        for item in request.items:
            result = checkout_pb2.RenewCheckOutResult()
            if item.holder in renewed:
                result.expires_at.FromDatetime(renewed[item.holder])
            else:
                result.error.CopyFrom(item_error(CheckOutLost(holder=item.holder)))
            results.append(result)
        return checkout_pb2.RenewCheckOutsResponse(results=results)

    async def CheckInPersonas(
        self, request: checkout_pb2.CheckInPersonasRequest, context: Context
    ) -> checkout_pb2.CheckInPersonasResponse:
        """Ends check-outs."""
        checks = Checks()
        checks.count("items", request.items, most=1000)
        for i, item in enumerate(request.items[:1000]):
            checks.text(f"items[{i}].holder", item.holder, min_length=1, max_length=128)
            checks.choice(f"items[{i}].outcome", item.outcome, range(5), "NOT_USED, SUCCEEDED, FAILED, BLOCKED")
        checks.done()
        outcomes: dict[str, UseOutcome] = {}
        for item in request.items:
            # Of two for the same holder the second finds nothing to end.
            outcomes.setdefault(item.holder, UseOutcome(item.outcome or UseOutcome.NOT_USED))
        ended = await self._leases.end(current().principal.organization_id, outcomes)
        checked_in = []
        for item in request.items:
            checked_in.append(item.holder in ended)
            ended.discard(item.holder)
        return checkout_pb2.CheckInPersonasResponse(checked_in=checked_in)


def _order(checks: Checks, path: str, organization_id: UUID, item: checkout_pb2.CheckOutItem) -> Order:
    checks.text(f"{path}.holder", item.holder, min_length=1, max_length=128)
    mode = checks.choice(f"{path}.mode", item.mode or Mode.EXCLUSIVE, tuple(Mode), "EXCLUSIVE, READ_ONLY")
    seconds = _duration(checks, item, f"{path}.duration")
    selection: UUID | Criteria
    if item.WhichOneof("selection") == "criteria":
        selection = _criteria(checks, f"{path}.criteria", item.criteria)
    else:
        # Also when neither is set, which the check then says.
        selection = checks.uuid(f"{path}.persona_id", item.persona_id)
    return Order(
        organization_id,
        item.holder,
        selection,
        Mode(mode) if mode in tuple(Mode) else Mode.EXCLUSIVE,
        timedelta(seconds=seconds),
    )


def _criteria(checks: Checks, path: str, criteria: checkout_pb2.PersonaCriteria) -> Criteria:
    check_tags(checks, f"{path}.tags", criteria.tags)
    checks.text(f"{path}.region", criteria.region, max_length=64)
    checks.number(f"{path}.min_aging_level", criteria.min_aging_level, least=0, most=100)
    cool_down = checks.duration(
        criteria, "cool_down", least=0, most=_LONGEST_COOL_DOWN_SECONDS, path=f"{path}.cool_down"
    )
    return Criteria(
        tuple(sorted(set(criteria.tags))),
        criteria.region,
        criteria.min_aging_level,
        _span(cool_down or 0.0),
    )


def _duration(checks: Checks, item: checkout_pb2.CheckOutItem | checkout_pb2.RenewCheckOutItem, path: str) -> float:
    seconds = checks.duration(item, "duration", least=1, most=_LONGEST_SECONDS, required=True, path=path)
    return min(max(seconds or 0.0, 0.0), _LONGEST_SECONDS)


def _span(seconds: float) -> timedelta:
    # A wrong duration may be beyond what a timedelta holds; it is reported, not used.
    return timedelta(seconds=min(max(seconds, 0.0), _LONGEST_COOL_DOWN_SECONDS))


def _result(answer: CheckOut | BaseException) -> checkout_pb2.CheckOutResult:
    """Returns the answer to one item; what is wrong with the service itself is raised for the call."""
    if isinstance(answer, CheckOut):
        return checkout_pb2.CheckOutResult(check_out=check_out_message(answer))
    if isinstance(answer, PersonaNotFound | PersonaCheckedOut | NoPersonaMatches):
        return checkout_pb2.CheckOutResult(error=item_error(answer))
    raise answer
