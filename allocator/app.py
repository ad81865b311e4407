"""The allocator: work, exits, leases, results. Owns the schema "allocator"."""

from __future__ import annotations

from typing import Any

from muster.allocator.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    client_pb2,
    client_pb2_grpc,
    exit_pb2,
    exit_pb2_grpc,
    insight_pb2,
    insight_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
    work_pb2,
    work_pb2_grpc,
)

from allocator.act_store import ActStore
from allocator.acts import Acts
from allocator.admin_servicer import AdminServicer
from allocator.allocation import Allocation
from allocator.allocation_store import AllocationStore
from allocator.audit_store import AuditStore
from allocator.availability import Availability
from allocator.capacity import Capacity
from allocator.client_servicer import ClientServicer
from allocator.client_store import ClientStore
from allocator.clients import Clients, SilentClients
from allocator.config import AllocatorConfig
from allocator.exit_forecast import ExitForecast
from allocator.exit_health import ExitHealth
from allocator.exit_provider_http import HttpExitProvider
from allocator.exit_providers import Circuit, GuardedProvider
from allocator.exit_releases import ExitReleases
from allocator.exit_servicer import ExitServicer
from allocator.exit_store import ExitStore
from allocator.external_exit_store import ExternalExitStore
from allocator.external_exits import ExternalExits
from allocator.gauges import Gauges
from allocator.insight_servicer import InsightServicer
from allocator.insight_store import InsightStore
from allocator.invariants import Invariants
from allocator.lease_store import LeaseStore
from allocator.leases import Leases
from allocator.no_work_watch import WatchedExplanation
from allocator.organization_share import OrganizationShare
from allocator.outbox import Outbox
from allocator.partitions import Partitions
from allocator.persona_peer import PersonaPeer
from allocator.personas import Personas
from allocator.quarantine_store import QuarantineStore
from allocator.report_cache import ReportCache
from allocator.report_store import ReportStore
from allocator.reports import Reports
from allocator.result_store import ResultStore
from allocator.results import Results
from allocator.slot_servicer import SlotServicer
from allocator.slot_store import SlotStore
from allocator.standing_store import StandingStore
from allocator.target_servicer import TargetServicer
from allocator.target_store import TargetStore
from allocator.targets import BackOff, Targets
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

    client_store = ClientStore(database, partitions)
    clients = Clients(client_store)
    allocations, leases_store = AllocationStore(database, partitions), LeaseStore(database, partitions)
    insight = InsightStore(database)
    availability = Availability(allocations)
    reports = ReportCache()
    providers: dict[str, GuardedProvider] = {}
    for provider_name, provider in config.exit_providers.items():
        circuit = Circuit(config.external_exits.pause_seconds)
        providers[provider_name] = GuardedProvider(provider_name, HttpExitProvider(provider), circuit)
        chassis.on_close(f"exit provider {provider_name}", providers[provider_name].close)
    external_store = ExternalExitStore(database, partitions)
    releases = ExitReleases(
        providers,
        external_store,
        reconcile_seconds=config.external_exits.reconcile_seconds,
        grace_seconds=config.external_exits.grace_seconds,
    )
    forecast = ExitForecast(database, sample_seconds=config.exits.sample_seconds)
    age, duration = config.leases.greatest_age_seconds, config.leases.duration_seconds
    personas = Personas(allocations, leases_store, availability, personas_peer, greatest_age_seconds=age)
    external_exits = ExternalExits(providers, external_store, leases_store, availability, greatest_age_seconds=age)
    standing = StandingStore(database)
    explanation = WatchedExplanation(standing, personas, external_exits, database)
    allocation = Allocation(
        allocations,
        availability,
        explanation,
        external_exits,
        personas,
        clients,
        OrganizationShare(config.share.lanes, config.share.weights),
        duration_seconds=duration,
        greatest_age_seconds=age,
        draining=chassis.draining,
    )
    leases = Leases(
        leases_store, availability, clients, duration_seconds=duration, sweep_seconds=config.leases.sweep_seconds
    )
    health = ExitHealth(database, partitions, config.cool_down)
    back_off = BackOff(**config.back_off.model_dump())
    results = Results(ResultStore(database, partitions, back_off, health), clients, availability, reports)
    for name, part in (
        ("availability", availability),
        ("personas", personas),
        ("allocation", allocation),
        ("results", results),
    ):
        chassis.on_close(name, part.close)

    work = WorkServicer(allocation, leases, results, clients, chassis.draining)
    slots = SlotServicer(
        SlotStore(database, partitions), availability, reports, clients, exit_providers=frozenset(providers)
    )
    exits = ExitServicer(
        ExitStore(database, partitions),
        health,
        forecast,
        providers,
        releases,
        availability,
        clients,
        limit=config.exits.limit,
    )
    quarantine = QuarantineStore(database)
    acts = Acts(ActStore(database, partitions, quarantine), leases, availability, reports)
    audit = AuditStore(database, partitions)
    admin = AdminServicer(acts, quarantine, audit, clients)
    machines = ClientServicer(client_store, clients, leases, availability)
    targets = Targets(TargetStore(database, partitions), availability)
    insights = InsightServicer(
        insight, Reports(ReportStore(database), insight, explanation, reports), explanation, allocation, clients
    )
    for module, name, grpc_module, servicer, role in (
        (work_pb2, "WorkService", work_pb2_grpc, work, Role.WORKER),
        (slot_pb2, "SlotService", slot_pb2_grpc, slots, Role.OPERATOR),
        (exit_pb2, "ExitService", exit_pb2_grpc, exits, Role.OPERATOR),
        (admin_pb2, "AdminService", admin_pb2_grpc, admin, Role.ADMIN),
        (client_pb2, "ClientService", client_pb2_grpc, machines, Role.OPERATOR),
        (target_pb2, "TargetService", target_pb2_grpc, TargetServicer(targets, clients), Role.OPERATOR),
        (insight_pb2, "InsightService", insight_pb2_grpc, insights, Role.OPERATOR),
    ):
        add = getattr(grpc_module, f"add_{name}Servicer_to_server")
        chassis.add(add, servicer, module.DESCRIPTOR.services_by_name[name], role)

    outbox, upkeep = Outbox(database, personas_peer), Upkeep(database, allocations, partitions)
    chassis.run_loop("sweep", leases.sweep_for_ever)
    chassis.run_loop("silent clients", SilentClients(client_store, leases).rounds_for_ever)
    chassis.run_loop("outbox", outbox.deliver_for_ever)
    chassis.run_loop("exit releases", releases.deliver_for_ever)
    chassis.run_loop("exit reconciliation", releases.reconcile_for_ever)
    chassis.run_loop("exit health", health.measure_for_ever)
    chassis.run_loop("exit forecast", forecast.sample_for_ever)
    chassis.run_loop("upkeep", upkeep.rounds_for_ever)
    chassis.run_loop("invariants", Invariants(database, audit).check_for_ever)
    chassis.run_loop("gauges", Gauges(database, partitions).measure_for_ever)
    chassis.run_loop("gauges of targets", targets.measure_for_ever)
    chassis.run_loop("capacity", Capacity(standing, explanation).measure_for_ever)
