"""The session tracker's metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import Counter, Gauge, Histogram

from session_tracker.sessions import LIVE_STATES, State

SESSIONS = Gauge("muster_tracker_sessions", "Live sessions of all organizations.", ["state"])
UPDATES = Counter("muster_tracker_updates", "Updates by what was done with them.", ["verdict"])
WATCHERS = Gauge("muster_tracker_watchers", "Open watch streams.")
STREAMS = Gauge("muster_tracker_report_streams", "Open report streams.")
RESULTS_PENDING = Gauge("muster_tracker_results_pending", "Final results that wait for their commit.")
RESULTS = Counter("muster_tracker_results", "Final results by what was done with them.", ["outcome"])
RESULTS_OLDEST = Gauge(
    "muster_tracker_results_oldest_seconds",
    "For how long final results have been tried to commit without success; 0: none waits.",
)
RENEWALS = Counter("muster_tracker_renewals", "Lease renewals asked of the allocator, by outcome.", ["outcome"])
FORGOTTEN = Counter("muster_tracker_forgotten_sessions", "Lost sessions that were dropped from memory.")
COMMANDS = Counter("muster_tracker_commands", "Commands given to sessions, by kind.", ["kind"])
WATCH_LAG = Histogram(
    "muster_tracker_watch_lag_seconds",
    "From the report of a session to the answer that carries it to a watcher, sampled.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
WATCH_MERGED = Counter(
    "muster_tracker_watch_merged", "States that a watcher which lagged was never sent, since newer ones replaced them."
)
CHECKPOINTS = Counter(
    "muster_tracker_checkpoints", "Checkpoints of important sessions, by what became of them.", ["outcome"]
)
CHECKPOINT_AGE = Gauge(
    "muster_tracker_checkpoint_age_seconds",
    "How long the oldest change of an important session has not been saved; 0: none.",
)
CHECKPOINT_OVERDUE = Gauge(
    "muster_tracker_checkpoint_overdue_seconds",
    "How far the latest checkpoint is behind its session's policy; 0: none is.",
)
REBUILDING = Gauge(
    "muster_tracker_rebuilding", "1 while sessions may be missing that workers have yet to report again, else 0."
)
# Without a series unless the engine has a store that can be down.
ENGINE_UP = Gauge("muster_tracker_engine_up", "Whether the engine's store is reached (1) or not (0).", ["engine"])
STORE_STATES = Counter(
    "muster_tracker_store_states", "States of sessions by where they went between here and the engine's store.", ["way"]
)
STORE_FLUSH = Histogram(
    "muster_tracker_store_flush_seconds",
    "Time to write what changed in an organization to the engine's store.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
TAKEN_OVER = Counter("muster_tracker_taken_over_sessions", "Sessions taken over from replicas that were gone.")


def watch_states(count: Callable[[State], int], rebuilding: Callable[[], bool]) -> None:
    """Makes `SESSIONS` ask `count` for the live sessions of a state whenever it is read, and `REBUILDING` likewise."""
    REBUILDING.set_function(lambda: float(rebuilding()))
    for state in LIVE_STATES:
        SESSIONS.labels(state.name.lower()).set_function(partial(count, state))
