"""Targets: how politely they are treated, and how the fleet stands with them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from muster import values
from muster.allocator.v1 import target_pb2, target_pb2_grpc
from muster.calls import Transport


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """What an operator says of a target.

    Attributes:
        max_in_flight: The most units of it under lease at once, over the whole fleet; 0 for no limit.
        min_delay: The least time between two units, up to 1 h.
        auto_pause: Whether it is paused when it blocks or asks to be left alone, and resumes by a probe.
    """

    max_in_flight: int = 0
    min_delay: timedelta = timedelta(0)
    auto_pause: bool = True


@dataclass(frozen=True, slots=True)
class TargetState:
    """How the fleet stands with a target.

    Attributes:
        target: Its name, or `slot:<id>` for a slot without one.
        policy: What the operator said.
        crawl_delay: The delay it asked for; None when it did not.
        held_until: Nothing goes out before; None when nothing holds it.
        paused_at: When it was paused for blocking or by its Retry-After; None when it is not.
        probe_at: While paused, when the next probe may go out.
        pauses: Pauses in a row; each doubles the wait for a probe.
        in_flight: Units under lease; counted only where the policy limits them.
        reason: Why it is held or paused.
    """

    target: str
    policy: TargetPolicy
    crawl_delay: timedelta | None
    held_until: datetime | None
    paused_at: datetime | None
    probe_at: datetime | None
    pauses: int
    in_flight: int
    reason: str


class Targets:
    """`client.targets`: politeness and back-off, for the whole fleet. Role: operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> target_pb2_grpc.TargetServiceAsyncStub:
        return self._transport.stub(target_pb2_grpc.TargetServiceStub)

    async def set_policy(self, target: str, policy: TargetPolicy) -> TargetState:
        """Says how politely a target is treated from now on; a longer delay in force is cut to the new one.

        The whole policy is replaced: of two callers who each change a field of what they read, the last one wins.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        message = target_pb2.TargetPolicy(
            max_in_flight=policy.max_in_flight,
            min_delay=values.duration(policy.min_delay),
            auto_pause=policy.auto_pause,
        )
        request = target_pb2.SetTargetPolicyRequest(target=target, policy=message)
        return _state((await self._transport.call(self._stub.SetTargetPolicy, request)).target)

    async def list(
        self, *, only_stopped: bool = False, target: str = "", page_size: int = 100
    ) -> AsyncIterator[TargetState]:
        """Yields by name the targets of which anything is known.

        Args:
            only_stopped: Only those that get nothing now.
            target: Only this one; '' for any.
            page_size: How many one call reads.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = target_pb2.ListTargetsRequest(page_size=page_size, only_stopped=only_stopped, target=target)
        async for answer in self._transport.pages(self._stub.ListTargets, request):
            for item in answer.targets:
                yield _state(item)

    async def hold(self, target: str, duration: timedelta, *, reason: str = "") -> TargetState:
        """Hands out nothing of a target, or of `slot:<id>`, for up to 30 days from now. Live leases go on.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = target_pb2.HoldTargetRequest(target=target, duration=values.duration(duration), reason=reason)
        return _state((await self._transport.call(self._stub.HoldTarget, request)).target)

    async def resume(self, target: str) -> TargetState:
        """Ends a hold, a Retry-After, a pause and a delay in force at once; forgets the target's own crawl delay.

        Raises:
            NotFound: nothing is known of the target.
            MusterError: it was refused, or did not succeed in time.
        """
        request = target_pb2.ResumeTargetRequest(target=target)
        return _state((await self._transport.call(self._stub.ResumeTarget, request)).target)


def _state(message: target_pb2.TargetState) -> TargetState:
    policy = message.policy
    return TargetState(
        target=message.target,
        policy=TargetPolicy(
            policy.max_in_flight,
            values.interval(policy, "min_delay") or timedelta(0),
            policy.auto_pause if policy.HasField("auto_pause") else True,
        ),
        crawl_delay=values.interval(message, "crawl_delay"),
        held_until=values.moment(message, "held_until"),
        paused_at=values.moment(message, "paused_at"),
        probe_at=values.moment(message, "probe_at"),
        pauses=message.pauses,
        in_flight=message.in_flight,
        reason=message.reason,
    )
