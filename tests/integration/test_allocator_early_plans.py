"""A plan that was made while there were no leases looks them up by key all the same, for it serves millions later."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from services.postgres import queries
from tests.support.allocator import Allocator
from tests.support.services import StartService

_KEY = uuid.uuid4()
_TEXT = f"{{{_KEY.hex}}}"
_LOOK_UPS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("leases.sql", "renew_leases", ([_KEY], [_KEY], 300.0)),
    ("leases.sql", "lock_leases", ([_KEY],)),
    ("leases.sql", "end_leases", ([_KEY], [6], [False], [1])),
    ("leases.sql", "withdraw_leases", ([_KEY], [_KEY], [_KEY], 30.0)),
    ("leases.sql", "forget_request", (_KEY,)),
    ("allocation.sql", "live_leases", ([_KEY],)),
    ("allocation.sql", "attach_personas", ([_KEY], [_KEY], [b""], [1])),
    ("external_exits.sql", "attach_exits", ([_KEY], ["10.0.0.1"])),
    ("results.sql", "lock_submitted", ([_KEY],)),
    ("results.sql", "record_results", (_TEXT, _TEXT, "{2}", "{1}", "{1}", *["{}"] * 8, ["pc"], [""], [1], [1])),
]


@pytest.mark.parametrize("known", ["nothing", "that there are none", "that there was one"])
@pytest.mark.parametrize(("file", "name", "arguments"), _LOOK_UPS, ids=[name for _, name, _ in _LOOK_UPS])
async def test_leases_are_looked_up_by_key(
    start_service: StartService, file: str, name: str, arguments: tuple[Any, ...], known: str
) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    organization_id = await allocator.service.organization_id()
    door = await allocator.connect()
    try:
        if known == "that there was one":
            await allocator.slot()
            await allocator.take(1)
        if known != "nothing":
            await door.execute("VACUUM ANALYZE leases")
        async with door.transaction():
            await door.execute("SET LOCAL enable_seqscan = off")
            await door.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            text = await door.fetchval(
                f"EXPLAIN (FORMAT JSON) {queries('allocator', file)[name]}", organization_id, *arguments
            )
    finally:
        await door.close()
    nodes = list(_nodes(json.loads(text)[0]["Plan"]))
    reads = [node for node in nodes if node.get("Relation Name") == "leases" and "Scan" in node["Node Type"]]
    reads = [node for node in reads if node["Node Type"] != "Bitmap Heap Scan"] + [
        node for node in nodes if node["Node Type"] == "Bitmap Index Scan" and node["Index Name"].startswith("leases")
    ]
    assert reads
    for node in reads:
        assert node.get("Index Name") == "leases_pkey", node
        assert "allocation_key = ANY" in node.get("Index Cond", ""), node


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
