"""Personas: the metadata of identities, their life, and leases on them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum

from muster import values
from muster.calls import Transport, item_error
from muster.persona_store.v1 import checkout_pb2, checkout_pb2_grpc, persona_pb2, persona_pb2_grpc


class PersonaStatus(IntEnum):
    """Where a persona stands in its life; UNSPECIFIED in a filter means any."""

    UNSPECIFIED = 0
    AGING = 1
    ACTIVE = 2
    DORMANT = 3
    BLOCKED = 4
    DISCARDED = 5


class CheckOutMode(IntEnum):
    """What a holder may do: EXCLUSIVE may save, any number of READ_ONLY holders may not."""

    UNSPECIFIED = 0
    EXCLUSIVE = 1
    READ_ONLY = 2


class UseOutcome(IntEnum):
    """How a use of a persona ended; NOT_USED moves no counter."""

    UNSPECIFIED = 0
    NOT_USED = 1
    SUCCEEDED = 2
    FAILED = 3
    BLOCKED = 4


@dataclass(frozen=True, slots=True)
class Persona:
    """An identity's metadata.

    Attributes:
        persona_id: A UUID.
        status: Where it stands.
        fingerprint_sha256: Of the canonical JSON of its fingerprint, 32 bytes.
        base_profile: The profile it was derived from.
        aging_level: 0 to 100.
        region: May be empty.
        tags: Sorted.
        generation: The newest committed bundle.
        total_uses: Check-ins after real use.
        success_count: Of those, successes.
        blocked_count: Of those, blocks.
        created_at: When it was made.
        last_used_at: None when it never was.
        held_by: Who holds it exclusively; empty when nobody does.
    """

    persona_id: str
    status: PersonaStatus
    fingerprint_sha256: bytes
    base_profile: str
    aging_level: int
    region: str
    tags: tuple[str, ...]
    generation: int
    total_uses: int
    success_count: int
    blocked_count: int
    created_at: datetime
    last_used_at: datetime | None
    held_by: str


@dataclass(frozen=True, slots=True)
class PartInfo:
    """A stored part of a bundle."""

    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Generation:
    """One committed bundle."""

    generation: int
    committed_at: datetime
    parts: tuple[PartInfo, ...]


@dataclass(frozen=True, slots=True)
class PersonaCriteria:
    """Which personas to pick from; only active ones are picked, the least recently used first."""

    tags: Sequence[str] = ()
    region: str = ""
    min_aging_level: int = 0
    cool_down: timedelta | None = None


@dataclass(frozen=True, slots=True)
class CheckOut:
    """A lease on a persona; `lease_token` is needed to save its bundle."""

    persona: Persona
    holder: str
    lease_token: bytes = field(repr=False)
    expires_at: datetime
    mode: CheckOutMode


class Personas:
    """`client.personas`: role operator; `get`, `list` and the check-outs also worker."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> persona_pb2_grpc.PersonaServiceAsyncStub:
        return self._transport.stub(persona_pb2_grpc.PersonaServiceStub)

    @property
    def _check_outs(self) -> checkout_pb2_grpc.CheckOutServiceAsyncStub:
        return self._transport.stub(checkout_pb2_grpc.CheckOutServiceStub)

    async def create(
        self,
        fingerprint_json: bytes,
        *,
        base_profile: str = "",
        aging_level: int = 0,
        status: PersonaStatus = PersonaStatus.UNSPECIFIED,
        region: str = "",
        tags: Sequence[str] = (),
        request_id: str = "",
    ) -> Persona:
        """Makes a persona and commits its fingerprint as generation 1.

        Args:
            fingerprint_json: A JSON object of at most 256 KiB.
            base_profile: The profile it was derived from, up to 20 characters.
            aging_level: 0 to 100.
            status: AGING or ACTIVE; UNSPECIFIED means ACTIVE.
            region: Up to 64 characters.
            tags: Up to 16, of 1 to 64 characters.
            request_id: A UUID, to ask again after a lost answer within 24 hours; empty makes a fresh one.

        Raises:
            FingerprintExists: another persona has the same fingerprint; the metadata holds its id.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.CreatePersonaRequest(
            request_id=request_id or str(uuid.uuid4()),
            fingerprint_json=fingerprint_json,
            base_profile=base_profile,
            aging_level=aging_level,
            status=persona_pb2.PersonaStatus.ValueType(status),
            region=region,
            tags=tags,
        )
        answer = await self._transport.call(self._stub.CreatePersona, request)
        return _persona(answer.persona)

    async def get(self, persona_id: str) -> Persona:
        """Reads a persona.

        Raises:
            NotFound: the organization has no such persona.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.GetPersonaRequest(persona_id=persona_id)
        return _persona((await self._transport.call(self._stub.GetPersona, request)).persona)

    async def list(
        self,
        *,
        status: PersonaStatus = PersonaStatus.UNSPECIFIED,
        tag: str = "",
        region: str = "",
        page_size: int = 100,
    ) -> AsyncIterator[Persona]:
        """Yields personas by id.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.ListPersonasRequest(
            page_size=page_size, status=persona_pb2.PersonaStatus.ValueType(status), tag=tag, region=region
        )
        async for answer in self._transport.pages(self._stub.ListPersonas, request):
            for persona in answer.personas:
                yield _persona(persona)

    async def set_status(self, persona_id: str, status: PersonaStatus, *, reason: str) -> Persona:
        """Moves a persona through its life.

        Raises:
            StatusTransitionRefused: its life has no such step.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.SetPersonaStatusRequest(
            persona_id=persona_id, status=persona_pb2.PersonaStatus.ValueType(status), reason=reason
        )
        return _persona((await self._transport.call(self._stub.SetPersonaStatus, request)).persona)

    async def generations(self, persona_id: str) -> tuple[Generation, ...]:
        """Reads the committed bundles that are kept, newest first.

        Raises:
            NotFound: the organization has no such persona.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.ListGenerationsRequest(persona_id=persona_id)
        answer = await self._transport.call(self._stub.ListGenerations, request)
        return tuple(generation(item) for item in answer.generations)

    async def rollback(self, persona_id: str, to_generation: int, *, request_id: str = "") -> Generation:
        """Commits a new generation with the parts of an older one.

        Args:
            persona_id: Whose.
            to_generation: The older one.
            request_id: A UUID, to ask again after a lost answer within 24 hours; empty makes a fresh one.

        Raises:
            GenerationNotFound: it is not kept any more.
            PersonaCheckedOut: somebody holds the persona.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.RollbackBundleRequest(
            request_id=request_id or str(uuid.uuid4()), persona_id=persona_id, generation=to_generation
        )
        return generation((await self._transport.call(self._stub.RollbackBundle, request)).generation)

    async def force_release(self, persona_id: str, *, reason: str) -> int:
        """Ends every check-out of a persona and returns how many there were.

        Raises:
            NotFound: the organization has no such persona.
            MusterError: it was refused, or did not succeed in time.
        """
        request = persona_pb2.ForceReleaseRequest(persona_id=persona_id, reason=reason)
        return (await self._transport.call(self._stub.ForceRelease, request)).released

    async def check_out(
        self,
        holder: str,
        selection: str | PersonaCriteria,
        duration: timedelta,
        *,
        mode: CheckOutMode = CheckOutMode.EXCLUSIVE,
    ) -> CheckOut:
        """Leases a persona outside an allocation, such as for looking after it by hand.

        Args:
            holder: Any id of the caller's, 1 to 128 characters; the same holder gets the same check-out again.
            selection: A persona's id, or what to pick by.
            duration: How long it lives unless it is renewed, 1 s to 24 h.
            mode: What the holder may do.

        Raises:
            PersonaCheckedOut: another holder has it.
            NoPersonaMatches: no idle persona matches.
            MusterError: it was refused, or did not succeed in time.
        """
        item = checkout_pb2.CheckOutItem(
            holder=holder, mode=checkout_pb2.CheckOutMode.ValueType(mode), duration=values.duration(duration)
        )
        if isinstance(selection, str):
            item.persona_id = selection
        else:
            item.criteria.CopyFrom(
                checkout_pb2.PersonaCriteria(
                    tags=selection.tags,
                    region=selection.region,
                    min_aging_level=selection.min_aging_level,
                    cool_down=values.duration(selection.cool_down),
                )
            )
        request = checkout_pb2.CheckOutPersonasRequest(items=[item])
        answer = await self._transport.call(self._check_outs.CheckOutPersonas, request)
        result = answer.results[0]
        if result.HasField("error"):
            raise item_error(result.error)
        made = result.check_out
        return CheckOut(
            _persona(made.persona),
            made.holder,
            made.lease_token,
            values.required_moment(made, "expires_at"),
            values.member(CheckOutMode, made.mode),
        )

    async def renew(self, check_out: CheckOut, duration: timedelta) -> datetime:
        """Moves the expiry of a check-out to `duration` from now and returns it.

        Raises:
            CheckOutLost: it ended.
            MusterError: it was refused, or did not succeed in time.
        """
        item = checkout_pb2.RenewCheckOutItem(
            holder=check_out.holder, lease_token=check_out.lease_token, duration=values.duration(duration)
        )
        request = checkout_pb2.RenewCheckOutsRequest(items=[item])
        answer = await self._transport.call(self._check_outs.RenewCheckOuts, request)
        result = answer.results[0]
        if result.HasField("error"):
            raise item_error(result.error)
        return values.required_moment(result, "expires_at")

    async def check_in(self, holder: str, outcome: UseOutcome = UseOutcome.NOT_USED) -> bool:
        """Ends the check-out of a holder and tells whether this call ended a live one.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        item = checkout_pb2.CheckInItem(holder=holder, outcome=checkout_pb2.UseOutcome.ValueType(outcome))
        request = checkout_pb2.CheckInPersonasRequest(items=[item])
        return (await self._transport.call(self._check_outs.CheckInPersonas, request)).checked_in[0]


def generation(message: persona_pb2.Generation) -> Generation:
    """Returns one committed bundle."""
    return Generation(
        message.generation,
        values.required_moment(message, "committed_at"),
        tuple(PartInfo(part.name, part.size_bytes, part.sha256) for part in message.parts),
    )


def _persona(message: persona_pb2.Persona) -> Persona:
    return Persona(
        persona_id=message.persona_id,
        status=values.member(PersonaStatus, message.status),
        fingerprint_sha256=message.fingerprint_sha256,
        base_profile=message.base_profile,
        aging_level=message.aging_level,
        region=message.region,
        tags=tuple(message.tags),
        generation=message.generation,
        total_uses=message.total_uses,
        success_count=message.success_count,
        blocked_count=message.blocked_count,
        created_at=values.required_moment(message, "created_at"),
        last_used_at=values.moment(message, "last_used_at"),
        held_by=message.held_by,
    )
