"""Bad input: every field of every RPC of the persona store, wrong, missing, too long or out of range."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from muster.persona_store.v1 import bundle_pb2, checkout_pb2, persona_pb2

from services.call import Role
from tests.support.personas import PersonaClient, duration, new_id, refusal_of, refused, start_personas
from tests.support.services import StartService

ID = str(uuid.UUID(int=7))
TOKEN = b"t" * 16
SHA = b"s" * 32


def criteria(**fields: Any) -> dict[str, Any]:
    return check_out(criteria=checkout_pb2.PersonaCriteria(**fields))


def check_out(**fields: Any) -> dict[str, Any]:
    whole = {"holder": "h", "duration": duration(60), **fields}
    if "criteria" not in whole:
        whole.setdefault("persona_id", ID)
    return {"items": [checkout_pb2.CheckOutItem(**whole)]}


def renewal(**fields: Any) -> dict[str, Any]:
    whole = {"holder": "h", "lease_token": TOKEN, "duration": duration(60), **fields}
    return {"items": [checkout_pb2.RenewCheckOutItem(**whole)]}


def check_in(**fields: Any) -> dict[str, Any]:
    return {"items": [checkout_pb2.CheckInItem(**{"holder": "h", **fields})]}


def part(name: str, data: bytes = b"x") -> bundle_pb2.Part:
    return bundle_pb2.Part(name=name, data=data)


CREATE = {"request_id": ID, "fingerprint_json": b'{"a":1}'}
SAVE = {"request_id": ID, "persona_id": ID, "lease_token": TOKEN, "parts": [part("state.json")]}
STATUS = {"persona_id": ID, "status": 3, "reason": "r"}
ROLLBACK = {"request_id": ID, "persona_id": ID, "generation": 1}
RELEASE = {"persona_id": ID, "reason": "r"}
BAD_IDS = ("", "x", "123", ID + "0", "g" * 36, "{" + ID[:34] + "}")
ENDLESS = Duration(seconds=2**62, nanos=5)

# Method, the request's fields, the field that is named.
CASES: list[tuple[str, dict[str, Any], str]] = [
    *(("CreatePersona", {**CREATE, "request_id": bad}, "request_id") for bad in BAD_IDS),
    *(
        ("CreatePersona", {**CREATE, "fingerprint_json": bad}, "fingerprint_json")
        for bad in (b"", b"[]", b"{", b"\xff")
    ),
    ("CreatePersona", {**CREATE, "base_profile": "x" * 21}, "base_profile"),
    ("CreatePersona", {**CREATE, "base_profile": "a\0b"}, "base_profile"),
    ("CreatePersona", {**CREATE, "aging_level": 101}, "aging_level"),
    *(("CreatePersona", {**CREATE, "status": bad}, "status") for bad in (3, 4, 5, 6, -1, 2**31 - 1)),
    ("CreatePersona", {**CREATE, "region": "x" * 65}, "region"),
    ("CreatePersona", {**CREATE, "region": "\x1b[0m"}, "region"),
    ("CreatePersona", {**CREATE, "tags": [str(n) for n in range(17)]}, "tags"),
    ("CreatePersona", {**CREATE, "tags": ["ok", ""]}, "tags[1]"),
    ("CreatePersona", {**CREATE, "tags": ["x" * 65]}, "tags[0]"),
    ("CreatePersona", {**CREATE, "tags": ["a\0"]}, "tags[0]"),
    *(("GetPersona", {"persona_id": bad}, "persona_id") for bad in BAD_IDS),
    ("ListPersonas", {"page_size": 1001}, "page_size"),
    ("ListPersonas", {"page_token": "x" * 513}, "page_token"),
    *(("ListPersonas", {"status": bad}, "status") for bad in (6, -1)),
    ("ListPersonas", {"tag": "x" * 65}, "tag"),
    ("ListPersonas", {"tag": "\0"}, "tag"),
    ("ListPersonas", {"region": "x" * 65}, "region"),
    *(("SetPersonaStatus", {**STATUS, "persona_id": bad}, "persona_id") for bad in BAD_IDS),
    *(("SetPersonaStatus", {**STATUS, "status": bad}, "status") for bad in (0, 6, -1)),
    *(("SetPersonaStatus", {**STATUS, "reason": bad}, "reason") for bad in ("", "x" * 257, "a\0")),
    *(("ListGenerations", {"persona_id": bad}, "persona_id") for bad in BAD_IDS),
    *(("RollbackBundle", {**ROLLBACK, "request_id": bad}, "request_id") for bad in BAD_IDS),
    *(("RollbackBundle", {**ROLLBACK, "persona_id": bad}, "persona_id") for bad in BAD_IDS),
    ("RollbackBundle", {**ROLLBACK, "generation": 0}, "generation"),
    *(("ForceRelease", {**RELEASE, "persona_id": bad}, "persona_id") for bad in BAD_IDS),
    *(("ForceRelease", {**RELEASE, "reason": bad}, "reason") for bad in ("", "x" * 257)),
    ("CheckOutPersonas", {}, "items"),
    ("CheckOutPersonas", {"items": check_out()["items"] * 257}, "items"),
    *(("CheckOutPersonas", check_out(holder=bad), "items[0].holder") for bad in ("", "x" * 129, "a\0")),
    *(("CheckOutPersonas", check_out(persona_id=bad), "items[0].persona_id") for bad in BAD_IDS),
    *(("CheckOutPersonas", check_out(mode=bad), "items[0].mode") for bad in (3, -1)),
    *(
        ("CheckOutPersonas", check_out(duration=bad), "items[0].duration")
        for bad in (None, duration(0.9), duration(86401), duration(-5), ENDLESS)
    ),
    ("CheckOutPersonas", criteria(tags=[str(n) for n in range(17)]), "items[0].criteria.tags"),
    *(("CheckOutPersonas", criteria(tags=[bad]), "items[0].criteria.tags[0]") for bad in ("", "x" * 65)),
    ("CheckOutPersonas", criteria(region="x" * 65), "items[0].criteria.region"),
    ("CheckOutPersonas", criteria(min_aging_level=101), "items[0].criteria.min_aging_level"),
    *(
        ("CheckOutPersonas", criteria(cool_down=bad), "items[0].criteria.cool_down")
        for bad in (duration(-1), duration(366 * 86400), ENDLESS)
    ),
    ("RenewCheckOuts", {}, "items"),
    ("RenewCheckOuts", {"items": renewal()["items"] * 1001}, "items"),
    ("RenewCheckOuts", {"items": renewal()["items"] * 2}, "items"),
    *(("RenewCheckOuts", renewal(holder=bad), "items[0].holder") for bad in ("", "x" * 129)),
    *(("RenewCheckOuts", renewal(lease_token=bad), "items[0].lease_token") for bad in (b"", b"x" * 15, b"x" * 17)),
    *(
        ("RenewCheckOuts", renewal(duration=bad), "items[0].duration")
        for bad in (None, duration(0.5), duration(90000), ENDLESS)
    ),
    ("CheckInPersonas", {}, "items"),
    ("CheckInPersonas", {"items": check_in()["items"] * 1001}, "items"),
    *(("CheckInPersonas", check_in(holder=bad), "items[0].holder") for bad in ("", "x" * 129, "a\0")),
    *(("CheckInPersonas", check_in(outcome=bad), "items[0].outcome") for bad in (5, -1)),
    *((method, {"persona_id": bad}, "persona_id") for method in ("LoadBundle", "LoadBundleStream") for bad in BAD_IDS),
    *(
        (method, {"persona_id": ID, "parts": parts}, field)
        for method in ("LoadBundle", "LoadBundleStream")
        for parts, field in ((["state.json"] * 5, "parts"), (["state.json", "../x"], "parts[1]"), ([""], "parts[0]"))
    ),
    *(("SaveBundle", {**SAVE, "request_id": bad}, "request_id") for bad in BAD_IDS),
    *(("SaveBundle", {**SAVE, "persona_id": bad}, "persona_id") for bad in BAD_IDS),
    *(("SaveBundle", {**SAVE, "lease_token": bad}, "lease_token") for bad in (b"", b"x" * 15, b"x" * 17)),
    ("SaveBundle", {**SAVE, "parts": []}, "parts"),
    ("SaveBundle", {**SAVE, "parts": [part("state.json")] * 5}, "parts"),
    ("SaveBundle", {**SAVE, "parts": [part("state.json"), part("state.json", b"y")]}, "parts"),
    *(
        ("SaveBundle", {**SAVE, "parts": [part(bad)]}, "parts[0].name")
        for bad in ("", "x", "../state.json", "state.json\0")
    ),
]

REQUESTS: dict[str, type[Message]] = {
    **{
        name: getattr(persona_pb2, f"{name}Request")
        for name in persona_pb2.DESCRIPTOR.services_by_name["PersonaService"].methods_by_name
    },
    **{
        name: getattr(checkout_pb2, f"{name}Request")
        for name in checkout_pb2.DESCRIPTOR.services_by_name["CheckOutService"].methods_by_name
    },
    **{
        name: getattr(bundle_pb2, f"{name}Request")
        for name in bundle_pb2.DESCRIPTOR.services_by_name["BundleService"].methods_by_name
    },
}


def call(client: PersonaClient, method: str, request: Message, metadata: Any, **options: Any) -> Any:
    for stub in (client.personas, client.check_outs, client.bundles):
        if hasattr(stub, method):
            made = getattr(stub, method)(request, metadata=metadata, **options)
            return first(made) if method == "LoadBundleStream" else made
    raise AssertionError(method)


async def first(stream: Any) -> Any:
    async for response in stream:
        return response
    raise AssertionError("an empty stream")


@pytest.fixture
async def client(start_service: StartService, tmp_path: Path) -> PersonaClient:
    return await start_personas(start_service, tmp_path)


async def test_every_wrong_field_is_named_and_nothing_is_changed(client: PersonaClient) -> None:
    await client.held("someone", (await client.create()).persona_id)
    before = await client.snapshot()
    for method, fields, field in CASES:
        case = f"{method} {field} {fields}"[:300]
        refusal = await refused(call(client, method, REQUESTS[method](**fields), client.operator))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), case
        assert field in refusal.fields, (case, refusal.fields)
        assert field in refusal.metadata["fields"], case
    assert await client.snapshot() == before


def test_every_field_of_every_request_has_a_case() -> None:
    missing = []
    # Every number is a valid generation to ask for; one that is not kept is GENERATION_NOT_FOUND.
    free = {"LoadBundle.generation", "LoadBundleStream.generation", "SaveBundle.parts.data"}
    for method, kind in REQUESTS.items():
        if method == "SaveBundleStream":
            continue
        named = [field.replace("[0]", "").replace("[1]", "") for name, _, field in CASES if name == method]
        for path in paths(kind.DESCRIPTOR):
            if path not in named and f"{method}.{path}" not in free:
                missing.append(f"{method}.{path}")  # noqa: PERF401
    assert missing == []


def paths(descriptor: Any, prefix: str = "") -> Sequence[str]:
    found: list[str] = []
    for field in descriptor.fields:
        path = prefix + field.name
        inner = field.message_type
        if inner is None or inner.full_name.startswith("google.protobuf."):
            found.append(path)
        elif inner.name == "PersonaCriteria":
            found += paths(inner, f"{path}.")
        else:
            found += [path, *paths(inner, f"{path}.")]
    return found


def header(**fields: Any) -> bundle_pb2.SaveBundleStreamRequest:
    whole = {"request_id": ID, "persona_id": ID, "lease_token": TOKEN, **fields}
    return bundle_pb2.SaveBundleStreamRequest(header=bundle_pb2.SaveBundleHeader(**whole))


def begins(name: str = "state.json", size: int = 1, sha256: bytes = SHA) -> bundle_pb2.SaveBundleStreamRequest:
    return bundle_pb2.SaveBundleStreamRequest(part=persona_pb2.PartInfo(name=name, size_bytes=size, sha256=sha256))


def goes_on(data: bytes) -> bundle_pb2.SaveBundleStreamRequest:
    return bundle_pb2.SaveBundleStreamRequest(data=data)


async def test_every_wrong_piece_of_a_stream_is_named_and_nothing_is_changed(client: PersonaClient) -> None:
    persona = await client.create()
    held = await client.held("h", persona.persona_id)
    good = header(request_id=new_id(), persona_id=persona.persona_id, lease_token=held.lease_token)
    nothing = bundle_pb2.SaveBundleStreamRequest()
    cases: list[tuple[list[bundle_pb2.SaveBundleStreamRequest], str]] = [
        ([], "header"),
        ([nothing], "header"),
        ([begins()], "header"),
        ([goes_on(b"x")], "header"),
        *(([header(request_id=bad)], "header.request_id") for bad in BAD_IDS),
        *(([header(persona_id=bad)], "header.persona_id") for bad in BAD_IDS),
        *(([header(lease_token=bad)], "header.lease_token") for bad in (b"", b"x" * 15)),
        ([good], "part"),
        ([good, good], "piece"),
        ([good, nothing], "piece"),
        ([good, goes_on(b"x")], "data"),
        ([good, begins(name="x")], "part.name"),
        ([good, begins(name="")], "part.name"),
        ([good, begins(sha256=b"s" * 31)], "part.sha256"),
        ([good, begins(), goes_on(b"xy")], "data"),
        ([good, begins(), goes_on(b"x")], "data"),
        ([good, begins(size=2), goes_on(b"x")], "data"),
        ([good, begins(size=2), goes_on(b"x"), begins(name="history.json")], "data"),
        ([good, begins("cookies.tar.gz", 2**21), goes_on(b"x" * (2**20 + 1))], "data"),
        ([good, begins(size=0, sha256=bytes.fromhex(EMPTY)), begins(size=0, sha256=bytes.fromhex(EMPTY))], "part.name"),
    ]
    before = await client.snapshot()
    for pieces, field in cases:

        async def each(pieces: Sequence[bundle_pb2.SaveBundleStreamRequest] = pieces) -> AsyncIterator[Any]:
            for piece in pieces:
                yield piece

        refusal = await refused(client.bundles.SaveBundleStream(each(), metadata=client.worker))
        case = f"{field}: {pieces}"[:300]
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), case
        assert refusal.fields == [field], case
    assert await client.snapshot() == before


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
OPERATORS = {"CreatePersona", "SetPersonaStatus", "ListGenerations", "RollbackBundle", "ForceRelease"}


@pytest.mark.parametrize("method", [name for name in REQUESTS if name != "SaveBundleStream"])
async def test_keys_roles_and_deadlines_are_checked_first(client: PersonaClient, method: str) -> None:
    request = REQUESTS[method]()
    for metadata in ((), (("authorization", "Bearer " + "x" * 40),)):
        refusal = await refused(call(client, method, request, metadata))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
    worker = await client.service.metadata(Role.WORKER)
    if method in OPERATORS:
        refusal = await refused(call(client, method, request, worker, timeout=20))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    try:
        await call(client, method, request, client.operator, timeout=0.001)
    except grpc.aio.AioRpcError as error:
        late = refusal_of(error)
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("GetPersona", {"persona_id": ID}),
        ("SetPersonaStatus", STATUS),
        ("ListGenerations", {"persona_id": ID}),
        ("RollbackBundle", ROLLBACK),
        ("ForceRelease", RELEASE),
        ("LoadBundle", {"persona_id": ID}),
        ("LoadBundleStream", {"persona_id": ID}),
        ("SaveBundle", SAVE),
    ],
)
async def test_a_persona_that_is_not_there_is_not_found(
    client: PersonaClient, method: str, fields: dict[str, Any]
) -> None:
    before = await client.snapshot()
    refusal = await refused(call(client, method, REQUESTS[method](**fields), client.operator))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "PERSONA_NOT_FOUND")
    assert refusal.metadata == {"persona_id": ID}
    assert await client.snapshot() == before
