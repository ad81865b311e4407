"""ExitService: translates and validates; the store decides."""

from __future__ import annotations

import re

from muster.allocator.v1 import exit_pb2, exit_pb2_grpc

from allocator.availability import Availability
from allocator.clients import Clients
from allocator.exit_store import ExitStore
from allocator.exits import DEFAULT_CAP, Exit, ExitSpec
from allocator.positions import time_position, uuid_position
from allocator.translation import moment
from services import pages, requests
from services.call import Principal, current
from services.status import Context
from services.validate import Checks

_ENDPOINT = re.compile(
    r"(?:https?|socks[45])://(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})\Z"
)
_CAP_MODES = (exit_pb2.EXIT_CAP_MODE_UNSPECIFIED, exit_pb2.EXIT_CAP_MODE_UNTIL_TOGGLE)


class ExitServicer(exit_pb2_grpc.ExitServiceServicer):
    """Administers pooled exits."""

    def __init__(self, store: ExitStore, availability: Availability, clients: Clients, *, limit: int) -> None:
        self._store = store
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
        principal = await self._principal()
        exits = await self._store.import_exits(principal.organization_id, specs, limit=self._limit)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.ImportExitsResponse(exits=[_message(exit_) for exit_ in exits])

    async def ListExits(self, request: exit_pb2.ListExitsRequest, context: Context) -> exit_pb2.ListExitsResponse:
        """Pages through exits."""
        checks = Checks()
        size = checks.page(request.page_size)
        checks.done()
        principal = await self._principal()
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
        principal = await self._principal()
        exit_ = await self._store.set_enabled(principal.organization_id, exit_id, request.enabled)
        self._availability.outdate(principal.organization_id)
        return exit_pb2.SetExitEnabledResponse(exit=_message(exit_))

    async def ToggleExit(self, request: exit_pb2.ToggleExitRequest, context: Context) -> exit_pb2.ToggleExitResponse:
        """Starts an exit's count afresh."""
        checks = Checks()
        request_id = checks.uuid("request_id", request.request_id)
        exit_id = checks.uuid("exit_id", request.exit_id)
        reason = checks.text("reason", request.reason, max_length=256)
        checks.done()
        principal = await self._principal()
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
        principal = await self._principal()
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

    async def _principal(self) -> Principal:
        principal = current().principal
        await self._clients.meet_organization(principal.organization_id, principal.time_zone)
        return principal


def _spec(checks: Checks, path: str, spec: exit_pb2.ExitSpec) -> ExitSpec:
    endpoint = checks.text(f"{path}.endpoint", spec.endpoint, min_length=1, max_length=512)
    match = _ENDPOINT.match(endpoint)
    if endpoint and (match is None or not 1 <= int(match["port"]) <= 65535):
        checks.fail(f"{path}.endpoint", "must be scheme://host:port with scheme http, https, socks4 or socks5")
    checks.choice(f"{path}.cap_mode", spec.cap_mode, _CAP_MODES, "UNTIL_TOGGLE")
    return ExitSpec(
        endpoint=endpoint,
        region=checks.text(f"{path}.region", spec.region, max_length=64),
        cap=checks.number(f"{path}.cap", spec.cap or DEFAULT_CAP, least=1, most=100_000),
    )


def _message(exit_: Exit) -> exit_pb2.Exit:
    return exit_pb2.Exit(
        exit_id=str(exit_.exit_id),
        spec=exit_pb2.ExitSpec(
            endpoint=exit_.endpoint,
            region=exit_.region,
            cap_mode=exit_pb2.EXIT_CAP_MODE_UNTIL_TOGGLE,
            cap=exit_.cap,
        ),
        enabled=exit_.enabled,
        use_count=exit_.use_count,
        toggle_epoch=exit_.toggle_epoch,
        toggled_at=moment(exit_.toggled_at),
        created_at=moment(exit_.created_at),
    )
