"""What the persona store counts."""

from prometheus_client import Counter, Gauge, Histogram

CHECK_OUTS_LIVE = Gauge("muster_persona_check_outs_live", "Check-outs that have not run out.", ["mode"])
CHECK_OUTS = Counter("muster_persona_check_outs", "Check-outs answered, by what became of them.", ["result"])
CHECK_OUTS_EXPIRED = Counter("muster_persona_check_outs_expired", "Check-outs that ran out and were swept.")
CONFLICTS = Counter(
    "muster_persona_conflicts",
    "Picks and saves that were repeated since another was faster.",
    ["kind"],
)
SAVE_SECONDS = Histogram(
    "muster_persona_save_seconds",
    "Time of a save, from its check to its commit.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
OBJECT_BYTES = Counter(
    "muster_persona_object_bytes", "Bytes of parts moved to and from the object store.", ["direction"]
)
PARTS_UNCHANGED = Counter("muster_persona_parts_unchanged", "Parts of saves that were not written again.")
PARTS_CORRUPT = Counter("muster_persona_parts_corrupt", "Parts read that are not what was saved.")
OBJECTS_COLLECTED = Counter("muster_persona_objects_collected", "Objects that the collector deleted.")
OBJECTS_PENDING = Gauge("muster_persona_objects_pending", "Objects announced or dropped that no generation refers to.")
