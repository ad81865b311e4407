"""WorkService: translates and validates; the domain decides."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2, work_pb2_grpc

from allocator.allocation import Allocation
from allocator.clients import Clients
from allocator.explanation import NoWork
from allocator.leases import LeaseName, Leases, Status
from allocator.packages import Demand, Package
from allocator.results import Acknowledgement, Product, Results, Submission
from allocator.translation import (
    client_identity,
    day_text,
    item_error,
    lease_name,
    moment,
    settings,
    settings_message,
)
from services import requests
from services.call import current
from services.errors import DomainError, InvalidField
from services.status import Context
from services.validate import Checks

_MOST_ITEMS = 256
_MOST_LEASES = 1000
_MOST_PRODUCTS = 1000
_MOST_RESULT_BYTES = 4 * 2**20
_DAY_SECONDS = 86400.0
_UNANSWERED = 64
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")

_OUTCOMES: dict[int, Status] = {
    work_pb2.WORK_OUTCOME_SUCCEEDED: Status.SUCCEEDED,
    work_pb2.WORK_OUTCOME_FAILED: Status.FAILED,
    work_pb2.WORK_OUTCOME_BLOCKED: Status.BLOCKED,
}


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

    async def AllocateWork(
        self, request: work_pb2.AllocateWorkRequest, context: Context
    ) -> work_pb2.AllocateWorkResponse:
        """Hands out work."""
        checks = Checks()
        demand = Demand(
            request_id=checks.uuid("request_id", request.request_id),
            digest=_digest(request),
            client_id=request.client.client_id,
            instance_number=request.client.instance_number,
            max_items=checks.number("max_items", request.max_items or 1, least=1, most=_MOST_ITEMS),
            target=checks.text("target", request.target, max_length=128),
            region=checks.text("region", request.region, max_length=64),
            traceparent=request.traceparent,
        )
        client = client_identity(checks, request, context)
        wait = checks.duration(request, "wait", least=0, most=30) or 0.0
        if request.traceparent and not _TRACEPARENT.match(request.traceparent):
            checks.fail("traceparent", "must be a W3C traceparent of version 00, 55 characters")
        checks.done()
        outcome = await self._allocation.allocate(await self._organization(), client, demand, wait)
        if isinstance(outcome, NoWork):
            retry_after = Duration()
            retry_after.FromMilliseconds(int(outcome.retry_after_seconds * 1000))
            return work_pb2.AllocateWorkResponse(
                no_work=work_pb2.NoWork(
                    blocker=work_pb2.BlockerKind.ValueType(outcome.blocker),
                    message=outcome.message,
                    retry_after=retry_after,
                )
            )
        duration = Duration()
        duration.FromMilliseconds(int(self._allocation.duration_seconds * 1000))
        return work_pb2.AllocateWorkResponse(allocations=[_allocation(package, duration) for package in outcome])

    async def RenewLeases(self, request: work_pb2.RenewLeasesRequest, context: Context) -> work_pb2.RenewLeasesResponse:
        """Renews leases."""
        names = _names(request.leases)
        answers = await self._leases.renew(await self._organization(), names)
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
        answers = await self._leases.release(await self._organization(), names, reason)
        return work_pb2.ReleaseLeasesResponse(
            leases=[
                work_pb2.ReleasedLease(allocation_key=str(name.key), error=item_error(error) if error else None)
                for name, error in zip(names, answers, strict=True)
            ]
        )

    async def SubmitResults(
        self, request: work_pb2.SubmitResultsRequest, context: Context
    ) -> work_pb2.SubmitResultsResponse:
        """Records results."""
        checks = Checks()
        client = client_identity(checks, request, context)
        checks.count("results", request.results, least=1, most=_MOST_ITEMS)
        if request.ByteSize() > _MOST_RESULT_BYTES:
            checks.fail("results", f"at most {_MOST_RESULT_BYTES} bytes in all, is {request.ByteSize()}")
        checks.done()
        submissions = []
        for number, result in enumerate(request.results):
            path = f"results[{number}]"
            if not result.HasField("lease"):
                checks.fail(f"{path}.lease", "required")
            outcome = checks.choice(f"{path}.outcome", result.outcome, _OUTCOMES, "SUCCEEDED, FAILED, BLOCKED")
            blocked = outcome == work_pb2.WORK_OUTCOME_BLOCKED
            if result.block_type and not blocked:
                checks.fail(f"{path}.block_type", "must be empty unless the outcome is BLOCKED")
            seconds = checks.duration(
                result, "execution_time", least=0, most=_DAY_SECONDS, required=True, path=f"{path}.execution_time"
            )
            retry_after = checks.duration(result, "retry_after", least=0, most=_DAY_SECONDS, path=f"{path}.retry_after")
            submissions.append(
                Submission(
                    name=lease_name(checks, f"{path}.lease", result.lease),
                    client=client,
                    status=_OUTCOMES.get(outcome, Status.FAILED),
                    block_type=checks.text(
                        f"{path}.block_type", result.block_type, min_length=int(blocked), max_length=64
                    ),
                    execution_time_ms=round((seconds or 0.0) * 1000),
                    applied_settings=settings(checks, f"{path}.applied_settings", result.applied_settings),
                    exit_ip=checks.address(f"{path}.exit_ip", result.exit_ip),
                    products=_products(checks, path, result),
                    retry_after_ms=None if retry_after is None else round(retry_after * 1000),
                    error_message=checks.text(f"{path}.error_message", result.error_message, max_length=1024),
                    persona_used=result.persona_used,
                )
            )
        checks.done()
        answers = await self._results.submit(await self._organization(), client, submissions)
        return work_pb2.SubmitResultsResponse(
            results=[
                _acknowledgement(submission.name, answer)
                for submission, answer in zip(submissions, answers, strict=True)
            ]
        )

    async def Heartbeat(self, request: work_pb2.HeartbeatRequest, context: Context) -> work_pb2.HeartbeatResponse:
        """Notes that an instance lives, or that it ends."""
        checks = Checks()
        client = client_identity(checks, request, context)
        checks.done()
        organization_id = await self._organization()
        released = 0
        if request.goodbye:
            released = await self._leases.goodbye(organization_id, client.client_id, client.instance_number)
        now, draining = await self._clients.heartbeat(organization_id, client)
        return work_pb2.HeartbeatResponse(server_time=moment(now), drain=draining, released_leases=released)

    async def WorkStream(
        self, request_iterator: AsyncIterator[work_pb2.WorkStreamRequest], context: Context
    ) -> AsyncIterator[work_pb2.WorkStreamResponse]:
        """Carries the calls over one stream, up to 64 at a time, each answered when it is done."""
        answers: asyncio.Queue[work_pb2.WorkStreamResponse | BaseException | None] = asyncio.Queue()
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
                unanswered.discard(response.sequence)
                room.release()
                yield response
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

    async def _answer(self, request: work_pb2.WorkStreamRequest, context: Context) -> work_pb2.WorkStreamResponse:
        """Returns the answer to one call of the stream. Raises: InvalidField, which ends it."""
        sequence = request.sequence
        try:
            match request.WhichOneof("call"):
                case "allocate":
                    allocated = await self.AllocateWork(request.allocate, context)
                    return work_pb2.WorkStreamResponse(sequence=sequence, allocate=allocated)
                case "renew":
                    renewed = await self.RenewLeases(request.renew, context)
                    return work_pb2.WorkStreamResponse(sequence=sequence, renew=renewed)
                case "release":
                    released = await self.ReleaseLeases(request.release, context)
                    return work_pb2.WorkStreamResponse(sequence=sequence, release=released)
                case _:
                    submitted = await self.SubmitResults(request.submit, context)
                    return work_pb2.WorkStreamResponse(sequence=sequence, submit=submitted)
        except InvalidField:
            raise
        except DomainError as error:
            return work_pb2.WorkStreamResponse(sequence=sequence, error=item_error(error))

    async def _organization(self) -> UUID:
        principal = current().principal
        await self._clients.meet_organization(principal.organization_id, principal.time_zone)
        return principal.organization_id


def _check_sequence(request: work_pb2.WorkStreamRequest, unanswered: set[int]) -> None:
    checks = Checks()
    if not request.sequence or request.sequence in unanswered:
        checks.fail("sequence", "must be from 1, each used once")
    if request.WhichOneof("call") is None:
        checks.fail("call", "required: allocate, renew, release or submit")
    checks.done()


def _digest(request: work_pb2.AllocateWorkRequest) -> bytes:
    """A retry may wait for another time, come from another address and carry another trace."""
    same = work_pb2.AllocateWorkRequest()
    same.CopyFrom(request)
    for name in ("wait", "traceparent"):
        same.ClearField(name)
    same.client.ClearField("client_ip")
    return requests.digest(same)


def _names(leases: Any, checks: Checks | None = None) -> list[LeaseName]:
    checks = checks or Checks()
    checks.count("leases", leases, least=1, most=_MOST_LEASES)
    names = [lease_name(checks, f"leases[{number}]", lease) for number, lease in enumerate(leases[:_MOST_LEASES])]
    checks.done()
    return names


def _products(checks: Checks, path: str, result: work_pb2.WorkResult) -> tuple[Product, ...]:
    checks.count(f"{path}.products", result.products, least=0, most=_MOST_PRODUCTS)
    products = []
    for number, product in enumerate(result.products[:_MOST_PRODUCTS]):
        where = f"{path}.products[{number}]"
        products.append(
            Product(
                product_id=checks.text(f"{where}.product_id", product.product_id, min_length=1, max_length=256),
                title=checks.text(f"{where}.title", product.title, max_length=1024),
                url=checks.text(f"{where}.url", product.url, max_length=2048),
                rank=product.rank,
                attributes=settings(checks, f"{where}.attributes", product.attributes),
            )
        )
    return tuple(products)


def _allocation(package: Package, duration: Duration) -> work_pb2.Allocation:
    message = work_pb2.Allocation(
        allocation_key=str(package.key),
        lease_token=package.token.bytes,
        expires_at=moment(package.expires_at),
        renewable_until=moment(package.renewable_until),
        lease_duration=duration,
        slot_id=str(package.slot_id),
        work_date=day_text(package.work_date),
        keyword=package.keyword,
        code=package.code,
        target=package.target,
        settings=settings_message(package.settings),
        traceparent=package.own_traceparent(),
    )
    if package.exit is not None:
        message.exit.exit_id = str(package.exit.exit_id)
        message.exit.endpoint = package.exit.endpoint
        message.exit.region = package.exit.region
    if package.persona is not None:
        message.persona.persona_id = str(package.persona.persona_id)
        message.persona.lease_token = package.persona.lease_token
        message.persona.generation = package.persona.generation
    return message


def _acknowledgement(name: LeaseName, answer: Acknowledgement | DomainError) -> work_pb2.SubmittedResult:
    if isinstance(answer, DomainError):
        return work_pb2.SubmittedResult(allocation_key=str(name.key), error=item_error(answer))
    return work_pb2.SubmittedResult(
        allocation_key=str(name.key),
        disposition=work_pb2.ResultDisposition.ValueType(answer.disposition),
        recorded_at=moment(answer.recorded_at),
    )
