"""The persona store over gRPC: the edge where its contract becomes the domain's words."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from muster.persona_store.v1 import checkout_pb2, checkout_pb2_grpc

from allocator.leases import PersonaUse
from allocator.packages import AssignedPersona
from allocator.personas import PersonaStoreUnavailable
from allocator.slots import PersonaNeed
from services.peers import Peer

_log = structlog.get_logger("allocator.personas")

# Long enough for a batch on a busy store, short enough that a caller with a usual deadline hears of it.
_SECONDS = 5.0
# The refusals that say that there is none; any other is a fault that a retry may mend.
_NONE_MATCHES = "NO_PERSONA_MATCHES"


class PersonaPeer:
    """Implements `allocator.personas.PersonaStore`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.configured = peer.configured
        self._stub = peer.stub(checkout_pb2_grpc.CheckOutServiceStub) if peer.configured else None

    async def check_out(
        self, organization_id: UUID, needs: Sequence[tuple[UUID, PersonaNeed]], duration_seconds: float
    ) -> list[AssignedPersona | None]:
        """Checks out a persona for each holder, or None where none matches.

        Raises:
            PersonaStoreUnavailable: it does not answer, or refuses.
        """
        duration = Duration()
        duration.FromNanoseconds(int(duration_seconds * 1e9))
        items = [
            checkout_pb2.CheckOutItem(
                holder=str(holder),
                criteria=checkout_pb2.PersonaCriteria(
                    tags=need.tags,
                    region=need.region,
                    min_aging_level=need.min_aging_level,
                    cool_down=Duration(seconds=need.cool_down_seconds),
                ),
                mode=checkout_pb2.CHECK_OUT_MODE_EXCLUSIVE,
                duration=duration,
            )
            for holder, need in needs
        ]
        if self._stub is None:
            raise PersonaStoreUnavailable
        try:
            response = await self._stub.CheckOutPersonas(
                checkout_pb2.CheckOutPersonasRequest(items=items),
                **self._peer.options(organization_id, at_most_seconds=_SECONDS),
            )
        except grpc.aio.AioRpcError as error:
            raise _unavailable("check-out", error) from error
        return [_assigned(result) for result in response.results]

    async def check_in(self, organization_id: UUID, uses: Sequence[tuple[UUID, PersonaUse]]) -> None:
        """Ends check-outs by holder. Safe to repeat.

        Raises:
            PersonaStoreUnavailable: it does not answer, or refuses.
        """
        if self._stub is None:
            raise PersonaStoreUnavailable
        # The numbers of the contract's UseOutcome are those of PersonaUse.
        items = [
            checkout_pb2.CheckInItem(holder=str(holder), outcome=checkout_pb2.UseOutcome.ValueType(use))
            for holder, use in uses
        ]
        try:
            await self._stub.CheckInPersonas(
                checkout_pb2.CheckInPersonasRequest(items=items),
                **self._peer.options(organization_id, at_most_seconds=_SECONDS),
            )
        except grpc.aio.AioRpcError as error:
            raise _unavailable("check-in", error) from error


def _assigned(result: checkout_pb2.CheckOutResult) -> AssignedPersona | None:
    if result.HasField("error"):
        if result.error.reason == _NONE_MATCHES:
            return None
        _log.warning("a check-out was refused", reason=result.error.reason, message=result.error.message)
        raise PersonaStoreUnavailable
    check_out = result.check_out
    return AssignedPersona(UUID(check_out.persona.persona_id), check_out.lease_token, check_out.persona.generation)


def _unavailable(what: str, error: grpc.aio.AioRpcError) -> PersonaStoreUnavailable:
    _log.warning("the persona store does not answer", call=what, code=error.code().name, details=error.details())
    return PersonaStoreUnavailable()
