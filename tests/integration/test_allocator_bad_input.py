"""Every field of every call, wrong in every way: the right status, the field's name, and nothing done."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import admin_pb2, client_pb2, exit_pb2, insight_pb2, slot_pb2, target_pb2, work_pb2

from services.call import Role
from tests.support.allocator import Allocator, spec, until
from tests.support.allocator_input import CALLS, SPEC_ROWS
from tests.support.bad_input import BadCall, automatic, leaves, plain, spoil
from tests.support.services import StartService

_MODULES = (work_pb2, slot_pb2, exit_pb2, target_pb2, client_pb2, insight_pb2, admin_pb2)
SERVICES: dict[str, ServiceDescriptor] = {
    name: service for module in _MODULES for name, service in module.DESCRIPTOR.services_by_name.items()
}
# Fields that nothing can be wrong with, and why.
FREE = {
    "results[].products[].rank": "any place in a listing is a place",
    "row": "the caller's own number",
    "spec.persona": "unset: no persona is needed",
}
# Streams, whose messages are looked at by tests of their own.
STREAMS = {"WorkService/WorkStream", "SlotService/ImportSlots"}


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    made = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    made.door = await made.connect()
    yield made
    await made.door.close()


async def _call(allocator: Allocator, method: str, request: Any) -> Any:
    service = SERVICES[method.partition("/")[0]]
    found = service.methods_by_name[method.partition("/")[2]]
    role = {"WorkService": Role.WORKER, "AdminService": Role.ADMIN}.get(service.name, Role.OPERATOR)
    call: Any = allocator.service.channel.unary_unary(
        f"/{service.full_name}/{found.name}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=GetMessageClass(found.output_type).FromString,
    )
    return await call(request, metadata=await allocator.service.metadata(role))


def _info(error: grpc.aio.AioRpcError) -> tuple[str, list[str]]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
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


async def _contents(allocator: Allocator) -> dict[str, tuple[int, str]]:
    """Returns the number of rows of every table, and a digest of them."""
    tables = await allocator.sql(
        "SELECT relname FROM pg_class c WHERE relnamespace = 'allocator'::regnamespace AND relkind IN ('r', 'p') "
        "AND NOT relispartition AND relname NOT IN ('organizations', 'alembic_version') ORDER BY 1"
    )
    contents = {}
    for table in tables:
        name = table["relname"]
        (row,) = await allocator.sql(
            f"SELECT count(*) AS rows, md5(string_agg(t::text, '|' ORDER BY t::text)) AS digest FROM {name} t"
        )
        contents[name] = row["rows"], row["digest"]
    return contents


async def _quiet(allocator: Allocator) -> dict[str, tuple[int, str]]:
    """Returns the contents once the loops that begin with the service have done their first round."""
    seen: list[dict[str, tuple[int, str]]] = [await _contents(allocator)]

    async def same_again() -> bool:
        seen.append(await _contents(allocator))
        return len(seen) > 10 and seen[-1] == seen[-10]

    await until(same_again)
    return seen[-1]


def test_every_field_of_every_request_has_its_bad_input() -> None:
    """So that no new field is forgotten."""
    bad: dict[str, set[str]] = {}
    for call in CALLS:
        bad.setdefault(call.method, set()).update(plain(path) for path, _ in call.faults)
    bad["SlotService/ImportSlots"] = {plain(path) for path, _ in SPEC_ROWS}
    # Of `spec` only what the mask names is looked at, and the mask must not name this one.
    bad["SlotService/UpdateSlot"] |= {"spec", "spec.external_id"}
    forgotten = []
    for name, service in SERVICES.items():
        for method in service.methods:
            known = bad.get(f"{name}/{method.name}", set())
            if method.name == "WorkStream":
                continue
            for path, field in leaves(method.input_type):
                if field.type == FieldDescriptor.TYPE_BOOL or field.type == FieldDescriptor.TYPE_ENUM:
                    continue  # any truth value is one; every enum is tried by its type
                if field.name == "page_size" or path in FREE or path in known:
                    continue
                if field.message_type is not None and field.message_type.GetOptions().map_entry:
                    continue  # every map is tried by its type
                forgotten.append(f"{name}/{method.name}: {path}")
    assert not forgotten, "\n".join(forgotten)
    assert set(bad) | STREAMS == {
        f"{name}/{method.name}" for name, service in SERVICES.items() for method in service.methods
    }


@pytest.mark.parametrize("service", SERVICES)
async def test_every_bad_field_is_refused_by_name_and_nothing_is_done(allocator: Allocator, service: str) -> None:
    await allocator.slot(keyword="stands", external_id="stands")
    await allocator.add_exits(1)
    before = await _quiet(allocator)
    wrong = []
    for call in CALLS:
        if not call.method.startswith(f"{service}/"):
            continue
        for path, value in [*call.faults, *automatic(call)]:
            spoilt = type(call.request)()
            spoilt.CopyFrom(call.request)
            spoil(spoilt, path, value)
            if (fault := await _refused(allocator, call, path, spoilt)) is not None:
                wrong.append(f"{call.method} {path}={str(value)[:60]!r}: {fault}")
    assert not wrong, "\n".join(wrong)
    assert await _contents(allocator) == before


async def _refused(allocator: Allocator, call: BadCall, path: str, spoilt: Any) -> str | None:
    """Returns what is wrong with the refusal; None when nothing is."""
    try:
        await _call(allocator, call.method, spoilt)
    except grpc.aio.AioRpcError as error:
        reason, fields = _info(error)
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            return f"{error.code().name} {reason}"
        if path == "page_token":
            return None if reason == "INVALID_PAGE_TOKEN" else reason
        wanted = plain(path).replace("[]", "[0]")
        named = any(field.startswith(wanted) or wanted.startswith(field) for field in fields)
        return None if reason == "INVALID_FIELD" and named else f"{reason}: {fields}"
    return "taken"


async def test_every_bad_row_of_an_import_is_refused_for_itself(allocator: Allocator) -> None:
    before = await _quiet(allocator)
    rows = []
    for number, (path, value) in enumerate(SPEC_ROWS):
        row = slot_pb2.ImportSlotsRequest(row=number, spec=spec(external_id=f"e{number}"))
        if path.startswith("spec.persona."):
            row.spec.persona.SetInParent()
        spoil(row, path, value)
        rows.append(row)
    metadata = await allocator.service.metadata(Role.OPERATOR)
    answers = {answer.row: answer async for answer in allocator.slots.ImportSlots(iter(rows), metadata=metadata)}
    taken = [SPEC_ROWS[number] for number, answer in answers.items() if answer.error.reason != "INVALID_FIELD"]
    assert not taken
    assert len(answers) == len(rows)
    assert not any(answer.slot_id or answer.created for answer in answers.values())
    assert await _contents(allocator) == before


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([work_pb2.WorkStreamRequest(sequence=0, renew=work_pb2.RenewLeasesRequest())], "sequence"),
        ([work_pb2.WorkStreamRequest(sequence=1)], "call"),
        ([work_pb2.WorkStreamRequest(sequence=1, renew=work_pb2.RenewLeasesRequest())], "leases"),
        ([work_pb2.WorkStreamRequest(sequence=1, release=work_pb2.ReleaseLeasesRequest())], "leases"),
        ([work_pb2.WorkStreamRequest(sequence=1, submit=work_pb2.SubmitResultsRequest())], "client"),
        ([work_pb2.WorkStreamRequest(sequence=1, allocate=work_pb2.AllocateWorkRequest())], "request_id"),
    ],
    ids=["sequence", "call", "renew", "release", "submit", "allocate"],
)
async def test_a_malformed_request_ends_the_stream(allocator: Allocator, requests: list[Any], field: str) -> None:
    call = allocator.work.WorkStream(iter(requests), metadata=allocator.worker)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in call:
            pass
    reason, fields = _info(refused.value)
    assert (refused.value.code(), reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert field in fields


async def test_every_method_asks_for_a_key_and_its_role(allocator: Allocator) -> None:
    lesser = {"AdminService": Role.OPERATOR}
    for method, request in {call.method: call.request for call in CALLS}.items():
        service = method.partition("/")[0]
        path = f"/{SERVICES[service].full_name}/{method.partition('/')[2]}"
        call: Any = allocator.service.channel.unary_unary(path, request_serializer=type(request).SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
        if service != "WorkService":
            metadata = await allocator.service.metadata(lesser.get(service, Role.WORKER))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(request, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED, method


async def test_a_request_that_is_wrong_all_over_is_told_the_first_fields(allocator: Allocator) -> None:
    # What an operator's list without schemes is; all of it would be more than a call's trailers carry.
    specs = [exit_pb2.ExitSpec(endpoint=f"10.0.{n // 250}.{n % 250}:3128") for n in range(500)]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.exits.ImportExits(exit_pb2.ImportExitsRequest(exits=specs), metadata=allocator.operator)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    reason, fields = _info(refused.value)
    assert (reason, fields[:2]) == ("INVALID_FIELD", ["exits[0].endpoint", "exits[1].endpoint"])
    assert str(refused.value.details()).endswith(f"and {500 - len(fields)} more")


async def test_a_call_without_time_is_not_begun(allocator: Allocator) -> None:
    await allocator.slot()
    request = work_pb2.AllocateWorkRequest(
        request_id=str(uuid.uuid4()), client=work_pb2.ClientIdentity(client_id="pc-1")
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.work.AllocateWork(request, metadata=allocator.worker, timeout=0.001)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not await allocator.sql("SELECT FROM leases")
