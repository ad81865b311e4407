"""TargetService: translates and validates; the store decides."""

from __future__ import annotations

from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import target_pb2, target_pb2_grpc

from allocator.clients import Clients
from allocator.positions import text_position
from allocator.targets import SLOT_PREFIX, TargetPolicy, Targets, TargetState
from allocator.translation import moment
from services import pages
from services.status import Context
from services.validate import Checks

_TARGET_LENGTH = 128
_MOST_IN_FLIGHT = 1_000_000
_MOST_DELAY_SECONDS = 3600
_MOST_HOLD_SECONDS = 30 * 86_400


class TargetServicer(target_pb2_grpc.TargetServiceServicer):
    """Administers targets."""

    def __init__(self, targets: Targets, clients: Clients) -> None:
        self._targets = targets
        self._clients = clients

    async def SetTargetPolicy(
        self, request: target_pb2.SetTargetPolicyRequest, context: Context
    ) -> target_pb2.SetTargetPolicyResponse:
        """Sets a policy."""
        checks = Checks()
        target = checks.text("target", request.target, min_length=1, max_length=_TARGET_LENGTH)
        if target.startswith(SLOT_PREFIX):
            checks.fail("target", f"must not begin with {SLOT_PREFIX}: a slot without a target has no policy")
        if not request.HasField("policy"):
            checks.fail("policy", "required")
        policy = request.policy
        seconds = checks.duration(policy, "min_delay", least=0, most=_MOST_DELAY_SECONDS, path="policy.min_delay")
        most = checks.number("policy.max_in_flight", policy.max_in_flight, least=0, most=_MOST_IN_FLIGHT)
        checks.done()
        wanted = TargetPolicy(
            max_in_flight=most or None,
            min_delay_ms=round((seconds or 0.0) * 1000),
            auto_pause=policy.auto_pause if policy.HasField("auto_pause") else True,
        )
        state = await self._targets.set_policy((await self._clients.caller()).organization_id, target, wanted)
        return target_pb2.SetTargetPolicyResponse(target=_message(state))

    async def ListTargets(
        self, request: target_pb2.ListTargetsRequest, context: Context
    ) -> target_pb2.ListTargetsResponse:
        """Pages through targets."""
        checks = Checks()
        size = checks.page(request.page_size)
        only = _target(checks, request.target) if request.target else None
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        scope = f"ListTargets {organization_id} {request.only_stopped} {only}"
        after = text_position(pages.decode(request.page_token, scope))
        states = await self._targets.page(organization_id, after, size, only=only, only_stopped=request.only_stopped)
        token = pages.encode([states[-1].target], scope) if len(states) == size else ""
        return target_pb2.ListTargetsResponse(targets=[_message(state) for state in states], next_page_token=token)

    async def HoldTarget(
        self, request: target_pb2.HoldTargetRequest, context: Context
    ) -> target_pb2.HoldTargetResponse:
        """Holds a target."""
        checks = Checks()
        target = _target(checks, request.target)
        seconds = checks.duration(request, "duration", least=0, most=_MOST_HOLD_SECONDS, required=True)
        if seconds == 0:
            checks.fail("duration", "must be more than 0 s: use ResumeTarget to end a hold")
        reason = checks.text("reason", request.reason, max_length=256)
        checks.done()
        assert seconds is not None
        state = await self._targets.hold(
            (await self._clients.caller()).organization_id, target, seconds, reason or "held by an operator"
        )
        return target_pb2.HoldTargetResponse(target=_message(state))

    async def ResumeTarget(
        self, request: target_pb2.ResumeTargetRequest, context: Context
    ) -> target_pb2.ResumeTargetResponse:
        """Ends what stops a target."""
        checks = Checks()
        target = _target(checks, request.target)
        checks.done()
        state = await self._targets.resume((await self._clients.caller()).organization_id, target)
        return target_pb2.ResumeTargetResponse(target=_message(state))


def _target(checks: Checks, value: str) -> str:
    """Checks the name of a target, or of a slot that is its own; the slot's id in the form in which it is stored."""
    target = checks.text("target", value, min_length=1, max_length=_TARGET_LENGTH)
    if target.startswith(SLOT_PREFIX):
        slot_id = target.removeprefix(SLOT_PREFIX)
        try:
            if len(slot_id) == 36:
                return f"{SLOT_PREFIX}{UUID(slot_id)}"
        except ValueError:
            pass
        checks.fail("target", f"must name a slot by its UUID after {SLOT_PREFIX}")
    return target


def _message(state: TargetState) -> target_pb2.TargetState:
    return target_pb2.TargetState(
        target=state.target,
        policy=target_pb2.TargetPolicy(
            max_in_flight=state.max_in_flight or 0,
            min_delay=_duration(state.min_delay_ms),
            auto_pause=state.auto_pause,
        ),
        crawl_delay=_duration(state.crawl_delay_ms) if state.crawl_delay_ms else None,
        held_until=moment(state.held_until),
        paused_at=moment(state.paused_at),
        probe_at=moment(state.probe_at),
        pauses=state.pauses,
        in_flight=state.in_flight,
        reason=state.reason,
    )


def _duration(milliseconds: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(milliseconds)
    return duration
