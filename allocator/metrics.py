"""The allocator's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

UNITS = Counter("muster_allocator_units", "Units handed out.")
NO_WORK = Counter("muster_allocator_no_work", "Calls answered with no work, by the first blocker.", ["blocker"])
RESULTS = Counter("muster_allocator_results", "Results taken, by what was done with them.", ["disposition"])
ENDED = Counter("muster_allocator_leases_ended", "Leases that ended without a result.", ["status"])
BATCH_SECONDS = Histogram(
    "muster_allocator_batch_seconds",
    "Time of one batch in the database.",
    ["batch"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
INDEX_SECONDS = Histogram(
    "muster_allocator_index_read_seconds",
    "Time to read what is available.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
CHECK_INS = Counter("muster_allocator_check_ins", "Check-ins delivered to the persona store.")

LIVE_LEASES = Gauge("muster_allocator_live_leases", "Leases on record.")
OVERDUE_LEASES = Gauge("muster_allocator_overdue_leases", "Leases that ran out over a minute ago and were not swept.")
OUTBOX_PENDING = Gauge("muster_allocator_outbox_pending", "Check-ins not delivered yet.")
QUARANTINED = Gauge("muster_allocator_quarantined_results", "Results in quarantine.")
QUOTA_VIOLATIONS = Gauge("muster_allocator_quota_violations", "Days of slots above their quota. Always 0.")
CAP_VIOLATIONS = Gauge("muster_allocator_cap_violations", "Exits above their cap. Always 0.")
