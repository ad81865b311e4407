"""The session tracker's metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import Counter, Gauge

from session_tracker.sessions import LIVE_STATES, State

SESSIONS = Gauge("muster_tracker_sessions", "Live sessions of all organizations.", ["state"])
UPDATES = Counter("muster_tracker_updates", "Updates by what was done with them.", ["verdict"])
WATCHERS = Gauge("muster_tracker_watchers", "Open watch streams.")
STREAMS = Gauge("muster_tracker_report_streams", "Open report streams.")
RESULTS_PENDING = Gauge("muster_tracker_results_pending", "Final results that wait for their commit.")
RESULTS = Counter("muster_tracker_results", "Final results by what was done with them.", ["outcome"])
RENEWALS = Counter("muster_tracker_renewals", "Lease renewals asked of the allocator, by outcome.", ["outcome"])
FORGOTTEN = Counter("muster_tracker_forgotten_sessions", "Lost sessions that were dropped from memory.")


def watch_states(count: Callable[[State], int]) -> None:
    """Makes `SESSIONS` ask `count` for the live sessions of a state whenever it is read."""
    for state in LIVE_STATES:
        SESSIONS.labels(state.name.lower()).set_function(partial(count, state))
