"""What the alert rules rely on: the session tracker's metrics as the real service exports them."""

import asyncio
from collections.abc import Callable
from typing import Any

from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc
from prometheus_client import REGISTRY

from services.call import Role
from tests.support.services import StartService


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_metrics_follow_what_happens(start_service: StartService) -> None:
    """B3-26: sessions by state, updates, commands, watchers and their lag, results."""
    tracker = await start_service("session_tracker")
    worker = {"metadata": await tracker.metadata()}
    operator = {"metadata": await tracker.metadata(Role.OPERATOR)}
    sessions: Any = session_pb2_grpc.SessionServiceStub(tracker.channel)
    control: Any = session_pb2_grpc.ControlServiceStub(tracker.channel)
    watching: Any = session_pb2_grpc.WatchServiceStub(tracker.channel)
    taken, paused = "muster_tracker_updates_total", "muster_tracker_commands_total"
    lag, results = "muster_tracker_watch_lag_seconds_count", "muster_tracker_results_total"
    before = {
        "taken": value(taken, verdict="taken"),
        "stale": value(taken, verdict="stale"),
        "unknown": value(taken, verdict="unknown"),
        "paused": value(paused, kind="pause"),
        "lag": value(lag),
        "recorded": value(results, outcome="recorded"),
    }
    for name in ("a", "b"):
        await sessions.StartSession(pb.StartSessionRequest(session_id=name), **worker)
    assert value("muster_tracker_sessions", state="queued") == 2

    watch = watching.WatchSessions(pb.WatchSessionsRequest(packed=True), **operator)
    assert (await watch.read()).snapshot
    assert value("muster_tracker_watchers") == 1
    updates = [pb.ProgressUpdate(session_id=name, sequence=1, current_page=1) for name in ("a", "b", "none")]
    await sessions.ReportProgress(pb.ReportProgressRequest(updates=updates), **worker)
    await sessions.ReportProgress(pb.ReportProgressRequest(updates=updates[:1]), **worker)
    await watch.read()
    assert value(taken, verdict="taken") - before["taken"] == 2
    assert value(taken, verdict="stale") - before["stale"] == 1
    assert value(taken, verdict="unknown") - before["unknown"] == 1
    # Measured by a change of counters alone: a change of state need not come from a report.
    updates = [pb.ProgressUpdate(session_id="a", sequence=2, current_page=2)]
    await sessions.ReportProgress(pb.ReportProgressRequest(updates=updates), **worker)
    await watch.read()
    await until(lambda: value(lag) > before["lag"])

    await control.ControlSessions(pb.ControlSessionsRequest(session_ids=["a"], kind=pb.COMMAND_KIND_PAUSE), **operator)
    assert value(paused, kind="pause") - before["paused"] == 1
    watch.cancel()
    await until(lambda: value("muster_tracker_watchers") == 0)

    for name in ("a", "b"):
        request = pb.CompleteSessionRequest(session_id=name, state=pb.SESSION_STATE_COMPLETED, total_pages=1)
        await sessions.CompleteSession(request, **worker)
    assert value(results, outcome="recorded") - before["recorded"] == 2
    assert value("muster_tracker_results_pending") == 0
    assert value("muster_tracker_results_oldest_seconds") == 0
    assert value("muster_tracker_sessions", state="running") == 0
    for name in ("muster_tracker_rebuilding", "muster_tracker_checkpoint_overdue_seconds"):
        assert REGISTRY.get_sample_value(name) == 0
