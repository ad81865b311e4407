"""Every field of every call, wrong in every way: the right status, the field's name, and nothing done."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import exit_pb2, insight_pb2, slot_pb2, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, spec
from tests.support.services import StartService

ID = "123e4567-e89b-12d3-a456-426614174000"
Change = Callable[[Any], Any]

CLIENT = work_pb2.ClientIdentity(client_id="pc-1")
LEASE = work_pb2.Lease(allocation_key=ID, lease_token=bytes(16))


def _put(path: str, value: Any) -> Change:
    """Sets a field by its path; a message is copied, a list replaced."""

    def change(message: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            message = message[int(parent)] if parent.isdigit() else getattr(message, parent)
        if value is None:
            message.ClearField(name)
        elif isinstance(value, list):
            message.ClearField(name)
            getattr(message, name).extend(value)
        elif isinstance(value, dict):
            for key, entry in value.items():
                getattr(message, name)[key].CopyFrom(entry)
        elif hasattr(value, "SerializeToString"):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)

    return change


def _seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def _many(count: int) -> dict[str, work_pb2.SettingValue]:
    return {f"s{number}": work_pb2.SettingValue(int_value=1) for number in range(count)}


_SETTING_FAULTS: list[Any] = [
    _many(65),
    {"": work_pb2.SettingValue(int_value=1)},
    {"n" * 65: work_pb2.SettingValue(int_value=1)},
    {"n": work_pb2.SettingValue()},
    {"n": work_pb2.SettingValue(double_value=float("nan"))},
    {"n": work_pb2.SettingValue(double_value=float("inf"))},
    {"n": work_pb2.SettingValue(string_value="x" * 4097)},
    {"n": work_pb2.SettingValue(string_value="\0")},
]

_CLIENT_FAULTS: list[tuple[str, Any]] = [
    ("client", None),
    ("client.client_id", ""),
    ("client.client_id", "x" * 129),
    ("client.client_id", "a b"),
    ("client.client_name", "x" * 129),
    ("client.instance_number", 65536),
    ("client.user_folder_number", 65536),
    ("client.client_ip", "nowhere"),
]

_ALLOCATE_FAULTS: list[tuple[str, Any]] = [
    ("request_id", ""),
    ("request_id", "no"),
    *_CLIENT_FAULTS,
    ("max_items", 257),
    ("wait", _seconds(30.1)),
    ("wait", _seconds(-1)),
    ("target", "x" * 129),
    ("target", "\x00"),
    ("region", "x" * 65),
    ("traceparent", "00-xyz"),
    ("traceparent", f"00-{'0' * 32}-{'1' * 16}-01"),
]

_RESULT_FAULTS: list[tuple[str, Any]] = [
    *_CLIENT_FAULTS,
    ("results", []),
    ("results.0.lease", None),
    ("results.0.lease.allocation_key", ""),
    ("results.0.lease.lease_token", b"short"),
    ("results.0.outcome", 0),
    ("results.0.outcome", 9),
    ("results.0.block_type", "captcha"),
    ("results.0.execution_time", None),
    ("results.0.execution_time", _seconds(-0.001)),
    ("results.0.execution_time", _seconds(86401)),
    *(("results.0.applied_settings", fault) for fault in _SETTING_FAULTS),
    ("results.0.exit_ip", "300.1.1.1"),
    ("results.0.products", [work_pb2.Product(product_id="p")] * 1001),
    ("results.0.products", [work_pb2.Product()]),
    ("results.0.products", [work_pb2.Product(product_id="p" * 257)]),
    ("results.0.products", [work_pb2.Product(product_id="p", title="t" * 1025)]),
    ("results.0.products", [work_pb2.Product(product_id="p", url="u" * 2049)]),
    *(("results.0.products", [work_pb2.Product(product_id="p", attributes=fault)]) for fault in _SETTING_FAULTS),
    ("results.0.retry_after", _seconds(86401)),
    ("results.0.error_message", "x" * 1025),
]

_SPEC_FAULTS: list[tuple[str, Any]] = [
    ("spec.keyword", ""),
    ("spec.keyword", "x" * 201),
    ("spec.code", "x" * 65),
    ("spec.target", "x" * 129),
    ("spec.start_date", ""),
    ("spec.start_date", "2024-02-30"),
    ("spec.start_date", "20240101"),
    ("spec.end_date", "1969-01-01"),
    ("spec.end_date", "2019-12-31"),
    ("spec.daily_quota", 0),
    ("spec.daily_quota", 1_000_001),
    *(("spec.settings", fault) for fault in _SETTING_FAULTS),
    ("spec.settings", {f"s{n}": work_pb2.SettingValue(string_value="x" * 4000) for n in range(5)}),
    ("spec.priority", 1001),
    ("spec.priority", -1001),
    ("spec.weight", 1001),
    ("spec.persona.tags", [f"t{n}" for n in range(17)]),
    ("spec.persona.tags", [""]),
    ("spec.persona.tags", ["x" * 65]),
    ("spec.persona.tags", ["a", "a"]),
    ("spec.persona.region", "x" * 65),
    ("spec.persona.min_aging_level", 101),
    ("spec.persona.cool_down_seconds", 31_536_001),
]

_LEASE_FAULTS: list[tuple[str, Any]] = [
    ("leases", []),
    ("leases", [LEASE] * 1001),
    ("leases.0.allocation_key", ""),
    ("leases.0.allocation_key", "x" * 36),
    ("leases.0.lease_token", b""),
    ("leases.0.lease_token", bytes(17)),
]

_PAGE_FAULTS: list[tuple[str, Any]] = [("page_size", 1001), ("page_token", "!"), ("page_token", "W10=")]

_EXIT_FAULTS: list[tuple[str, Any]] = [
    ("exits", []),
    ("exits", [exit_pb2.ExitSpec(endpoint=f"http://h:{n + 1}") for n in range(501)]),
    ("exits", [exit_pb2.ExitSpec(endpoint="http://h:1")] * 2),
    *(
        ("exits.0.endpoint", endpoint)
        for endpoint in (
            "",
            "h:1",
            "ftp://h:1",
            "http://h",
            "http://h:0",
            "http://h:65536",
            "http://u:p@h:1",
            "http://h:1/x",
        )
    ),
    ("exits.0.endpoint", f"http://{'h' * 510}:1"),
    ("exits.0.region", "x" * 65),
    ("exits.0.cap_mode", 9),
    ("exits.0.cap", 100_001),
]

SLOT = slot_pb2.CreateSlotRequest(request_id=ID, spec=spec())
UPDATE = slot_pb2.UpdateSlotRequest(slot_id=ID, spec=spec(), update_mask=FieldMask(paths=["keyword"]))


def _masked(fault: tuple[str, Any]) -> tuple[slot_pb2.UpdateSlotRequest, tuple[str, Any]]:
    masked = slot_pb2.UpdateSlotRequest()
    masked.CopyFrom(UPDATE)
    masked.update_mask.paths[:] = [fault[0].split(".")[1]]
    return masked, fault


# Service, method, a request that is well formed, and the fields that are to be spoilt.
CALLS: list[tuple[str, str, Any, list[tuple[str, Any]]]] = [
    ("work", "AllocateWork", work_pb2.AllocateWorkRequest(request_id=ID, client=CLIENT), _ALLOCATE_FAULTS),
    ("work", "RenewLeases", work_pb2.RenewLeasesRequest(leases=[LEASE]), _LEASE_FAULTS),
    ("work", "ReleaseLeases", work_pb2.ReleaseLeasesRequest(leases=[LEASE]), [*_LEASE_FAULTS, ("reason", "x" * 257)]),
    (
        "work",
        "SubmitResults",
        work_pb2.SubmitResultsRequest(
            client=CLIENT,
            results=[
                work_pb2.WorkResult(lease=LEASE, outcome=work_pb2.WORK_OUTCOME_FAILED, execution_time=_seconds(1))
            ],
        ),
        _RESULT_FAULTS,
    ),
    (
        "work",
        "SubmitResults",
        work_pb2.SubmitResultsRequest(
            client=CLIENT,
            results=[
                work_pb2.WorkResult(
                    lease=LEASE, outcome=work_pb2.WORK_OUTCOME_BLOCKED, block_type="b", execution_time=_seconds(1)
                )
            ],
        ),
        [("results.0.block_type", ""), ("results.0.block_type", "x" * 65)],
    ),
    ("work", "Heartbeat", work_pb2.HeartbeatRequest(client=CLIENT), _CLIENT_FAULTS),
    ("slots", "CreateSlot", SLOT, [("request_id", ""), ("spec", None), ("spec.external_id", "x" * 129), *_SPEC_FAULTS]),
    ("slots", "GetSlot", slot_pb2.GetSlotRequest(slot_id=ID), [("slot_id", ""), ("slot_id", "x")]),
    (
        "slots",
        "ListSlots",
        slot_pb2.ListSlotsRequest(),
        [*_PAGE_FAULTS, ("target", "x" * 129), ("keyword_prefix", "x" * 201)],
    ),
    (
        "slots",
        "UpdateSlot",
        UPDATE,
        [("slot_id", ""), ("etag", "x" * 65), ("reason", "x" * 257), ("update_mask", FieldMask(paths=["external_id"]))],
    ),
    *(
        ("slots", "UpdateSlot", masked, [fault])
        for masked, fault in map(_masked, _SPEC_FAULTS)
        if fault != ("spec.end_date", "2019-12-31")  # a matter of the slot's other date, and tested with it
    ),
    ("slots", "ListSlotHistory", slot_pb2.ListSlotHistoryRequest(slot_id=ID), [("slot_id", ""), *_PAGE_FAULTS]),
    (
        "exits",
        "ImportExits",
        exit_pb2.ImportExitsRequest(exits=[exit_pb2.ExitSpec(endpoint="http://h:1")]),
        _EXIT_FAULTS,
    ),
    ("exits", "ListExits", exit_pb2.ListExitsRequest(), _PAGE_FAULTS),
    ("exits", "SetExitEnabled", exit_pb2.SetExitEnabledRequest(exit_id=ID), [("exit_id", "")]),
    (
        "exits",
        "ToggleExit",
        exit_pb2.ToggleExitRequest(request_id=ID, exit_id=ID),
        [("request_id", ""), ("exit_id", "x"), ("reason", "x" * 257)],
    ),
    ("exits", "ListExitToggles", exit_pb2.ListExitTogglesRequest(), [*_PAGE_FAULTS, ("exit_id", "x")]),
    (
        "insight",
        "ExplainAllocation",
        insight_pb2.ExplainAllocationRequest(),
        [("slot_id", "x"), ("target", "x" * 129), ("region", "x" * 65)],
    ),
    ("insight", "GetDashboard", insight_pb2.GetDashboardRequest(), [*_PAGE_FAULTS, ("work_date", "today")]),
    (
        "insight",
        "ListAllocations",
        insight_pb2.ListAllocationsRequest(),
        [*_PAGE_FAULTS, ("work_date", "2024-13-01"), ("status", 77), ("slot_id", "x")],
    ),
]

# Method and request about something that is not there, and the reason.
STRANGERS: list[tuple[str, str, Any, str]] = [
    ("slots", "GetSlot", slot_pb2.GetSlotRequest(slot_id=ID), "SLOT_NOT_FOUND"),
    ("slots", "UpdateSlot", UPDATE, "SLOT_NOT_FOUND"),
    ("slots", "ListSlotHistory", slot_pb2.ListSlotHistoryRequest(slot_id=ID), "SLOT_NOT_FOUND"),
    ("insight", "ExplainAllocation", insight_pb2.ExplainAllocationRequest(slot_id=ID), "SLOT_NOT_FOUND"),
    ("exits", "SetExitEnabled", exit_pb2.SetExitEnabledRequest(exit_id=ID), "EXIT_NOT_FOUND"),
    ("exits", "ToggleExit", exit_pb2.ToggleExitRequest(request_id=ID, exit_id=ID), "EXIT_NOT_FOUND"),
]


def _info(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    reason, fields = "", []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            fields = [violation.field for violation in bad.field_violations]
    return reason, fields


async def _contents(allocator: Allocator) -> list[Any]:
    tables = await allocator.sql(
        "SELECT relname FROM pg_class c WHERE relnamespace = 'allocator'::regnamespace AND relkind IN ('r', 'p') "
        "AND NOT relispartition AND relname NOT IN ('organizations', 'alembic_version') ORDER BY 1"
    )
    return [(row["relname"], len(await allocator.sql(f"SELECT FROM {row['relname']}"))) for row in tables]


async def test_every_bad_field_is_refused_by_name_and_nothing_is_done(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    allocator.door = await allocator.connect()
    try:
        before = await _contents(allocator)
        tried = 0
        for service, method, request, faults in CALLS:
            for path, value in faults:
                spoilt = type(request)()
                spoilt.CopyFrom(request)
                _put(path, value)(spoilt)
                metadata = allocator.worker if service == "work" else allocator.operator
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await getattr(getattr(allocator, service), method)(spoilt, metadata=metadata)
                what = (method, path, str(value)[:40], refused.value.details())
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, what
                reason, fields = _info(refused.value)
                if path == "page_token":
                    assert reason == "INVALID_PAGE_TOKEN", what
                else:
                    assert reason == "INVALID_FIELD", what
                    wanted = path.replace(".0", "[0]").removesuffix("[0]")
                    assert any(field.startswith(wanted) or wanted.startswith(field) for field in fields), what
                tried += 1
        assert tried > 180
        assert await _contents(allocator) == before
    finally:
        await allocator.door.close()


async def test_what_is_not_there_is_not_found(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    for service, method, request, reason in STRANGERS:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(getattr(allocator, service), method)(request, metadata=allocator.operator)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert _info(refused.value)[0] == reason
    # A toggle that was refused has not used up its request id.
    assert not await allocator.sql("SELECT FROM requests")


async def test_every_method_asks_for_a_key_and_its_role(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    for service, method, request, _ in CALLS:
        call = getattr(getattr(allocator, service), method)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        if service != "work":
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(request, metadata=await allocator.service.metadata(Role.WORKER))
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_call_without_time_is_not_begun(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    await allocator.slot()
    request = work_pb2.AllocateWorkRequest(request_id=str(uuid.uuid4()), client=CLIENT)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.work.AllocateWork(request, metadata=allocator.worker, timeout=0.001)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not await allocator.sql("SELECT FROM leases")
