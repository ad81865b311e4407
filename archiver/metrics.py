"""What the archiver tells Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

ROWS = Counter("muster_archiver_rows", "Rows moved to cold storage.", ["policy"])
BYTES = Counter("muster_archiver_bytes", "Bytes of cold files published.", ["policy"])
STEP_SECONDS = Histogram(
    "muster_archiver_step_seconds",
    "Time of one step of one partition.",
    ["step"],
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 7200),
)
RUN_SECONDS = Histogram(
    "muster_archiver_run_seconds",
    "Time of one run of a job.",
    ["job"],
    buckets=(0.1, 1, 10, 60, 300, 1800, 3600, 14400),
)
FAILURES = Counter("muster_archiver_failures", "Partitions or policies that a job failed at.", ["job", "policy"])
LAST_SUCCESS = Gauge(
    "muster_archiver_last_success_timestamp_seconds",
    "When a job last succeeded; 0 for never.",
    ["job"],
)
AHEAD = Gauge("muster_archiver_partitions_ahead", "Partitions after the current one, without a gap.", ["policy"])
REPAIRED = Counter("muster_archiver_partitions_repaired", "Times the current partition was missing.", ["policy"])
QUERY_BYTES = Counter("muster_archiver_query_bytes", "Bytes of files and partitions that queries read.", ["kind"])
