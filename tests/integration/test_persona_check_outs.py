"""CheckOutService over a real database: exclusivity, picks, renewal, expiry, counters."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from muster.persona_store.v1 import checkout_pb2, persona_pb2

from tests.support.personas import (
    EXCLUSIVE,
    READ_ONLY,
    PersonaClient,
    duration,
    item,
    new_id,
    refused,
    start_personas,
)
from tests.support.services import StartService

NOT_USED = checkout_pb2.USE_OUTCOME_NOT_USED
SUCCEEDED = checkout_pb2.USE_OUTCOME_SUCCEEDED
FAILED = checkout_pb2.USE_OUTCOME_FAILED
BLOCKED = checkout_pb2.USE_OUTCOME_BLOCKED


@pytest.fixture
async def client(start_service: StartService, tmp_path: Path) -> PersonaClient:
    return await start_personas(start_service, tmp_path)


async def test_a_check_out_carries_persona_token_and_expiry(client: PersonaClient) -> None:
    persona = await client.create(region="kr")
    held = await client.held("h", persona.persona_id, seconds=90)
    assert held.holder == "h"
    assert held.mode == EXCLUSIVE
    assert len(held.lease_token) == 16
    left = held.expires_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(seconds=60) < left <= timedelta(seconds=91)
    persona.held_by = "h"
    assert held.persona == persona == await client.get(persona.persona_id)


async def test_of_fifty_at_once_one_gets_a_named_persona(client: PersonaClient) -> None:
    persona = await client.create()
    results = await asyncio.gather(*(client.take_one(f"h{n}", persona.persona_id) for n in range(50)))
    taken = [result.check_out for result in results if result.HasField("check_out")]
    assert len(taken) == 1
    for result in results:
        if result.HasField("error"):
            assert result.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
            assert result.error.reason == "PERSONA_CHECKED_OUT"
            until = datetime.fromisoformat(result.error.metadata["until"])
            assert until == taken[0].expires_at.ToDatetime(tzinfo=UTC)


async def test_of_fifty_picks_at_once_every_persona_is_picked_once(client: PersonaClient) -> None:
    ids = {(await client.create()).persona_id for _ in range(30)}
    results = await asyncio.gather(*(client.take_one(f"h{n}") for n in range(50)))
    taken = [result.check_out.persona.persona_id for result in results if result.HasField("check_out")]
    assert sorted(taken) == sorted(ids)
    errors = [result.error for result in results if result.HasField("error")]
    assert {error.reason for error in errors} == {"NO_PERSONA_MATCHES"}
    assert {error.code for error in errors} == {grpc.StatusCode.NOT_FOUND.value[0]}
    for error in errors:
        assert error.metadata == {"held": "30", "cooling": "0"}


async def test_replicas_share_personas_without_a_false_none(
    client: PersonaClient, start_service: StartService, tmp_path: Path
) -> None:
    replica = await PersonaClient.of(
        await start_service(
            "persona_store",
            database=client.service.database,
            objects={"engine": "local", "folder": tmp_path},
            check_outs={"sweep_seconds": 60},
        )
    )
    ids = {(await client.create()).persona_id for _ in range(40)}
    both = [client, replica]
    results = await asyncio.gather(*(both[n % 2].take_one(f"h{n}") for n in range(40)))
    assert {result.check_out.persona.persona_id for result in results} == ids


async def test_none_matches_is_not_said_because_a_row_is_locked(client: PersonaClient) -> None:
    persona = await client.create()
    async with await psycopg.AsyncConnection.connect(client.service.dsn) as other:
        await other.execute("SELECT 1 FROM persona_store.personas FOR UPDATE")
        waiting = asyncio.create_task(client.take_one("h"))
        await until(client, "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        assert not waiting.done()
        await other.rollback()
    assert (await waiting).check_out.persona.persona_id == persona.persona_id


async def until(client: PersonaClient, condition: str) -> None:
    """Waits, at most 10 s, until a query says true."""
    async with asyncio.timeout(10):
        while not (await client.sql(condition))[0][0]:
            await asyncio.sleep(0.01)


async def test_a_holder_gets_its_check_out_again(client: PersonaClient) -> None:
    first, second = await client.create(), await client.create()
    held = await client.held("h", first.persona_id)
    assert await client.held("h", first.persona_id) == held
    assert await client.held("h") == held
    # Twice in one batch as well.
    assert [result.check_out for result in await client.take(item("h"), item("h"))] == [held, held]
    for result in (
        await client.take_one("h", second.persona_id),
        await client.take_one("h", first.persona_id, mode=READ_ONLY),
    ):
        assert result.error.reason == "PERSONA_CHECKED_OUT"
        assert result.error.metadata["persona_id"] == first.persona_id


async def test_each_item_of_a_batch_is_answered_for_itself(client: PersonaClient) -> None:
    persona = await client.create()
    results = await client.take(
        item("a", persona.persona_id), item("b", persona.persona_id), item("c", new_id()), item("d")
    )
    reasons = [result.error.reason for result in results]
    assert sorted(reasons[:2]) == ["", "PERSONA_CHECKED_OUT"]
    assert reasons[2:] == ["PERSONA_NOT_FOUND", "NO_PERSONA_MATCHES"]


async def test_readers_share_and_do_not_hinder(client: PersonaClient) -> None:
    persona = await client.create()
    results = await client.take(*(item(f"r{n}", mode=READ_ONLY) for n in range(5)))
    assert {result.check_out.persona.persona_id for result in results} == {persona.persona_id}
    held = await client.held("writer", persona.persona_id)
    await client.held("r9", persona.persona_id, mode=READ_ONLY)
    refusal = await refused(client.save(results[0].check_out, {"state.json": b"{}"}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHECK_OUT_READ_ONLY")
    assert (await client.save(held, {"state.json": b"{}"})).generation == 2
    assert (await client.get(persona.persona_id)).held_by == "writer"


async def test_picks_take_turns(client: PersonaClient) -> None:
    ids = [(await client.create()).persona_id for _ in range(4)]
    # Never used come first, in the order they were made; then by their last use.
    for turn in range(3):
        for persona_id in ids:
            held = await client.held("h")
            assert held.persona.persona_id == persona_id, turn
            await client.bring_back("h", FAILED)


async def test_what_comes_back_unused_is_as_if_never_picked_but_waits_its_turn(client: PersonaClient) -> None:
    first, second = await client.create(), await client.create()
    assert (await client.held("h")).persona.persona_id == first.persona_id
    assert await client.bring_back("h", NOT_USED)
    persona = await client.get(first.persona_id)
    assert (persona.total_uses, persona.HasField("last_used_at")) == (0, False)
    # Not the same again at once: a persona that nobody can use must not stop everybody.
    assert (await client.held("h")).persona.persona_id == second.persona_id
    await client.bring_back("h", SUCCEEDED)
    # It has not been used, so it need not cool down.
    assert (await client.held("h", cool_down=duration(3600))).persona.persona_id == first.persona_id
    none = await client.take_one("i", cool_down=duration(3600))
    assert none.error.metadata == {"held": "1", "cooling": "1"}


@pytest.mark.parametrize("status", ["AGING", "DORMANT", "BLOCKED", "DISCARDED"])
async def test_only_active_personas_are_picked(client: PersonaClient, status: str) -> None:
    persona = await client.create()
    number = persona_pb2.PersonaStatus.Value(f"PERSONA_STATUS_{status}")
    await client.sql("UPDATE personas SET status = $1", number)
    assert (await client.take_one("h")).error.metadata == {"held": "0", "cooling": "0"}
    named = await client.take_one("h", persona.persona_id)
    if status == "DISCARDED":
        assert named.error.reason == "PERSONA_NOT_FOUND"
    else:
        assert named.check_out.persona.status == number


async def test_picks_match_tags_region_level_and_cool_down(client: PersonaClient) -> None:
    plain = await client.create()
    korean = await client.create(region="kr", tags=["a"], aging_level=10)
    ripe = await client.create(region="kr", tags=["a", "b"], aging_level=80)

    async def picked(**criteria: Any) -> str:
        result = await client.take_one("probe", **criteria)
        await client.bring_back("probe", NOT_USED)
        return result.check_out.persona.persona_id if result.HasField("check_out") else result.error.reason

    assert await picked(region="kr", min_aging_level=11) == ripe.persona_id
    assert await picked(tags=["b", "a", "b"]) == ripe.persona_id
    assert await picked(tags=["a"]) == korean.persona_id
    assert await picked(region="kr", tags=["a"], min_aging_level=80) == ripe.persona_id
    assert await picked() == plain.persona_id
    impossible: list[dict[str, Any]] = [
        {"region": "us"},
        {"tags": ["a", "c"]},
        {"min_aging_level": 81},
        {"region": "k"},
    ]
    for criteria in impossible:
        assert await picked(**criteria) == "NO_PERSONA_MATCHES"

    await client.sql(
        "UPDATE personas SET last_used_at = now() - interval '2 hours', turn_at = now() - interval '3 hours'"
    )
    assert await picked(region="kr", cool_down=duration(3600), min_aging_level=20) == ripe.persona_id
    assert await picked(cool_down=duration(3 * 3600)) == "NO_PERSONA_MATCHES"
    refusal = (await client.take_one("x", region="kr", cool_down=duration(3 * 3600))).error
    assert refusal.metadata == {"held": "0", "cooling": "2"}


async def test_many_pools_are_picked_from_the_organizations_queue(client: PersonaClient) -> None:
    # More kinds of personas than are merged: each its own tag, all of one region.
    organization = await client.service.organization_id()
    await client.sql(
        "INSERT INTO pools (organization_id, region, tags, aging_level, base_profile)"
        " SELECT $1, 'kr', ARRAY['own ' || n], 50, '' FROM generate_series(1, 600) n",
        organization,
    )
    ids = [(await client.create(region="kr", tags=[f"own {n}"], aging_level=50)).persona_id for n in (3, 1, 2)]
    stranger = await client.create(region="us")
    for persona_id in ids:
        assert (await client.held(f"h{persona_id}", region="kr")).persona.persona_id == persona_id
    refusal = (await client.take_one("x", region="kr", cool_down=duration(10))).error
    assert refusal.metadata == {"held": "3", "cooling": "0"}
    assert (await client.held("x")).persona.persona_id == stranger.persona_id


async def test_renewal_is_fenced_by_token_and_expiry(client: PersonaClient) -> None:
    ids = [(await client.create()).persona_id for _ in range(3)]
    held = [await client.held(f"h{n}", persona_id, seconds=5) for n, persona_id in enumerate(ids)]
    await client.expire("h2")
    wishes = [
        checkout_pb2.RenewCheckOutItem(holder="h0", lease_token=held[0].lease_token, duration=duration(600)),
        checkout_pb2.RenewCheckOutItem(holder="h1", lease_token=held[0].lease_token, duration=duration(600)),
        checkout_pb2.RenewCheckOutItem(holder="h2", lease_token=held[2].lease_token, duration=duration(600)),
        checkout_pb2.RenewCheckOutItem(holder="h3", lease_token=b"x" * 16, duration=duration(600)),
    ]
    request = checkout_pb2.RenewCheckOutsRequest(items=wishes)
    results = (await client.check_outs.RenewCheckOuts(request, metadata=client.worker)).results
    assert results[0].expires_at.ToDatetime(tzinfo=UTC) > datetime.now(UTC) + timedelta(seconds=500)
    for result, holder in zip(results[1:], ("h1", "h2", "h3"), strict=True):
        assert result.error.reason == "CHECK_OUT_LOST"
        assert result.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert result.error.metadata == {"holder": holder}
    again = await client.held("h0", ids[0])
    assert again.lease_token == held[0].lease_token
    assert again.expires_at == results[0].expires_at


async def test_counters_move_exactly_once(client: PersonaClient) -> None:
    persona_id = (await client.create()).persona_id
    for outcome in (SUCCEEDED, SUCCEEDED, FAILED, BLOCKED, NOT_USED, 0):
        await client.held("h", persona_id)
        ended = await asyncio.gather(*(client.bring_back("h", outcome) for _ in range(4)))
        assert Counter(ended) == {True: 1, False: 3}
    persona = await client.get(persona_id)
    assert (persona.total_uses, persona.success_count, persona.blocked_count) == (4, 2, 1)
    assert datetime.now(UTC) - persona.last_used_at.ToDatetime(tzinfo=UTC) < timedelta(minutes=1)
    assert persona.held_by == ""


async def test_a_check_in_of_many_counts_each(client: PersonaClient) -> None:
    persona_id = (await client.create()).persona_id
    await client.take(*(item(f"r{n}", persona_id, mode=READ_ONLY) for n in range(3)), item("w", persona_id))
    request = checkout_pb2.CheckInPersonasRequest(
        items=[
            checkout_pb2.CheckInItem(holder=holder, outcome=outcome)
            for holder, outcome in [
                ("r0", SUCCEEDED),
                ("w", BLOCKED),
                ("r1", SUCCEEDED),
                ("r2", NOT_USED),
                ("r0", FAILED),
                ("zz", FAILED),
            ]
        ]
    )
    response = await client.check_outs.CheckInPersonas(request, metadata=client.worker)
    assert list(response.checked_in) == [True, True, True, True, False, False]
    persona = await client.get(persona_id)
    assert (persona.total_uses, persona.success_count, persona.blocked_count) == (3, 2, 1)


async def test_what_ran_out_is_free_at_once(client: PersonaClient) -> None:
    persona_id = (await client.create()).persona_id
    held = await client.held("gone", persona_id)
    await client.expire("gone")
    assert (await client.get(persona_id)).held_by == ""
    # Nobody has swept; the pick does not need it.
    assert (await client.held("next")).persona.persona_id == persona_id
    assert not await client.bring_back("gone", SUCCEEDED)
    assert (await refused(client.save(held, {"state.json": b"late"}))).reason == "CHECK_OUT_LOST"
    persona = await client.get(persona_id)
    assert (persona.total_uses, persona.generation) == (0, 1)
    # Its last holder may have used it, so it rests from then on.
    assert persona.HasField("last_used_at")


async def test_the_sweeper_ends_what_ran_out(start_service: StartService, tmp_path: Path) -> None:
    client = await start_personas(start_service, tmp_path, check_outs={"sweep_seconds": 0.02})
    for n in range(3):
        await client.held(f"h{n}", (await client.create()).persona_id)
    await client.expire("h1")
    await until(client, "SELECT count(*) = 2 FROM check_outs")


async def test_personas_of_another_organization_are_not_there(client: PersonaClient) -> None:
    persona = await client.create()
    held = await client.held("h", persona.persona_id)
    other = await PersonaClient.of(client.service, "globex")
    assert (await other.take_one("o", persona.persona_id)).error.reason == "PERSONA_NOT_FOUND"
    assert (await other.take_one("o")).error.metadata == {"held": "0", "cooling": "0"}
    assert not await other.bring_back("h")
    assert (await refused(other.get(persona.persona_id))).reason == "PERSONA_NOT_FOUND"
    assert (await refused(other.save(held, {"state.json": b"{}"}))).reason == "PERSONA_NOT_FOUND"
    assert (await refused(other.load(persona.persona_id))).reason == "PERSONA_NOT_FOUND"
    assert (await refused(other.generations(persona.persona_id))).reason == "PERSONA_NOT_FOUND"
    for call in (
        other.personas.ForceRelease(
            persona_pb2.ForceReleaseRequest(persona_id=persona.persona_id, reason="x"), metadata=other.operator
        ),
        other.personas.SetPersonaStatus(
            persona_pb2.SetPersonaStatusRequest(persona_id=persona.persona_id, status=4, reason="x"),  # type: ignore[arg-type]
            metadata=other.operator,
        ),
        other.personas.RollbackBundle(
            persona_pb2.RollbackBundleRequest(
                request_id=str(uuid.uuid4()), persona_id=persona.persona_id, generation=1
            ),
            metadata=other.operator,
        ),
    ):
        assert (await refused(call)).reason == "PERSONA_NOT_FOUND"
    renewal = checkout_pb2.RenewCheckOutsRequest(
        items=[checkout_pb2.RenewCheckOutItem(holder="h", lease_token=held.lease_token, duration=duration(9))]
    )
    results = (await other.check_outs.RenewCheckOuts(renewal, metadata=other.worker)).results
    assert results[0].error.reason == "CHECK_OUT_LOST"
    # The same holder name in both organizations is two holders.
    mine = await other.create()
    assert (await other.held("h")).persona.persona_id == mine.persona_id


async def test_too_many_waiting_check_outs_are_refused(start_service: StartService, tmp_path: Path) -> None:
    client = await start_personas(
        start_service, tmp_path, check_outs={"sweep_seconds": 60, "batch_items": 1, "waiting_items": 2}
    )
    refusal = await refused(client.take(*(item(f"h{n}") for n in range(20))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refusal.retry_seconds
