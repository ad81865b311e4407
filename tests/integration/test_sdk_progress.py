"""Leases that are kept, and progress that never waits: what a worker does in the background."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from muster import CheckpointPolicy, Client, Job, Worker
from muster.session_tracker.v1 import session_pb2

from tests.support.house import (
    COMPLETE,
    IDLE,
    RELEASE,
    RENEW,
    REPORT,
    START,
    House,
    client_of,
    run,
    unit,
)
from tests.support.scripted import Status, refusal


@pytest.fixture
async def client(house: House) -> AsyncIterator[Client]:
    async with client_of(house) as made:
        yield made


async def test_the_worker_renews_by_itself_while_nothing_is_reported(house: House, client: Client) -> None:
    house.work(unit(lease_seconds=0.6))

    async def body(job: Job) -> None:
        await house.came(RENEW, 3)
        assert not job.lease_lost.is_set()
        await job.succeed()

    await run(client, body)
    assert house.calls[RENEW][0].leases[0].lease_token == b"l" * 16
    assert len(house.results()) == 1


async def test_a_report_that_is_taken_puts_the_renewal_off(house: House, client: Client) -> None:
    house.work(unit(lease_seconds=3.0))
    clock = asyncio.get_running_loop().time
    took = 0.0

    async def body(job: Job) -> None:
        nonlocal took
        began = clock()
        page = 0
        while not house.calls[RENEW]:
            page += 1
            job.progress(page)
            await house.came(REPORT, page)
        took = clock() - began
        await job.succeed()

    await run(client, body)
    # A third of the lease without a report would be 1 s; with reports it is two thirds.
    assert 1.9 < took < 2.8


@pytest.mark.parametrize("reason", ["LEASE_LOST", "LEASE_TOKEN_MISMATCH", "ALLOCATION_NOT_FOUND"])
async def test_a_renewal_that_is_refused_sets_lease_lost(house: House, client: Client, reason: str) -> None:
    house.work(unit(lease_seconds=0.6))
    house.on(RENEW, house.renew(reason))

    async def body(job: Job) -> None:
        await asyncio.wait_for(job.lease_lost.wait(), 5)

    await run(client, body)
    assert len(house.calls[RENEW]) == 1


async def test_a_lease_at_its_greatest_age_is_lost_only_when_it_runs_out(house: House, client: Client) -> None:
    # The tracker may have renewed it since: it ends as late as any renewal could make it.
    oldest = unit(lease_seconds=0.6)
    oldest.renewable_until.FromMilliseconds(oldest.expires_at.ToMilliseconds() + 900)
    house.work(oldest)
    house.on(RENEW, house.renew("LEASE_AGE_EXCEEDED"))
    clock = asyncio.get_running_loop().time
    took = 0.0

    async def body(job: Job) -> None:
        nonlocal took
        began = clock()
        await asyncio.wait_for(job.lease_lost.wait(), 10)
        took = clock() - began

    await run(client, body)
    assert took > 1.2
    assert len(house.calls[RENEW]) == 1


async def test_renewals_go_on_after_the_allocator_was_away(house: House, client: Client) -> None:
    house.work(unit(lease_seconds=4.0))
    house.on(RENEW, Status(grpc.StatusCode.INTERNAL), *[Status(grpc.StatusCode.UNAVAILABLE)] * 3, house.renew())

    async def body(job: Job) -> None:
        await house.came(RENEW, 5)
        assert not job.lease_lost.is_set()
        await job.succeed()

    await run(client, body)


@pytest.mark.parametrize("reporting", [False, True])
async def test_a_worker_that_reaches_nobody_learns_that_its_lease_ran_out(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch, reporting: bool
) -> None:
    monkeypatch.setattr("muster.leases._TRACKER_ROUND_SECONDS", 0.2)
    house.work(unit(lease_seconds=1.0))

    async def body(job: Job) -> None:
        if reporting:
            job.progress(1)
            await house.came(REPORT)
        port = int(house.address.rpartition(":")[2])
        await house.stop()
        await asyncio.wait_for(job.lease_lost.wait(), 30)
        await house.start(port)

    await run(client, body)
    assert not house.results()


async def test_a_lease_that_ends_is_told_of_before_the_service_wants_to_be_asked_again(
    house: House, client: Client
) -> None:
    house.work(unit(lease_seconds=1.0))
    house.on(RENEW, refusal("DATABASE_UNAVAILABLE", retry_after=3600))

    async def body(job: Job) -> None:
        await asyncio.wait_for(job.lease_lost.wait(), 30)

    await run(client, body)


async def test_the_tracker_can_tell_that_a_lease_is_lost(house: House, client: Client) -> None:
    house.work(unit())
    house.on(REPORT, House.report(lost=True))

    async def body(job: Job) -> None:
        job.progress(1)
        await asyncio.wait_for(job.lease_lost.wait(), 5)

    await run(client, body)


async def test_progress_never_waits_for_a_tracker_that_hangs_and_keeps_only_the_latest(
    house: House, client: Client
) -> None:
    house.work(unit())
    going = asyncio.Event()

    async def hang(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        async for _ in batches:
            await asyncio.Event().wait()
        yield session_pb2.ReportStreamResponse()

    house.on(REPORT, hang, House.report())

    async def body(job: Job) -> None:
        clock = asyncio.get_running_loop().time
        job.progress(0)
        await house.came(REPORT, 1)
        began = clock()
        for page in range(1, 50_001):
            job.progress(page, 50_000)
        assert clock() - began < 5
        assert len(worker._reporter._live) == 1
        await house.came(REPORT, 2)
        going.set()
        await job.succeed()

    async with Worker(client, client_id="pc-1") as worker:
        async for job in worker.jobs(stop_when_idle=IDLE):
            async with job:
                await body(job)
    assert going.is_set()
    later = [update for batch in house.calls[REPORT][1:] for update in batch.updates]
    assert later[0].current_page == 50_000
    assert later[0].sequence > 50_000


async def test_the_crawl_goes_on_without_a_tracker_and_it_catches_up(house: House, client: Client) -> None:
    away = Status(grpc.StatusCode.UNAVAILABLE)
    house.work(unit("one"), unit("two"))
    house.on(START, *[away] * 4, session_pb2.StartSessionResponse())
    house.on(COMPLETE, *[away] * 3, session_pb2.CompleteSessionResponse())

    async def body(job: Job) -> None:
        job.progress(3, 3)
        await job.succeed()

    await run(client, body)
    assert len(house.results()) == 2
    done = {end.session_id for end in house.calls[COMPLETE][3:]}
    assert done == {result.lease.allocation_key for result in house.results()}
    assert all(end.started_at.seconds and end.total_pages == 3 for end in house.calls[COMPLETE])


async def test_no_tracker_at_all_is_no_hindrance(house: House) -> None:
    house.work(unit(lease_seconds=0.6))
    async with Client(api_key="k" * 40, allocator=house.address) as client:

        async def body(job: Job) -> None:
            job.progress(1)
            await house.came(RENEW, 1)
            await job.succeed()

        await run(client, body)
    assert len(house.results()) == 1


async def test_a_session_the_tracker_forgot_is_registered_again_with_its_numbers(house: House, client: Client) -> None:
    house.work(unit())

    async def forgetful(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        async for batch in batches:
            forgotten = house.calls[START][:1] if len(house.calls[REPORT]) == 2 else []
            names = [start.session_id for start in forgotten]
            yield session_pb2.ReportStreamResponse(batch=batch.batch, unknown_sessions=names)

    house.on(REPORT, forgetful)

    async def body(job: Job) -> None:
        job.progress(1)
        await house.came(REPORT, 1)
        job.progress(2, 9, 4)
        await house.came(START, 2)
        job.progress(3)
        await house.came(REPORT, 3)
        await job.succeed()

    await run(client, body)
    again = house.calls[START][1].progress
    assert (again.current_page, again.total_pages, again.products_found) == (2, 9, 4)
    assert again.sequence == house.calls[REPORT][1].packed.sequence[0]


async def test_after_a_broken_stream_the_latest_state_is_reported_again(house: House, client: Client) -> None:
    house.work(unit())

    async def breaks(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        async for batch in batches:
            yield session_pb2.ReportStreamResponse(batch=batch.batch, taken=1)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    house.on(REPORT, breaks, House.report())

    async def body(job: Job) -> None:
        job.progress(5)
        await house.came(REPORT, 2)
        await job.succeed()

    await run(client, body)
    assert [batch.updates[0].current_page for batch in house.calls[REPORT][:2]] == [5, 5]


async def test_a_session_that_is_refused_is_not_followed_and_the_work_goes_on(house: House, client: Client) -> None:
    house.work(unit())
    house.on(START, refusal("SESSION_LIMIT_REACHED"))

    async def body(job: Job) -> None:
        job.progress(1)
        await house.came(START)
        await job.succeed()

    await run(client, body)
    assert len(house.results()) == 1
    assert not house.calls[REPORT]


async def test_a_job_is_paused_and_stopped_by_its_session(house: House) -> None:
    one = unit()
    house.work(one)

    def told(kind: session_pb2.CommandKind.ValueType, number: int) -> session_pb2.ReportStreamResponse:
        command = session_pb2.SessionCommand(session_id=one.allocation_key, kind=kind, number=number, message="enough")
        return session_pb2.ReportStreamResponse(commands=[command])

    async def commanding(batches: Any, context: Any) -> AsyncIterator[session_pb2.ReportStreamResponse]:
        async for batch in batches:
            yield session_pb2.ReportStreamResponse(batch=batch.batch, taken=1)
            if any(update.acknowledged_command for update in batch.updates):
                yield told(session_pb2.COMMAND_KIND_STOP, 2)
            else:
                yield told(session_pb2.COMMAND_KIND_PAUSE, 1)

    house.on(REPORT, commanding)
    async with client_of(house) as client:
        policy = CheckpointPolicy(every_pages=7)
        async with Worker(client, client_id="pc-1", checkpoint=policy) as worker, asyncio.timeout(10):
            async for job in worker.jobs(stop_when_idle=IDLE):
                async with job:
                    job.progress(1, stage="list")
                    while not job.session.paused:
                        await asyncio.sleep(0)
                    assert not await job.session.permit()
    reported = [update for batch in house.calls[REPORT] for update in batch.updates]
    assert reported[-1].stage == "list"
    assert session_pb2.SESSION_STATE_PAUSED in {update.state for update in reported}
    assert house.calls[START][0].checkpoint.every_pages == 7
    assert house.calls[RELEASE][0].leases[0].allocation_key == one.allocation_key
    (end,) = house.calls[COMPLETE]
    assert end.state == session_pb2.SESSION_STATE_STOPPED
