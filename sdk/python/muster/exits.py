"""Pooled exits: how a run reaches its target."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from muster import values
from muster.allocator.v1 import exit_pb2, exit_pb2_grpc
from muster.calls import Transport


class ExitCapMode(IntEnum):
    """When a use of an exit is given back; UNSPECIFIED means UNTIL_TOGGLE."""

    UNSPECIFIED = 0
    UNTIL_TOGGLE = 1


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What an operator says of an exit.

    Attributes:
        endpoint: The proxy's address, `scheme://host:port` with http, https, socks4 or socks5; unique.
        region: The region it leaves from, up to 64 characters.
        cap_mode: When a use is given back.
        cap: The most uses, 1 to 100,000; 0 means 20.
    """

    endpoint: str
    region: str = ""
    cap_mode: ExitCapMode = ExitCapMode.UNSPECIFIED
    cap: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """A pooled exit; `use_count` is never above its cap, and `toggled_at` is None when it never was."""

    exit_id: str
    spec: ExitSpec
    enabled: bool
    use_count: int
    toggle_epoch: int
    toggled_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ExitToggle:
    """One toggle; `use_count_before` is what was counted until then."""

    exit_id: str
    toggled_at: datetime
    actor: str
    reason: str
    use_count_before: int


class Exits:
    """`client.exits`: pooled exits. Role: operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> exit_pb2_grpc.ExitServiceAsyncStub:
        return self._transport.stub(exit_pb2_grpc.ExitServiceStub)

    async def add(self, specs: Sequence[ExitSpec]) -> tuple[Exit, ...]:
        """Registers 1 to 500 exits by endpoint; one that stands keeps its counters and takes the other values.

        Raises:
            LimitReached: the organization may not hold so many; none is registered then.
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ImportExitsRequest(
            exits=[
                exit_pb2.ExitSpec(
                    endpoint=spec.endpoint,
                    region=spec.region,
                    cap_mode=exit_pb2.ExitCapMode.ValueType(spec.cap_mode),
                    cap=spec.cap,
                )
                for spec in specs
            ]
        )
        answer = await self._transport.call(self._stub.ImportExits, request)
        return tuple(_exit(item) for item in answer.exits)

    async def list(self, *, page_size: int = 100) -> AsyncIterator[Exit]:
        """Yields the organization's exits by id.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ListExitsRequest(page_size=page_size)
        async for answer in self._transport.pages(self._stub.ListExits, request):
            for item in answer.exits:
                yield _exit(item)

    async def set_enabled(self, exit_id: str, enabled: bool) -> Exit:
        """Takes an exit out of use or back. Live leases keep it.

        Raises:
            NotFound: the organization has no such exit.
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.SetExitEnabledRequest(exit_id=exit_id, enabled=enabled)
        answer = await self._transport.call(self._stub.SetExitEnabled, request)
        return _exit(answer.exit)

    async def toggle(self, exit_id: str, *, reason: str = "") -> Exit:
        """Says that an exit has a new address: its use count starts from 0.

        Raises:
            NotFound: the organization has no such exit.
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_id, reason=reason)
        answer = await self._transport.call(self._stub.ToggleExit, request)
        return _exit(answer.exit)

    async def toggles(self, exit_id: str = "", *, page_size: int = 100) -> AsyncIterator[ExitToggle]:
        """Yields the toggles of one exit, or of all, newest first.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ListExitTogglesRequest(exit_id=exit_id, page_size=page_size)
        async for answer in self._transport.pages(self._stub.ListExitToggles, request):
            for item in answer.toggles:
                yield ExitToggle(
                    item.exit_id,
                    values.required_moment(item, "toggled_at"),
                    item.actor,
                    item.reason,
                    item.use_count_before,
                )


def _exit(message: exit_pb2.Exit) -> Exit:
    spec = message.spec
    return Exit(
        message.exit_id,
        ExitSpec(spec.endpoint, spec.region, values.member(ExitCapMode, spec.cap_mode), spec.cap),
        message.enabled,
        message.use_count,
        message.toggle_epoch,
        values.moment(message, "toggled_at"),
        values.required_moment(message, "created_at"),
    )
