"""SlotService: translates and validates; the store decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Set
from datetime import date
from typing import Any
from uuid import UUID

from muster.allocator.v1 import slot_pb2, slot_pb2_grpc

from allocator.availability import Availability
from allocator.clients import Clients
from allocator.positions import time_position, uuid_position
from allocator.report_cache import ReportCache
from allocator.slot_store import SlotStore
from allocator.slots import CHANGEABLE, Pacing, PersonaNeed, Slot, SlotFilter, SlotSpec
from allocator.translation import day_text, item_error, moment, settings, settings_message, tracking_message
from services import pages, requests
from services.errors import DomainError
from services.status import Context
from services.validate import Checks

_MOST_SETTINGS_BYTES = 16 * 1024
_IMPORT_BATCH = 250
# With one batch in hand, at most 1,000 rows are unanswered.
_IMPORT_QUEUE = 750
_PACINGS = {
    slot_pb2.PACING_UNSPECIFIED: Pacing.ASAP,
    slot_pb2.PACING_ASAP: Pacing.ASAP,
    slot_pb2.PACING_EVEN: Pacing.EVEN,
}
_PACING_NUMBERS = {Pacing.ASAP: slot_pb2.PACING_ASAP, Pacing.EVEN: slot_pb2.PACING_EVEN}


class SlotServicer(slot_pb2_grpc.SlotServiceServicer):
    """Administers slots.

    Args:
        store: Where they are kept.
        availability: What is told that they changed.
        reports: Likewise.
        clients: Where organizations are met.
        exit_providers: The external providers that a slot may name.
    """

    def __init__(
        self,
        store: SlotStore,
        availability: Availability,
        reports: ReportCache,
        clients: Clients,
        *,
        exit_providers: Set[str],
    ) -> None:
        self._store = store
        self._availability = availability
        self._reports = reports
        self._clients = clients
        self._providers = exit_providers

    async def CreateSlot(self, request: slot_pb2.CreateSlotRequest, context: Context) -> slot_pb2.CreateSlotResponse:
        """Makes a slot."""
        checks = Checks()
        request_id = checks.uuid("request_id", request.request_id)
        if not request.HasField("spec"):
            checks.fail("spec", "required")
        spec = self._spec(checks, request.spec)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        slot = await self._store.create(organization_id, request_id, requests.digest(request), spec)
        self._outdate(organization_id)
        return slot_pb2.CreateSlotResponse(slot=_message(slot))

    async def GetSlot(self, request: slot_pb2.GetSlotRequest, context: Context) -> slot_pb2.GetSlotResponse:
        """Reads a slot."""
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id)
        checks.done()
        slot = await self._store.get((await self._clients.caller()).organization_id, slot_id)
        return slot_pb2.GetSlotResponse(slot=_message(slot))

    async def ListSlots(self, request: slot_pb2.ListSlotsRequest, context: Context) -> slot_pb2.ListSlotsResponse:
        """Pages through slots."""
        checks = Checks()
        size = checks.page(request.page_size)
        target = checks.text("target", request.target, max_length=128)
        prefix = checks.text("keyword_prefix", request.keyword_prefix, max_length=200)
        code = checks.text("code", request.code, max_length=64)
        external_id = checks.text("external_id", request.external_id, max_length=128)
        checks.done()
        is_active = request.is_active if request.HasField("is_active") else None
        wanted = SlotFilter(target, is_active, prefix, code, external_id)
        organization_id = (await self._clients.caller()).organization_id
        scope = f"ListSlots {organization_id} {wanted}"
        after = uuid_position(pages.decode(request.page_token, scope))
        slots = [_message(slot) for slot in await self._store.page(organization_id, after, size, wanted)]
        shown = pages.fitting(slots)
        token = pages.encode([shown[-1].slot_id], scope) if len(slots) == size or len(shown) < len(slots) else ""
        return slot_pb2.ListSlotsResponse(slots=shown, next_page_token=token)

    async def UpdateSlot(self, request: slot_pb2.UpdateSlotRequest, context: Context) -> slot_pb2.UpdateSlotResponse:
        """Changes a slot."""
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id)
        reason = checks.text("reason", request.reason, max_length=256)
        etag = checks.text("etag", request.etag, max_length=64)
        names = list(dict.fromkeys(request.update_mask.paths))
        if not names:
            checks.fail("update_mask", "required: at least one field of spec")
        if strangers := [name for name in names if name not in CHANGEABLE]:
            checks.fail(
                "update_mask", f"cannot change {', '.join(strangers)}; can change {', '.join(CHANGEABLE)}"[:400]
            )
        fields = self._fields(checks, request.spec)
        given = {name: fields[name]() for name in names if name in CHANGEABLE}
        checks.done()
        principal = await self._clients.caller()
        slot = await self._store.update(
            principal.organization_id, slot_id, given, etag=etag, actor=principal.key_id, reason=reason
        )
        self._outdate(principal.organization_id)
        return slot_pb2.UpdateSlotResponse(slot=_message(slot))

    async def PauseSlot(self, request: slot_pb2.PauseSlotRequest, context: Context) -> slot_pb2.PauseSlotResponse:
        """Switches a slot off."""
        return slot_pb2.PauseSlotResponse(slot=await self._switch(request, is_active=False))

    async def ResumeSlot(self, request: slot_pb2.ResumeSlotRequest, context: Context) -> slot_pb2.ResumeSlotResponse:
        """Switches a slot on."""
        return slot_pb2.ResumeSlotResponse(slot=await self._switch(request, is_active=True))

    async def _switch(
        self, request: slot_pb2.PauseSlotRequest | slot_pb2.ResumeSlotRequest, *, is_active: bool
    ) -> slot_pb2.Slot:
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id)
        reason = checks.text("reason", request.reason, max_length=256)
        checks.done()
        principal = await self._clients.caller()
        slot = await self._store.update(
            principal.organization_id,
            slot_id,
            {"is_active": is_active},
            etag="",
            actor=principal.key_id,
            reason=reason,
        )
        self._outdate(principal.organization_id)
        return _message(slot)

    async def ImportSlots(
        self, request_iterator: AsyncIterator[slot_pb2.ImportSlotsRequest], context: Context
    ) -> AsyncIterator[slot_pb2.ImportSlotsResponse]:
        """Makes slots from a stream; while one batch is written, the next rows queue."""
        organization_id = (await self._clients.caller()).organization_id
        rows: asyncio.Queue[slot_pb2.ImportSlotsRequest | BaseException | None] = asyncio.Queue(_IMPORT_QUEUE)

        async def read() -> None:
            try:
                async for request in request_iterator:
                    await rows.put(request)
            except Exception as error:
                await rows.put(error)
            else:
                await rows.put(None)

        reader = asyncio.create_task(read())
        try:
            ended = False
            while not ended:
                batch = [await rows.get()]
                while batch[-1] is not None and len(batch) < _IMPORT_BATCH and not rows.empty():
                    batch.append(rows.get_nowait())
                requests_ = []
                for row in batch:
                    if isinstance(row, BaseException):
                        raise row
                    if row is None:
                        ended = True
                    else:
                        requests_.append(row)
                for response in await self._import(organization_id, requests_):
                    yield response
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _import(
        self, organization_id: UUID, rows: list[slot_pb2.ImportSlotsRequest]
    ) -> list[slot_pb2.ImportSlotsResponse]:
        responses: list[slot_pb2.ImportSlotsResponse | None] = []
        specs = []
        for row in rows:
            checks = Checks()
            spec = self._spec(checks, row.spec)
            if not row.spec.external_id:
                checks.fail("spec.external_id", "required")
            try:
                checks.done()
            except DomainError as error:
                responses.append(slot_pb2.ImportSlotsResponse(row=row.row, error=item_error(error)))
            else:
                responses.append(None)
                specs.append(spec)
        answers = iter(await self._store.create_many(organization_id, specs) if specs else ())
        self._outdate(organization_id)
        return [response or _imported(row.row, *next(answers)) for row, response in zip(rows, responses, strict=True)]

    async def ListSlotHistory(
        self, request: slot_pb2.ListSlotHistoryRequest, context: Context
    ) -> slot_pb2.ListSlotHistoryResponse:
        """Pages through the changes of a slot."""
        checks = Checks()
        slot_id = checks.uuid("slot_id", request.slot_id)
        size = checks.page(request.page_size)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        scope = f"ListSlotHistory {organization_id} {slot_id}"
        before = time_position(pages.decode(request.page_token, scope))
        changes = await self._store.history(organization_id, slot_id, before, size)
        shown = pages.fitting(
            [
                slot_pb2.SlotChange(
                    changed_at=moment(change.changed_at),
                    actor=change.actor,
                    reason=change.reason,
                    difference_json=change.difference,
                )
                for change in changes
            ]
        )
        token = ""
        if len(changes) == size or len(shown) < len(changes):
            last = changes[len(shown) - 1]
            token = pages.encode([last.changed_at.isoformat(), str(last.change_id)], scope)
        return slot_pb2.ListSlotHistoryResponse(changes=shown, next_page_token=token)

    def _outdate(self, organization_id: UUID) -> None:
        self._availability.outdate(organization_id)
        self._reports.outdate(organization_id)

    def _spec(self, checks: Checks, spec: slot_pb2.SlotSpec) -> SlotSpec:
        values = {name: check() for name, check in self._fields(checks, spec).items()}
        external_id = checks.text("spec.external_id", spec.external_id, max_length=128)
        made = SlotSpec(**values, external_id=external_id)
        for contradiction in made.contradictions():
            checks.fail(contradiction.field, contradiction.rule)
        return made

    def _fields(self, checks: Checks, spec: slot_pb2.SlotSpec) -> dict[str, Callable[[], Any]]:
        """Returns the check of each field of a spec, by the names of `CHANGEABLE`."""

        def day(name: str) -> date:
            return checks.day(f"spec.{name}", getattr(spec, name)) or date.max

        def opaque() -> dict[str, Any]:
            size = sum(entry.ByteSize() + len(name.encode()) for name, entry in spec.settings.items())
            if size > _MOST_SETTINGS_BYTES:
                checks.fail("spec.settings", f"at most {_MOST_SETTINGS_BYTES} bytes in all, is {size}")
            return settings(checks, "spec.settings", spec.settings)

        def provider() -> str:
            if spec.exit_provider and spec.exit_provider not in self._providers:
                known = ", ".join(sorted(self._providers)) or "none is configured"
                checks.fail("spec.exit_provider", f"must be a configured provider: {known}"[:400])
            return spec.exit_provider

        return {
            "keyword": lambda: checks.text("spec.keyword", spec.keyword, min_length=1, max_length=200),
            "code": lambda: checks.text("spec.code", spec.code, max_length=64),
            "target": lambda: checks.text("spec.target", spec.target, max_length=128),
            "start_date": lambda: day("start_date"),
            "end_date": lambda: day("end_date"),
            "daily_quota": lambda: checks.number("spec.daily_quota", spec.daily_quota, least=1, most=1_000_000),
            "settings": opaque,
            "is_active": lambda: spec.is_active if spec.HasField("is_active") else True,
            "priority": lambda: checks.number("spec.priority", spec.priority, least=-1000, most=1000),
            "weight": lambda: checks.number("spec.weight", spec.weight or 1, least=1, most=1000),
            "without_exit": lambda: spec.without_exit,
            "persona": lambda: _need(checks, spec),
            "pacing": lambda: _pacing(checks, spec),
            "exit_region": lambda: checks.text("spec.exit_region", spec.exit_region, max_length=64),
            "exit_provider": provider,
        }


def _pacing(checks: Checks, spec: slot_pb2.SlotSpec) -> Pacing:
    checks.choice("spec.pacing", spec.pacing, _PACINGS, "ASAP, EVEN")
    return _PACINGS.get(spec.pacing, Pacing.ASAP)


def _need(checks: Checks, spec: slot_pb2.SlotSpec) -> PersonaNeed | None:
    if not spec.HasField("persona"):
        return None
    need = spec.persona
    checks.count("spec.persona.tags", need.tags, least=0, most=16)
    checks.unique("spec.persona.tags", need.tags)
    for number, tag in enumerate(need.tags):
        checks.text(f"spec.persona.tags[{number}]", tag, min_length=1, max_length=64)
    return PersonaNeed(
        tags=tuple(sorted(need.tags)),
        region=checks.text("spec.persona.region", need.region, max_length=64),
        min_aging_level=checks.number("spec.persona.min_aging_level", need.min_aging_level, least=0, most=100),
        cool_down_seconds=checks.number(
            "spec.persona.cool_down_seconds", need.cool_down_seconds, least=0, most=31_536_000
        ),
    )


def _message(slot: Slot) -> slot_pb2.Slot:
    spec = slot.spec
    message = slot_pb2.Slot(
        slot_id=str(slot.slot_id),
        spec=slot_pb2.SlotSpec(
            keyword=spec.keyword,
            code=spec.code,
            target=spec.target,
            start_date=day_text(spec.start_date),
            end_date=day_text(spec.end_date),
            daily_quota=spec.daily_quota,
            settings=settings_message(spec.settings),
            is_active=spec.is_active,
            priority=spec.priority,
            weight=spec.weight,
            without_exit=spec.without_exit,
            external_id=spec.external_id,
            pacing=_PACING_NUMBERS[spec.pacing],
            exit_region=spec.exit_region,
            exit_provider=spec.exit_provider,
        ),
        etag=slot.etag,
        created_at=moment(slot.created_at),
        updated_at=moment(slot.updated_at),
        today=tracking_message(slot.today),
    )
    if spec.persona is not None:
        message.spec.persona.SetInParent()
        message.spec.persona.tags.extend(spec.persona.tags)
        message.spec.persona.region = spec.persona.region
        message.spec.persona.min_aging_level = spec.persona.min_aging_level
        message.spec.persona.cool_down_seconds = spec.persona.cool_down_seconds
    return message


def _imported(row: int, answer: UUID | DomainError, created: bool) -> slot_pb2.ImportSlotsResponse:
    if isinstance(answer, DomainError):
        return slot_pb2.ImportSlotsResponse(row=row, error=item_error(answer))
    return slot_pb2.ImportSlotsResponse(row=row, slot_id=str(answer), created=created)
