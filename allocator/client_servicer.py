"""ClientService: translates and validates; the store decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from muster.allocator.v1 import client_pb2, client_pb2_grpc

from allocator.clients import Client
from allocator.positions import text_position
from allocator.translation import act_of, deed_of, moment
from services import pages
from services.status import Context
from services.validate import Checks

if TYPE_CHECKING:
    from allocator.acts import Acts
    from allocator.availability import Availability
    from allocator.client_store import ClientStore
    from allocator.clients import Clients


class ClientServicer(client_pb2_grpc.ClientServiceServicer):
    """Administers clients."""

    def __init__(self, store: ClientStore, clients: Clients, acts: Acts, availability: Availability) -> None:
        self._store = store
        self._clients = clients
        self._acts = acts
        self._availability = availability

    async def ListClients(
        self, request: client_pb2.ListClientsRequest, context: Context
    ) -> client_pb2.ListClientsResponse:
        """Pages through clients."""
        checks = Checks()
        size = checks.page(request.page_size)
        checks.done()
        online = request.online if request.HasField("online") else None
        principal = await self._clients.caller()
        scope = f"ListClients {principal.organization_id} {online}"
        after = text_position(pages.decode(request.page_token, scope))
        clients = await self._store.page(principal.organization_id, after, size, online=online)
        token = pages.encode([clients[-1].client_id], scope) if len(clients) == size else ""
        return client_pb2.ListClientsResponse(clients=[_message(client) for client in clients], next_page_token=token)

    async def SetClientDraining(
        self, request: client_pb2.SetClientDrainingRequest, context: Context
    ) -> client_pb2.SetClientDrainingResponse:
        """Tells a client to drain, or to work again."""
        checks = Checks()
        client_id = checks.identifier("client_id", request.client_id)
        checks.done()
        principal = await self._clients.caller()
        client = await self._store.set_draining(
            principal.organization_id, client_id, request.draining, deed_of(principal, "SetClientDraining", request)
        )
        self._availability.outdate(principal.organization_id)
        return client_pb2.SetClientDrainingResponse(client=_message(client))

    async def DeclareInstanceDead(
        self, request: client_pb2.DeclareInstanceDeadRequest, context: Context
    ) -> client_pb2.DeclareInstanceDeadResponse:
        """Frees the leases of an instance."""
        checks = Checks()
        principal = await self._clients.caller()
        act = act_of(checks, request, principal, "DeclareInstanceDead")
        client_id = checks.identifier("client_id", request.client_id)
        number = checks.number("instance_number", request.instance_number, least=0, most=65535)
        checks.done()
        ended = await self._acts.declare_dead(principal.organization_id, act, client_id, number)
        self._clients.forget(principal.organization_id, client_id, number)
        return client_pb2.DeclareInstanceDeadResponse(released_leases=ended)


def _message(client: Client) -> client_pb2.Client:
    return client_pb2.Client(
        client_id=client.client_id,
        client_name=client.client_name,
        client_ip=client.client_ip,
        online=client.online,
        draining=client.draining,
        first_seen_at=moment(client.first_seen_at),
        last_seen_at=moment(client.last_seen_at),
        instances=[
            client_pb2.ClientInstance(
                instance_number=instance.instance_number,
                user_folder_number=instance.user_folder_number,
                last_seen_at=moment(instance.last_seen_at),
                online=instance.online,
                leases=instance.leases,
            )
            for instance in client.instances
        ],
        leases=client.leases,
    )
