"""The allocator: work, exits, leases, results. Owns the schema "allocator"."""

from __future__ import annotations

from typing import Any

from allocator import parts
from allocator.allocation import Allocation
from allocator.allocation_store import AllocationStore
from allocator.availability import Availability
from allocator.capacity import Capacity
from allocator.client_servicer import ClientServicer
from allocator.client_store import ClientStore
from allocator.clients import Clients, SilentClients
from allocator.config import AllocatorConfig
from allocator.lease_store import LeaseStore
from allocator.leases import Leases
from allocator.no_work_watch import WatchedExplanation
from allocator.organization_share import OrganizationShare
from allocator.outbox import Outbox
from allocator.partitions import Partitions
from allocator.persona_peer import PersonaPeer
from allocator.personas import Personas
from allocator.report_cache import ReportCache
from allocator.result_store import ResultStore
from allocator.results import Results
from allocator.slot_servicer import SlotServicer
from allocator.slot_store import SlotStore
from allocator.standing_store import StandingStore
from allocator.target_servicer import TargetServicer
from allocator.target_store import TargetStore
from allocator.targets import BackOff, Targets
from allocator.work_servicer import WorkServicer
from services.chassis import Chassis
from services.peers import Peer

CONFIG = AllocatorConfig

# A row that stays locked longer than this fails the batch that waits for it, instead of every caller's deadline.
_LOCK_TIMEOUT_MS = "5000"
# Tables swing between empty and millions of rows within minutes, and a plan outlives that: one that reads a table
# whole, since it was small when the plan was made, is never right. Every statement has its index.
# Checks and gauges that do read tables whole take one core each, so that the others are left to the work.
_SETTINGS = {
    "lock_timeout": _LOCK_TIMEOUT_MS,
    "enable_seqscan": "off",
    "max_parallel_workers_per_gather": "0",
}


async def bind(chassis: Chassis[Any], config: AllocatorConfig) -> None:
    """Builds the service and registers it."""
    database = await chassis.database(**_SETTINGS)
    partitions = Partitions(database)
    await partitions.ensure()
    peer = Peer(config.persona_store)
    chassis.on_close("persona_store", peer.close)
    personas_peer = PersonaPeer(peer)

    client_store = ClientStore(database, partitions)
    clients = Clients(client_store)
    allocations, lease_store = AllocationStore(database, partitions), LeaseStore(database, partitions)
    availability, reports = Availability(allocations), ReportCache()
    exits = parts.exits(chassis, config, database, partitions, lease_store, availability, clients)

    age, duration = config.leases.greatest_age_seconds, config.leases.duration_seconds
    personas = Personas(allocations, lease_store, availability, personas_peer, greatest_age_seconds=age)
    standing = StandingStore(database)
    explanation = WatchedExplanation(standing, personas, exits.external, database)
    allocation = Allocation(
        allocations,
        availability,
        explanation,
        exits.external,
        personas,
        clients,
        OrganizationShare(config.share.lanes, config.share.weights),
        duration_seconds=duration,
        greatest_age_seconds=age,
        draining=chassis.draining,
    )
    leases = Leases(
        lease_store, availability, clients, duration_seconds=duration, sweep_seconds=config.leases.sweep_seconds
    )
    back_off = BackOff(**config.back_off.model_dump())
    results = Results(ResultStore(database, partitions, back_off, exits.health), clients, availability, reports)
    targets = Targets(TargetStore(database, partitions), availability)
    acts = parts.acts(database, partitions, leases, availability, reports)
    chassis.on_close("availability", availability.close)
    chassis.on_close("personas", personas.close)
    chassis.on_close("allocation", allocation.close)
    chassis.on_close("results", results.close)

    parts.serve(
        chassis,
        work=WorkServicer(allocation, leases, results, clients, chassis.draining),
        slots=SlotServicer(
            SlotStore(database, partitions), availability, reports, clients, exit_providers=frozenset(exits.providers)
        ),
        exits=exits.servicer,
        targets=TargetServicer(targets, clients),
        clients=ClientServicer(client_store, clients, acts, availability),
        insight=parts.insight(database, partitions, explanation, allocation, clients, reports),
        admin=parts.admin(database, partitions, acts, clients),
    )
    loops: parts.Loops = {
        "sweep": leases.sweep_for_ever,
        "silent clients": SilentClients(client_store, leases).rounds_for_ever,
        "outbox": Outbox(database, personas_peer).deliver_for_ever,
        "gauges of targets": targets.measure_for_ever,
        "capacity": Capacity(standing, explanation).measure_for_ever,
        **exits.loops,
        **parts.upkeep_loops(database, partitions, allocations),
    }
    for name, loop in loops.items():
        chassis.run_loop(name, loop)
