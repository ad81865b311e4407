"""The session tracker, put together."""

from __future__ import annotations

from muster.session_tracker.v1 import session_pb2, session_pb2_grpc

from services.call import Role
from services.chassis import Chassis
from services.peers import Peer
from session_tracker.allocator_peer import AllocatorLeases
from session_tracker.checkpoint_store import PostgresCheckpoints
from session_tracker.checkpoints import Checkpoints
from session_tracker.clock import Clock
from session_tracker.config import TrackerConfig
from session_tracker.control_servicer import ControlServicer
from session_tracker.leases import Renewals
from session_tracker.metrics import watch_states
from session_tracker.organizations import Organizations
from session_tracker.redis_engine import RedisEngine
from session_tracker.results import Results
from session_tracker.session_servicer import SessionServicer
from session_tracker.silence import Silence
from session_tracker.store import PostgresResults
from session_tracker.watch_servicer import WatchServicer

CONFIG = TrackerConfig


async def bind(chassis: Chassis[TrackerConfig], config: TrackerConfig) -> None:
    """Builds the service from its parts and registers it."""
    clock = Clock()
    database = await chassis.database()
    store = PostgresResults(database)
    organizations = Organizations(config.sessions, clock)
    if config.engine.kind == "redis":
        engine = RedisEngine(organizations, config.engine, config.sessions, clock)
        # Closed after what commits results, so that every end is still written.
        chassis.on_close("redis engine", engine.close)
        await engine.start()
        chassis.run_loop("redis engine", engine.loop)
    checkpoints = Checkpoints(organizations, PostgresCheckpoints(database), clock, config.checkpoints.interval_seconds)
    # Closed after the results, whose sessions need no checkpoint any more.
    chassis.on_close("checkpoints", checkpoints.close)
    results = Results(organizations, store, clock)
    chassis.on_close("results", results.close)
    sessions = SessionServicer(organizations, results, clock, chassis.draining)
    watch = WatchServicer(organizations, store, clock, chassis.draining)
    peer = Peer(config.allocator)
    chassis.on_close("allocator", peer.close)
    if peer.configured:
        renewals = Renewals(organizations, AllocatorLeases(peer), config.renewal.interval_seconds)
        chassis.run_loop("renewals", renewals.loop)
    await checkpoints.restore()
    chassis.run_loop("checkpoints", checkpoints.loop)
    chassis.run_loop("silence", Silence(organizations, store).loop)
    chassis.run_loop("end of streams", sessions.end_streams)
    watch_states(organizations.count, lambda: any(one.rebuilding for one in organizations))
    names = session_pb2.DESCRIPTOR.services_by_name
    chassis.add(session_pb2_grpc.add_SessionServiceServicer_to_server, sessions, names["SessionService"], Role.WORKER)
    chassis.add(
        session_pb2_grpc.add_ControlServiceServicer_to_server,
        ControlServicer(organizations),
        names["ControlService"],
        Role.OPERATOR,
    )
    chassis.add(
        session_pb2_grpc.add_WatchServiceServicer_to_server,
        watch,
        names["WatchService"],
        Role.WORKER,
        ListResults=Role.OPERATOR,
    )
