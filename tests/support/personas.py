"""A running persona store, with what tests of it say again and again."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from muster.persona_store.v1 import (
    bundle_pb2,
    bundle_pb2_grpc,
    checkout_pb2,
    checkout_pb2_grpc,
    persona_pb2,
    persona_pb2_grpc,
)

from services.call import Role
from tests.support.s3 import S3Server, make_bucket
from tests.support.services import RunningService, StartService

EXCLUSIVE = checkout_pb2.CHECK_OUT_MODE_EXCLUSIVE
READ_ONLY = checkout_pb2.CHECK_OUT_MODE_READ_ONLY
# The loops of a service under test stand still, so that tests decide when something is swept or collected.
QUIET = {"check_outs": {"sweep_seconds": 60}, "bundles": {"collect_seconds": 86400}}


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call was refused."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    retry_seconds: float | None


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details of a status."""
    reason, metadata, fields, retry = "", {}, [], None
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed is not None:
        for detail in status_pb2.Status.FromString(packed).details:
            info, bad, again = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                fields = [violation.field for violation in bad.field_violations]
            elif detail.Unpack(again):
                retry = again.retry_delay.ToTimedelta().total_seconds()
    return Refusal(error.code(), reason, metadata, fields, retry)


async def refused(call: Any) -> Refusal:
    """Waits for a call that must be refused, and says how it was."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError(f"not refused: {answer}")


def duration(seconds: float) -> Duration:
    """Makes a Duration."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def new_id() -> str:
    """Makes a fresh request id."""
    return str(uuid.uuid4())


@dataclass(slots=True)
class PersonaClient:
    """The three services of a running persona store, as one organization's operator and worker see them."""

    service: RunningService
    organization: str
    operator: tuple[tuple[str, str], ...]
    worker: tuple[tuple[str, str], ...]
    personas: persona_pb2_grpc.PersonaServiceAsyncStub
    check_outs: checkout_pb2_grpc.CheckOutServiceAsyncStub
    bundles: bundle_pb2_grpc.BundleServiceAsyncStub

    @classmethod
    async def of(cls, service: RunningService, organization: str = "acme") -> PersonaClient:
        """Makes a client for an organization."""
        return cls(
            service,
            organization,
            await service.metadata(Role.OPERATOR, organization),
            await service.metadata(Role.WORKER, organization),
            persona_pb2_grpc.PersonaServiceStub(service.channel),
            checkout_pb2_grpc.CheckOutServiceStub(service.channel),
            bundle_pb2_grpc.BundleServiceStub(service.channel),
        )

    async def create(self, *, fingerprint: bytes | None = None, **fields: Any) -> persona_pb2.Persona:
        """Makes a persona with a fingerprint of its own."""
        data = fingerprint if fingerprint is not None else json.dumps({"seed": new_id()}).encode()
        fields.setdefault("request_id", new_id())
        request = persona_pb2.CreatePersonaRequest(fingerprint_json=data, **fields)
        return (await self.personas.CreatePersona(request, metadata=self.operator)).persona

    async def get(self, persona_id: str) -> persona_pb2.Persona:
        """Reads a persona."""
        request = persona_pb2.GetPersonaRequest(persona_id=persona_id)
        return (await self.personas.GetPersona(request, metadata=self.worker)).persona

    async def take(self, *items: checkout_pb2.CheckOutItem) -> Sequence[checkout_pb2.CheckOutResult]:
        """Checks out."""
        request = checkout_pb2.CheckOutPersonasRequest(items=items)
        return (await self.check_outs.CheckOutPersonas(request, metadata=self.worker)).results

    async def take_one(
        self, holder: str, persona_id: str = "", *, mode: int = 0, seconds: float = 60, **criteria: Any
    ) -> checkout_pb2.CheckOutResult:
        """Checks a persona out, a named one or one that is picked."""
        return (await self.take(item(holder, persona_id, mode=mode, seconds=seconds, **criteria)))[0]

    async def held(self, holder: str, persona_id: str = "", **more: Any) -> checkout_pb2.CheckOut:
        """Checks a persona out that is to be had."""
        result = await self.take_one(holder, persona_id, **more)
        assert result.HasField("check_out"), result.error
        return result.check_out

    async def bring_back(self, holder: str, outcome: int = checkout_pb2.USE_OUTCOME_SUCCEEDED) -> bool:
        """Checks in."""
        request = checkout_pb2.CheckInPersonasRequest(
            items=[checkout_pb2.CheckInItem(holder=holder, outcome=checkout_pb2.UseOutcome.ValueType(outcome))]
        )
        return (await self.check_outs.CheckInPersonas(request, metadata=self.worker)).checked_in[0]

    async def save(
        self, check_out: checkout_pb2.CheckOut, parts: dict[str, bytes], *, request_id: str = ""
    ) -> persona_pb2.Generation:
        """Saves parts."""
        request = bundle_pb2.SaveBundleRequest(
            request_id=request_id or new_id(),
            persona_id=check_out.persona.persona_id,
            lease_token=check_out.lease_token,
            parts=[bundle_pb2.Part(name=name, data=data) for name, data in parts.items()],
        )
        return (await self.bundles.SaveBundle(request, metadata=self.worker)).generation

    async def load(self, persona_id: str, generation: int = 0, parts: Sequence[str] = ()) -> dict[str, bytes]:
        """Loads parts."""
        request = bundle_pb2.LoadBundleRequest(persona_id=persona_id, generation=generation, parts=parts)
        response = await self.bundles.LoadBundle(request, metadata=self.worker)
        return {part.name: part.data for part in response.parts}

    async def generations(self, persona_id: str) -> list[int]:
        """Lists the kept generations, newest first."""
        request = persona_pb2.ListGenerationsRequest(persona_id=persona_id)
        found = await self.personas.ListGenerations(request, metadata=self.operator)
        return [generation.generation for generation in found.generations]

    async def sql(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs a statement in the service's schema, as a superuser."""
        connection = await asyncpg.connect(self.service.dsn, server_settings={"search_path": "persona_store"})
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def expire(self, holder: str) -> None:
        """Lets a check-out run out."""
        await self.sql("UPDATE check_outs SET expires_at = now() - interval '1 second' WHERE holder = $1", holder)

    async def snapshot(self) -> list[tuple[Any, ...]]:
        """Reads everything the database holds of personas, to show that nothing changed."""
        tables = ("personas", "pools", "check_outs", "generations", "pending_objects", "persona_events", "requests")
        return [(table, *await self.sql(f"SELECT * FROM {table} ORDER BY 1, 2, 3")) for table in tables]


def item(
    holder: str, persona_id: str = "", *, mode: int = 0, seconds: float = 60, **criteria: Any
) -> checkout_pb2.CheckOutItem:
    """Makes an item of a check-out: of the persona named, or of one that is picked by criteria."""
    wish = checkout_pb2.CheckOutItem(
        holder=holder, duration=duration(seconds), mode=checkout_pb2.CheckOutMode.ValueType(mode)
    )
    if persona_id:
        wish.persona_id = persona_id
    else:
        wish.criteria.CopyFrom(checkout_pb2.PersonaCriteria(**criteria))
    return wish


async def start_personas(start_service: StartService, folder: Path, **tables: Any) -> PersonaClient:
    """Starts a persona store on a folder."""
    settings = {**QUIET, "objects": {"engine": "local", "folder": folder}, **tables}
    return await PersonaClient.of(await start_service("persona_store", **settings))


@contextlib.asynccontextmanager
async def s3_settings(server: S3Server) -> AsyncIterator[dict[str, Any]]:
    """Makes a bucket and gives the settings of a store in it."""
    with make_bucket(server, "personas") as bucket:
        yield {
            "engine": "s3",
            "endpoint": server.endpoint,
            "bucket": bucket,
            "access_key": server.access_key,
            "secret_key": server.secret_key,
            "prefix": "bundles",
        }
