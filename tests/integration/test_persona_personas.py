"""PersonaService over a real database: create, read, list, status, rollback and forced release."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from muster.persona_store.v1 import checkout_pb2, persona_pb2

from tests.support.personas import (
    READ_ONLY,
    PersonaClient,
    new_id,
    refused,
    start_personas,
)
from tests.support.services import StartService

STATUS = persona_pb2.PersonaStatus


@pytest.fixture
async def client(start_service: StartService, tmp_path: Path) -> PersonaClient:
    return await start_personas(start_service, tmp_path)


async def test_a_persona_is_created_whole(client: PersonaClient, tmp_path: Path) -> None:
    data = b'{ "b": 1.0, "a": "\xc3\xa9" }'
    persona = await client.create(
        fingerprint=data, base_profile="desktop", aging_level=40, region="kr", tags=["z", "a", "z"]
    )
    assert persona == await client.get(persona.persona_id)
    assert persona.status == STATUS.PERSONA_STATUS_ACTIVE
    assert persona.fingerprint_sha256 == hashlib.sha256('{"a":"é","b":1}'.encode()).digest()
    assert (persona.base_profile, persona.aging_level, persona.region) == ("desktop", 40, "kr")
    assert list(persona.tags) == ["a", "z"]
    assert (persona.generation, persona.total_uses, persona.held_by) == (1, 0, "")
    assert not persona.HasField("last_used_at")
    assert abs(persona.created_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=1)
    # The bytes as they came, under the key that the design names.
    assert await client.load(persona.persona_id) == {"fingerprint.json": data}
    spread = hashlib.sha256(persona.persona_id.encode()).hexdigest()
    key = f"v1/{spread[:2]}/{spread[2:4]}/{persona.persona_id}/1/fingerprint.json"
    assert (tmp_path / key).read_bytes() == data
    assert await client.sql("SELECT * FROM pending_objects") == []


async def test_a_fingerprint_is_taken_once_per_organization(client: PersonaClient) -> None:
    first = await client.create(fingerprint=b'{"a":1,"b":2}')
    refusal = await refused(client.create(fingerprint=b'{"b":2.0, "a":1}'))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "FINGERPRINT_EXISTS")
    assert refusal.metadata == {"persona_id": first.persona_id}
    other = await PersonaClient.of(client.service, "globex")
    assert (await other.create(fingerprint=b'{"a":1,"b":2}')).persona_id != first.persona_id


async def test_of_racing_creations_with_one_fingerprint_one_wins(client: PersonaClient) -> None:
    answers = await asyncio.gather(*(client.create(fingerprint=b'{"a":1}') for _ in range(12)), return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, persona_pb2.Persona)]
    assert len(made) == 1
    for answer in answers:
        if isinstance(answer, grpc.aio.AioRpcError):
            assert answer.code() is grpc.StatusCode.ALREADY_EXISTS
    assert (await client.sql("SELECT count(*) AS n FROM personas"))[0]["n"] == 1


async def test_creation_is_idempotent_by_request_id(client: PersonaClient) -> None:
    request_id = new_id()
    answers = await asyncio.gather(
        *(client.create(fingerprint=b'{"a":1}', request_id=request_id) for _ in range(6)), return_exceptions=True
    )
    ids = {answer.persona_id for answer in answers if isinstance(answer, persona_pb2.Persona)}
    assert len(ids) == 1
    assert (await client.create(fingerprint=b'{"a":1}', request_id=request_id)).persona_id in ids
    refusal = await refused(client.create(fingerprint=b'{"a":2}', request_id=request_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


async def test_lists_page_by_id_and_filter(client: PersonaClient) -> None:
    made = [
        await client.create(
            region="kr" if index % 2 else "us",
            tags=["even"] if index % 2 == 0 else [],
            status=STATUS.PERSONA_STATUS_AGING if index < 3 else STATUS.PERSONA_STATUS_ACTIVE,
        )
        for index in range(7)
    ]
    other = await PersonaClient.of(client.service, "globex")
    await other.create()

    async def listed(**filters: object) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = persona_pb2.ListPersonasRequest(page_size=2, page_token=token, **filters)  # type: ignore[arg-type]
            page = await client.personas.ListPersonas(request, metadata=client.worker)
            assert len(page.personas) <= 2
            found += [persona.persona_id for persona in page.personas]
            token = page.next_page_token
            if not token:
                return found

    ids = [persona.persona_id for persona in made]
    assert await listed() == ids
    assert await listed(region="kr") == ids[1::2]
    assert await listed(tag="even") == ids[::2]
    assert await listed(status=STATUS.PERSONA_STATUS_AGING) == ids[:3]
    assert await listed(region="mars") == []

    first = await client.personas.ListPersonas(
        persona_pb2.ListPersonasRequest(page_size=1, region="kr"), metadata=client.worker
    )
    for token in (first.next_page_token, first.next_page_token[:-4], "x", "é"):
        request = persona_pb2.ListPersonasRequest(page_size=1, region="us", page_token=token)
        refusal = await refused(client.personas.ListPersonas(request, metadata=client.worker))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")
    stolen = persona_pb2.ListPersonasRequest(page_size=1, region="kr", page_token=first.next_page_token)
    assert (await refused(other.personas.ListPersonas(stolen, metadata=other.worker))).reason == "INVALID_PAGE_TOKEN"


STEPS = {
    "AGING": {"ACTIVE", "BLOCKED", "DISCARDED"},
    "ACTIVE": {"DORMANT", "BLOCKED", "DISCARDED"},
    "DORMANT": {"ACTIVE", "BLOCKED", "DISCARDED"},
    "BLOCKED": {"DORMANT", "DISCARDED"},
    "DISCARDED": set(),
}


async def set_status(client: PersonaClient, persona_id: str, status: str, reason: str = "test") -> persona_pb2.Persona:
    request = persona_pb2.SetPersonaStatusRequest(
        persona_id=persona_id, status=STATUS.Value(f"PERSONA_STATUS_{status}"), reason=reason
    )
    return (await client.personas.SetPersonaStatus(request, metadata=client.operator)).persona


@pytest.mark.parametrize("before", STEPS)
async def test_a_life_has_the_steps_of_the_contract_and_no_other(client: PersonaClient, before: str) -> None:
    for after in STEPS:
        persona = await client.create()
        number = STATUS.Value(f"PERSONA_STATUS_{before}")
        await client.sql("UPDATE personas SET status = $1 WHERE persona_id = $2", number, persona.persona_id)
        if after == before or after in STEPS[before]:
            changed = await set_status(client, persona.persona_id, after)
            assert changed.status == STATUS.Value(f"PERSONA_STATUS_{after}")
        else:
            refusal = await refused(set_status(client, persona.persona_id, after))
            assert (refusal.code, refusal.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "STATUS_TRANSITION_REFUSED",
            )
            assert refusal.metadata == {"from": before.lower(), "to": after.lower()}
            assert (await client.get(persona.persona_id)).status == number
    events = await client.sql("SELECT from_status, to_status FROM persona_events")
    assert len(events) == len(STEPS[before])


async def test_events_name_actor_and_reason(client: PersonaClient) -> None:
    persona = await client.create()
    await set_status(client, persona.persona_id, "BLOCKED", "refused twice")
    (event,) = await client.sql("SELECT * FROM persona_events")
    assert (event["kind"], event["from_status"], event["to_status"]) == (1, 2, 4)
    assert event["reason"] == "refused twice"
    keys = await client.sql("SELECT role FROM identity.api_keys WHERE key_id = $1::uuid", event["actor"])
    assert [key["role"] for key in keys] == [2]


async def test_forced_release_ends_every_check_out(client: PersonaClient) -> None:
    persona = await client.create()
    held = await client.held("writer", persona.persona_id)
    await client.held("reader", persona.persona_id, mode=READ_ONLY)
    request = persona_pb2.ForceReleaseRequest(persona_id=persona.persona_id, reason="stuck")
    assert (await client.personas.ForceRelease(request, metadata=client.operator)).released == 2
    assert (await client.personas.ForceRelease(request, metadata=client.operator)).released == 0
    assert (await client.get(persona.persona_id)).held_by == ""
    assert (await refused(client.save(held, {"state.json": b"{}"}))).reason == "CHECK_OUT_LOST"
    events = await client.sql("SELECT kind, reason, released FROM persona_events ORDER BY event_id")
    assert [tuple(event) for event in events] == [(2, "stuck", 2), (2, "stuck", 0)]


async def test_rollback_brings_back_the_parts_of_a_generation(client: PersonaClient) -> None:
    persona = await client.create()
    held = await client.held("h", persona.persona_id)
    await client.save(held, {"state.json": b"two", "cookies.tar.gz": b"jar"})
    await client.save(held, {"state.json": b"three"})
    request = persona_pb2.RollbackBundleRequest(request_id=new_id(), persona_id=persona.persona_id, generation=2)
    refusal = await refused(client.personas.RollbackBundle(request, metadata=client.operator))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PERSONA_CHECKED_OUT")
    assert refusal.metadata["persona_id"] == persona.persona_id
    await client.bring_back("h", checkout_pb2.USE_OUTCOME_NOT_USED)

    answer = await client.personas.RollbackBundle(request, metadata=client.operator)
    assert answer == await client.personas.RollbackBundle(request, metadata=client.operator)
    assert answer.generation.generation == 4
    loaded = await client.load(persona.persona_id)
    assert loaded["state.json"] == b"two"
    assert loaded["cookies.tar.gz"] == b"jar"
    assert await client.generations(persona.persona_id) == [4, 3, 2, 1]
    for generation in (9, 2**63):
        unknown = persona_pb2.RollbackBundleRequest(
            request_id=new_id(), persona_id=persona.persona_id, generation=generation
        )
        refusal = await refused(client.personas.RollbackBundle(unknown, metadata=client.operator))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")
    reused = persona_pb2.RollbackBundleRequest(
        request_id=request.request_id, persona_id=persona.persona_id, generation=3
    )
    assert (await refused(client.personas.RollbackBundle(reused, metadata=client.operator))).reason == (
        "REQUEST_ID_REUSED"
    )


async def test_fingerprints_are_limited(client: PersonaClient) -> None:
    padding = "x" * (256 * 1024 - len('{"a":""}'))
    largest = json.dumps({"a": padding}, separators=(",", ":")).encode()
    assert (await client.create(fingerprint=largest)).generation == 1
    before = await client.snapshot()
    refusal = await refused(client.create(fingerprint=largest + b" "))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PART_TOO_LARGE")
    assert refusal.metadata == {"part": "fingerprint.json", "size": "262145", "limit": "262144"}
    assert await client.snapshot() == before
