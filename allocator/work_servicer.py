"""WorkService: translates and validates; the domain decides."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

from muster.allocator.v1 import work_pb2, work_pb2_grpc

from allocator.allocation import Allocation
from allocator.blockers import NoWork
from allocator.clients import ClientIdentity, Clients
from allocator.leases import LeaseName, Leases, Status
from allocator.package_bytes import packages_bytes
from allocator.packages import Demand
from allocator.results import Results
from allocator.submissions import answers_bytes, submissions
from allocator.translation import (
    client_identity,
    item_error,
    lease_name,
    moment,
    no_work_message,
)
from services.errors import DomainError, InvalidField
from services.status import Context
from services.validate import Checks
from services.varints import varint

_MOST_ITEMS = 256
_MOST_LEASES = 1000
_UNANSWERED = 64
# The tags of a stream's answer.
_SEQUENCE = b"\x08"
_ALLOCATE = b"\x12"
_SUBMIT = b"\x2a"
# An answer on a stream: its sequence, and the message, encoded or not.
_Answer = tuple[int, work_pb2.WorkStreamResponse | bytes]
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")


class WorkServicer(work_pb2_grpc.WorkServiceServicer):
    """What a worker calls."""

    def __init__(
        self,
        allocation: Allocation,
        leases: Leases,
        results: Results,
        clients: Clients,
        draining: asyncio.Event,
    ) -> None:
        self._allocation = allocation
        self._leases = leases
        self._results = results
        self._clients = clients
        self._draining = draining

    async def AllocateWork(  # type: ignore[override]
        self, request: work_pb2.AllocateWorkRequest, context: Context
    ) -> bytes:
        """Hands out work; the answer is encoded."""
        checks = Checks()
        client = client_identity(checks, request, context)
        demand = Demand(
            request_id=checks.uuid("request_id", request.request_id),
            digest=_digest(client, request.max_items, request.target, request.region),
            client_id=client.client_id,
            instance_number=client.instance_number,
            max_items=checks.number("max_items", request.max_items or 1, least=1, most=_MOST_ITEMS),
            target=checks.text("target", request.target, max_length=128) if request.target else "",
            region=checks.text("region", request.region, max_length=64) if request.region else "",
            traceparent=request.traceparent,
        )
        wait = checks.duration(request, "wait", least=0, most=30) or 0.0
        if demand.traceparent and not _TRACEPARENT.match(demand.traceparent):
            checks.fail("traceparent", "must be a W3C traceparent of version 00, 55 characters")
        checks.done()
        outcome = await self._allocation.allocate((await self._clients.caller()).organization_id, client, demand, wait)
        if isinstance(outcome, NoWork):
            return work_pb2.AllocateWorkResponse(no_work=no_work_message(outcome)).SerializeToString()
        return packages_bytes(outcome, self._allocation.duration_seconds)

    async def RenewLeases(self, request: work_pb2.RenewLeasesRequest, context: Context) -> work_pb2.RenewLeasesResponse:
        """Renews leases."""
        names = _names(request.leases)
        answers = await self._leases.renew((await self._clients.caller()).organization_id, names)
        return work_pb2.RenewLeasesResponse(
            leases=[
                work_pb2.RenewedLease(allocation_key=str(name.key), error=item_error(answer))
                if isinstance(answer, DomainError)
                else work_pb2.RenewedLease(allocation_key=str(name.key), expires_at=moment(answer))
                for name, answer in zip(names, answers, strict=True)
            ]
        )

    async def ReleaseLeases(
        self, request: work_pb2.ReleaseLeasesRequest, context: Context
    ) -> work_pb2.ReleaseLeasesResponse:
        """Releases leases."""
        checks = Checks()
        reason = checks.text("reason", request.reason, max_length=256)
        names = _names(request.leases, checks)
        answers = await self._leases.release((await self._clients.caller()).organization_id, names, reason)
        return work_pb2.ReleaseLeasesResponse(
            leases=[
                work_pb2.ReleasedLease(allocation_key=str(name.key), error=item_error(error) if error else None)
                for name, error in zip(names, answers, strict=True)
            ]
        )

    async def SubmitResults(  # type: ignore[override]
        self, request: work_pb2.SubmitResultsRequest, context: Context
    ) -> bytes:
        """Records results; the answer is encoded."""
        checks = Checks()
        client = client_identity(checks, request, context)
        given = submissions(checks, request, client)
        checks.done()
        answered = await self._results.submit((await self._clients.caller()).organization_id, client, given)
        return answers_bytes(given, answered)

    async def Heartbeat(self, request: work_pb2.HeartbeatRequest, context: Context) -> work_pb2.HeartbeatResponse:
        """Notes that an instance lives, or that it ends."""
        checks = Checks()
        client = client_identity(checks, request, context)
        checks.done()
        organization_id = (await self._clients.caller()).organization_id
        released = 0
        if request.goodbye:
            released = await self._clients.goodbye(organization_id, client.client_id, client.instance_number)
            self._leases.gave_back(organization_id, released, Status.RELEASED)
        else:
            await self._clients.meet(organization_id, client)
        now, draining = await self._clients.heartbeat(organization_id, client.client_id)
        return work_pb2.HeartbeatResponse(server_time=moment(now), drain=draining, released_leases=released)

    async def WorkStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[work_pb2.WorkStreamRequest], context: Context
    ) -> AsyncIterator[work_pb2.WorkStreamResponse | bytes]:
        """Carries the calls over one stream, up to 64 at a time, each answered when it is done."""
        answers: asyncio.Queue[_Answer | BaseException | None] = asyncio.Queue()
        room = asyncio.Semaphore(_UNANSWERED)
        tasks: set[asyncio.Task[None]] = set()
        unanswered: set[int] = set()

        async def answer(request: work_pb2.WorkStreamRequest) -> None:
            try:
                await answers.put(await self._answer(request, context))
            except Exception as error:
                await answers.put(error)

        async def read() -> None:
            try:
                async for request in request_iterator:
                    _check_sequence(request, unanswered)
                    unanswered.add(request.sequence)
                    await room.acquire()
                    task = asyncio.create_task(answer(request))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    if self._draining.is_set():
                        break
            except Exception as error:
                await answers.put(error)
                return
            if tasks:
                await asyncio.wait(set(tasks))
            await answers.put(None)

        reader = asyncio.create_task(read())
        stop = asyncio.create_task(self._stop_reading(reader, tasks, answers))
        try:
            while (response := await answers.get()) is not None:
                if isinstance(response, BaseException):
                    raise response
                sequence, message = response
                unanswered.discard(sequence)
                room.release()
                yield message
        finally:
            for task in (reader, stop, *tasks):
                task.cancel()
            await asyncio.gather(reader, stop, *tasks, return_exceptions=True)

    async def _stop_reading(self, reader: asyncio.Task[None], tasks: set[asyncio.Task[None]], answers: Any) -> None:
        """When the service drains, takes no more from the stream, lets what was begun be answered, and ends it."""
        await self._draining.wait()
        reader.cancel()
        if tasks:
            await asyncio.wait(set(tasks))
        await answers.put(None)

    async def _answer(self, request: work_pb2.WorkStreamRequest, context: Context) -> _Answer:
        """Returns the answer to one call of the stream. Raises: InvalidField, which ends it."""
        sequence = request.sequence
        try:
            match request.WhichOneof("call"):
                case "allocate":
                    allocated = await self.AllocateWork(request.allocate, context)
                    return sequence, _stream_answer(sequence, _ALLOCATE, allocated)
                case "renew":
                    renewed = await self.RenewLeases(request.renew, context)
                    return sequence, work_pb2.WorkStreamResponse(sequence=sequence, renew=renewed)
                case "release":
                    released = await self.ReleaseLeases(request.release, context)
                    return sequence, work_pb2.WorkStreamResponse(sequence=sequence, release=released)
                case _:
                    submitted = await self.SubmitResults(request.submit, context)
                    return sequence, _stream_answer(sequence, _SUBMIT, submitted)
        except InvalidField:
            raise
        except DomainError as error:
            return sequence, work_pb2.WorkStreamResponse(sequence=sequence, error=item_error(error))


def _stream_answer(sequence: int, tag: bytes, answer: bytes) -> bytes:
    """Returns a WorkStreamResponse with an answer that is encoded already."""
    return b"".join((_SEQUENCE, varint(sequence), tag, varint(len(answer)), answer))


def _check_sequence(request: work_pb2.WorkStreamRequest, unanswered: set[int]) -> None:
    checks = Checks()
    if not request.sequence or request.sequence in unanswered:
        checks.fail("sequence", "must be from 1, each used once")
    if request.WhichOneof("call") is None:
        checks.fail("call", "required: allocate, renew, release or submit")
    checks.done()


@lru_cache(maxsize=4096)
def _digest(client: ClientIdentity, max_items: int, target: str, region: str) -> bytes:
    """A retry may wait for another time, come from another address and carry another trace."""
    same = (
        client.client_id,
        client.client_name,
        client.instance_number,
        client.user_folder_number,
        max_items,
        target,
        region,
    )
    return hashlib.sha256(repr(same).encode()).digest()


def _names(leases: Any, checks: Checks | None = None) -> list[LeaseName]:
    checks = checks or Checks()
    checks.count("leases", leases, least=1, most=_MOST_LEASES)
    names = [lease_name(checks, f"leases[{number}]", lease) for number, lease in enumerate(leases[:_MOST_LEASES])]
    checks.done()
    return names
