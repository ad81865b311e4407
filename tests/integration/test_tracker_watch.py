"""Watching live sessions: snapshot, changes, resumption, filters, and watchers that are slow."""

from __future__ import annotations

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.call import Role
from tests.support.services import RunningService, StartService
from tests.support.watchers import Console, Worker


@pytest.fixture
async def service(start_service: StartService) -> RunningService:
    # Finished sessions leave soon: a test waits for one.
    return await start_service("session_tracker", sessions={"finished_seconds": 1.0})


async def test_a_snapshot_comes_first_and_then_every_change(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a", "b")
    console.open()
    first = await console.read()
    assert first.snapshot
    assert set(console.held) == {"a", "b"}
    await worker.page("a", page=3)
    await console.read_until(lambda held: held["a"].current_page == 3)
    await worker.start("c")
    await console.read_until(lambda held: "c" in held)
    await worker.complete("b")
    await console.read_until(lambda held: held["b"].state == pb.SESSION_STATE_COMPLETED)
    await console.read_until(lambda held: "b" not in held)
    assert not any(answer.snapshot for answer in console.answers[1:])
    offsets = [answer.offset for answer in console.answers]
    assert offsets == sorted(set(offsets))
    console.close()


async def test_an_empty_snapshot_is_sent_too(service: RunningService) -> None:
    console = Console(service, await service.metadata(Role.WORKER))
    console.open()
    answer = await console.read()
    assert (answer.snapshot, len(answer.sessions)) == (True, 0)
    console.close()


async def test_a_large_snapshot_comes_in_pieces_and_only_the_last_can_be_resumed_from(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    names = [f"s{number:04}" for number in range(1201)]
    await worker.start(*names)
    console.open()
    while len(console.held) < len(names):
        await console.read()
    assert [len(answer.sessions) for answer in console.answers] == [250, 250, 250, 250, 201]
    assert [answer.snapshot for answer in console.answers] == [True, False, False, False, False]
    assert [answer.offset for answer in console.answers] == [0, 0, 0, 0, 1201]
    console.close()
    # Cut off after the first piece, a watcher misses nothing when it comes back.
    console.held = {session.session_id: session for session in console.answers[0].sessions}
    console.offset = console.answers[0].offset
    console.open()
    await console.read_until(lambda held: set(held) == set(names))
    console.close()


async def test_a_watcher_goes_on_where_it_left_off(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a", "b", "c")
    console.open()
    await console.read()
    console.close()
    await worker.page("a", page=9)
    await worker.complete("b")
    console.open()
    answer = await console.read()
    assert not answer.snapshot
    assert {session.session_id for session in answer.sessions} == {"a", "b"}
    assert (console.held["a"].current_page, console.held["b"].state) == (9, pb.SESSION_STATE_COMPLETED)
    console.close()
    console.open()
    answer = await console.read()
    assert (answer.snapshot, len(answer.sessions), len(answer.removed)) == (False, 0, 0), "nothing happened meanwhile"
    console.close()


async def test_after_a_restart_a_watcher_gets_a_snapshot(service: RunningService, start_service: StartService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata)
    await worker.start("a")
    console.open()
    await console.read()
    console.close()
    restarted = await start_service("session_tracker", database=service.database)
    again = Console(restarted, metadata)
    again.epoch, again.offset, again.held = console.epoch, console.offset, console.held
    again.open()
    assert (await again.read()).snapshot
    assert again.held == {}
    assert again.epoch != console.epoch
    again.close()


async def test_a_filter_shows_what_matches_and_removes_what_does_no_more(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    console = Console(service, metadata, states=[pb.SESSION_STATE_RUNNING], slot_id="slot")
    await worker.start("a", "b", slot_id="slot")
    await worker.start("elsewhere", slot_id="other")
    await worker.page("a", "elsewhere", page=1)
    console.open()
    await console.read()
    assert set(console.held) == {"a"}
    await worker.page("b", page=1)
    await console.read_until(lambda held: set(held) == {"a", "b"})
    await worker.page("a", page=1, state=pb.SESSION_STATE_PAUSED)
    await console.read_until(lambda held: set(held) == {"b"})
    console.close()
    await worker.page("a", page=2)
    await worker.page("b", page=2, state=pb.SESSION_STATE_PAUSED)
    console.open()
    answer = await console.read()
    assert not answer.snapshot
    assert set(console.held) == {"a"}
    assert all("elsewhere" not in answer.removed for answer in console.answers)
    console.close()


async def test_organizations_watch_their_own(service: RunningService) -> None:
    mine, theirs = await service.metadata(Role.WORKER), await service.metadata(Role.WORKER, organization="umbrella")
    console = Console(service, mine)
    console.open()
    await console.read()
    await Worker(service, theirs).start("theirs")
    await Worker(service, mine).start("mine")
    await console.read_until(lambda held: held)
    assert set(console.held) == {"mine"}
    console.close()


async def test_a_slow_watcher_gets_the_latest_and_holds_nobody_up(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    # A window that stays small, so that what the slow one does not read soon stands in nobody's buffers.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    narrow = grpc.aio.insecure_channel(service.address, options=options)
    slow, quick = Console(service, metadata, channel=narrow), Console(service, metadata)
    names = [f"s{number:03}-" + "x" * 100 for number in range(400)]
    await worker.start(*names)
    for console in (slow, quick):
        console.open()
        await console.read()
    rounds = 60
    for page in range(1, rounds + 1):
        await worker.page(*names, page=page)
        await quick.read_until(lambda held, page=page: held[names[0]].current_page == page)
    await slow.read_until(lambda held: all(session.current_page == rounds for session in held.values()))
    # Some answers stood in the transport's buffers; the rest were merged.
    assert len(slow.answers) < rounds / 2 < len(quick.answers)
    slow.close()
    quick.close()
    await narrow.close()


async def test_a_finished_session_is_shown_in_its_final_state_and_later_removed(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    finished = Console(service, metadata, states=[pb.SESSION_STATE_COMPLETED])
    await worker.start("a", "b")
    finished.open()
    await finished.read()
    assert not finished.held
    await worker.complete("a", message="all pages done", total_pages=7)
    await finished.read_until(lambda held: "a" in held)
    assert (finished.held["a"].current_page, finished.held["a"].reason) == (7, "all pages done")
    await finished.read_until(lambda held: not held)
    finished.close()


async def test_an_interval_merges_what_happens_in_between(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata, interval_seconds=0.5)
    await worker.start("a")
    console.open()
    await console.read()
    for page in range(1, 51):
        await worker.page("a", page=page)
    await console.read_until(lambda held: held["a"].current_page == 50)
    assert len(console.answers) <= 3
    console.close()


async def test_a_service_watches_for_the_organization_it_names(service: RunningService) -> None:
    worker_key = await service.metadata(Role.WORKER)
    await Worker(service, worker_key).start("mine")
    named = (
        *await service.metadata(Role.SERVICE, "suite"),
        ("muster-organization", str(await service.organization_id())),
    )
    console = Console(service, named)
    console.open()
    await console.read()
    assert set(console.held) == {"mine"}
    console.close()


async def test_without_a_key_nothing_is_watched(service: RunningService) -> None:
    console = Console(service, ())
    console.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await console.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    # A worker does not choose whose sessions it sees, whatever it names.
    theirs = await service.organization_id("umbrella")
    metadata = (*await service.metadata(Role.WORKER), ("muster-organization", str(theirs)))
    await Worker(service, await service.metadata(Role.WORKER, "umbrella")).start("theirs")
    console = Console(service, metadata)
    console.open()
    await console.read()
    assert not console.held
    console.close()


async def test_a_service_that_drains_ends_its_watches(start_service: StartService) -> None:
    service = await start_service("session_tracker")
    metadata = await service.metadata(Role.WORKER)
    consoles = [Console(service, metadata), Console(service, metadata, interval_seconds=30.0)]
    for console in consoles:
        console.open()
        await console.read()
    service.chassis.draining.set()
    for console in consoles:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await console.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
