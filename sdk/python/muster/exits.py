"""Exits: how a run reaches its target."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum

from muster import values
from muster.allocator.v1 import exit_pb2, exit_pb2_grpc
from muster.calls import Transport
from muster.results import ExitSignal


class ExitCapMode(IntEnum):
    """When a use of an exit is given back: at a toggle, when its lease ends, or when the window ends.

    UNSPECIFIED means UNTIL_TOGGLE.
    """

    UNSPECIFIED = 0
    UNTIL_TOGGLE = 1
    CONCURRENT = 2
    PER_WINDOW = 3


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """What an operator says of an exit.

    Attributes:
        endpoint: The proxy's address, `scheme://host:port` with http, https, socks4 or socks5; unique.
        region: The region it leaves from, up to 64 characters.
        cap_mode: When a use is given back.
        cap: The most uses, 1 to 100,000; 0 means 20.
        window: The window of PER_WINDOW, whole seconds of 1 s to 24 h; zero in every other mode.
    """

    endpoint: str
    region: str = ""
    cap_mode: ExitCapMode = ExitCapMode.UNSPECIFIED
    cap: int = 0
    window: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Exit:
    """A pooled exit; `use_count` is never above its cap, and `toggled_at` is None when it never was.

    `window_ends_at` is None but in PER_WINDOW after the first use.
    """

    exit_id: str
    spec: ExitSpec
    enabled: bool
    use_count: int
    toggle_epoch: int
    toggled_at: datetime | None
    created_at: datetime
    window_ends_at: datetime | None


@dataclass(frozen=True, slots=True)
class ExitToggle:
    """One toggle; `use_count_before` is what was counted until then."""

    exit_id: str
    toggled_at: datetime
    actor: str
    reason: str
    use_count_before: int


@dataclass(frozen=True, slots=True)
class ExitHealth:
    """How one exit stands with one target, '' for slots without one: it is not used for it before `cooling_until`.

    `faults` counts the faulty runs in a row; each doubles the cool-down.
    """

    exit_id: str
    target: str
    signal: ExitSignal
    faults: int
    cooling_until: datetime
    reported_at: datetime


@dataclass(frozen=True, slots=True)
class ExitForecast:
    """When the pool will be used up at the pace of the last 15 minutes.

    Attributes:
        room: Uses left on enabled exits.
        capacity: Their caps together.
        uses_per_minute: Uses taken net of those given back.
        empty_at: When nothing will be left; None when nothing is being used up, or nothing was observed yet.
        observed: How much of the last 15 minutes was observed; the pace is unknown at zero.
    """

    room: int
    capacity: int
    uses_per_minute: float
    empty_at: datetime | None
    observed: timedelta


@dataclass(frozen=True, slots=True)
class ExitProvider:
    """An external provider as one replica sees it.

    Attributes:
        name: As configured.
        available: Whether the last call was answered.
        last_error: What went wrong with the last call that failed.
        answered_at: When the last call was answered; None when none was.
        held: Leases of ours that it holds and that are live.
        orphans_released: Orphans released since the replica started.
        releases_pending: Leases that ended and that it has yet to hear of.
    """

    name: str
    available: bool
    last_error: str
    answered_at: datetime | None
    held: int
    orphans_released: int
    releases_pending: int


class Exits:
    """`client.exits`: pooled exits and the state of external providers. Role: operator."""

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
                    window_seconds=int(spec.window.total_seconds()),
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

    async def delete(self, exit_id: str) -> bool:
        """Forgets an exit that is disabled and that no live lease has; its toggles stay. Returns whether there was one.

        Raises:
            FailedPrecondition: it is enabled, or live leases have it.
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._stub.DeleteExit, exit_pb2.DeleteExitRequest(exit_id=exit_id))
        return bool(answer.deleted)

    async def toggle(self, exit_id: str, *, reason: str = "", request_id: str = "") -> Exit:
        """Says that an exit has a new address: its use count starts from 0.

        Args:
            exit_id: Which.
            reason: For the log, up to 256 characters.
            request_id: A UUID, to ask again after a lost answer within 24 hours; empty makes a fresh one.

        Raises:
            NotFound: the organization has no such exit.
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ToggleExitRequest(request_id=request_id or str(uuid.uuid4()), exit_id=exit_id, reason=reason)
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

    async def health(self, *, exit_id: str = "", target: str = "", page_size: int = 100) -> AsyncIterator[ExitHealth]:
        """Yields by exit and target which exits cool down, or did lately; empty for all.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ListExitHealthRequest(exit_id=exit_id, target=target, page_size=page_size)
        async for answer in self._transport.pages(self._stub.ListExitHealth, request):
            for item in answer.health:
                yield ExitHealth(
                    item.exit_id,
                    item.target,
                    values.member(ExitSignal, item.signal),
                    item.faults,
                    values.required_moment(item, "cooling_until"),
                    values.required_moment(item, "reported_at"),
                )

    async def clear_health(self, exit_id: str, *, target: str | None = None) -> int:
        """Ends the cool-downs of an exit, for one target or for all, and returns how many they were.

        Raises:
            NotFound: the organization has no such exit.
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ClearExitHealthRequest(exit_id=exit_id, target=target)
        return (await self._transport.call(self._stub.ClearExitHealth, request)).cleared

    async def forecast(self, *, region: str = "") -> ExitForecast:
        """Says when the pool will be used up; empty for exits of all regions.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = exit_pb2.ForecastExitsRequest(region=region)
        answer = await self._transport.call(self._stub.ForecastExits, request)
        return ExitForecast(
            answer.room,
            answer.capacity,
            answer.uses_per_minute,
            values.moment(answer, "empty_at"),
            timedelta(seconds=answer.observed_seconds),
        )

    async def providers(self) -> tuple[ExitProvider, ...]:
        """Reads the configured external providers, by name.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._stub.ListExitProviders, exit_pb2.ListExitProvidersRequest())
        return tuple(
            ExitProvider(
                item.name,
                item.available,
                item.last_error,
                values.moment(item, "answered_at"),
                item.held,
                item.orphans_released,
                item.releases_pending,
            )
            for item in answer.providers
        )


def _exit(message: exit_pb2.Exit) -> Exit:
    spec = message.spec
    return Exit(
        message.exit_id,
        ExitSpec(
            spec.endpoint,
            spec.region,
            values.member(ExitCapMode, spec.cap_mode),
            spec.cap,
            timedelta(seconds=spec.window_seconds),
        ),
        message.enabled,
        message.use_count,
        message.toggle_epoch,
        values.moment(message, "toggled_at"),
        values.required_moment(message, "created_at"),
        values.moment(message, "window_ends_at"),
    )
