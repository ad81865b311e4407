"""The worker loop over real servers that are scripted: results, leases, progress, and services that are away."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from muster import Client, ExitSignal, Job, Product, ResultDisposition, Worker, errors
from muster.allocator.v1 import work_pb2
from muster.persona_store.v1 import bundle_pb2, persona_pb2
from muster.session_tracker.v1 import session_pb2
from muster.work import AssignedExit

from tests.support.house import (
    ALLOCATE,
    COMPLETE,
    IDLE,
    RELEASE,
    REPORT,
    START,
    SUBMIT,
    House,
    client_of,
    run,
    unit,
)
from tests.support.scripted import Status, refusal

HEARTBEAT = "WorkService/Heartbeat"


@pytest.fixture
async def client(house: House) -> AsyncIterator[Client]:
    async with client_of(house) as made:
        yield made


async def test_a_worker_gets_works_reports_and_hands_in(house: House, client: Client) -> None:
    house.work(unit("json"), unit("socket"))
    seen: list[str] = []

    async def body(job: Job) -> None:
        seen.append(job.keyword)
        assert job.exit is not None
        assert job.exit.endpoint == "http://127.0.0.1:3128"
        assert job.settings == {"max_pages": 4}
        job.progress(2, 4, 7, 1, stage="results")
        await house.came(REPORT, len(seen))
        found = [Product("json", "json", "http://x/json", 1, {"size": 3})]
        assert await job.succeed(products=found, exit_ip="127.0.0.1") is ResultDisposition.RECORDED
        assert job.settled

    await run(client, body)
    assert seen == ["json", "socket"]
    first, second = house.results()
    assert first.outcome == second.outcome == work_pb2.WORK_OUTCOME_SUCCEEDED
    assert first.lease.lease_token == b"l" * 16
    assert first.exit_ip == "127.0.0.1"
    assert first.applied_settings["max_pages"].int_value == 4
    assert first.products[0].attributes["size"].int_value == 3
    assert not first.persona_used
    assert 0 < first.execution_time.ToTimedelta().total_seconds() < 60
    start = house.calls[START][0]
    assert (start.session_id, start.allocation_key) == (first.lease.allocation_key,) * 2
    assert (start.slot_id, start.client_id, start.config_snapshot_json) == ("slot-1", "pc-1", '{"max_pages": 4}')
    update = house.calls[REPORT][0].updates[0]
    assert (update.current_page, update.total_pages, update.products_found, update.errors_count) == (2, 4, 7, 1)
    ends = house.calls[COMPLETE]
    assert [end.state for end in ends] == [session_pb2.SESSION_STATE_COMPLETED] * 2
    assert (ends[0].total_pages, ends[0].products_found, ends[0].stage) == (2, 7, "results")
    identity = house.calls[ALLOCATE][0].client
    assert (identity.client_id, identity.instance_number, identity.user_folder_number) == ("pc-1", 2, 3)
    assert house.calls["WorkService/Heartbeat"][-1].goodbye
    assert not house.calls[RELEASE]


async def test_an_exception_is_recorded_as_failed_and_the_loop_goes_on(
    house: House, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.work(unit("bad"), unit("good"))
    # The record holds a lone surrogate, which the test report could not be sent with: it is kept out of that.
    log = logging.getLogger("muster.worker")
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [caplog.handler])

    async def body(job: Job) -> None:
        if job.keyword == "bad":
            raise RuntimeError("\x1b[31mno page\x1b[0m \ud800" + "x" * 2000)
        await job.succeed()

    with caplog.at_level(logging.ERROR, "muster.worker"):
        await run(client, body)
    bad, good = house.results()
    assert bad.outcome == work_pb2.WORK_OUTCOME_FAILED
    assert bad.error_message.startswith("RuntimeError:  [31mno page")
    assert len(bad.error_message) == 1024
    assert good.outcome == work_pb2.WORK_OUTCOME_SUCCEEDED
    assert "bad" in caplog.text
    assert [end.state for end in house.calls[COMPLETE]] == [
        session_pb2.SESSION_STATE_FAILED,
        session_pb2.SESSION_STATE_COMPLETED,
    ]


async def test_a_block_carries_its_kind_and_how_long_to_stay_away(house: House, client: Client) -> None:
    house.work(unit())
    await run(client, lambda job: job.blocked("http_429", retry_after=timedelta(days=3), message="later"))
    (result,) = house.results()
    assert result.outcome == work_pb2.WORK_OUTCOME_BLOCKED
    assert (result.block_type, result.error_message) == ("http_429", "later")
    assert result.retry_after.ToTimedelta() == timedelta(hours=24)


async def test_a_result_says_what_its_run_says_of_the_exit_and_what_the_target_asks_for(
    house: House, client: Client
) -> None:
    house.work(unit("limited"), unit("broken"), unit("plain"))

    async def body(job: Job) -> None:
        if job.keyword == "limited":
            job.exit_signal, job.crawl_delay = ExitSignal.RATE_LIMITED, timedelta(hours=9)
            await job.blocked("http_429")
        elif job.keyword == "broken":
            # Said before the body breaks, it goes with the failure that is recorded for it.
            job.exit_signal = ExitSignal.TRANSPORT_ERROR
            raise ConnectionResetError("the proxy hung up")
        else:
            await job.succeed()

    await run(client, body)
    limited, broken, plain = house.results()
    assert (limited.exit_signal, limited.crawl_delay.ToTimedelta()) == (
        work_pb2.EXIT_SIGNAL_RATE_LIMITED,
        timedelta(hours=1),
    )
    assert (broken.outcome, broken.exit_signal) == (
        work_pb2.WORK_OUTCOME_FAILED,
        work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR,
    )
    assert plain.exit_signal == work_pb2.EXIT_SIGNAL_UNSPECIFIED
    assert not plain.HasField("crawl_delay")


async def test_an_external_exit_tells_its_provider_and_address(house: House, client: Client) -> None:
    external = unit()
    external.exit.CopyFrom(
        work_pb2.AssignedExit(endpoint="http://127.0.0.1:1", region="kr", provider="vpn", exit_ip="203.0.113.7")
    )
    house.work(external)
    seen = []

    async def body(job: Job) -> None:
        seen.append(job.exit)
        await job.succeed()

    await run(client, body)
    assert seen == [AssignedExit("", "http://127.0.0.1:1", "kr", "vpn", "203.0.113.7")]


async def test_leaving_without_a_result_gives_the_unit_back(house: House, client: Client) -> None:
    house.work(unit("one"), unit("two"))

    async def body(job: Job) -> None:
        pass

    await run(client, body)
    # Without `async with job` the unit goes back when the next one is asked for.
    house.work(unit("three"))
    async with Worker(client, client_id="pc-1") as worker:
        async for _ in worker.jobs(stop_when_idle=IDLE):
            pass
    assert len(house.calls[RELEASE]) == 3
    assert not house.results()
    assert {end.state for end in house.calls[COMPLETE]} == {session_pb2.SESSION_STATE_STOPPED}


async def test_breaking_out_of_the_loop_gives_the_unit_back_before_the_goodbye(house: House, client: Client) -> None:
    house.work(unit())
    async with Worker(client, client_id="pc-1") as worker:
        async for _ in worker.jobs():
            break
        assert not house.calls[RELEASE]
    assert len(house.calls[RELEASE]) == 1
    assert house.calls["WorkService/Heartbeat"][-1].goodbye


async def test_a_cancelled_worker_gives_its_unit_back(house: House, client: Client) -> None:
    house.work(unit())
    working = asyncio.Event()

    async def body(job: Job) -> None:
        working.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run(client, body))
    await working.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [request.reason for request in house.calls[RELEASE]] == ["the work was cancelled"]
    assert house.calls["WorkService/Heartbeat"][-1].goodbye


async def test_stop_ends_the_loop_after_the_job_in_hand(house: House, client: Client) -> None:
    house.on(ALLOCATE, work_pb2.AllocateWorkResponse(allocations=[unit()]))
    done = 0
    async with Worker(client, client_id="pc-1") as worker:
        async for job in worker.jobs():
            async with job:
                worker.stop()
                await job.succeed()
                done += 1
    assert done == 1


async def test_stop_does_not_wait_for_the_end_of_a_rest(house: House, client: Client) -> None:
    resting = Duration(seconds=590)
    house.on(ALLOCATE, work_pb2.AllocateWorkResponse(no_work=work_pb2.NoWork(retry_after=resting)))
    async with Worker(client, client_id="pc-1") as worker:

        async def every() -> list[Job]:
            return [job async for job in worker.jobs()]

        task = asyncio.create_task(every())
        await house.came(ALLOCATE)
        worker.stop()
        assert await asyncio.wait_for(task, 5) == []


async def test_the_worker_rests_for_as_long_as_it_is_told(house: House, client: Client) -> None:
    house.on(ALLOCATE, House.none(seconds=0.3), House.none(work_pb2.BLOCKER_KIND_CLIENT_DRAINING))
    clock = asyncio.get_running_loop().time
    began = clock()
    async with Worker(client, client_id="pc-1") as worker:
        assert [job async for job in worker.jobs()] == []
        assert worker.stopping
    assert 0.3 <= clock() - began < 3
    first, second = house.calls[ALLOCATE]
    assert first.request_id != second.request_id


async def test_a_heartbeat_that_says_drain_ends_the_loop(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muster.worker.HEARTBEAT_SECONDS", 0.05)
    house.on("WorkService/Heartbeat", work_pb2.HeartbeatResponse(drain=True))
    async with Worker(client, client_id="pc-1") as worker:
        async with asyncio.timeout(5):
            assert [job async for job in worker.jobs()] == []


async def test_no_heartbeat_follows_the_goodbye(house: House, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muster.worker.HEARTBEAT_SECONDS", 0.02)
    beats = house.calls[HEARTBEAT]

    async def answer(request: work_pb2.HeartbeatRequest, context: Any) -> work_pb2.HeartbeatResponse:
        if request.goodbye:
            with contextlib.suppress(TimeoutError):
                await house.came(HEARTBEAT, len(beats) + 1, seconds=0.5)
        return work_pb2.HeartbeatResponse()

    house.on(HEARTBEAT, answer)
    async with Worker(client, client_id="pc-1"):
        await house.came(HEARTBEAT, 2)
    assert [beat.goodbye for beat in beats] == [False] * (len(beats) - 1) + [True]


async def test_while_the_allocator_is_away_the_same_demand_is_made_again(house: House, client: Client) -> None:
    house.on(
        ALLOCATE,
        *[Status(grpc.StatusCode.UNAVAILABLE)] * 6,
        work_pb2.AllocateWorkResponse(allocations=[unit()]),
        House.none(),
    )
    await run(client, lambda job: job.succeed())
    ids = [request.request_id for request in house.calls[ALLOCATE]]
    assert len(set(ids[:7])) == 1
    assert len(house.results()) == 1


async def test_a_demand_whose_leases_ended_meanwhile_is_made_anew(house: House, client: Client) -> None:
    # The allocator was away for longer than a lease lasts: what the lost answer held has run out.
    house.on(
        ALLOCATE,
        *[Status(grpc.StatusCode.UNAVAILABLE)] * 2,
        refusal("REQUEST_ID_REUSED"),
        work_pb2.AllocateWorkResponse(allocations=[unit()]),
        House.none(),
    )
    await run(client, lambda job: job.succeed())
    ids = [request.request_id for request in house.calls[ALLOCATE]]
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert len(house.results()) == 1


async def test_a_wrong_key_ends_the_loop_with_the_reason(house: House, client: Client) -> None:
    house.on(ALLOCATE, refusal("INVALID_API_KEY"))
    with pytest.raises(errors.Unauthenticated):
        await run(client, lambda job: job.succeed())


async def test_a_late_result_is_handed_in_and_the_worker_is_told(house: House, client: Client) -> None:
    house.work(unit("late"), unit("gone"))
    house.on(
        SUBMIT,
        House.submit(work_pb2.RESULT_DISPOSITION_RECORDED_LATE),
        House.submit(work_pb2.RESULT_DISPOSITION_QUARANTINED),
    )
    dispositions = []

    async def body(job: Job) -> None:
        dispositions.append(await job.succeed())

    await run(client, body)
    assert dispositions == [ResultDisposition.RECORDED_LATE, ResultDisposition.QUARANTINED]


async def test_a_result_that_is_refused_for_its_lease_sets_lease_lost(house: House, client: Client) -> None:
    house.work(unit())
    house.on(SUBMIT, House.submit(reason="LEASE_LOST"))

    async def body(job: Job) -> None:
        with pytest.raises(errors.LeaseLost):
            await job.succeed()
        assert job.lease_lost.is_set()

    await run(client, body)
    assert len(house.calls[SUBMIT]) == 1
    assert not house.calls[RELEASE]


async def test_a_result_that_is_refused_for_its_contents_is_recorded_as_failed(house: House, client: Client) -> None:
    house.work(unit())
    house.on(SUBMIT, refusal("INVALID_FIELD", "results[0].products[0].title: at most 1024 characters"), House.submit())
    await run(client, lambda job: job.succeed(products=[Product("p", "t" * 2000)]))
    refused, failed = house.results()
    assert refused.outcome == work_pb2.WORK_OUTCOME_SUCCEEDED
    assert failed.outcome == work_pb2.WORK_OUTCOME_FAILED
    assert "at most 1024" in failed.error_message


async def test_a_success_that_does_not_get_through_is_never_turned_into_a_failure(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muster.jobs._SUBMIT_SECONDS", 0.3)
    house.work(unit())
    house.on(SUBMIT, Status(grpc.StatusCode.UNAVAILABLE))
    await run(client, lambda job: job.succeed())
    assert {result.outcome for result in house.results()} == {work_pb2.WORK_OUTCOME_SUCCEEDED}
    assert not house.calls[RELEASE]


async def test_a_result_outlives_a_restart_of_the_allocator(house: House, client: Client) -> None:
    house.work(unit())
    house.on(SUBMIT, *[Status(grpc.StatusCode.UNAVAILABLE)] * 5, House.submit())
    await run(client, lambda job: job.succeed())
    assert len(house.results()) == 6


async def test_a_bundle_is_loaded_restored_changed_and_saved(house: House, client: Client, tmp_path: Path) -> None:
    house.work(unit(persona=True), unit(persona=True))
    saved: dict[str, bytes] = {}

    async def load(request: Any, context: Any) -> bundle_pb2.LoadBundleResponse:
        parts = [bundle_pb2.Part(name=name, data=data) for name, data in saved.items()]
        return bundle_pb2.LoadBundleResponse(generation=len(saved), parts=parts)

    async def save(request: bundle_pb2.SaveBundleRequest, context: Any) -> bundle_pb2.SaveBundleResponse:
        assert request.lease_token == b"p" * 16
        saved.update({part.name: part.data for part in request.parts})
        return bundle_pb2.SaveBundleResponse(generation=persona_pb2.Generation(generation=2))

    house.on("BundleService/LoadBundle", refusal("GENERATION_NOT_FOUND"), load)
    house.on("BundleService/SaveBundle", save)
    visits: list[int] = []

    async def body(job: Job) -> None:
        folder = tmp_path / job.key
        bundle = await job.load_bundle()
        restored = bundle.restore_profile(folder)
        assert restored is (bundle.generation > 0)
        visits.append(int((folder / "Cookies").read_text()) if restored else 0)
        folder.mkdir(exist_ok=True)
        (folder / "Cookies").write_text(str(visits[-1] + 1))
        await job.save_bundle(profile=folder, state={"checkpoint": 1}, history=["json"])
        await job.succeed()

    await run(client, body)
    assert visits == [0, 1]
    assert saved["state.json"] == b'{"checkpoint":1}'
    assert [result.persona_used for result in house.results()] == [True, True]


async def test_a_lost_check_out_saves_nothing_and_is_recorded(house: House, client: Client) -> None:
    house.work(unit(persona=True))
    house.on("BundleService/SaveBundle", refusal("CHECK_OUT_LOST"))
    lost = False

    async def body(job: Job) -> None:
        nonlocal lost
        with contextlib.suppress(errors.CheckOutLost):
            await job.save_bundle(state={})
        lost = job.lease_lost.is_set()
        raise RuntimeError("stopped")

    await run(client, body)
    assert lost
    assert house.results()[0].outcome == work_pb2.WORK_OUTCOME_FAILED


async def test_misuse_is_told_in_words(house: House, client: Client) -> None:
    house.work(unit(), unit(persona=True))

    async def body(job: Job) -> None:
        if job.persona is None:
            with pytest.raises(ValueError, match="has no persona"):
                await job.load_bundle()
        else:
            with pytest.raises(ValueError, match="nothing to save"):
                await job.save_bundle()
        await job.succeed()
        with pytest.raises(RuntimeError, match="has its result already"):
            await job.fail("again")
        job.progress(9)

    await run(client, body)
    assert len(house.results()) == 2


async def test_the_worker_of_the_readme_runs_and_exits_cleanly(house: House, tmp_path: Path) -> None:
    readme = Path(__file__).parents[2] / "sdk" / "python" / "README.md"
    example = readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    crawl = (
        "from types import SimpleNamespace\n"
        "async def crawl(keyword, proxy, settings):\n"
        "    assert proxy.startswith('http://') and settings == {'max_pages': 4}\n"
        "    return [SimpleNamespace(id=keyword, title=keyword)]\n"
    )
    program = tmp_path / "worker.py"
    program.write_text(crawl + example, encoding="utf-8")
    units = [work_pb2.AllocateWorkResponse(allocations=[unit(name)]) for name in ("json", "socket")]
    house.on(ALLOCATE, *units, House.none(work_pb2.BLOCKER_KIND_CLIENT_DRAINING))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        str(program),
        env={
            **os.environ,
            "MUSTER_API_KEY": "k" * 40,
            "MUSTER_ALLOCATOR": house.address,
            "MUSTER_SESSION_TRACKER": house.address,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    assert (process.returncode, said) == (0, b"")
    assert [result.products[0].product_id for result in house.results()] == ["json", "socket"]
    assert {end.state for end in house.calls[COMPLETE]} == {session_pb2.SESSION_STATE_COMPLETED}
