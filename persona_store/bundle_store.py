"""Generations in the database, and the announcements of objects that no generation refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from persona_store.errors import (
    CheckOutLost,
    CheckOutReadOnly,
    GenerationNotFound,
    PersonaCheckedOut,
    PersonaNotFound,
)
from persona_store.parts import Generation, Manifest, Part, PartKind, pack, unpack
from persona_store.personas import Mutation
from services import requests
from services.objects import ObjectStoreUnavailable
from services.postgres import Database, queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("persona_store", "bundles.sql")
_PERSONAS = queries("persona_store", "personas.sql")
_READ_ONLY = 2
# The column's range; no persona gets there.
_LAST_GENERATION = 2**31 - 1


class Outpaced(Exception):
    """Another save replaced a part that this one meant to keep; nothing was changed, begin again."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What a part of a save is: its kind, size and SHA-256."""

    kind: PartKind
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Save:
    """Who saves what.

    Attributes:
        mutation: Tenant and request.
        persona_id: Which persona.
        lease_token: Of its exclusive check-out.
    """

    mutation: Mutation
    persona_id: UUID
    lease_token: bytes


@dataclass(frozen=True, slots=True)
class Reservation:
    """A number no other save gets, and the parts that are announced and to be written under it."""

    number: int
    to_write: frozenset[PartKind]


@dataclass(frozen=True, slots=True)
class Doomed:
    """An object whose announcement is past its time; no commit takes it in any more."""

    organization_id: UUID
    persona_id: UUID
    written: int
    kind: PartKind


class BundleStore:
    """Generations. Every method is one transaction.

    All raise DatabaseUnavailable when the database does not answer.

    Args:
        database: The service's own.
        generations_kept: How many generations a persona keeps.
        grace: How long an announced object stays.
    """

    def __init__(self, database: Database, *, generations_kept: int, grace: timedelta) -> None:
        self._database = database
        self._kept = generations_kept
        self._grace = grace

    async def find(self, organization_id: UUID, persona_id: UUID, generation: int) -> Generation:
        """Returns a kept generation, the newest for 0. Raises: PersonaNotFound, GenerationNotFound."""
        row = await self._database.fetchrow(
            _SQL["find_generation"], organization_id, persona_id, min(generation, _LAST_GENERATION)
        )
        if row is None:
            raise PersonaNotFound(persona_id)
        if row["generation"] is None:
            raise GenerationNotFound(persona_id, generation)
        return _generation(row)

    async def list(self, organization_id: UUID, persona_id: UUID) -> Sequence[Generation]:
        """Returns the kept generations, newest first. Raises: PersonaNotFound."""
        rows = await self._database.fetch(_SQL["list_generations"], organization_id, persona_id)
        if not rows:
            # Every persona has at least one.
            raise PersonaNotFound(persona_id)
        return [_generation(row) for row in rows]

    async def check_early(self, save: Save) -> None:
        """Checks that a save may begin, before its parts travel; its commit checks again.

        A request that was committed passes, whatever became of its lease: it has its answer.

        Raises:
            PersonaNotFound: there is no such persona.
            CheckOutLost: the token names no live check-out of it.
            CheckOutReadOnly: it names a read-only one.
        """
        mutation = save.mutation
        async with self._database.connection() as connection:
            answered = await connection.fetchrow(
                _PERSONAS["find_answer"], mutation.organization_id, mutation.method, mutation.request_id
            )
            if answered is None:
                await _check_lease(connection, save, "find_lease")

    async def announce(self, organization_id: UUID, persona_id: UUID, number: int, kinds: Sequence[PartKind]) -> None:
        """Announces objects before they are written, so that they are collected if their commit never comes."""
        async with self._database.connection() as connection:
            await _announce(connection, organization_id, persona_id, [(number, kind) for kind in kinds], self._grace)

    async def reserve(self, save: Save, digests: Sequence[Digest]) -> Reservation:
        """Begins a save: checks its lease, gives it a number and announces the parts that changed, all at once.

        Raises:
            PersonaNotFound, CheckOutLost, CheckOutReadOnly: as in `check_early`.
        """
        organization = save.mutation.organization_id
        async with self._database.transaction() as connection:
            await _check_lease(connection, save, "find_lease")
            number = await connection.fetchval(_SQL["reserve_generation"], organization, save.persona_id)
            row = await connection.fetchrow(_SQL["find_generation"], organization, save.persona_id, 0)
            assert row is not None
            base = {part.kind: part for part in unpack(row["manifest"])}
            changed = [digest.kind for digest in digests if not _is_part(digest, base.get(digest.kind))]
            await _announce(
                connection, organization, save.persona_id, [(number, kind) for kind in changed], self._grace
            )
        return Reservation(number, frozenset(changed))

    async def commit(self, save: Save, reservation: Reservation, digests: Sequence[Digest]) -> Generation:
        """Commits a save whose objects are written.

        One transaction takes the request's record, holds the lease so that it cannot end before the commit, merges the
        parts into the newest generation, takes the announced objects in, drops generations beyond those kept and
        announces the objects that only they had.

        Returns:
            The new generation; or the one that the same request committed before.

        Raises:
            PersonaNotFound, CheckOutLost, CheckOutReadOnly: as in `check_early`.
            RequestIdReused: the request id stands for another request.
            Outpaced: a part that was to be kept is gone; nothing was changed.
            ObjectStoreUnavailable: writing took longer than the grace, and the objects are doomed.
        """
        mutation = save.mutation
        organization = mutation.organization_id
        async with self._database.transaction() as connection:
            answer = await requests.claim(
                connection, organization, mutation.method, mutation.request_id, mutation.request_sha256
            )
            if answer is not None:
                return Generation.unpacked(answer)
            await _check_lease(connection, save, "hold_lease")
            current, reserved = await _lock(connection, organization, save.persona_id)
            settled = await connection.fetch(_SQL["settle_pending"], organization, save.persona_id, reservation.number)
            if len(settled) != len(reservation.to_write):
                raise ObjectStoreUnavailable("the save took too long: repeat it", retry_after_seconds=1.0)
            rows = await connection.fetch(_SQL["list_generations"], organization, save.persona_id)
            kept = {row["generation"]: unpack(row["manifest"]) for row in rows}
            merged = {part.kind: part for part in kept[current]}
            for digest in digests:
                merged[digest.kind] = _part(digest, reservation, current, kept)
            # A save that was overtaken by one with a later number commits under a fresh one: numbers only rise.
            number = reservation.number if reservation.number > current else reserved + 1
            return await self._append(connection, mutation, save.persona_id, number, tuple(merged.values()), kept)

    async def roll_back(self, mutation: Mutation, persona_id: UUID, generation: int) -> Generation:
        """Commits a new generation with the parts of an older one.

        Returns:
            The new generation; or the one that the same request committed before.

        Raises:
            PersonaNotFound: there is no such persona.
            PersonaCheckedOut: somebody holds it exclusively.
            GenerationNotFound: the older one is not kept.
            RequestIdReused: the request id stands for another request.
        """
        organization = mutation.organization_id
        async with self._database.transaction() as connection:
            answer = await requests.claim(
                connection, organization, mutation.method, mutation.request_id, mutation.request_sha256
            )
            if answer is not None:
                return Generation.unpacked(answer)
            _, reserved = await _lock(connection, organization, persona_id)
            holder = await connection.fetchrow(_SQL["find_exclusive_holder"], organization, persona_id)
            if holder is not None:
                raise PersonaCheckedOut(persona_id, holder["expires_at"])
            rows = await connection.fetch(_SQL["list_generations"], organization, persona_id)
            kept = {row["generation"]: unpack(row["manifest"]) for row in rows}
            if generation not in kept:
                raise GenerationNotFound(persona_id, generation)
            return await self._append(connection, mutation, persona_id, reserved + 1, kept[generation], kept)

    async def _append(
        self,
        connection: Connection,
        mutation: Mutation,
        persona_id: UUID,
        number: int,
        parts: Manifest,
        kept: dict[int, Manifest],
    ) -> Generation:
        organization = mutation.organization_id
        manifest = pack(parts)
        committed_at = await connection.fetchval(_SQL["insert_generation"], organization, persona_id, number, manifest)
        await connection.execute(_SQL["set_generation"], organization, persona_id, number)
        all_numbers = sorted([*kept, number])
        dropped, left = all_numbers[: -self._kept], all_numbers[-self._kept :]
        if dropped:
            everything = {**kept, number: parts}
            needed = {(part.written, part.kind) for one in left for part in everything[one]}
            garbage = {(part.written, part.kind) for one in dropped for part in everything[one]} - needed
            await connection.execute(_SQL["drop_generations"], organization, persona_id, left[0])
            await _announce(connection, organization, persona_id, list(garbage), self._grace)
        generation = Generation(number, committed_at, unpack(manifest))
        await requests.record(connection, organization, mutation.method, mutation.request_id, generation.packed())
        return generation

    async def doom(self) -> Sequence[Doomed]:
        """Dooms up to 256 objects whose time has come and returns them; from then on no commit takes them in."""
        rows = await self._database.fetch(_SQL["doom_objects"])
        kinds = {kind.number: kind for kind in PartKind}
        return [
            Doomed(row["organization_id"], row["persona_id"], row["generation"], kinds[row["part"]]) for row in rows
        ]

    async def forget(self, doomed: Sequence[Doomed]) -> None:
        """Ends the announcements of objects that were deleted."""
        await self._database.execute(
            _SQL["forget_doomed"],
            [one.organization_id for one in doomed],
            [one.persona_id for one in doomed],
            [one.written for one in doomed],
            [one.kind.number for one in doomed],
        )

    async def pending(self) -> int:
        """Returns how many objects are announced."""
        count: int = await self._database.fetchval(_SQL["count_pending"])
        return count


async def _check_lease(connection: Connection, save: Save, statement: str) -> None:
    organization = save.mutation.organization_id
    mode = await connection.fetchval(_SQL[statement], organization, save.persona_id, save.lease_token)
    if mode is None:
        if not await connection.fetch(_PERSONAS["find_personas"], [organization], [save.persona_id]):
            raise PersonaNotFound(save.persona_id)
        raise CheckOutLost(persona_id=str(save.persona_id))
    if mode == _READ_ONLY:
        raise CheckOutReadOnly(save.persona_id)


async def _lock(connection: Connection, organization_id: UUID, persona_id: UUID) -> tuple[int, int]:
    row = await connection.fetchrow(_PERSONAS["lock_persona"], organization_id, persona_id)
    if row is None:
        raise PersonaNotFound(persona_id)
    return row["generation"], row["generations_reserved"]


async def _announce(
    connection: Connection,
    organization_id: UUID,
    persona_id: UUID,
    objects: Sequence[tuple[int, PartKind]],
    grace: timedelta,
) -> None:
    if objects:
        await connection.execute(
            _SQL["insert_pending"],
            organization_id,
            persona_id,
            [number for number, _ in objects],
            [kind.number for _, kind in objects],
            grace,
        )


def _is_part(digest: Digest, part: Part | None) -> bool:
    return part is not None and part.sha256 == digest.sha256 and part.size_bytes == digest.size_bytes


def _part(digest: Digest, reservation: Reservation, current: int, kept: dict[int, Manifest]) -> Part:
    if digest.kind in reservation.to_write:
        return Part(digest.kind, reservation.number, digest.size_bytes, digest.sha256)
    for generation in (current, *kept):
        for part in kept[generation]:
            if part.kind is digest.kind and _is_part(digest, part):
                return part
    raise Outpaced


def _generation(row: asyncpg.Record) -> Generation:
    return Generation(row["generation"], row["committed_at"], unpack(row["manifest"]))
