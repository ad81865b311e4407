"""Clients as operators see them: the machines that work, and the processes on them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

from muster import values
from muster.allocator.v1 import admin_pb2, client_pb2, client_pb2_grpc
from muster.calls import Transport


@dataclass(frozen=True, slots=True)
class MachineInstance:
    """A process on a machine; online while it spoke within 10 minutes."""

    instance_number: int
    user_folder_number: int
    last_seen_at: datetime
    online: bool
    leases: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine; online while it spoke within 10 minutes."""

    client_id: str
    client_name: str
    client_ip: str
    online: bool
    draining: bool
    first_seen_at: datetime
    last_seen_at: datetime
    instances: tuple[MachineInstance, ...]
    leases: int


class Machines:
    """`client.machines`: the clients of the fleet. Role: operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> client_pb2_grpc.ClientServiceAsyncStub:
        return self._transport.stub(client_pb2_grpc.ClientServiceStub)

    async def list(self, *, online: bool | None = None, page_size: int = 100) -> AsyncIterator[Machine]:
        """Yields the organization's clients by id; None shows those that are online and those that are not.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = client_pb2.ListClientsRequest(page_size=page_size, online=online)
        async for answer in self._transport.pages(self._stub.ListClients, request):
            for item in answer.clients:
                yield _machine(item)

    async def set_draining(self, client_id: str, draining: bool) -> Machine:
        """Tells a client to finish what it holds and take nothing new, or to work again.

        It may still get work for a moment after this has returned: it has drained when it holds no leases 5 seconds or
        more after it was told to.

        Raises:
            NotFound: the organization has no such client.
            MusterError: it was refused, or did not succeed in time.
        """
        request = client_pb2.SetClientDrainingRequest(client_id=client_id, draining=draining)
        return _machine((await self._transport.call(self._stub.SetClientDraining, request)).client)

    async def declare_dead(
        self, client_id: str, instance_number: int, *, reason: str, dry_run: bool = False, request_id: str = ""
    ) -> int:
        """Frees the leases of an instance at once and returns how many they were.

        Args:
            client_id: The machine.
            instance_number: The process on it.
            reason: For the audit entry, 1 to 256 characters.
            dry_run: Answer only.
            request_id: To make it again after a lost answer, which might free what was leased since; empty makes a
                fresh one.

        Raises:
            NotFound: the organization has no such client, or the client no such instance.
            MusterError: it was refused, or did not succeed in time.
        """
        act = admin_pb2.Act(request_id=request_id or str(uuid.uuid4()), reason=reason, dry_run=dry_run)
        request = client_pb2.DeclareInstanceDeadRequest(client_id=client_id, instance_number=instance_number, act=act)
        return (await self._transport.call(self._stub.DeclareInstanceDead, request)).released_leases


def _machine(message: client_pb2.Client) -> Machine:
    return Machine(
        client_id=message.client_id,
        client_name=message.client_name,
        client_ip=message.client_ip,
        online=message.online,
        draining=message.draining,
        first_seen_at=values.required_moment(message, "first_seen_at"),
        last_seen_at=values.required_moment(message, "last_seen_at"),
        instances=tuple(
            MachineInstance(
                item.instance_number,
                item.user_folder_number,
                values.required_moment(item, "last_seen_at"),
                item.online,
                item.leases,
            )
            for item in message.instances
        ),
        leases=message.leases,
    )
