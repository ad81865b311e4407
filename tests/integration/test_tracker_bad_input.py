"""Every field of every RPC of the session tracker, wrong in each way it can be; and calls that must not be made.

`cases` names each wrong field by its path, such as `updates[1].last_errors[0].at`. A walk over the contract's
descriptors proves that every path has a case, but for those of which every value means something.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc

from services.call import Role
from tests.support.services import RunningService, StartService

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


# What is answered in another way than with INVALID_FIELD and the path.
OTHER_REASONS = {
    "page_token": (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN"),
    "fleet": (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED"),
}
# Of which every value means something, in whatever message they stand: counts, and what is compared with a number that
# stands. A wrong `offset` is one without `epoch`.
ANY_VALUE = {
    "count", "page", "current_page", "total_pages", "products_found", "errors_count", "acknowledged_command", "offset",
}  # fmt: skip
ANY_SWITCH = {("WatchSessions", "packed")}
SERVICES = pb.DESCRIPTOR.services_by_name
METHODS = [(service, method.name) for service in SERVICES for method in SERVICES[service].methods]


async def call(service: RunningService, method: str, request: Any, **options: Any) -> None:
    """Makes a call of any shape and reads its first answer."""
    owner = next(owner for owner, name in METHODS if name == method)
    stub: Any = getattr(session_pb2_grpc, f"{owner}Stub")(service.channel)
    if method == "ReportStream":

        async def requests() -> AsyncIterator[Any]:
            yield request

        await stub.ReportStream(requests(), **options).read()
    elif method == "WatchSessions":
        stream = stub.WatchSessions(request, **options)
        await stream.read()
        stream.cancel()
    else:
        await getattr(stub, method)(request, **options)


def requests_of(method: str) -> Any:
    owner = next(owner for owner, name in METHODS if name == method)
    return getattr(pb, SERVICES[owner].methods_by_name[method].input_type.name)


async def refusal(awaitable: Any) -> tuple[grpc.StatusCode, str, set[str]]:
    """Returns code, reason and the fields named."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None, caught.value
    info, violations = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(violations)
    return caught.value.code(), info.reason, {violation.field for violation in violations.field_violations}


async def standing(service: RunningService, metadata: Any) -> tuple[Any, ...]:
    """Returns all that a refused request might have changed."""
    watch = session_pb2_grpc.WatchServiceStub(service.channel)
    totals = await watch.GetTotals(pb.GetTotalsRequest(), metadata=metadata)
    got = await watch.GetSession(pb.GetSessionRequest(session_id=LIVE), metadata=metadata)
    session = got.session
    # Moments are reckoned from two clocks and so may differ by a microsecond.
    for name in ("updated_at", "state_since", "estimated_completion", "eta_low", "eta_high"):
        session.ClearField(name)
    figures = totals.live, dict(totals.by_state), totals.pages, totals.products, totals.errors, totals.results_committed
    return figures, session, tuple(got.last_errors), got.config_snapshot_json


async def change_mark(service: RunningService, metadata: Any) -> tuple[str, int]:
    """Returns the epoch and the offset, which grows with any change."""
    watch: Any = session_pb2_grpc.WatchServiceStub(service.channel)
    stream = watch.WatchSessions(pb.WatchSessionsRequest(interval=Duration()), metadata=metadata)
    answer = await stream.read()
    stream.cancel()
    return answer.epoch, answer.offset


async def test_wrong_fields_are_named_and_nothing_is_done(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.OPERATOR)
    live = pb.StartSessionRequest(session_id=LIVE, stage="list", config_snapshot_json="{}")
    await call(service, "StartSession", live, metadata=metadata)
    first = pb.ReportProgressRequest(updates=[update(sequence=1, current_page=LIVE_PAGES)])
    await call(service, "ReportProgress", first, metadata=metadata)
    before, mark = await standing(service, metadata), await change_mark(service, metadata)
    assert before[1].current_page == LIVE_PAGES
    count = 0
    for method, request, field in cases():
        count += 1
        code, reason, fields = await refusal(call(service, method, request, metadata=metadata))
        told = OTHER_REASONS.get(field)
        if told is not None:
            assert (code, reason) == told, (method, request)
        else:
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), (method, request)
            assert field in fields, (method, request, fields)
        assert await standing(service, metadata) == before, (method, request)
    assert await change_mark(service, metadata) == mark
    assert count > 400


def test_every_field_of_every_request_is_tried() -> None:
    tried = {(method, re.sub(r"\[\d+\]", "", field)) for method, _, field in cases()}

    def walk(method: str, message: Descriptor, path: str) -> Iterator[str]:
        for field in message.fields:
            name = f"{path}{field.name}"
            nested = field.message_type
            if nested is not None and nested.file.name == pb.DESCRIPTOR.name:
                yield from walk(method, nested, f"{name}.")
            # A counter stands for itself; an array of counters has a length that may be wrong.
            elif field.name in ANY_VALUE and not path.startswith("packed."):
                continue
            elif (method, name) not in tried and (method, name) not in ANY_SWITCH:
                yield f"{method} {name}"

    left = [field for _, method in METHODS for field in walk(method, requests_of(method).DESCRIPTOR, "")]
    assert left == []


async def test_a_stream_takes_so_many_names_and_what_was_answered_stands(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.WORKER)
    await call(service, "StartSession", pb.StartSessionRequest(session_id="n0"), metadata=metadata)
    stub: Any = session_pb2_grpc.SessionServiceStub(service.channel)
    stream = stub.ReportStream(metadata=metadata)
    for batch in range(1, 101):
        names = [f"n{number}" for number in range(1000 * (batch - 1), 1000 * batch)]
        arrays = pb.PackedUpdates(handle=[0], sequence=[batch], current_page=[batch])
        await stream.write(pb.ReportStreamRequest(batch=batch, names=names, packed=arrays))
        assert (await stream.read()).taken == 1
    arrays = pb.PackedUpdates(handle=[0], sequence=[101], current_page=[101])
    await stream.write(pb.ReportStreamRequest(batch=101, names=["one more"], packed=arrays))
    code, reason, fields = await refusal(stream.read())
    assert (code, reason, fields) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", {"names"})
    watch = session_pb2_grpc.WatchServiceStub(service.channel)
    session = (await watch.GetSession(pb.GetSessionRequest(session_id="n0"), metadata=metadata)).session
    assert (session.sequence, session.current_page) == (100, 100)


async def test_edges_are_taken(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.OPERATOR)
    name = "가" * 128
    last = pb.ErrorEntry(at=NOW, error_class="c" * 64, message="m" * 256, page=MOST)
    classes = [pb.ErrorCount(error_class=f"{number:064}", count=MOST) for number in range(16)]
    progress = pb.ProgressUpdate(
        session_id=name, sequence=2**64 - 3, state=pb.SESSION_STATE_PAUSED, stage="y" * 64, current_page=MOST,
        total_pages=MOST, products_found=MOST, errors_count=MOST, reason="r" * 256, errors_by_class=classes,
        last_errors=[last] * 10, acknowledged_command=2**64 - 1,
    )  # fmt: skip
    request = pb.StartSessionRequest(
        session_id=name, stage="x" * 64, total_pages=MOST, slot_id="s" * 128, client_id="c" * 128,
        tags=[f"{number:064}" for number in range(16)], config_snapshot_json='{"a": "' + "x" * 16375 + '"}',
        allocation_key=UUID_TEXT.upper(), lease_token=TOKEN, progress=progress, traceparent="t" * 55,
        checkpoint=pb.CheckpointPolicy(every_pages=1_000_000, every=Duration(seconds=3600)),
    )  # fmt: skip
    await call(service, "StartSession", request, metadata=metadata)
    progress.sequence += 1
    await call(service, "ReportProgress", pb.ReportProgressRequest(updates=[progress] * 1000), metadata=metadata)
    arrays = pb.PackedUpdates(
        handle=[0], sequence=[2**64 - 1], current_page=[MOST], total_pages=[MOST], products_found=[MOST],
        errors_count=[MOST], state=[pb.SESSION_STATE_RATE_LIMITED],
    )  # fmt: skip
    batch = pb.ReportStreamRequest(batch=2**64 - 1, names=[name] * 1000, updates=[progress] * 999, packed=arrays)
    await call(service, "ReportStream", batch, metadata=metadata)
    for wanted in (
        {"session_ids": [name], "kind": pb.COMMAND_KIND_SPEED_LIMIT, "pages_per_minute": 1_000_000.0},
        {"filter": pb.SessionFilter(tag=f"{3:064}"), "kind": pb.COMMAND_KIND_STOP, "reason": "r" * 256},
    ):
        await call(service, "ControlSessions", pb.ControlSessionsRequest(**wanted), metadata=metadata)  # type: ignore[arg-type]
    watch = session_pb2_grpc.WatchServiceStub(service.channel)
    got = await watch.GetSession(pb.GetSessionRequest(session_id=name), metadata=metadata)
    session = got.session
    assert (session.sequence, session.state) == (2**64 - 1, pb.SESSION_STATE_RATE_LIMITED)
    assert (len(session.errors_by_class), len(got.last_errors), len(session.tags)) == (16, 10, 16)
    assert (session.pages_per_minute_limit, session.important) == (1_000_000.0, True)
    complete = pb.CompleteSessionRequest(
        session_id=name, state=pb.SESSION_STATE_STOPPED, stage="z" * 64, total_pages=MOST, products_found=MOST,
        errors_count=MOST, started_at=Timestamp(seconds=0), message="m" * 1024, config_snapshot_json="{}",
        slot_id="t" * 128, client_id="d" * 128,
    )  # fmt: skip
    await call(service, "CompleteSession", complete, metadata=metadata)
    (result,) = (await watch.ListResults(pb.ListResultsRequest(page_size=1000), metadata=metadata)).results
    assert (result.total_pages, result.message, result.stage) == (MOST, "m" * 1024, "z" * 64)
    assert result.execution_time.seconds > 1_700_000_000


@pytest.mark.parametrize(("owner", "method"), METHODS)
async def test_calls_without_a_key_or_time_are_not_begun(start_service: StartService, owner: str, method: str) -> None:
    service = await start_service("session_tracker")
    request = requests_of(method)()
    for metadata in ((), (("authorization", "Bearer " + "x" * 50),), (("authorization", "nonsense"),)):
        code, reason, _ = await refusal(call(service, method, request, metadata=metadata))
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(service, method, request, metadata=await service.metadata(Role.WORKER), timeout=0.001)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_results_and_commands_are_for_operators(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.WORKER)
    for method in ("ListResults", "ControlSessions"):
        code, reason, _ = await refusal(call(service, method, requests_of(method)(), metadata=metadata))
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    for method in ("ListSessions", "GetTotals", "WatchSessions"):
        await call(service, method, requests_of(method)(), metadata=metadata)
