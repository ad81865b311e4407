"""The session tracker's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

SESSIONS = Gauge("muster_tracker_sessions", "Live sessions of all organizations.", ["state"])
UPDATES = Counter("muster_tracker_updates", "Updates by what was done with them.", ["verdict"])
WATCHERS = Gauge("muster_tracker_watchers", "Open watch streams.")
STREAMS = Gauge("muster_tracker_report_streams", "Open report streams.")
RESULTS_PENDING = Gauge("muster_tracker_results_pending", "Final results that wait for their commit.")
RESULTS = Counter("muster_tracker_results", "Final results by what was done with them.", ["outcome"])
RENEWALS = Counter("muster_tracker_renewals", "Lease renewals asked of the allocator, by outcome.", ["outcome"])
FORGOTTEN = Counter("muster_tracker_forgotten_sessions", "Lost sessions that were dropped from memory.")
