"""The domain's objects as messages of the contract."""

from __future__ import annotations

from muster.persona_store.v1 import checkout_pb2, persona_pb2

from persona_store.check_outs import CheckOut
from persona_store.parts import Generation, Part
from persona_store.personas import Persona
from services.errors import DomainError
from services.status import code_number


def persona_message(persona: Persona) -> persona_pb2.Persona:
    """Returns a persona as a message."""
    message = persona_pb2.Persona(
        persona_id=str(persona.persona_id),
        status=persona_pb2.PersonaStatus.ValueType(persona.status),
        fingerprint_sha256=persona.fingerprint_sha256,
        base_profile=persona.base_profile,
        aging_level=persona.aging_level,
        region=persona.region,
        tags=persona.tags,
        generation=persona.generation,
        total_uses=persona.total_uses,
        success_count=persona.success_count,
        blocked_count=persona.blocked_count,
        held_by=persona.held_by,
    )
    message.created_at.FromDatetime(persona.created_at)
    if persona.last_used_at is not None:
        message.last_used_at.FromDatetime(persona.last_used_at)
    return message


def part_message(part: Part) -> persona_pb2.PartInfo:
    """Returns what is known of a part as a message."""
    return persona_pb2.PartInfo(name=part.kind.file_name, size_bytes=part.size_bytes, sha256=part.sha256)


def generation_message(generation: Generation) -> persona_pb2.Generation:
    """Returns a generation as a message, its parts by name."""
    parts = sorted(generation.parts, key=lambda part: part.kind.file_name)
    message = persona_pb2.Generation(generation=generation.generation, parts=map(part_message, parts))
    message.committed_at.FromDatetime(generation.committed_at)
    return message


def check_out_message(check_out: CheckOut) -> checkout_pb2.CheckOut:
    """Returns a check-out as a message."""
    message = checkout_pb2.CheckOut(
        persona=persona_message(check_out.persona),
        holder=check_out.lease.holder,
        lease_token=check_out.lease.lease_token,
        mode=checkout_pb2.CheckOutMode.ValueType(check_out.lease.mode),
    )
    message.expires_at.FromDatetime(check_out.lease.expires_at)
    return message


def item_error(error: DomainError) -> checkout_pb2.ItemError:
    """Returns the refusal of one item of a batch."""
    return checkout_pb2.ItemError(
        code=code_number(error.reason), reason=error.reason, message=error.message, metadata=error.metadata
    )
