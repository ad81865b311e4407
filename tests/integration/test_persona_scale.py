"""What keeps the persona store flat as it grows: bytes for each row, plans, and what stops a start."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from services.errors import StartupError
from services.postgres import queries
from tests.support.personas import PersonaClient, start_personas
from tests.support.services import StartService

PERSONAS = 40_000
LIVE = 3_000
SQL = queries("persona_store", "check_outs.sql")


async def populate(client: PersonaClient) -> None:
    """Fills the tables as years of work would: many personas, fifty pools, thousands of live check-outs."""
    organization = await client.service.organization_id()
    await client.sql(
        "INSERT INTO pools (organization_id, region, tags, aging_level, base_profile)"
        " SELECT $1, 'r' || r, ARRAY['t' || t], 50, 'desktop' FROM generate_series(1, 10) r, generate_series(1, 5) t",
        organization,
    )
    # Ids rise as UUIDv7 do.
    await client.sql(
        "INSERT INTO personas (organization_id, persona_id, pool_id, generation, generations_reserved, status,"
        " fingerprint_sha256)"
        " SELECT $1, (lpad(to_hex(1760000000000 + n), 12, '0') || '7' || substr(md5(n::text), 1, 3) || '8'"
        " || substr(md5(n::text), 4, 15))::uuid, 1 + n % 50, 1, 1, 2, sha256(n::text::bytea)"
        " FROM generate_series(1, $2::integer) n",
        organization,
        PERSONAS,
    )
    await client.sql("VACUUM ANALYZE")
    # The planner's statistics are of before, as after a sudden rush.
    await client.sql(
        "INSERT INTO check_outs SELECT organization_id, 'live ' || row_number() OVER (), persona_id, 1,"
        " decode(repeat('00', 16), 'hex'), now() + interval '1 hour'"
        " FROM (SELECT organization_id, persona_id FROM personas ORDER BY turn_at DESC LIMIT $1) AS late",
        LIVE,
    )


@pytest.fixture
async def client(start_service: StartService, tmp_path: Path) -> PersonaClient:
    client = await start_personas(start_service, tmp_path)
    await populate(client)
    return client


async def test_a_persona_costs_at_most_400_bytes_with_every_index(client: PersonaClient) -> None:
    (row,) = await client.sql("SELECT pg_total_relation_size('personas')::float8 / $1 AS bytes", float(PERSONAS))
    assert row["bytes"] <= 400


async def explain(connection: Any, name: str, *arguments: Any) -> tuple[str, int]:
    """Returns a statement's plan and how many pages it touched."""
    statement = f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, FORMAT JSON) {SQL[name]}"
    (plan,) = json.loads(await connection.fetchval(statement, *arguments))
    top = plan["Plan"]
    return json.dumps(plan), top["Shared Hit Blocks"] + top["Shared Read Blocks"]


@pytest.mark.parametrize(
    ("name", "pools", "index"),
    [
        ("pick_from_pools", [3, 13], "personas_pool_turn"),
        ("pick_from_organization", None, "personas_turn"),
        ("pick_returned", None, "personas_returned"),
    ],
)
async def test_picks_read_the_front_of_an_index(
    client: PersonaClient, name: str, pools: list[int] | None, index: str
) -> None:
    organization = await client.service.organization_id()
    settings = {"search_path": "persona_store", "enable_seqscan": "off", "jit": "off"}
    connection = await asyncpg.connect(client.service.dsn, server_settings=settings)
    try:
        plan, pages = await explain(connection, name, organization, pools, timedelta(0), [], 8)
    finally:
        await connection.close()
    assert f'"Index Name": "{index}"' in plan
    assert "Seq Scan" not in plan
    # Eight personas from each of two pools, each with a look into the check-outs: about four pages for each.
    assert pages < 150


async def test_a_store_that_cannot_be_used_stops_the_start(start_service: StartService, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupError, match=r"the object store .* cannot be used"):
        await start_service("persona_store", objects={"engine": "local", "folder": tmp_path / "file"})
    with pytest.raises(StartupError, match=r"no object store is named: set objects\.folder"):
        await start_service("persona_store")
