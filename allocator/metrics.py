"""The allocator's metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

UNITS = Counter("muster_allocator_units", "Units handed out.")
NO_WORK = Counter("muster_allocator_no_work", "Calls answered with no work, by the first blocker.", ["blocker"])
RESULTS = Counter("muster_allocator_results", "Results taken, by what was done with them.", ["disposition"])
RESULTS_BY_OUTCOME = Counter(
    "muster_allocator_results_by_outcome", "Results that count, by how the unit ended.", ["outcome"]
)
for _outcome in ("succeeded", "failed", "blocked"):
    # A series that begins with its first result would hide that one from `increase`.
    RESULTS_BY_OUTCOME.labels(_outcome)
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
INDEX_AGE_SECONDS = Histogram(
    "muster_allocator_index_age_seconds",
    "How old the oldest reading of the index was when a batch chose by it.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60),
)
EXITS_COOLING = Gauge(
    "muster_allocator_exits_cooling", "Pairs of exit and target that cool down, by the last fault.", ["signal"]
)
EXIT_SECONDS_TO_EMPTY = Gauge(
    "muster_allocator_exit_seconds_to_empty",
    "When the pool of the organization that is nearest to it will be used up at the pace of 15 minutes; +Inf if none.",
)
EXIT_SECONDS_TO_EMPTY.set(float("inf"))
EXIT_USE_RATIO = Gauge(
    "muster_allocator_exit_use_ratio",
    "Uses that count over the caps of enabled exits, of the organization that has used the most; 0 to 1.",
)
PROVIDER_CALLS = Counter(
    "muster_allocator_exit_provider_calls",
    "Calls for external exits, retries apart, by their outcome: answered, none, failed, passed_over.",
    ["provider", "call", "outcome"],
)
PROVIDER_ORPHANS = Counter(
    "muster_allocator_exit_orphans_released", "Remote leases without one of ours that were released.", ["provider"]
)
EXIT_RELEASES_PENDING = Gauge(
    "muster_allocator_exit_releases_pending", "External exits that ended here and whose provider has yet to hear of it."
)
CHECK_INS = Counter("muster_allocator_check_ins", "Check-ins delivered to the persona store.")

LIVE_LEASES = Gauge("muster_allocator_live_leases", "Leases on record.")
OVERDUE_LEASES = Gauge("muster_allocator_overdue_leases", "Leases that ran out over a minute ago and were not swept.")
OUTBOX_SECONDS = Gauge("muster_allocator_outbox_oldest_seconds", "Age of the oldest check-in not delivered yet.")
OUTBOX_PENDING = Gauge("muster_allocator_outbox_pending", "Check-ins not delivered yet.")
TARGET_TURNS = Counter(
    "muster_allocator_target_turns", "Targets that stopped or went on by what results said of them.", ["turn"]
)
TARGETS_PAUSED = Gauge("muster_allocator_targets_paused", "Targets paused for blocking or by their Retry-After.")
TARGETS_HELD = Gauge("muster_allocator_targets_held", "Targets held by their Retry-After or by an operator.")
QUARANTINED = Gauge("muster_allocator_quarantined_results", "Results in quarantine.")
ACTIVE_SLOTS = Gauge("muster_allocator_active_slots", "Slots that are active and within their dates today.")
CLIENTS = Gauge(
    "muster_allocator_clients",
    "Clients by state: online, or offline: silent for over 10 minutes, not a day, without goodbye or order to drain.",
    ["state"],
)
PARTITIONS_MISSING = Gauge(
    "muster_allocator_partitions_missing", "Partitions from today's to three intervals ahead that do not stand."
)
UPKEEP_AT = Gauge("muster_allocator_upkeep_timestamp_seconds", "When the last round of the upkeep ended.")

# The invariants of the design; each always 0.
VIOLATIONS = Gauge(
    "muster_allocator_invariant_violations",
    "Rows that break an invariant, as far as the last check looked. Always 0.",
    ["invariant"],
)
CHECKED_AT = Gauge(
    "muster_allocator_invariant_checked_timestamp_seconds", "When an invariant was last checked.", ["invariant"]
)
NO_WORK_WATCHED = Counter("muster_allocator_no_work_watched", "No-work answers that were checked for their truth.")
AVAILABLE_UNITS = Gauge(
    "muster_allocator_available_units",
    "Units that could be handed out now over all organizations, if personas and external exits allow.",
)
