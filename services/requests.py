"""Request ids: what makes a mutation safe to retry.

Each service keeps a table ``requests`` in its own schema and records the answer of a mutation in the same transaction.
A retry finds the answer; another request under the same id is refused. Rows are kept for 24 hours.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING
from uuid import UUID

from google.protobuf.message import Message

from services.errors import RequestIdReused
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("services", "requests.sql")


def digest(request: Message) -> bytes:
    """Returns the SHA-256 of a request, by which a retry is told from another request."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


async def claim(
    connection: Connection, organization_id: UUID, method: str, request_id: UUID, request_sha256: bytes
) -> bytes | None:
    """Claims a request id within the transaction in hand.

    Waits while another transaction works under the same id.

    Args:
        connection: A connection in a transaction.
        organization_id: The tenant.
        method: The method's name; ids of different methods do not meet.
        request_id: The caller's id.
        request_sha256: From `digest`.

    Returns:
        The answer on record, when this is a retry of what was committed; None when the id is fresh and now claimed.

    Raises:
        RequestIdReused: the id stands for another request.
    """
    row = await connection.fetchrow(_SQL["claim_request"], organization_id, method, request_id, request_sha256)
    if row is not None:
        return None
    row = await connection.fetchrow(_SQL["find_request"], organization_id, method, request_id)
    if row is None or row["request_sha256"] != request_sha256:
        raise RequestIdReused(
            "request_id stands for another request already: take a fresh one", request_id=str(request_id)
        )
    answer: bytes = row["answer"]
    return answer


async def record(connection: Connection, organization_id: UUID, method: str, request_id: UUID, answer: bytes) -> None:
    """Records the answer of a claimed request, in the same transaction."""
    await connection.execute(_SQL["record_answer"], organization_id, method, request_id, answer)


async def forget_old(connection: Connection) -> int:
    """Deletes up to 10,000 rows older than 24 hours and returns how many."""
    tag = await connection.execute(_SQL["forget_requests"])
    return int(tag.rpartition(" ")[2])
