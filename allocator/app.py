"""The allocator: work, exits, leases, results. Owns the schema "allocator"."""

from __future__ import annotations

from typing import Any

from muster.allocator.v1 import (
    exit_pb2,
    exit_pb2_grpc,
    insight_pb2,
    insight_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
    work_pb2,
    work_pb2_grpc,
)

from allocator.allocation import Allocation
from allocator.allocation_store import AllocationStore
from allocator.availability import Availability
from allocator.clients import Clients
from allocator.config import AllocatorConfig
from allocator.exit_servicer import ExitServicer
from allocator.exit_store import ExitStore
from allocator.explanation import Explanation
from allocator.insight_servicer import InsightServicer
from allocator.insight_store import InsightStore
from allocator.lease_store import LeaseStore
from allocator.leases import Leases
from allocator.outbox import Outbox
from allocator.partitions import Partitions
from allocator.persona_peer import PersonaPeer
from allocator.personas import Personas
from allocator.result_store import ResultStore
from allocator.results import Results
from allocator.slot_servicer import SlotServicer
from allocator.slot_store import SlotStore
from allocator.upkeep import Upkeep
from allocator.work_servicer import WorkServicer
from services.call import Role
from services.chassis import Chassis
from services.peers import Peer

CONFIG = AllocatorConfig

# A row that stays locked longer than this fails the batch that waits for it, instead of every caller's deadline.
_LOCK_TIMEOUT_MS = "5000"


async def bind(chassis: Chassis[Any], config: AllocatorConfig) -> None:
    """Builds the service and registers it."""
    database = await chassis.database(lock_timeout=_LOCK_TIMEOUT_MS)
    partitions = Partitions(database)
    await partitions.ensure()
    peer = Peer(config.persona_store)
    chassis.on_close("persona_store", peer.close)
    personas_peer = PersonaPeer(peer)

    clients = Clients(database)
    allocations, leases_store = AllocationStore(database, partitions), LeaseStore(database, partitions)
    insight = InsightStore(database)
    availability, explanation = Availability(allocations), Explanation(insight)
    age, duration = config.leases.greatest_age_seconds, config.leases.duration_seconds
    personas = Personas(allocations, leases_store, availability, personas_peer, greatest_age_seconds=age)
    allocation = Allocation(
        allocations,
        availability,
        explanation,
        personas,
        clients,
        duration_seconds=duration,
        greatest_age_seconds=age,
        draining=chassis.draining,
    )
    leases = Leases(leases_store, availability, duration_seconds=duration, sweep_seconds=config.leases.sweep_seconds)
    results = Results(ResultStore(database, partitions), clients)
    for name, part in (("personas", personas), ("allocation", allocation), ("results", results)):
        chassis.on_close(name, part.close)

    work = WorkServicer(allocation, leases, results, clients, chassis.draining)
    slots = SlotServicer(SlotStore(database, partitions), availability, clients)
    exits = ExitServicer(ExitStore(database, partitions), availability, clients, limit=config.exits.limit)
    insights = InsightServicer(insight, explanation, clients)
    for module, name, grpc_module, servicer, role in (
        (work_pb2, "WorkService", work_pb2_grpc, work, Role.WORKER),
        (slot_pb2, "SlotService", slot_pb2_grpc, slots, Role.OPERATOR),
        (exit_pb2, "ExitService", exit_pb2_grpc, exits, Role.OPERATOR),
        (insight_pb2, "InsightService", insight_pb2_grpc, insights, Role.OPERATOR),
    ):
        add = getattr(grpc_module, f"add_{name}Servicer_to_server")
        chassis.add(add, servicer, module.DESCRIPTOR.services_by_name[name], role)

    outbox, upkeep = Outbox(database, personas_peer), Upkeep(database, allocations, partitions)
    chassis.run_loop("sweep", leases.sweep_for_ever)
    chassis.run_loop("outbox", outbox.deliver_for_ever)
    chassis.run_loop("upkeep", upkeep.rounds_for_ever)
    chassis.run_loop("gauges", upkeep.measure_for_ever)
