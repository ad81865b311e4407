"""The archiver put together."""

from __future__ import annotations

from muster.archiver.v1 import archive_pb2, archive_pb2_grpc

from archiver.cold import ColdReader
from archiver.config import ArchiverConfig
from archiver.partitions import PartitionMaker
from archiver.policies import Policies
from archiver.queries import QueryEngine
from archiver.query_servicer import QueryServicer
from archiver.runs import ArchiveRuns
from archiver.schedule import Schedule
from archiver.servicer import ArchiveServicer, PolicyServicer
from archiver.sources import Sources
from archiver.store import Store
from archiver.threads import Threads
from services.call import Role
from services.chassis import Chassis
from services.objects import ObjectStore

CONFIG = ArchiverConfig


async def bind(chassis: Chassis[ArchiverConfig], config: ArchiverConfig) -> None:
    """Builds the archiver from its parts and registers its services."""
    sources = Sources(config.sources)
    store = Store(await chassis.database())
    objects = await ObjectStore.open(config.objects)
    threads = Threads()
    chassis.on_close("threads", threads.close)
    policies = Policies(store, sources)
    maker = PartitionMaker(store, policies, sources)
    runs = ArchiveRuns(store, policies, sources, objects, threads)
    chassis.on_close("runs", runs.close)
    cold = ColdReader(objects, config.objects)
    engine = QueryEngine(store, policies, sources, cold, threads, config.query.memory_bytes)
    services = archive_pb2.DESCRIPTOR.services_by_name
    chassis.add(
        archive_pb2_grpc.add_PolicyServiceServicer_to_server,
        PolicyServicer(policies),
        services["PolicyService"],
        Role.ADMIN,
    )
    chassis.add(
        archive_pb2_grpc.add_ArchiveServiceServicer_to_server,
        ArchiveServicer(store, policies, sources, maker, runs),
        services["ArchiveService"],
        Role.ADMIN,
    )
    chassis.add(
        archive_pb2_grpc.add_QueryServiceServicer_to_server,
        QueryServicer(engine),
        services["QueryService"],
        Role.OPERATOR,
    )
    schedule = Schedule(config.schedule, config.policies, store, policies, maker, runs)
    chassis.run_loop("schedule", schedule.keep)
