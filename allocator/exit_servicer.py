"""ExitService: translates and validates; the store decides."""

from __future__ import annotations

import math
from collections.abc import Mapping

from muster.allocator.v1 import exit_pb2, exit_pb2_grpc, work_pb2

from allocator.availability import Availability
from allocator.clients import Clients
from allocator.exit_forecast import ExitForecast
from allocator.exit_health import ExitHealth, ExitStanding
from allocator.exit_providers import GuardedProvider
from allocator.exit_releases import ExitReleases
from allocator.exit_store import ExitStore
from allocator.exits import DEFAULT_CAP, CapMode, Exit, ExitSpec, is_endpoint
from allocator.positions import pair_position, time_position, uuid_position
from allocator.translation import moment
from services import pages, requests
from services.status import Context
from services.validate import Checks

_LONGEST_WINDOW_SECONDS = 86_400


class ExitServicer(exit_pb2_grpc.ExitServiceServicer):
    """Administers exits.

    Args:
        store: Pooled exits.
        health: How exits stand with targets.
        forecast: When the pool will be empty.
        providers: Of external exits, by name.
        releases: Knows which external exits their providers have yet to hear of.
        availability: Is told of what changed.
        clients: Notes the organization.
        limit: The most exits an organization may have.
    """

    def __init__(
        self,
        store: ExitStore,
        health: ExitHealth,
        forecast: ExitForecast,
        providers: Mapping[str, GuardedProvider],
        releases: ExitReleases,
        availability: Availability,
        clients: Clients,
        *,
        limit: int,
    ) -> None:
        self._store = store
        self._health = health
        self._forecast = forecast
        self._providers = providers
        self._releases = releases
        self._availability = availability
        self._clients = clients
        self._limit = limit

    async def ImportExits(self, request: exit_pb2.ImportExitsRequest, context: Context) -> exit_pb2.ImportExitsResponse:
        """Registers exits."""
        checks = Checks()
        checks.count("exits", request.exits, least=1, most=500)
        specs = [_spec(checks, f"exits[{number}]", spec) for number, spec in enumerate(request.exits[:500])]
        checks.unique("exits.endpoint", (spec.endpoint for spec in specs))
        checks.done()
        principal = await self._clients.caller()
        exits = await self._store.import_exits(principal.organization_id, specs, limit=self._limit)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.ImportExitsResponse(exits=[_message(exit_) for exit_ in exits])

    async def ListExits(self, request: exit_pb2.ListExitsRequest, context: Context) -> exit_pb2.ListExitsResponse:
        """Pages through exits."""
        checks = Checks()
        size = checks.page(request.page_size)
        checks.done()
        principal = await self._clients.caller()
        scope = f"ListExits {principal.organization_id}"
        after = uuid_position(pages.decode(request.page_token, scope))
        exits = await self._store.page(principal.organization_id, after, size)
        token = pages.encode([str(exits[-1].exit_id)], scope) if len(exits) == size else ""
        return exit_pb2.ListExitsResponse(exits=[_message(exit_) for exit_ in exits], next_page_token=token)

    async def SetExitEnabled(
        self, request: exit_pb2.SetExitEnabledRequest, context: Context
    ) -> exit_pb2.SetExitEnabledResponse:
        """Takes an exit out of use or back."""
        checks = Checks()
        exit_id = checks.uuid("exit_id", request.exit_id)
        checks.done()
        principal = await self._clients.caller()
        exit_ = await self._store.set_enabled(principal.organization_id, exit_id, request.enabled)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.SetExitEnabledResponse(exit=_message(exit_))

    async def DeleteExit(self, request: exit_pb2.DeleteExitRequest, context: Context) -> exit_pb2.DeleteExitResponse:
        """Forgets an exit."""
        checks = Checks()
        exit_id = checks.uuid("exit_id", request.exit_id)
        checks.done()
        principal = await self._clients.caller()
        deleted = await self._store.delete(principal.organization_id, exit_id)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.DeleteExitResponse(deleted=deleted)

    async def ToggleExit(self, request: exit_pb2.ToggleExitRequest, context: Context) -> exit_pb2.ToggleExitResponse:
        """Starts an exit's count afresh."""
        checks = Checks()
        request_id = checks.uuid("request_id", request.request_id)
        exit_id = checks.uuid("exit_id", request.exit_id)
        reason = checks.text("reason", request.reason, max_length=256)
        checks.done()
        principal = await self._clients.caller()
        exit_ = await self._store.toggle(
            principal.organization_id,
            exit_id,
            request_id,
            requests.digest(request),
            actor=principal.key_id,
            reason=reason,
        )
        self._availability.outdate(principal.organization_id)
        return exit_pb2.ToggleExitResponse(exit=_message(exit_))

    async def ListExitToggles(
        self, request: exit_pb2.ListExitTogglesRequest, context: Context
    ) -> exit_pb2.ListExitTogglesResponse:
        """Pages through toggles."""
        checks = Checks()
        exit_id = checks.uuid("exit_id", request.exit_id, required=False) if request.exit_id else None
        size = checks.page(request.page_size)
        checks.done()
        principal = await self._clients.caller()
        scope = f"ListExitToggles {principal.organization_id} {exit_id}"
        before = time_position(pages.decode(request.page_token, scope))
        toggles = await self._store.page_of_toggles(principal.organization_id, exit_id, before, size)
        token = ""
        if len(toggles) == size:
            token = pages.encode([toggles[-1].toggled_at.isoformat(), str(toggles[-1].toggle_id)], scope)
        return exit_pb2.ListExitTogglesResponse(
            toggles=[
                exit_pb2.ExitToggle(
                    exit_id=str(toggle.exit_id),
                    toggled_at=moment(toggle.toggled_at),
                    actor=toggle.actor,
                    reason=toggle.reason,
                    use_count_before=toggle.use_count_before,
                )
                for toggle in toggles
            ],
            next_page_token=token,
        )

    async def ListExitHealth(
        self, request: exit_pb2.ListExitHealthRequest, context: Context
    ) -> exit_pb2.ListExitHealthResponse:
        """Pages through cool-downs."""
        checks = Checks()
        exit_id = checks.uuid("exit_id", request.exit_id, required=False) if request.exit_id else None
        target = checks.text("target", request.target, max_length=128) or None
        size = checks.page(request.page_size)
        checks.done()
        principal = await self._clients.caller()
        scope = f"ListExitHealth {principal.organization_id} {exit_id} {target}"
        after = pair_position(pages.decode(request.page_token, scope))
        standings = await self._health.page(principal.organization_id, exit_id, target, after, size)
        token = ""
        if len(standings) == size:
            token = pages.encode([str(standings[-1].exit_id), standings[-1].target], scope)
        return exit_pb2.ListExitHealthResponse(
            health=[_health_message(standing) for standing in standings], next_page_token=token
        )

    async def ClearExitHealth(
        self, request: exit_pb2.ClearExitHealthRequest, context: Context
    ) -> exit_pb2.ClearExitHealthResponse:
        """Ends cool-downs."""
        checks = Checks()
        exit_id = checks.uuid("exit_id", request.exit_id)
        target = checks.text("target", request.target, max_length=128) if request.HasField("target") else None
        checks.done()
        principal = await self._clients.caller()
        cleared = await self._health.clear(principal.organization_id, exit_id, target)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.ClearExitHealthResponse(cleared=cleared)

    async def ForecastExits(
        self, request: exit_pb2.ForecastExitsRequest, context: Context
    ) -> exit_pb2.ForecastExitsResponse:
        """Says when the pool will be used up."""
        checks = Checks()
        region = checks.text("region", request.region, max_length=64)
        checks.done()
        principal = await self._clients.caller()
        forecast = await self._forecast.forecast(principal.organization_id, region)
        return exit_pb2.ForecastExitsResponse(
            room=forecast.room,
            capacity=forecast.capacity,
            uses_per_minute=forecast.uses_per_minute,
            empty_at=moment(forecast.empty_at),
            # Rounded up, since 0 says that the pace is unknown.
            observed_seconds=math.ceil(forecast.observed_seconds),
        )

    async def ListExitProviders(
        self, request: exit_pb2.ListExitProvidersRequest, context: Context
    ) -> exit_pb2.ListExitProvidersResponse:
        """Reads the external providers."""
        await self._clients.caller()
        pending = await self._releases.pending()
        return exit_pb2.ListExitProvidersResponse(
            providers=[
                exit_pb2.ExitProviderState(
                    name=name,
                    available=provider.available,
                    last_error=provider.last_error,
                    answered_at=moment(provider.answered_at),
                    held=provider.held,
                    orphans_released=provider.orphans_released,
                    releases_pending=pending.get(name, 0),
                )
                for name, provider in sorted(self._providers.items())
            ]
        )


def _spec(checks: Checks, path: str, spec: exit_pb2.ExitSpec) -> ExitSpec:
    endpoint = checks.text(f"{path}.endpoint", spec.endpoint, min_length=1, max_length=512)
    if endpoint and not is_endpoint(endpoint):
        checks.fail(f"{path}.endpoint", "must be scheme://host:port with scheme http, https, socks4 or socks5")
    mode = spec.cap_mode or CapMode.UNTIL_TOGGLE
    checks.choice(f"{path}.cap_mode", mode, list(CapMode), "UNTIL_TOGGLE, CONCURRENT, PER_WINDOW")
    per_window = mode == CapMode.PER_WINDOW
    if per_window:
        checks.number(f"{path}.window_seconds", spec.window_seconds, least=1, most=_LONGEST_WINDOW_SECONDS)
    elif spec.window_seconds:
        checks.fail(f"{path}.window_seconds", "must be 0 but in mode PER_WINDOW")
    return ExitSpec(
        endpoint=endpoint,
        region=checks.text(f"{path}.region", spec.region, max_length=64),
        cap_mode=CapMode(mode) if mode in list(CapMode) else CapMode.UNTIL_TOGGLE,
        cap=checks.number(f"{path}.cap", spec.cap or DEFAULT_CAP, least=1, most=100_000),
        window_seconds=spec.window_seconds if per_window else None,
    )


def _message(exit_: Exit) -> exit_pb2.Exit:
    return exit_pb2.Exit(
        exit_id=str(exit_.exit_id),
        spec=exit_pb2.ExitSpec(
            endpoint=exit_.endpoint,
            region=exit_.region,
            cap_mode=exit_pb2.ExitCapMode.ValueType(exit_.cap_mode),
            cap=exit_.cap,
            window_seconds=exit_.window_seconds or 0,
        ),
        enabled=exit_.enabled,
        use_count=exit_.use_count,
        toggle_epoch=exit_.toggle_epoch,
        toggled_at=moment(exit_.toggled_at),
        created_at=moment(exit_.created_at),
        window_ends_at=moment(exit_.window_ends_at),
    )


def _health_message(standing: ExitStanding) -> exit_pb2.ExitHealth:
    return exit_pb2.ExitHealth(
        exit_id=str(standing.exit_id),
        target=standing.target,
        signal=work_pb2.ExitSignal.ValueType(standing.signal),
        faults=standing.faults,
        cooling_until=moment(standing.cooling_until),
        reported_at=moment(standing.reported_at),
    )
