"""All services in one scripted server, as a worker of the client package meets them."""

import uuid
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from muster import Client, Job, RetryPolicy, Worker
from muster.allocator.v1 import work_pb2
from muster.session_tracker.v1 import session_pb2

from services.status import code_number
from tests.support.scripted import ScriptedServer

LEASED_AT = 1_800_000_000
IDLE = timedelta(0)
ALLOCATE = "WorkService/AllocateWork"
SUBMIT = "WorkService/SubmitResults"
RELEASE = "WorkService/ReleaseLeases"
RENEW = "WorkService/RenewLeases"
REPORT = "SessionService/ReportStream"
START = "SessionService/StartSession"
COMPLETE = "SessionService/CompleteSession"


def item_error(reason: str) -> work_pb2.ItemError:
    return work_pb2.ItemError(code=code_number(reason), reason=reason, message="as scripted")


def unit(keyword: str = "json", *, lease_seconds: float = 300.0, persona: bool = False) -> work_pb2.Allocation:
    allocation = work_pb2.Allocation(
        allocation_key=str(uuid.uuid4()),
        lease_token=b"l" * 16,
        expires_at=Timestamp(seconds=LEASED_AT + int(lease_seconds), nanos=int(lease_seconds % 1 * 1e9)),
        renewable_until=Timestamp(seconds=LEASED_AT + 7200),
        lease_duration=Duration(seconds=int(lease_seconds), nanos=int(lease_seconds % 1 * 1e9)),
        slot_id="slot-1",
        work_date="2026-11-20",
        keyword=keyword,
        target="pydoc",
        exit=work_pb2.AssignedExit(exit_id="e", endpoint="http://127.0.0.1:3128"),
    )
    allocation.settings["max_pages"].int_value = 4
    if persona:
        allocation.persona.CopyFrom(work_pb2.AssignedPersona(persona_id="p", lease_token=b"p" * 16, generation=1))
    return allocation


class House(ScriptedServer):
    """Services that do their work; a test changes what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.on(ALLOCATE, self.none())
        self.on(SUBMIT, self.submit())
        self.on(RENEW, self.renew())
        self.on(RELEASE, self.release())
        self.on("WorkService/Heartbeat", work_pb2.HeartbeatResponse())
        self.on(START, session_pb2.StartSessionResponse())
        self.on(REPORT, self.report())
        self.on(COMPLETE, session_pb2.CompleteSessionResponse())

    @staticmethod
    def none(
        blocker: work_pb2.BlockerKind.ValueType = work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED, seconds: float = 0.1
    ) -> work_pb2.AllocateWorkResponse:
        wait = Duration(nanos=int(seconds * 1e9))
        return work_pb2.AllocateWorkResponse(no_work=work_pb2.NoWork(blocker=blocker, retry_after=wait))

    def work(self, *units: work_pb2.Allocation) -> None:
        answers = [work_pb2.AllocateWorkResponse(allocations=[one]) for one in units]
        self.on(ALLOCATE, *answers, self.none())

    @staticmethod
    def submit(
        disposition: work_pb2.ResultDisposition.ValueType = work_pb2.RESULT_DISPOSITION_RECORDED, reason: str = ""
    ) -> Callable[..., Any]:
        async def answer(request: work_pb2.SubmitResultsRequest, context: Any) -> work_pb2.SubmitResultsResponse:
            return work_pb2.SubmitResultsResponse(
                results=[
                    work_pb2.SubmittedResult(allocation_key=result.lease.allocation_key, error=item_error(reason))
                    if reason
                    else work_pb2.SubmittedResult(allocation_key=result.lease.allocation_key, disposition=disposition)
                    for result in request.results
                ]
            )

        return answer

    def renew(self, reason: str = "") -> Callable[..., Any]:
        async def answer(request: work_pb2.RenewLeasesRequest, context: Any) -> work_pb2.RenewLeasesResponse:
            renewed = []
            for lease in request.leases:
                if reason:
                    renewed.append(work_pb2.RenewedLease(allocation_key=lease.allocation_key, error=item_error(reason)))
                else:
                    later = Timestamp(seconds=LEASED_AT + 600)
                    renewed.append(work_pb2.RenewedLease(allocation_key=lease.allocation_key, expires_at=later))
            return work_pb2.RenewLeasesResponse(leases=renewed)

        return answer

    @staticmethod
    def release(reason: str = "") -> Callable[..., Any]:
        async def answer(request: work_pb2.ReleaseLeasesRequest, context: Any) -> work_pb2.ReleaseLeasesResponse:
            released = [
                work_pb2.ReleasedLease(
                    allocation_key=lease.allocation_key, error=item_error(reason) if reason else None
                )
                for lease in request.leases
            ]
            return work_pb2.ReleaseLeasesResponse(leases=released)

        return answer

    @staticmethod
    def report(*, unknown: bool = False, lost: bool = False) -> Callable[..., Any]:
        async def answer(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
            known: list[str] = []
            async for batch in batches:
                known += batch.names
                names = [update.session_id for update in batch.updates]
                names += [known[handle] for handle in batch.packed.handle]
                commands = [
                    session_pb2.SessionCommand(
                        session_id=name, kind=session_pb2.COMMAND_KIND_LEASE_LOST, message="expired"
                    )
                    for name in names
                    if lost
                ]
                yield session_pb2.ReportStreamResponse(
                    batch=batch.batch,
                    taken=0 if unknown else len(names),
                    unknown_sessions=names if unknown else [],
                    commands=commands,
                )

        return answer

    def results(self) -> list[work_pb2.WorkResult]:
        return [result for request in self.calls[SUBMIT] for result in request.results]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """The scripted services."""
    made = House()
    await made.start()
    yield made
    await made.stop()


def client_of(house: House) -> Client:
    """Makes a client of all of them, with little patience."""
    there = house.address
    policy = RetryPolicy(call_seconds=1.0, total_seconds=3.0)
    return Client(api_key="k" * 40, allocator=there, persona_store=there, session_tracker=there, policy=policy)


async def run(client: Client, body: Callable[[Job], Any], *, stop_when_idle: timedelta | None = IDLE) -> None:
    """Runs a worker until there is no work; a check that failed in the body fails the test, not only its job."""
    failed: list[Exception] = []
    async with Worker(client, client_id="pc-1", instance_number=2, folder=3) as worker:
        async for job in worker.jobs(stop_when_idle=stop_when_idle):
            async with job:
                try:
                    await body(job)
                except (AssertionError, TimeoutError) as error:
                    failed.append(error)
                    raise
    if failed:
        raise failed[0]
