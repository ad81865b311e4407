"""Lease renewal over the allocator's contract."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import grpc
from muster.allocator.v1 import work_pb2, work_pb2_grpc

from services.peers import Peer
from session_tracker.leases import AllocatorUnavailable
from session_tracker.sessions import Lease

_CALL_SECONDS = 10.0
# Refusals after which a lease cannot come back. Another one, also that it is at its greatest age, leaves it alive until
# it runs out: it is asked for again.
_LOST = frozenset({"LEASE_LOST", "LEASE_TOKEN_MISMATCH", "ALLOCATION_NOT_FOUND"})


class AllocatorLeases:
    """A `LeaseRenewer` that calls the allocator, for the organization of the sessions."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._work = peer.stub(work_pb2_grpc.WorkServiceStub)

    async def renew(self, organization_id: UUID, leases: Sequence[Lease]) -> list[str | None]:
        """See `LeaseRenewer.renew`."""
        request = work_pb2.RenewLeasesRequest(
            leases=[
                work_pb2.Lease(allocation_key=lease.allocation_key, lease_token=lease.lease_token) for lease in leases
            ]
        )
        try:
            response = await self._work.RenewLeases(
                request, **self._peer.options(organization_id, at_most_seconds=_CALL_SECONDS)
            )
        except grpc.aio.AioRpcError as error:
            raise AllocatorUnavailable(f"{error.code().name}: {error.details()}") from error
        if len(response.leases) != len(leases):
            raise AllocatorUnavailable(f"{len(response.leases)} answers to {len(leases)} leases")
        return [
            f"{answer.error.reason}: {answer.error.message}"
            if answer.WhichOneof("result") == "error" and answer.error.reason in _LOST
            else None
            for answer in response.leases
        ]
