"""Work under lease: what a worker asks for, holds and hands in."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import IntEnum
from typing import Any

from muster import values
from muster.allocator.v1 import work_pb2, work_pb2_grpc
from muster.calls import Transport, item_error
from muster.errors import MusterError
from muster.results import Lease, SubmittedResult, WorkResult, lease_message, result_message, submitted
from muster.values import Setting


class BlockerKind(IntEnum):
    """Why a slot, or an organization, gets no work; the nearest to the cause first."""

    UNSPECIFIED = 0
    NO_SLOT = 1
    SLOT_INACTIVE = 2
    SLOT_OUT_OF_DATE = 3
    QUOTA_EXHAUSTED = 4
    NO_EXIT = 5
    EXIT_EXHAUSTED = 6
    NO_PERSONA = 7
    PERSONA_STORE_UNAVAILABLE = 8
    CLIENT_DRAINING = 9
    PACED = 10
    TARGET_HELD = 11
    TARGET_PAUSED = 12
    TARGET_BUSY = 13
    EXIT_COOLING = 14
    EXIT_UNAVAILABLE = 15


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """The machine and the process that speak.

    Attributes:
        client_id: The machine's own id, chosen by it and kept: 1 to 128 of `A-Z a-z 0-9 . _ : -`.
        instance_number: The process on that machine, 0 to 65535.
        client_name: For people, up to 128 characters; empty keeps the one on record.
        user_folder_number: The profile folder it uses, 0 to 65535.
        client_ip: The machine's own idea of its address; empty lets the service record the peer's.
    """

    client_id: str
    instance_number: int = 0
    client_name: str = ""
    user_folder_number: int = 0
    client_ip: str = ""


@dataclass(frozen=True, slots=True)
class AssignedExit:
    """The exit of one allocation: connect to `endpoint`, such as `http://127.0.0.1:3128`.

    An external exit has a `provider`, and the `exit_ip` that it says the target sees; a pooled one has an `exit_id`.
    """

    exit_id: str
    endpoint: str
    region: str
    provider: str = ""
    exit_ip: str = ""


@dataclass(frozen=True, slots=True)
class AssignedPersona:
    """The persona of one allocation, checked out for it alone.

    `lease_token` is needed to save its bundle; `generation` is the newest one at check-out, 0 when nothing was saved.
    """

    persona_id: str
    lease_token: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """One unit of work under lease. Moments are the database's clock.

    Attributes:
        lease: Its key and token.
        expires_at: The lease ends then unless it is renewed.
        renewable_until: No renewal moves the expiry past this moment.
        lease_duration: How long the lease lasts from its grant or renewal.
        slot_id: The slot it belongs to.
        work_date: The day it counts on.
        keyword: What to work on.
        code: The site's own code; may be empty.
        target: Where; may be empty.
        settings: The slot's settings when the lease was granted.
        exit: The way to the target; None when the slot uses none.
        persona: The identity to work as; None when the slot needs none.
        traceparent: W3C trace context of this unit.
    """

    lease: Lease
    expires_at: datetime
    renewable_until: datetime
    lease_duration: timedelta
    slot_id: str
    work_date: date
    keyword: str
    code: str
    target: str
    settings: dict[str, Setting]
    exit: AssignedExit | None
    persona: AssignedPersona | None
    traceparent: str

    @property
    def allocation_key(self) -> str:
        """Names the unit for ever."""
        return self.lease.allocation_key


@dataclass(frozen=True, slots=True)
class NoWork:
    """Why nothing was handed out, and when to ask again."""

    blocker: BlockerKind
    message: str
    retry_after: timedelta


@dataclass(frozen=True, slots=True)
class Allocations:
    """The answer to a demand for work: units, or the reason why there are none."""

    allocations: tuple[Allocation, ...]
    no_work: NoWork | None


@dataclass(frozen=True, slots=True)
class RenewedLease:
    """The answer to one renewal: the new expiry, or why it was refused."""

    allocation_key: str
    expires_at: datetime | None
    error: MusterError | None


@dataclass(frozen=True, slots=True)
class ReleasedLease:
    """The answer to one release: `error` is None when it is released."""

    allocation_key: str
    error: MusterError | None


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The answer to a heartbeat.

    Attributes:
        server_time: The database's clock.
        drain: Finish what is leased, then stop.
        released_leases: Leases released by a goodbye.
    """

    server_time: datetime
    drain: bool
    released_leases: int


class Work:
    """`client.work`: demands for work, leases and results. The worker loop in `muster.Worker` is built on it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> work_pb2_grpc.WorkServiceAsyncStub:
        return self._transport.stub(work_pb2_grpc.WorkServiceStub)

    async def allocate(
        self,
        client: ClientIdentity,
        *,
        max_items: int = 1,
        wait: timedelta | None = None,
        target: str = "",
        region: str = "",
        traceparent: str = "",
        request_id: str = "",
        total_seconds: float | None = None,
    ) -> Allocations:
        """Asks for units of work.

        Args:
            client: Who asks.
            max_items: The most units, 1 to 256.
            wait: How long the service may wait for work, up to 30 s; None for no wait.
            target: Only slots with this target; empty for any.
            region: Only exits of this region; empty for any.
            traceparent: W3C trace context of the caller.
            request_id: A UUID that names this demand, to ask again after a lost answer; empty makes a fresh one.
            total_seconds: How long to keep trying; None means the client's policy.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = work_pb2.AllocateWorkRequest(
            request_id=request_id or str(uuid.uuid4()),
            client=identity_message(client),
            max_items=max_items,
            wait=values.duration(wait),
            target=target,
            region=region,
            traceparent=traceparent,
        )
        longer = wait.total_seconds() if wait else 0.0
        answer = await self._transport.call(
            self._stub.AllocateWork,
            request,
            call_seconds=self._transport.policy.call_seconds + longer,
            total_seconds=total_seconds,
        )
        allocations = tuple(_allocation(allocation) for allocation in answer.allocations)
        return Allocations(allocations, no_work(answer) if answer.HasField("no_work") else None)

    async def renew(self, leases: Sequence[Lease], *, total_seconds: float | None = None) -> tuple[RenewedLease, ...]:
        """Renews 1 to 1000 leases; each is answered for itself, in order.

        Args:
            leases: Which.
            total_seconds: How long to keep trying; None means the client's policy.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        answer = await self._transport.call(
            self._stub.RenewLeases,
            work_pb2.RenewLeasesRequest(leases=[lease_message(lease) for lease in leases]),
            total_seconds=total_seconds,
        )
        return tuple(
            RenewedLease(
                item.allocation_key,
                values.moment(item, "expires_at"),
                item_error(item.error) if item.HasField("error") else None,
            )
            for item in answer.leases
        )

    async def release(
        self, leases: Sequence[Lease], *, reason: str = "", total_seconds: float | None = None
    ) -> tuple[ReleasedLease, ...]:
        """Gives 1 to 1000 units back unworked; each is answered for itself, in order.

        Args:
            leases: Which.
            reason: For the log, up to 256 characters.
            total_seconds: How long to keep trying; None means the client's policy.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        request = work_pb2.ReleaseLeasesRequest(leases=[lease_message(lease) for lease in leases], reason=reason)
        answer = await self._transport.call(self._stub.ReleaseLeases, request, total_seconds=total_seconds)
        return tuple(
            ReleasedLease(item.allocation_key, item_error(item.error) if item.HasField("error") else None)
            for item in answer.leases
        )

    async def submit(
        self, client: ClientIdentity, results: Sequence[WorkResult], *, total_seconds: float | None = None
    ) -> tuple[SubmittedResult, ...]:
        """Hands in 1 to 256 results; each is answered for itself, in order, and counts once however often it comes.

        Args:
            client: Who submits.
            results: With at most 4 MiB in all.
            total_seconds: How long to keep trying; None means the client's policy.

        Raises:
            MusterError: the call was refused, or did not succeed in time.
        """
        request = work_pb2.SubmitResultsRequest(
            client=identity_message(client), results=[result_message(result) for result in results]
        )
        answer = await self._transport.call(self._stub.SubmitResults, request, total_seconds=total_seconds)
        return tuple(submitted(item) for item in answer.results)

    async def heartbeat(
        self, client: ClientIdentity, *, goodbye: bool = False, total_seconds: float | None = None
    ) -> HeartbeatReply:
        """Tells that an instance lives, or with `goodbye` that it ends: its live leases are released then.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(
            self._stub.Heartbeat,
            work_pb2.HeartbeatRequest(client=identity_message(client), goodbye=goodbye),
            total_seconds=total_seconds,
        )
        return HeartbeatReply(values.required_moment(answer, "server_time"), answer.drain, answer.released_leases)


def no_work(answer: Any) -> NoWork:
    """Returns the field `no_work` of an answer."""
    told: work_pb2.NoWork = answer.no_work
    return NoWork(values.member(BlockerKind, told.blocker), told.message, told.retry_after.ToTimedelta())


def identity_message(client: ClientIdentity) -> work_pb2.ClientIdentity:
    """Returns who speaks as a message."""
    return work_pb2.ClientIdentity(
        client_id=client.client_id,
        client_name=client.client_name,
        instance_number=client.instance_number,
        user_folder_number=client.user_folder_number,
        client_ip=client.client_ip,
    )


def _allocation(message: work_pb2.Allocation) -> Allocation:
    assigned, persona = message.exit, message.persona
    return Allocation(
        lease=Lease(message.allocation_key, message.lease_token),
        expires_at=values.required_moment(message, "expires_at"),
        renewable_until=values.required_moment(message, "renewable_until"),
        lease_duration=message.lease_duration.ToTimedelta(),
        slot_id=message.slot_id,
        work_date=date.fromisoformat(message.work_date),
        keyword=message.keyword,
        code=message.code,
        target=message.target,
        settings=values.plain_settings(message.settings),
        exit=AssignedExit(assigned.exit_id, assigned.endpoint, assigned.region, assigned.provider, assigned.exit_ip)
        if message.HasField("exit")
        else None,
        persona=AssignedPersona(persona.persona_id, persona.lease_token, persona.generation)
        if message.HasField("persona")
        else None,
        traceparent=message.traceparent,
    )
