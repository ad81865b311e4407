"""Every field of every RPC of the session tracker, wrong in each way it can be; and calls that must not be made.

A walk over the contract's descriptors proves that every path has a case, but for those of which every value means
something.
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
from tests.support.tracker_input import LIVE, LIVE_PAGES, MOST, NOW, TOKEN, UUID_TEXT, cases, update

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
