"""What can be wrong with each field of each request of the session tracker, field by field.

`cases` names each wrong field by its path, such as `updates[1].last_errors[0].at`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from muster.session_tracker.v1 import session_pb2 as pb

# Live before the cases begin, with LIVE_PAGES reported, so that whatever a refused request did all the same would show.
LIVE = "live"
LIVE_PAGES = 7
MOST = 2**32 - 1
NOW = Timestamp(seconds=1_700_000_000)
MOMENTS = (Timestamp(seconds=-62_135_596_801), Timestamp(nanos=-1), Timestamp(seconds=253_402_300_799))
FUTURE = Timestamp(seconds=4_000_000_000)
UUID_TEXT = "123e4567-e89b-12d3-a456-426614174000"
TOKEN = b"t" * 16
STATES = (1, 5, 6, 7, 8, 9, 10, -1, 99)
SNAPSHOTS = (
    "{",
    "[]",
    '"text"',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\u0000"}',
    '{"a": "\\udfff"}',
    '{"a": "' + "x" * 16384 + '"}',
    '{"a":' + "[" * 5000 + "]" * 5000 + "}",
    '{"a":' + "[" * 100 + "]" * 100 + "}",
)

Change = tuple[str, dict[str, Any]]
Case = tuple[str, Any, str]


def texts(most: int, *, required: bool = False) -> tuple[str, ...]:
    """Texts that a field of at most so many characters does not take."""
    return ("x" * (most + 1), "가" * (most + 1), "a\x00b", "a\x1bb", *(("",) if required else ()))


def bad_update_fields() -> Iterator[Change]:
    """Fields of an update that are wrong: the path in the update, and the fields to set."""
    for name in texts(128, required=True):
        yield "session_id", {"session_id": name}
    yield "sequence", {"sequence": 0}
    for state in STATES:
        yield "state", {"state": state}
    for text in texts(64):
        yield "stage", {"stage": text}
    for text in texts(256):
        yield "reason", {"reason": text}
    yield "errors_by_class", {"errors_by_class": [pb.ErrorCount(error_class=f"c{n}", count=1) for n in range(17)]}
    yield "errors_by_class", {"errors_by_class": [pb.ErrorCount(error_class="c")] * 2}
    for text in texts(64, required=True):
        counts = [pb.ErrorCount(error_class="fine"), pb.ErrorCount(error_class=text)]
        yield "errors_by_class[1].error_class", {"errors_by_class": counts}
        yield "last_errors[0].error_class", {"last_errors": [pb.ErrorEntry(at=NOW, error_class=text)]}
    entry = pb.ErrorEntry(at=NOW, error_class="c")
    yield "last_errors", {"last_errors": [entry] * 11}
    for at in (None, *MOMENTS):
        yield "last_errors[1].at", {"last_errors": [entry, pb.ErrorEntry(at=at, error_class="c")]}
    for text in texts(256):
        wrong = pb.ErrorEntry(at=NOW, error_class="c", message=text)
        yield "last_errors[0].message", {"last_errors": [wrong]}


def update(**fields: Any) -> pb.ProgressUpdate:
    return pb.ProgressUpdate(**{"session_id": LIVE, "sequence": 100, "current_page": 99, **fields})


def report_cases() -> Iterator[Case]:
    lists: list[tuple[str, list[pb.ProgressUpdate]]] = [("updates", []), ("updates", [update()] * 1001)]
    lists += [
        (f"updates[1].{path}", [update(), update(**{"sequence": 101, **change})])
        for path, change in bad_update_fields()
    ]
    for field, updates in lists:
        yield "ReportProgress", pb.ReportProgressRequest(updates=updates), field
        yield "ReportStream", pb.ReportStreamRequest(batch=1, updates=updates), field
    yield "ReportStream", pb.ReportStreamRequest(updates=[update()]), "batch"


def packed(names: Any = None, updates: Any = 0, **change: Any) -> pb.ReportStreamRequest:
    arrays: dict[str, Any] = {"handle": [0, 1], "sequence": [100, 100], "current_page": [99, 99], **change}
    return pb.ReportStreamRequest(
        batch=1,
        names=[LIVE, "other"] if names is None else names,
        updates=[update()] * updates,
        packed=pb.PackedUpdates(**arrays),
    )


def packed_cases() -> Iterator[Case]:
    def case(field: str, request: pb.ReportStreamRequest) -> Case:
        return "ReportStream", request, field

    yield case("names", packed([f"n{number}" for number in range(1001)]))
    for name in texts(128, required=True):
        yield case("names[1]", packed([LIVE, name]))
    yield case("packed.handle[0]", packed([]))
    yield case("packed.handle[1]", packed([LIVE]))
    yield case("packed.handle[1]", packed(handle=[0, 2]))
    yield case("packed.handle[0]", packed(handle=[MOST, 0]))
    yield case("packed.handle", packed(handle=[0, 0]))
    yield case("packed.handle", packed(updates=999))
    yield case("packed.handle", packed(updates=1, handle=[]))
    every = list(range(1000))
    yield case("packed.handle", packed(updates=1, handle=every, sequence=[1] * 1000, current_page=[]))
    yield case("packed.handle", packed(handle=[0] * 1001, sequence=[1] * 1001, current_page=[]))
    for field in ("sequence", "current_page", "total_pages", "products_found", "errors_count", "state"):
        for length in (1, 3):
            yield case(f"packed.{field}", packed(**{field: [2] * length}))
    yield case("packed.sequence", packed(sequence=[]))
    yield case("packed.sequence[1]", packed(sequence=[100, 0]))
    for state in STATES:
        yield case("packed.state[1]", packed(state=[2, state]))
    # Names alone are no batch of updates.
    yield case("updates", pb.ReportStreamRequest(batch=1, names=[LIVE]))


def start_cases() -> Iterator[Case]:
    def case(field: str, **fields: Any) -> Case:
        return "StartSession", pb.StartSessionRequest(**{"session_id": "new", **fields}), field

    for name in texts(128, required=True):
        yield case("session_id", session_id=name)
    for field, most in (("stage", 64), ("slot_id", 128), ("client_id", 128)):
        for text in texts(most):
            yield case(field, **{field: text})
    for at in (*MOMENTS, FUTURE):
        yield case("started_at", started_at=at)
    yield case("tags", tags=[f"t{number}" for number in range(17)])
    yield case("tags", tags=["a", "a"])
    for text in texts(64, required=True):
        yield case("tags[1]", tags=["a", text])
    for text in SNAPSHOTS:
        yield case("config_snapshot_json", config_snapshot_json=text)
    for key in ("nonsense", "x" * 36, UUID_TEXT + "0", "x" * 2000):
        yield case("allocation_key", allocation_key=key, lease_token=TOKEN)
    yield case("allocation_key", lease_token=TOKEN)
    for token in (b"", b"x" * 15, b"x" * 17):
        yield case("lease_token", allocation_key=UUID_TEXT, lease_token=token)
    # On the live session, so that its counters would show it.
    for path, change in bad_update_fields():
        yield case(f"progress.{path}", session_id=LIVE, progress=update(**change))
    yield case("progress.session_id", progress=update())
    yield case("checkpoint.every_pages", checkpoint=pb.CheckpointPolicy(every_pages=1_000_001))
    for every in (Duration(), Duration(nanos=999_999_999), Duration(seconds=3601), Duration(seconds=-1)):
        yield case("checkpoint.every", checkpoint=pb.CheckpointPolicy(every=every))
    for text in ("x", "x" * 54, "x" * 56, "\x00" * 55):
        yield case("traceparent", traceparent=text)


def complete_cases() -> Iterator[Case]:
    def case(field: str, **fields: Any) -> Case:
        request = pb.CompleteSessionRequest(**{"session_id": LIVE, "state": pb.SESSION_STATE_COMPLETED, **fields})
        return "CompleteSession", request, field

    for name in texts(128, required=True):
        yield case("session_id", session_id=name)
    for state in (0, 1, 2, 3, 4, 5, 6, 10, -1):
        yield case("state", state=state)
    for field, most in (("stage", 64), ("message", 1024), ("slot_id", 128), ("client_id", 128)):
        for text in texts(most):
            yield case(field, **{field: text})
    for at in (*MOMENTS, FUTURE):
        yield case("started_at", started_at=at)
    # Nobody here knows when it began.
    yield case("started_at", session_id="not live")
    for text in SNAPSHOTS:
        yield case("config_snapshot_json", config_snapshot_json=text)


def bad_filters() -> Iterator[tuple[str, pb.SessionFilter]]:
    states: Any
    for states in ([7, 10], [1, 99], [1, -1]):
        yield "filter.states[1]", pb.SessionFilter(states=states)
    yield "filter.states", pb.SessionFilter(states=[pb.SESSION_STATE_QUEUED] * 17)
    for field, most in (("slot_id", 128), ("client_id", 128), ("stage", 64), ("tag", 64)):
        for text in texts(most):
            wrong: dict[str, Any] = {field: text}
            yield f"filter.{field}", pb.SessionFilter(**wrong)


def control_cases() -> Iterator[Case]:
    def case(field: str, **fields: Any) -> Case:
        kind = {"kind": pb.COMMAND_KIND_STOP}
        ids = {} if "filter" in fields else {"session_ids": [LIVE]}
        return "ControlSessions", pb.ControlSessionsRequest(**{**kind, **ids, **fields}), field

    yield case("session_ids", session_ids=[f"s{number}" for number in range(1001)])
    yield case("session_ids", session_ids=[LIVE, LIVE])
    for name in texts(128, required=True):
        yield case("session_ids[1]", session_ids=[LIVE, name])
    for field, wrong in bad_filters():
        yield case(field, filter=wrong)
    # A command for everybody is a mistake, and so is one with two answers to whom.
    for empty in (None, pb.SessionFilter(), pb.SessionFilter(states=[pb.SESSION_STATE_UNSPECIFIED])):
        yield case("filter", filter=empty)
    yield case("filter", session_ids=[LIVE], filter=pb.SessionFilter(stage="list"))
    for kind in (0, pb.COMMAND_KIND_LEASE_LOST, 6, -1):
        yield case("kind", kind=kind)
    for speed in (-0.5, 1_000_000.5, float("nan"), float("inf"), float("-inf")):
        yield case("pages_per_minute", kind=pb.COMMAND_KIND_SPEED_LIMIT, pages_per_minute=speed)
        yield case("pages_per_minute", pages_per_minute=speed)
    for text in texts(256):
        yield case("reason", reason=text)


def watch_cases() -> Iterator[Case]:
    for name in texts(128, required=True):
        yield "GetSession", pb.GetSessionRequest(session_id=name), "session_id"
    for field, wrong in bad_filters():
        yield "ListSessions", pb.ListSessionsRequest(filter=wrong), field
        yield "WatchSessions", pb.WatchSessionsRequest(filter=wrong), field
    for size in (1001, MOST):
        yield "ListSessions", pb.ListSessionsRequest(page_size=size), "page_size"
        yield "ListResults", pb.ListResultsRequest(page_size=size), "page_size"
    for token in ("x", "x" * 2000, "WzFd", "e30=", "W10=", "\x00"):
        yield "ListSessions", pb.ListSessionsRequest(page_token=token), "page_token"
        yield "ListResults", pb.ListResultsRequest(page_token=token), "page_token"
    for text in texts(64):
        yield "WatchSessions", pb.WatchSessionsRequest(epoch=text), "epoch"
    yield "WatchSessions", pb.WatchSessionsRequest(offset=7), "epoch"
    for interval in (Duration(seconds=61), Duration(seconds=-1), Duration(seconds=60, nanos=1)):
        yield "WatchSessions", pb.WatchSessionsRequest(interval=interval), "interval"
    for text in texts(128):
        yield "GetTotals", pb.GetTotalsRequest(slot_id=text), "slot_id"
        yield "ListResults", pb.ListResultsRequest(slot_id=text), "slot_id"
        yield "ListResults", pb.ListResultsRequest(client_id=text), "client_id"
    yield "GetTotals", pb.GetTotalsRequest(slot_id="slot", fleet=True), "slot_id"
    # A field of right form, which an operator may not set.
    yield "GetTotals", pb.GetTotalsRequest(fleet=True), "fleet"
    state: Any
    for state in (1, 2, 6, 10, -1):
        yield "ListResults", pb.ListResultsRequest(state=state), "state"
    for at in MOMENTS:
        yield "ListResults", pb.ListResultsRequest(completed_after=at), "completed_after"
        yield "ListResults", pb.ListResultsRequest(completed_before=at), "completed_before"
    for before in (Timestamp(seconds=5), Timestamp(seconds=6)):
        request = pb.ListResultsRequest(completed_after=Timestamp(seconds=6), completed_before=before)
        yield "ListResults", request, "completed_before"


def cases() -> Iterator[Case]:
    """Method, request, and the path of the field that must be named."""
    yield from start_cases()
    yield from report_cases()
    yield from packed_cases()
    yield from complete_cases()
    yield from control_cases()
    yield from watch_cases()
