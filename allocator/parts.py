"""The parts of the service by theme, as `bind` puts them together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
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
from allocator.clients import Clients
from allocator.config import AllocatorConfig
from allocator.exit_forecast import ExitForecast
from allocator.exit_health import ExitHealth
from allocator.exit_provider_http import HttpExitProvider
from allocator.exit_providers import Circuit, GuardedProvider
from allocator.exit_releases import ExitReleases
from allocator.exit_servicer import ExitServicer
from allocator.exit_store import ExitStore
from allocator.explanation import Explanation
from allocator.external_exit_store import ExternalExitStore
from allocator.external_exits import ExternalExits
from allocator.gauges import Gauges
from allocator.insight_servicer import InsightServicer
from allocator.insight_store import InsightStore
from allocator.invariants import Invariants
from allocator.lease_store import LeaseStore
from allocator.leases import Leases
from allocator.partitions import Partitions
from allocator.quarantine_store import QuarantineStore
from allocator.report_cache import ReportCache
from allocator.report_store import ReportStore
from allocator.reports import Reports
from allocator.upkeep import Upkeep
from allocator.weekly import WeeklyStatistics
from allocator.weekly_store import WeeklyStore
from services.call import Role
from services.chassis import Chassis
from services.postgres import Database

Loops = Mapping[str, Callable[[], Awaitable[None]]]


@dataclass(frozen=True, slots=True)
class Exits:
    """Pooled and external exits, but for the choice among them, which is allocation's."""

    providers: Mapping[str, GuardedProvider]
    external: ExternalExits
    releases: ExitReleases
    health: ExitHealth
    forecast: ExitForecast
    servicer: ExitServicer

    @property
    def loops(self) -> Loops:
        """What runs for them."""
        return {
            "exit releases": self.releases.deliver_for_ever,
            "exit reconciliation": self.releases.reconcile_for_ever,
            "exit health": self.health.measure_for_ever,
            "exit forecast": self.forecast.sample_for_ever,
        }


def exits(
    chassis: Chassis[Any],
    config: AllocatorConfig,
    database: Database,
    partitions: Partitions,
    leases: LeaseStore,
    availability: Availability,
    clients: Clients,
) -> Exits:
    """Builds what has to do with exits; external providers are closed with the chassis."""
    providers: dict[str, GuardedProvider] = {}
    for name, provider in config.exit_providers.items():
        circuit = Circuit(config.external_exits.pause_seconds)
        providers[name] = GuardedProvider(name, HttpExitProvider(provider), circuit)
        chassis.on_close(f"exit provider {name}", providers[name].close)
    store = ExternalExitStore(database, partitions)
    external = ExternalExits(
        providers, store, leases, availability, greatest_age_seconds=config.leases.greatest_age_seconds
    )
    releases = ExitReleases(
        providers,
        store,
        reconcile_seconds=config.external_exits.reconcile_seconds,
        grace_seconds=config.external_exits.grace_seconds,
    )
    health = ExitHealth(database, partitions, config.cool_down)
    forecast = ExitForecast(database, sample_seconds=config.exits.sample_seconds)
    servicer = ExitServicer(
        ExitStore(database, partitions),
        health,
        forecast,
        providers,
        releases,
        availability,
        clients,
        limit=config.exits.limit,
    )
    return Exits(providers, external, releases, health, forecast, servicer)


def insight(
    database: Database,
    partitions: Partitions,
    explanation: Explanation,
    allocation: Allocation,
    clients: Clients,
    cache: ReportCache,
) -> InsightServicer:
    """Builds what reads: explanations, figures, reports."""
    store = InsightStore(database)
    reports = Reports(ReportStore(database), store, explanation, cache)
    return InsightServicer(store, WeeklyStore(database, partitions), reports, explanation, allocation, clients)


def acts(
    database: Database, partitions: Partitions, leases: Leases, availability: Availability, reports: ReportCache
) -> Acts:
    """Builds what operators do by hand."""
    return Acts(ActStore(database, partitions, QuarantineStore(database)), leases, availability, reports)


def admin(database: Database, partitions: Partitions, acts: Acts, clients: Clients) -> AdminServicer:
    """Builds what administrators call."""
    return AdminServicer(acts, QuarantineStore(database), AuditStore(database, partitions), clients)


def upkeep_loops(database: Database, partitions: Partitions, allocations: AllocationStore) -> Loops:
    """Builds what is done by the clock and what watches, and returns what runs for it."""
    return {
        "upkeep": Upkeep(database, allocations, partitions).rounds_for_ever,
        "weekly statistics": WeeklyStatistics(WeeklyStore(database, partitions)).rounds_for_ever,
        "invariants": Invariants(database, AuditStore(database, partitions)).check_for_ever,
        "gauges": Gauges(database, partitions).measure_for_ever,
    }


def serve(
    chassis: Chassis[Any],
    *,
    work: work_pb2_grpc.WorkServiceServicer,
    slots: slot_pb2_grpc.SlotServiceServicer,
    exits: exit_pb2_grpc.ExitServiceServicer,
    targets: target_pb2_grpc.TargetServiceServicer,
    clients: client_pb2_grpc.ClientServiceServicer,
    insight: insight_pb2_grpc.InsightServiceServicer,
    admin: admin_pb2_grpc.AdminServiceServicer,
) -> None:
    """Registers the services of the contract, each with the least role that may call it."""
    for module, name, grpc_module, servicer, role in (
        (work_pb2, "WorkService", work_pb2_grpc, work, Role.WORKER),
        (slot_pb2, "SlotService", slot_pb2_grpc, slots, Role.OPERATOR),
        (exit_pb2, "ExitService", exit_pb2_grpc, exits, Role.OPERATOR),
        (target_pb2, "TargetService", target_pb2_grpc, targets, Role.OPERATOR),
        (client_pb2, "ClientService", client_pb2_grpc, clients, Role.OPERATOR),
        (insight_pb2, "InsightService", insight_pb2_grpc, insight, Role.OPERATOR),
        (admin_pb2, "AdminService", admin_pb2_grpc, admin, Role.ADMIN),
    ):
        add = getattr(grpc_module, f"add_{name}Servicer_to_server")
        chassis.add(add, servicer, module.DESCRIPTOR.services_by_name[name], role)
