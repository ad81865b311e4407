"""Bundles: saved atomically as generations, loaded with every part checked.

A save writes its objects first, under a number that no other save ever gets, and then one transaction makes them a
generation. Whatever fails before that transaction commits leaves the last generation as it was; the objects written
until then were announced and are collected after the grace.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog
import uuid_utils.compat as uuid7

from persona_store import metrics
from persona_store.bundle_store import BundleStore, Digest, Outpaced, Save
from persona_store.errors import GenerationNotFound, PartCorrupt, PartTooLarge
from persona_store.parts import INLINE_BYTES, Generation, Part, PartKind, object_key, pack
from persona_store.personas import Mutation, NewPersona
from persona_store.store import PersonaStore
from services.objects import ObjectStore, ObjectStoreUnavailable

_log = structlog.get_logger("bundles")

CHUNK_BYTES = 256 * 2**10
# A save is outpaced when others of the same lease replace, within it, all the generations it began with.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Content:
    """A part to be saved: what it is, and its bytes or the file that holds them."""

    digest: Digest
    data: bytes | Path


def content(kind: PartKind, data: bytes) -> Content:
    """Returns a part with its digest."""
    return Content(Digest(kind, len(data), hashlib.sha256(data).digest()), data)


class Bundles:
    """Saves and loads.

    Args:
        store: Generations.
        personas: Personas.
        objects: The bytes.
        save_seconds: The longest that writing the objects of one save may take.
    """

    def __init__(
        self, store: BundleStore, personas: PersonaStore, objects: ObjectStore, *, save_seconds: float
    ) -> None:
        self._store = store
        self._personas = personas
        self._objects = objects
        self._save_seconds = save_seconds

    async def create(self, mutation: Mutation, new: NewPersona) -> UUID:
        """Makes a persona whose fingerprint is generation 1, and returns its id.

        Raises:
            FingerprintExists: another persona of the organization has the fingerprint.
            RequestIdReused: the request id stands for another request.
            ObjectStoreUnavailable: the fingerprint could not be written; nothing was made.
        """
        answer = await self._personas.find_answer(mutation)
        if answer is not None:
            return UUID(bytes=answer)
        organization = mutation.organization_id
        await self._personas.refuse_twin(organization, new.fingerprint_sha256)
        persona_id = uuid7.uuid7()
        fingerprint = content(PartKind.FINGERPRINT, new.fingerprint)
        await self._store.announce(organization, persona_id, 1, [PartKind.FINGERPRINT])
        await self._write(persona_id, 1, [fingerprint])
        digest = fingerprint.digest
        manifest = pack([Part(digest.kind, 1, digest.size_bytes, digest.sha256)])
        return await self._personas.create(mutation, persona_id, new, manifest)

    async def save(self, save: Save, contents: Sequence[Content]) -> Generation:
        """Commits a new generation: the parts given, and the others of the generation before.

        Returns:
            The new generation; on a retry, the one that was committed at first.

        Raises:
            PersonaNotFound: there is no such persona.
            CheckOutLost: the token names no live check-out of it.
            CheckOutReadOnly: it names a read-only one.
            RequestIdReused: the request id stands for another request.
            ObjectStoreUnavailable: an object could not be written; the last generation is intact.
        """
        answer = await self._personas.find_answer(save.mutation)
        if answer is not None:
            return Generation.unpacked(answer)
        digests = [one.digest for one in contents]
        with metrics.SAVE_SECONDS.time():
            for _ in range(_ATTEMPTS):
                reservation = await self._store.reserve(save, digests)
                changed = [one for one in contents if one.digest.kind in reservation.to_write]
                await self._write(save.persona_id, reservation.number, changed)
                try:
                    generation = await self._store.commit(save, reservation, digests)
                except Outpaced:
                    metrics.CONFLICTS.labels("save").inc()
                    continue
                metrics.PARTS_UNCHANGED.inc(len(contents) - len(changed))
                return generation
        raise ObjectStoreUnavailable("other saves of this check-out were faster: repeat it", retry_after_seconds=1.0)

    async def _write(self, persona_id: UUID, number: int, contents: Sequence[Content]) -> None:
        puts = []
        for one in contents:
            key = object_key(persona_id, number, one.digest.kind)
            if isinstance(one.data, Path):
                puts.append(self._objects.put_file(key, one.data))
            else:
                puts.append(self._put(key, one.data))
        try:
            async with asyncio.timeout(self._save_seconds):
                # Every put is waited for, so that none is under way any more when the call is answered.
                results = await asyncio.gather(*puts, return_exceptions=True)
        except TimeoutError:
            raise ObjectStoreUnavailable(
                f"the object store did not take the parts within {self._save_seconds:g} s", retry_after_seconds=2.0
            ) from None
        for result in results:
            if isinstance(result, BaseException):
                raise result
        metrics.OBJECT_BYTES.labels("written").inc(sum(one.digest.size_bytes for one in contents))

    async def _put(self, key: str, data: bytes) -> None:
        await self._objects.put(key, data)

    async def load(
        self, organization_id: UUID, persona_id: UUID, generation: int, wanted: Collection[PartKind]
    ) -> tuple[Generation, list[tuple[Part, bytes]]]:
        """Reads a generation's parts, each checked against its size and SHA-256.

        Args:
            organization_id: The tenant.
            persona_id: Which persona.
            generation: Which generation; 0 for the newest.
            wanted: Only these parts; empty for all.

        Raises:
            PersonaNotFound: there is no such persona.
            GenerationNotFound: it does not have this generation, or not any more.
            PartTooLarge: together they are larger than `INLINE_BYTES`.
            PartCorrupt: a part is not what was saved.
            ObjectStoreUnavailable: the store does not answer.
        """
        found = await self._store.find(organization_id, persona_id, generation)
        parts = _chosen(found, wanted)
        total = sum(part.size_bytes for part in parts)
        if total > INLINE_BYTES:
            raise PartTooLarge("bundle", total, INLINE_BYTES, " in one message: use LoadBundleStream")
        keys = [object_key(persona_id, part.written, part.kind) for part in parts]
        datas = await asyncio.gather(*(self._objects.get(key) for key in keys))
        loaded = []
        for part, data in zip(parts, datas, strict=True):
            if data is None or len(data) != part.size_bytes or hashlib.sha256(data).digest() != part.sha256:
                raise await self._fault(organization_id, persona_id, found, part)
            loaded.append((part, data))
        metrics.OBJECT_BYTES.labels("read").inc(total)
        return found, loaded

    async def find(self, organization_id: UUID, persona_id: UUID, generation: int) -> Generation:
        """Returns a generation, the newest for 0. Raises: PersonaNotFound, GenerationNotFound."""
        return await self._store.find(organization_id, persona_id, generation)

    async def pieces(
        self, organization_id: UUID, persona_id: UUID, found: Generation, wanted: Collection[PartKind]
    ) -> AsyncIterator[Part | bytes]:
        """Yields each part and then its bytes, in pieces of at most `CHUNK_BYTES`.

        Raises:
            GenerationNotFound: it was dropped and collected meanwhile.
            PartCorrupt: after its bytes, if a part is not what was saved.
            ObjectStoreUnavailable: the store does not answer.
        """
        for part in _chosen(found, wanted):
            yield part
            digest, size = hashlib.sha256(), 0
            async for block in self._objects.stream(object_key(persona_id, part.written, part.kind), CHUNK_BYTES):
                size += len(block)
                if size > part.size_bytes:
                    break
                digest.update(block)
                for begin in range(0, len(block), CHUNK_BYTES):
                    yield block[begin : begin + CHUNK_BYTES]
            if size != part.size_bytes or digest.digest() != part.sha256:
                raise await self._fault(organization_id, persona_id, found, part)
            metrics.OBJECT_BYTES.labels("read").inc(size)

    async def _fault(
        self, organization_id: UUID, persona_id: UUID, found: Generation, part: Part
    ) -> PartCorrupt | GenerationNotFound:
        """Returns what is wrong with a part: its generation is no longer kept, or its bytes are wrong."""
        try:
            await self._store.find(organization_id, persona_id, found.generation)
        except GenerationNotFound as error:
            return error
        metrics.PARTS_CORRUPT.inc()
        _log.error(
            "a stored part is corrupt",
            persona=str(persona_id),
            generation=found.generation,
            key=object_key(persona_id, part.written, part.kind),
        )
        return PartCorrupt(persona_id, found.generation, part.kind.file_name)


def _chosen(found: Generation, wanted: Collection[PartKind]) -> list[Part]:
    return [part for part in found.parts if not wanted or part.kind in wanted]
