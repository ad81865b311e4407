"""Personas in the database: metadata, life and the record of what was done to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar
from uuid import UUID

import asyncpg
import uuid_utils.compat as uuid7

from persona_store.errors import FingerprintExists, PersonaNotFound, StatusTransitionRefused
from persona_store.personas import Filter, Mutation, NewPersona, Persona, PersonaStatus
from services import requests
from services.errors import RequestIdReused
from services.postgres import Database, queries

_SQL = queries("persona_store", "personas.sql")
_CHECK_OUTS = queries("persona_store", "check_outs.sql")
_BUNDLES = queries("persona_store", "bundles.sql")

_STATUS_SET = 1
_RELEASED_BY_FORCE = 2
_EXCLUSIVE = 1

Result = TypeVar("Result")


async def repeated(work: Callable[[], Awaitable[Result]]) -> Result:
    """Runs a transaction again, up to twice, when the database ended it to break a deadlock.

    Locks are taken in one order everywhere (see check_outs.sql), except that a unique index makes an insert wait for
    whoever was there first, in whatever order that was.
    """
    for _ in range(2):
        try:
            return await work()
        except asyncpg.DeadlockDetectedError:
            continue
    return await work()


class PersonaStore:
    """Personas. Every method is one transaction, and raises DatabaseUnavailable when the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, organization_id: UUID, persona_id: UUID) -> Persona:
        """Returns a persona as it stands. Raises: PersonaNotFound."""
        row = await self._database.fetchrow(_SQL["find_personas"], [organization_id], [persona_id])
        if row is None:
            raise PersonaNotFound(persona_id)
        return persona_of(row)

    async def list(self, organization_id: UUID, narrowed: Filter, after: UUID, rows: int) -> Sequence[Persona]:
        """Returns up to `rows` personas in the order of their ids, from the one after `after`."""
        found = await self._database.fetch(
            _SQL["list_personas"], organization_id, after, narrowed.status, narrowed.region, narrowed.tag, rows
        )
        return [persona_of(row) for row in found]

    async def find_answer(self, mutation: Mutation) -> bytes | None:
        """Returns the recorded answer to a mutation, or None when it was not committed.

        Raises:
            RequestIdReused: the request id stands for another request.
        """
        row = await self._database.fetchrow(
            _SQL["find_answer"], mutation.organization_id, mutation.method, mutation.request_id
        )
        if row is None:
            return None
        if row["request_sha256"] != mutation.request_sha256:
            raise RequestIdReused(
                "request_id stands for another request already: take a fresh one", request_id=str(mutation.request_id)
            )
        answer: bytes = row["answer"]
        return answer

    async def refuse_twin(self, organization_id: UUID, fingerprint_sha256: bytes) -> None:
        """Checks that no persona has a fingerprint; another one may still take it before `create` does.

        Raises:
            FingerprintExists: one has it.
        """
        found = await self._database.fetchval(_SQL["find_by_fingerprint"], organization_id, fingerprint_sha256)
        if found is not None:
            raise FingerprintExists(found)

    async def create(self, mutation: Mutation, persona_id: UUID, new: NewPersona, manifest: bytes) -> UUID:
        """Makes a persona with generation 1, whose object was announced and written before.

        All at once: the request's record, the pool, the persona, its generation and the end of the announcement.

        Returns:
            The persona's id; another one than `persona_id` when the same request was committed meanwhile.

        Raises:
            FingerprintExists: another persona took the fingerprint.
            RequestIdReused: the request id stands for another request.
            PersonaNotFound: the announced object was collected since its writing took so long.
        """
        organization = mutation.organization_id
        async with self._database.transaction() as connection:
            answer = await requests.claim(
                connection, organization, mutation.method, mutation.request_id, mutation.request_sha256
            )
            if answer is not None:
                return UUID(bytes=answer)
            pool = (organization, new.region, new.aging_level, new.base_profile, list(new.tags))
            pool_id = await connection.fetchval(_SQL["find_pool"], *pool)
            if pool_id is None:
                await connection.execute(_SQL["insert_pool"], *pool)
                pool_id = await connection.fetchval(_SQL["find_pool"], *pool)
            row = (organization, persona_id, pool_id, new.status, new.fingerprint_sha256)
            if await connection.fetchval(_SQL["insert_persona"], *row) is None:
                twin = await connection.fetchval(_SQL["find_by_fingerprint"], organization, new.fingerprint_sha256)
                raise FingerprintExists(twin)
            if not await connection.fetch(_BUNDLES["settle_pending"], organization, persona_id, 1):
                raise PersonaNotFound(persona_id)
            await connection.fetchval(_BUNDLES["insert_generation"], organization, persona_id, 1, manifest)
            await requests.record(connection, organization, mutation.method, mutation.request_id, persona_id.bytes)
        return persona_id

    async def set_status(
        self, organization_id: UUID, persona_id: UUID, status: PersonaStatus, actor: str, reason: str
    ) -> None:
        """Moves a persona through its life and writes the event, both or neither; nothing when it stands there.

        Args:
            organization_id: The tenant.
            persona_id: Which persona.
            status: The new status.
            actor: The API key's id.
            reason: 1 to 256 characters.

        Raises:
            PersonaNotFound: there is none.
            StatusTransitionRefused: the status machine has no such step.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(_SQL["lock_persona"], organization_id, persona_id)
            if row is None:
                raise PersonaNotFound(persona_id)
            before = PersonaStatus(row["status"])
            if before is status:
                return
            if not before.may_become(status):
                raise StatusTransitionRefused(before.name.lower(), status.name.lower())
            await connection.execute(_SQL["set_status"], organization_id, persona_id, status)
            await connection.execute(
                _SQL["insert_event"],
                uuid7.uuid7(),
                organization_id,
                persona_id,
                _STATUS_SET,
                actor,
                reason,
                before,
                status,
                0,
            )

    async def force_release(self, organization_id: UUID, persona_id: UUID, actor: str, reason: str) -> int:
        """Ends every check-out of a persona and writes the event, both or neither.

        Returns:
            How many live check-outs ended. Whoever held them can neither save nor renew from now on.

        Raises:
            PersonaNotFound: there is none.
        """

        async def work() -> int:
            async with self._database.transaction() as connection:
                ended = await connection.fetch(_CHECK_OUTS["release_by_force"], organization_id, persona_id)
                if await connection.fetchrow(_SQL["lock_persona"], organization_id, persona_id) is None:
                    raise PersonaNotFound(persona_id)
                if any(row["mode"] == _EXCLUSIVE for row in ended):
                    await connection.execute(_CHECK_OUTS["rest"], organization_id, persona_id)
                released = len([row for row in ended if row["live"]])
                await connection.execute(
                    _SQL["insert_event"],
                    uuid7.uuid7(),
                    organization_id,
                    persona_id,
                    _RELEASED_BY_FORCE,
                    actor,
                    reason,
                    None,
                    None,
                    released,
                )
                return released

        return await repeated(work)

    async def forget_requests(self) -> int:
        """Deletes a bounded number of recorded answers older than 24 hours and returns how many."""
        async with self._database.connection() as connection:
            return await requests.forget_old(connection)


def persona_of(row: asyncpg.Record) -> Persona:
    """Returns the persona of a row of `find_personas` or `list_personas`."""
    return Persona(
        persona_id=UUID(int=row["persona_id"].int),
        status=PersonaStatus(row["status"]),
        fingerprint_sha256=row["fingerprint_sha256"],
        base_profile=row["base_profile"],
        aging_level=row["aging_level"],
        region=row["region"],
        tags=tuple(row["tags"]),
        generation=row["generation"],
        total_uses=row["total_uses"],
        success_count=row["success_count"],
        blocked_count=row["blocked_count"],
        last_used_at=row["last_used_at"],
        held_by=row["held_by"],
    )
