"""Reads what the checker compares the history with."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg

from tests.fault.allocator.evidence import ResultRow, Row, Tables
from tests.support.allocator import INVARIANTS

_ALLOCATIONS = """
SELECT allocation_key, slot_id, exit_id, lease_token, work_date, status, late, quarantined,
  extract(epoch FROM allocated_at)::float8 AS allocated_at
FROM work_allocations
UNION ALL
SELECT allocation_key, slot_id, exit_id, lease_token, work_date, 1, false, false, extract(epoch FROM granted_at)::float8
FROM leases
"""
_RESULTS = """
SELECT r.allocation_key, r.outcome, r.late,
  (SELECT count(*) FROM product_results p
    WHERE p.organization_id = r.organization_id AND p.created_at = r.created_at AND p.allocation_key = r.allocation_key)
  AS products
FROM work_results r
"""


async def read(connection: asyncpg.Connection[asyncpg.Record]) -> Tables:
    """Reads everything; the fleet must have ended."""
    tables = Tables()
    for row in await connection.fetch(_ALLOCATIONS):
        tables.allocations[str(row["allocation_key"])] = Row(
            slot=str(row["slot_id"]),
            exit=str(row["exit_id"] or ""),
            token=row["lease_token"].hex,
            work_date=row["work_date"].isoformat(),
            status=row["status"],
            late=row["late"],
            quarantined=row["quarantined"],
            allocated_at=row["allocated_at"],
        )
    for row in await connection.fetch(_RESULTS):
        tables.results.append(ResultRow(str(row["allocation_key"]), row["outcome"], row["late"], row["products"]))
    tables.quarantined = {
        str(row["allocation_key"]) for row in await connection.fetch("SELECT allocation_key FROM quarantined_results")
    }
    for row in await connection.fetch("SELECT request_id, answer FROM requests WHERE method = 'AllocateWork'"):
        tables.requests[str(row["request_id"])] = _keys(row["answer"])
    for name, statement in INVARIANTS.items():
        tables.broken[name] = len(await connection.fetch(statement))
    return tables


def _keys(answer: Any) -> set[str]:
    """An answer on record is its keys, 16 bytes each."""
    return {str(UUID(bytes=answer[begin : begin + 16])) for begin in range(0, len(answer), 16)}
