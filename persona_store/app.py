"""The persona store, put together."""

from __future__ import annotations

from datetime import timedelta

from muster.persona_store.v1 import (
    bundle_pb2,
    bundle_pb2_grpc,
    checkout_pb2,
    checkout_pb2_grpc,
    persona_pb2,
    persona_pb2_grpc,
)

from persona_store.bundle_servicer import BundleServicer
from persona_store.bundle_store import BundleStore
from persona_store.bundles import Bundles
from persona_store.check_out_servicer import CheckOutServicer
from persona_store.check_out_store import CheckOutStore
from persona_store.check_outs import CheckOuts
from persona_store.collector import Collector, Sweeper, every
from persona_store.config import PersonaStoreConfig
from persona_store.persona_servicer import PersonaServicer
from persona_store.store import PersonaStore
from services.call import Role
from services.chassis import Chassis
from services.objects import ObjectStore

CONFIG = PersonaStoreConfig


async def bind(chassis: Chassis[PersonaStoreConfig], config: PersonaStoreConfig) -> None:
    """Builds the service's parts and registers them.

    Raises:
        StartupError: the database or the object store cannot be used.
    """
    # Every statement has its index, and check_outs grows and shrinks faster than its statistics: a plan that was made
    # while it was empty must not read it whole for each candidate ever after.
    database = await chassis.database(enable_seqscan="off", jit="off")
    objects = await ObjectStore.open(config.objects)
    personas = PersonaStore(database)
    leases = CheckOutStore(database)
    generations = BundleStore(
        database,
        generations_kept=config.bundles.generations_kept,
        grace=timedelta(seconds=config.bundles.grace_seconds),
    )
    bundles = Bundles(generations, personas, objects, save_seconds=config.bundles.save_seconds)
    check_outs = CheckOuts(
        leases, batch_items=config.check_outs.batch_items, waiting_items=config.check_outs.waiting_items
    )
    chassis.on_close("check-outs", check_outs.close)
    chassis.add(
        persona_pb2_grpc.add_PersonaServiceServicer_to_server,
        PersonaServicer(personas, generations, bundles),
        persona_pb2.DESCRIPTOR.services_by_name["PersonaService"],
        Role.OPERATOR,
        GetPersona=Role.WORKER,
        ListPersonas=Role.WORKER,
    )
    chassis.add(
        checkout_pb2_grpc.add_CheckOutServiceServicer_to_server,
        CheckOutServicer(check_outs, leases),
        checkout_pb2.DESCRIPTOR.services_by_name["CheckOutService"],
        Role.WORKER,
    )
    chassis.add(
        bundle_pb2_grpc.add_BundleServiceServicer_to_server,
        BundleServicer(bundles, generations),
        bundle_pb2.DESCRIPTOR.services_by_name["BundleService"],
        Role.WORKER,
    )
    collector = Collector(generations, personas, objects)
    chassis.run_loop("sweeper", every(config.check_outs.sweep_seconds, "sweeper", Sweeper(leases).sweep))
    chassis.run_loop("collector", every(config.bundles.collect_seconds, "collector", collector.collect))
