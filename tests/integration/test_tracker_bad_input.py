"""Every field of every RPC of the session tracker, wrong in each way it can be; and calls that must not be made."""

from __future__ import annotations

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

LONG = "x" * 2000
FUTURE = Timestamp(seconds=4_000_000_000)
OUT_OF_RANGE = Timestamp(seconds=-62_135_596_801)
NAMES_128 = ("", "x" * 129, "a\x00b", "a\x1bb")
UPDATE: dict[str, Any] = {"session_id": "s", "sequence": 1}
UUID_TEXT = "123e4567-e89b-12d3-a456-426614174000"
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


def updates(**fields: Any) -> list[pb.ProgressUpdate]:
    return [pb.ProgressUpdate(**UPDATE), pb.ProgressUpdate(**{**UPDATE, **fields})]


def bad_updates() -> Iterator[tuple[dict[str, Any], str]]:
    """Lists of updates that are wrong, with the field that must be named."""
    yield {"updates": []}, "updates"
    yield {"updates": [pb.ProgressUpdate(**UPDATE)] * 1001}, "updates"
    for name in NAMES_128:
        yield {"updates": updates(session_id=name)}, "updates[1].session_id"
    yield {"updates": updates(sequence=0)}, "updates[1].sequence"
    for state in (1, 5, 6, 7, 8, 9, 10, -1, 99):
        yield {"updates": updates(state=state)}, "updates[1].state"
    for stage in ("x" * 65, "a\x00b"):
        yield {"updates": updates(stage=stage)}, "updates[1].stage"


def bad_filters() -> Iterator[tuple[dict[str, Any], str]]:
    """Filters that are wrong, with the field that must be named."""
    states: Any
    for states in ([7], [1, 99], [-1]):
        yield {"filter": pb.SessionFilter(states=states)}, f"filter.states[{len(states) - 1}]"
    yield {"filter": pb.SessionFilter(states=[pb.SESSION_STATE_QUEUED] * 17)}, "filter.states"
    for field, most in (("slot_id", 128), ("client_id", 128), ("stage", 64), ("tag", 64)):
        for value in ("x" * (most + 1), "a\x00b"):
            wrong: dict[str, Any] = {field: value}
            yield {"filter": pb.SessionFilter(**wrong)}, f"filter.{field}"


def cases() -> Iterator[tuple[str, Any, str]]:
    """Method, request, and the field that must be named."""
    values: Any
    request: Any
    start: dict[str, Any] = {"session_id": "s"}
    for name in NAMES_128:
        yield "StartSession", pb.StartSessionRequest(session_id=name), "session_id"
    for field, values in {
        "stage": ("x" * 65, "a\x00b"),
        "started_at": (FUTURE, OUT_OF_RANGE, Timestamp(nanos=-1)),
        "slot_id": ("x" * 129, "a\x00b"),
        "client_id": ("x" * 129, "a\x00b"),
        "config_snapshot_json": SNAPSHOTS,
        "lease_token": (b"", b"x" * 15, b"x" * 17),
    }.items():
        for value in values:
            extra: dict[str, Any] = {"allocation_key": UUID_TEXT} if field == "lease_token" else {}
            yield "StartSession", pb.StartSessionRequest(**{**start, **extra, field: value}), field
    for tags, field in (
        ([f"t{number}" for number in range(17)], "tags"),
        (["a", "a"], "tags"),
        (["a", ""], "tags[1]"),
        (["x" * 65], "tags[0]"),
        (["a\x00"], "tags[0]"),
    ):
        yield "StartSession", pb.StartSessionRequest(session_id="s", tags=tags), field
    for key in ("nonsense", "x" * 36, UUID_TEXT + "0", LONG):
        request = pb.StartSessionRequest(session_id="s", allocation_key=key, lease_token=b"t" * 16)
        yield "StartSession", request, "allocation_key"
    yield "StartSession", pb.StartSessionRequest(session_id="s", lease_token=b"t" * 16), "allocation_key"
    for change in (
        {"session_id": ""}, {"session_id": "other"}, {"sequence": 0}, {"state": 7}, {"state": 99},
        {"stage": "x" * 65},
    ):  # fmt: skip
        progress = pb.ProgressUpdate(**{**UPDATE, **change})
        yield (
            "StartSession",
            pb.StartSessionRequest(session_id="s", progress=progress),
            f"progress.{next(iter(change))}",
        )

    for fields, field in bad_updates():
        yield "ReportProgress", pb.ReportProgressRequest(**fields), field
        yield "ReportStream", pb.ReportStreamRequest(batch=1, **fields), field
    yield "ReportStream", pb.ReportStreamRequest(updates=updates()), "batch"

    complete: dict[str, Any] = {"session_id": "s", "state": 7}
    for name in NAMES_128:
        yield "CompleteSession", pb.CompleteSessionRequest(session_id=name, state=pb.SESSION_STATE_FAILED), "session_id"
    for field, values in {
        "state": (0, 1, 2, 3, 4, 5, 6, 10, -1),
        "stage": ("x" * 65, "a\x00b"),
        "started_at": (FUTURE, OUT_OF_RANGE, None),
        "config_snapshot_json": SNAPSHOTS,
        "message": ("x" * 1025, "a\x00b"),
    }.items():
        for value in values:
            yield "CompleteSession", pb.CompleteSessionRequest(**{**complete, field: value}), field

    for name in NAMES_128:
        yield "GetSession", pb.GetSessionRequest(session_id=name), "session_id"
    for fields, field in bad_filters():
        yield "ListSessions", pb.ListSessionsRequest(**fields), field
        yield "WatchSessions", pb.WatchSessionsRequest(**fields), field
    yield "ListSessions", pb.ListSessionsRequest(page_size=1001), "page_size"
    for token in ("x", LONG, "WzFd", "e30=", "W10="):
        yield "ListSessions", pb.ListSessionsRequest(page_token=token), "page_token"
        yield "ListResults", pb.ListResultsRequest(page_token=token), "page_token"
    for epoch in ("x" * 65, "a\x00b"):
        yield "WatchSessions", pb.WatchSessionsRequest(epoch=epoch), "epoch"
    yield "WatchSessions", pb.WatchSessionsRequest(offset=7), "epoch"
    for interval in (Duration(seconds=61), Duration(seconds=-1), Duration(seconds=60, nanos=1)):
        yield "WatchSessions", pb.WatchSessionsRequest(interval=interval), "interval"

    yield "ListResults", pb.ListResultsRequest(page_size=1001), "page_size"
    for state in (1, 2, 6, 10, -1):
        yield "ListResults", pb.ListResultsRequest(state=state), "state"  # type: ignore[arg-type]
    for slot in ("x" * 129, "a\x00b"):
        yield "ListResults", pb.ListResultsRequest(slot_id=slot), "slot_id"
    yield "ListResults", pb.ListResultsRequest(completed_after=OUT_OF_RANGE), "completed_after"
    yield "ListResults", pb.ListResultsRequest(completed_before=OUT_OF_RANGE), "completed_before"
    for before in (Timestamp(seconds=5), Timestamp(seconds=6)):
        request = pb.ListResultsRequest(completed_after=Timestamp(seconds=6), completed_before=before)
        yield "ListResults", request, "completed_before"


# Whose every value means something.
ANY_VALUE = {
    "total_pages", "current_page", "products_found", "errors_count", "offset",
}  # fmt: skip
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


async def test_wrong_fields_are_named_and_nothing_is_done(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.OPERATOR)
    count = 0
    for method, request, field in cases():
        count += 1
        code, reason, fields = await refusal(call(service, method, request, metadata=metadata))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (method, request)
        if field == "page_token":
            assert reason == "INVALID_PAGE_TOKEN", (method, request)
        else:
            assert (reason, field in fields) == ("INVALID_FIELD", True), (method, request, fields)
    assert count > 150
    watch = session_pb2_grpc.WatchServiceStub(service.channel)
    totals = await watch.GetTotals(pb.GetTotalsRequest(), metadata=metadata)
    assert (totals.live, totals.results_committed) == (0, 0)


def test_every_field_of_every_request_is_tried() -> None:
    tried = {(method, part) for method, _, field in cases() for part in field.replace("[", ".").split(".")}

    def walk(method: str, message: Descriptor) -> Iterator[str]:
        for field in message.fields:
            nested = field.message_type
            if nested is not None and nested.file.name == pb.DESCRIPTOR.name:
                yield from walk(method, nested)
            elif field.name not in ANY_VALUE and (method, field.name) not in tried:
                yield f"{method}.{field.name}"

    left = [field for _, method in METHODS for field in walk(method, requests_of(method).DESCRIPTOR)]
    assert left == []


async def test_edges_are_taken(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.OPERATOR)
    most = 2**32 - 1
    request = pb.StartSessionRequest(
        session_id="가" * 128, stage="x" * 64, total_pages=most, slot_id="s" * 128, client_id="c" * 128,
        tags=[f"{number:064}" for number in range(16)], config_snapshot_json='{"a": "' + "x" * 16375 + '"}',
        allocation_key=UUID_TEXT.upper(), lease_token=b"t" * 16,
        progress=pb.ProgressUpdate(
            session_id="가" * 128, sequence=2**64 - 2, state=pb.SESSION_STATE_PAUSED, stage="y" * 64,
            current_page=most, total_pages=most, products_found=most, errors_count=most,
        ),
    )  # fmt: skip
    await call(service, "StartSession", request, metadata=metadata)
    update = pb.ProgressUpdate()
    update.CopyFrom(request.progress)
    update.sequence += 1
    await call(service, "ReportProgress", pb.ReportProgressRequest(updates=[update] * 1000), metadata=metadata)
    await call(
        service, "ReportStream", pb.ReportStreamRequest(batch=2**64 - 1, updates=[update] * 1000), metadata=metadata
    )
    complete = pb.CompleteSessionRequest(
        session_id="가" * 128, state=pb.SESSION_STATE_STOPPED, stage="z" * 64, total_pages=most, products_found=most,
        errors_count=most, started_at=Timestamp(seconds=0), message="m" * 1024, config_snapshot_json="{}",
    )  # fmt: skip
    await call(service, "CompleteSession", complete, metadata=metadata)
    watch = session_pb2_grpc.WatchServiceStub(service.channel)
    (result,) = (await watch.ListResults(pb.ListResultsRequest(page_size=1000), metadata=metadata)).results
    assert (result.total_pages, result.message, result.stage) == (most, "m" * 1024, "z" * 64)
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


async def test_results_are_for_operators(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.WORKER)
    code, reason, _ = await refusal(call(service, "ListResults", pb.ListResultsRequest(), metadata=metadata))
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    for method in ("ListSessions", "GetTotals", "WatchSessions"):
        await call(service, method, requests_of(method)(), metadata=metadata)
