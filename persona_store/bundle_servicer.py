"""BundleService: translates and checks; the rest is below."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from uuid import UUID

from muster.persona_store.v1 import bundle_pb2, bundle_pb2_grpc, persona_pb2

from persona_store.bundle_store import BundleStore, Digest, Save
from persona_store.bundles import Bundles, content
from persona_store.errors import PartTooLarge
from persona_store.messages import generation_message, part_message
from persona_store.parts import BY_NAME, INLINE_BYTES, Part, PartKind
from persona_store.personas import Mutation
from persona_store.spool import PartMismatch, Spool, spool
from services.call import current
from services.errors import FieldViolation, InvalidField
from services.requests import digest
from services.status import Context
from services.validate import Checks

_NAMES = ", ".join(BY_NAME)
_PIECE_BYTES = 2**20


class BundleServicer(bundle_pb2_grpc.BundleServiceServicer):
    """Serves BundleService."""

    def __init__(self, bundles: Bundles, generations: BundleStore) -> None:
        self._bundles = bundles
        self._generations = generations

    async def LoadBundle(
        self, request: bundle_pb2.LoadBundleRequest, context: Context
    ) -> bundle_pb2.LoadBundleResponse:
        """Reads a bundle in one message."""
        persona_id, wanted = _wanted(request)
        organization = current().principal.organization_id
        found, loaded = await self._bundles.load(organization, persona_id, request.generation, wanted)
        parts = sorted(
            (bundle_pb2.Part(name=part.kind.file_name, data=data) for part, data in loaded), key=lambda part: part.name
        )
        return bundle_pb2.LoadBundleResponse(generation=found.generation, parts=parts)

    async def SaveBundle(
        self, request: bundle_pb2.SaveBundleRequest, context: Context
    ) -> bundle_pb2.SaveBundleResponse:
        """Commits a generation that came in one message."""
        checks = Checks()
        request_id, persona_id = _check_save(checks, "", request)
        checks.count("parts", request.parts, most=4)
        kinds = [_kind(checks, f"parts[{i}].name", part.name) for i, part in enumerate(request.parts[:4])]
        checks.unique("parts", (part.name for part in request.parts[:4]))
        checks.done()
        for kind, part in zip(kinds, request.parts, strict=True):
            _check_size(kind, len(part.data))
        total = sum(len(part.data) for part in request.parts)
        if total > INLINE_BYTES:
            raise PartTooLarge("bundle", total, INLINE_BYTES, " in one message: use SaveBundleStream")
        mutation = Mutation(current().principal.organization_id, "SaveBundle", request_id, digest(request))
        generation = await self._bundles.save(
            Save(mutation, persona_id, request.lease_token),
            [content(kind, part.data) for kind, part in zip(kinds, request.parts, strict=True)],
        )
        return bundle_pb2.SaveBundleResponse(generation=generation_message(generation))

    async def LoadBundleStream(
        self, request: bundle_pb2.LoadBundleStreamRequest, context: Context
    ) -> AsyncIterator[bundle_pb2.LoadBundleStreamResponse]:
        """Reads a bundle in pieces."""
        persona_id, wanted = _wanted(request)
        organization = current().principal.organization_id
        found = await self._bundles.find(organization, persona_id, request.generation)
        yield bundle_pb2.LoadBundleStreamResponse(generation=found.generation)
        async for piece in self._bundles.pieces(organization, persona_id, found, wanted):
            if isinstance(piece, Part):
                yield bundle_pb2.LoadBundleStreamResponse(part=part_message(piece))
            else:
                yield bundle_pb2.LoadBundleStreamResponse(data=piece)

    async def SaveBundleStream(
        self, requests: AsyncIterator[bundle_pb2.SaveBundleStreamRequest], context: Context
    ) -> bundle_pb2.SaveBundleStreamResponse:
        """Commits a generation that came in pieces."""
        header = await _header(requests)
        checks = Checks()
        request_id, persona_id = _check_save(checks, "header.", header)
        checks.done()
        organization = current().principal.organization_id
        mutation = Mutation(organization, "SaveBundleStream", request_id, b"")
        await self._generations.check_early(Save(mutation, persona_id, header.lease_token))
        async with spool() as received:
            await _receive(requests, received)
            sha256 = hashlib.sha256(header.SerializeToString(deterministic=True))
            for one in received.contents:
                sha256.update(bytes([one.digest.kind.number]) + one.digest.sha256)
            mutation = replace(mutation, request_sha256=sha256.digest())
            generation = await self._bundles.save(Save(mutation, persona_id, header.lease_token), received.contents)
        return bundle_pb2.SaveBundleStreamResponse(generation=generation_message(generation))


def _wanted(
    request: bundle_pb2.LoadBundleRequest | bundle_pb2.LoadBundleStreamRequest,
) -> tuple[UUID, frozenset[PartKind]]:
    checks = Checks()
    persona_id = checks.uuid("persona_id", request.persona_id)
    checks.count("parts", request.parts, least=0, most=4)
    kinds = [_kind(checks, f"parts[{i}]", name) for i, name in enumerate(request.parts[:4])]
    checks.done()
    return persona_id, frozenset(kinds)


def _check_save(
    checks: Checks, path: str, request: bundle_pb2.SaveBundleRequest | bundle_pb2.SaveBundleHeader
) -> tuple[UUID, UUID]:
    request_id = checks.uuid(f"{path}request_id", request.request_id)
    persona_id = checks.uuid(f"{path}persona_id", request.persona_id)
    checks.token(f"{path}lease_token", request.lease_token)
    return request_id, persona_id


def _kind(checks: Checks, field: str, name: str) -> PartKind:
    kind = BY_NAME.get(name)
    if kind is None:
        checks.fail(field, f"must be one of {_NAMES}")
        return PartKind.FINGERPRINT
    return kind


def _check_size(kind: PartKind, size: int) -> None:
    if size > kind.limit_bytes:
        raise PartTooLarge(kind.file_name, size, kind.limit_bytes)


async def _header(requests: AsyncIterator[bundle_pb2.SaveBundleStreamRequest]) -> bundle_pb2.SaveBundleHeader:
    async for request in requests:
        if request.WhichOneof("piece") == "header":
            return request.header
        break
    raise _violation("header", "required: the first piece")


async def _receive(requests: AsyncIterator[bundle_pb2.SaveBundleStreamRequest], received: Spool) -> None:
    names: Sequence[str] = ()
    try:
        async for request in requests:
            piece = request.WhichOneof("piece")
            if piece == "part":
                names = (*names, request.part.name)
                await received.begin(_announced(request.part, names))
            elif piece == "data":
                if not received.receives:
                    raise _violation("data", "must come after its part")
                if len(request.data) > _PIECE_BYTES:
                    raise _violation("data", f"at most {_PIECE_BYTES} bytes in a piece, is {len(request.data)}")
                await received.write(request.data)
            else:
                raise _violation("piece", "must be a part or data: the header comes once, first")
        await received.finish()
    except PartMismatch as error:
        raise _violation("data", str(error)) from error
    if not received.contents:
        raise _violation("part", "required: 1 to 4 parts")


def _announced(info: persona_pb2.PartInfo, names: Sequence[str]) -> Digest:
    checks = Checks()
    kind = _kind(checks, "part.name", info.name)
    checks.unique("part.name", names)
    checks.octets("part.sha256", info.sha256, least=32, most=32)
    checks.done()
    _check_size(kind, info.size_bytes)
    return Digest(kind, info.size_bytes, info.sha256)


def _violation(field: str, rule: str) -> InvalidField:
    return InvalidField([FieldViolation(field, rule)])
