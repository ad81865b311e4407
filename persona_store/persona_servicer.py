"""PersonaService: translates and checks; the rest is below."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from muster.persona_store.v1 import persona_pb2, persona_pb2_grpc

from persona_store.bundle_store import BundleStore
from persona_store.bundles import Bundles
from persona_store.errors import PartTooLarge
from persona_store.fingerprints import fingerprint_sha256
from persona_store.messages import generation_message, persona_message
from persona_store.parts import PartKind
from persona_store.personas import Filter, Mutation, NewPersona, PersonaStatus
from persona_store.store import PersonaStore
from services import pages
from services.call import current
from services.errors import InvalidPageToken
from services.requests import digest
from services.status import Context
from services.validate import Checks

_STATUSES = "AGING, ACTIVE, DORMANT, BLOCKED, DISCARDED"


class PersonaServicer(persona_pb2_grpc.PersonaServiceServicer):
    """Serves PersonaService."""

    def __init__(self, personas: PersonaStore, generations: BundleStore, bundles: Bundles) -> None:
        self._personas = personas
        self._generations = generations
        self._bundles = bundles

    async def CreatePersona(
        self, request: persona_pb2.CreatePersonaRequest, context: Context
    ) -> persona_pb2.CreatePersonaResponse:
        """Makes a persona."""
        checks = Checks()
        request_id = checks.uuid("request_id", request.request_id)
        limit = PartKind.FINGERPRINT.limit_bytes
        sha256 = b""
        if len(request.fingerprint_json) <= limit:
            try:
                sha256 = fingerprint_sha256(request.fingerprint_json)
            except ValueError as error:
                checks.fail("fingerprint_json", str(error))
        checks.text("base_profile", request.base_profile, max_length=20)
        checks.number("aging_level", request.aging_level, least=0, most=100)
        status = request.status or PersonaStatus.ACTIVE
        checks.choice("status", status, (PersonaStatus.AGING, PersonaStatus.ACTIVE), "AGING, ACTIVE")
        checks.text("region", request.region, max_length=64)
        check_tags(checks, "tags", request.tags)
        checks.done()
        if len(request.fingerprint_json) > limit:
            raise PartTooLarge(PartKind.FINGERPRINT.file_name, len(request.fingerprint_json), limit)
        organization = current().principal.organization_id
        new = NewPersona(
            request.fingerprint_json,
            sha256,
            request.base_profile,
            request.aging_level,
            PersonaStatus(status),
            request.region,
            tuple(sorted(set(request.tags))),
        )
        mutation = Mutation(organization, "CreatePersona", request_id, digest(request))
        persona_id = await self._bundles.create(mutation, new)
        persona = await self._personas.find(organization, persona_id)
        return persona_pb2.CreatePersonaResponse(persona=persona_message(persona))

    async def GetPersona(
        self, request: persona_pb2.GetPersonaRequest, context: Context
    ) -> persona_pb2.GetPersonaResponse:
        """Reads a persona."""
        checks = Checks()
        persona_id = checks.uuid("persona_id", request.persona_id)
        checks.done()
        persona = await self._personas.find(current().principal.organization_id, persona_id)
        return persona_pb2.GetPersonaResponse(persona=persona_message(persona))

    async def ListPersonas(
        self, request: persona_pb2.ListPersonasRequest, context: Context
    ) -> persona_pb2.ListPersonasResponse:
        """Pages through personas."""
        checks = Checks()
        size = checks.page(request.page_size)
        checks.choice("status", request.status, range(6), _STATUSES)
        checks.text("tag", request.tag, max_length=64)
        checks.text("region", request.region, max_length=64)
        checks.text("page_token", request.page_token, max_length=512)
        checks.done()
        organization = current().principal.organization_id
        scope = f"ListPersonas {organization} {request.status} {request.region!r} {request.tag!r}"
        position = pages.decode(request.page_token, scope)
        after = _position(position)
        status = PersonaStatus(request.status) if request.status else None
        narrowed = Filter(status, request.region, request.tag)
        # One more than asked for tells whether there is another page.
        found = list(await self._personas.list(organization, narrowed, after, size + 1))
        shown = pages.fitting([persona_message(persona) for persona in found[:size]])
        token = pages.encode([shown[-1].persona_id], scope) if len(found) > len(shown) else ""
        return persona_pb2.ListPersonasResponse(personas=shown, next_page_token=token)

    async def SetPersonaStatus(
        self, request: persona_pb2.SetPersonaStatusRequest, context: Context
    ) -> persona_pb2.SetPersonaStatusResponse:
        """Moves a persona through its life."""
        checks = Checks()
        persona_id = checks.uuid("persona_id", request.persona_id)
        checks.choice("status", request.status, range(1, 6), _STATUSES)
        checks.text("reason", request.reason, min_length=1, max_length=256)
        checks.done()
        principal = current().principal
        await self._personas.set_status(
            principal.organization_id, persona_id, PersonaStatus(request.status), principal.key_id, request.reason
        )
        persona = await self._personas.find(principal.organization_id, persona_id)
        return persona_pb2.SetPersonaStatusResponse(persona=persona_message(persona))

    async def ListGenerations(
        self, request: persona_pb2.ListGenerationsRequest, context: Context
    ) -> persona_pb2.ListGenerationsResponse:
        """Reads the kept generations."""
        checks = Checks()
        persona_id = checks.uuid("persona_id", request.persona_id)
        checks.done()
        found = await self._generations.list(current().principal.organization_id, persona_id)
        return persona_pb2.ListGenerationsResponse(generations=map(generation_message, found))

    async def RollbackBundle(
        self, request: persona_pb2.RollbackBundleRequest, context: Context
    ) -> persona_pb2.RollbackBundleResponse:
        """Brings an older generation back as a new one."""
        checks = Checks()
        request_id = checks.uuid("request_id", request.request_id)
        persona_id = checks.uuid("persona_id", request.persona_id)
        if request.generation == 0:
            checks.fail("generation", "required: a generation from ListGenerations")
        checks.done()
        mutation = Mutation(current().principal.organization_id, "RollbackBundle", request_id, digest(request))
        generation = await self._generations.roll_back(mutation, persona_id, request.generation)
        return persona_pb2.RollbackBundleResponse(generation=generation_message(generation))

    async def ForceRelease(
        self, request: persona_pb2.ForceReleaseRequest, context: Context
    ) -> persona_pb2.ForceReleaseResponse:
        """Ends every check-out of a persona."""
        checks = Checks()
        persona_id = checks.uuid("persona_id", request.persona_id)
        checks.text("reason", request.reason, min_length=1, max_length=256)
        checks.done()
        principal = current().principal
        released = await self._personas.force_release(
            principal.organization_id, persona_id, principal.key_id, request.reason
        )
        return persona_pb2.ForceReleaseResponse(released=released)


def check_tags(checks: Checks, field: str, tags: Sequence[str]) -> None:
    """Checks up to 16 tags of 1 to 64 characters."""
    checks.count(field, tags, least=0, most=16)
    for index, tag in enumerate(tags[:16]):
        checks.text(f"{field}[{index}]", tag, min_length=1, max_length=64)


def _position(position: list[str | int] | None) -> UUID:
    if position is None:
        return UUID(int=0)
    try:
        return UUID(str(position[0]))
    except (ValueError, IndexError):
        raise InvalidPageToken("page_token was not given for this request: begin again without one") from None
