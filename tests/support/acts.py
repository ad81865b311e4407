"""Operators' and administrators' calls on an allocator under test."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import admin_pb2, admin_pb2_grpc, client_pb2, client_pb2_grpc, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, Metadata


def act(*, dry_run: bool = False, reason: str = "a test", request_id: str | None = None) -> admin_pb2.Act:
    """What every act has, under a fresh request id unless one is given."""
    return admin_pb2.Act(request_id=request_id or str(uuid.uuid4()), reason=reason, dry_run=dry_run)


@dataclass(slots=True)
class Office:
    """Those who administer an allocator."""

    allocator: Allocator
    clients: client_pb2_grpc.ClientServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub
    administrator: Metadata

    @classmethod
    async def of(cls, allocator: Allocator, organization: str = "acme") -> Office:
        """Opens the office of an organization."""
        channel = allocator.service.channel
        return cls(
            allocator,
            client_pb2_grpc.ClientServiceStub(channel),
            admin_pb2_grpc.AdminServiceStub(channel),
            await allocator.service.metadata(Role.ADMIN, organization),
        )

    async def list_clients(self, **values: Any) -> client_pb2.ListClientsResponse:
        """Lists clients."""
        return await self.clients.ListClients(client_pb2.ListClientsRequest(**values), metadata=self.allocator.operator)

    async def drain(self, client_id: str, draining: bool = True) -> client_pb2.Client:
        """Tells a client to drain, or to work again."""
        request = client_pb2.SetClientDrainingRequest(client_id=client_id, draining=draining)
        return (await self.clients.SetClientDraining(request, metadata=self.allocator.operator)).client

    async def declare_dead(self, the_act: admin_pb2.Act, client_id: str, number: int = 0) -> int:
        """Declares an instance dead; returns how many leases were freed."""
        request = client_pb2.DeclareInstanceDeadRequest(act=the_act, client_id=client_id, instance_number=number)
        return (await self.clients.DeclareInstanceDead(request, metadata=self.allocator.operator)).released_leases

    async def revoke(self, the_act: admin_pb2.Act, *keys: str) -> list[str]:
        """Revokes leases; returns the reason of each refusal, '' for none."""
        request = admin_pb2.RevokeLeasesRequest(act=the_act, allocation_keys=keys)
        response = await self.admin.RevokeLeases(request, metadata=self.administrator)
        assert [item.allocation_key for item in response.leases] == list(keys)
        return [item.error.reason for item in response.leases]

    async def release_by_age(
        self, the_act: admin_pb2.Act, seconds: int, **values: Any
    ) -> admin_pb2.ReleaseByAgeResponse:
        """Releases leases by age."""
        request = admin_pb2.ReleaseByAgeRequest(act=the_act, older_than=Duration(seconds=seconds), **values)
        return await self.admin.ReleaseByAge(request, metadata=self.administrator)

    async def reopen(self, the_act: admin_pb2.Act, slot_id: str, **values: Any) -> admin_pb2.ReopenQuotaResponse:
        """Reopens a day's quota."""
        request = admin_pb2.ReopenQuotaRequest(act=the_act, slot_id=slot_id, **values)
        return await self.admin.ReopenQuota(request, metadata=self.administrator)

    async def quarantined(self, **values: Any) -> admin_pb2.ListQuarantinedResultsResponse:
        """Lists what is in quarantine."""
        return await self.admin.ListQuarantinedResults(
            admin_pb2.ListQuarantinedResultsRequest(**values), metadata=self.administrator
        )

    async def accept(self, the_act: admin_pb2.Act, *keys: str) -> list[str]:
        """Accepts results in quarantine; returns the reason of each refusal, '' for none."""
        request = admin_pb2.AcceptQuarantinedResultsRequest(act=the_act, allocation_keys=keys)
        response = await self.admin.AcceptQuarantinedResults(request, metadata=self.administrator)
        return [item.error.reason for item in response.results]

    async def discard(self, the_act: admin_pb2.Act, *keys: str) -> list[str]:
        """Discards results in quarantine; returns the reason of each refusal, '' for none."""
        request = admin_pb2.DiscardQuarantinedResultsRequest(act=the_act, allocation_keys=keys)
        response = await self.admin.DiscardQuarantinedResults(request, metadata=self.administrator)
        return [item.error.reason for item in response.results]

    async def entries(self, **values: Any) -> list[admin_pb2.AuditEntry]:
        """Lists audit entries."""
        response = await self.admin.ListAuditEntries(
            admin_pb2.ListAuditEntriesRequest(**values), metadata=self.administrator
        )
        return list(response.entries)


def identity(client_id: str, number: int = 0, **values: Any) -> work_pb2.ClientIdentity:
    """A client and an instance on it."""
    return work_pb2.ClientIdentity(client_id=client_id, instance_number=number, **values)
