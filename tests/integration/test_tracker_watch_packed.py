"""Packed changes over gRPC: what a watcher holds is the same, at a fraction of the bytes; also for slow ones."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest
from muster.session_tracker.v1 import session_pb2 as pb
from muster.session_tracker.v1 import session_pb2_grpc
from prometheus_client import REGISTRY

from services.call import Role
from tests.support.services import RunningService, StartService
from tests.support.watchers import Console, Held, Metadata, Worker

# What is reckoned anew whenever it is asked for.
RECKONED = ("estimated_completion", "eta_low", "eta_high", "eta_method", "pages_per_second")


def comparable(held: Held) -> dict[str, Any]:
    """Returns what must be equal: packed moments are in milliseconds."""
    found = {}
    for name, session in held.items():
        copy = pb.Session()
        copy.CopyFrom(session)
        for field in RECKONED:
            copy.ClearField(field)  # type: ignore[arg-type]
        for field in ("updated_at", "state_since", "started_at"):
            copy.ClearField(field)  # type: ignore[arg-type]
        found[name] = (copy, session.updated_at.ToMilliseconds() // 5)
    return found


async def stands(service: RunningService, metadata: Metadata) -> Held:
    """Returns the live sessions as they are listed."""
    watch: Any = session_pb2_grpc.WatchServiceStub(service.channel)
    answer = await watch.ListSessions(pb.ListSessionsRequest(page_size=1000), metadata=metadata)
    return {session.session_id: session for session in answer.sessions}


@pytest.fixture
async def service(start_service: StartService) -> RunningService:
    return await start_service("session_tracker")


async def test_counters_come_as_arrays_and_the_rest_in_full(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata, packed=True)
    names = [f"s{number:03}" for number in range(200)]
    await worker.start(*names, slot_id="slot", total_pages=100)
    await worker.page(*names, page=1, total_pages=100)
    console.open()
    await console.read()
    snapshot = console.answers[0].ByteSize()
    for page in range(2, 5):
        await worker.page(*names, page=page, total_pages=100, products_found=3 * page)
        await console.read_until(lambda held, page=page: {session.current_page for session in held.values()} == {page})
    changes = console.answers[1:]
    assert sum(len(answer.packed.number) for answer in changes) >= 500
    packed_only = [answer for answer in changes if answer.packed.number and not answer.sessions]
    assert all(answer.ByteSize() < snapshot / 5 for answer in packed_only)
    await worker.page(names[0], page=5, total_pages=100, products_found=15, stage="detail", reason="deeper")
    await console.read_until(lambda held: held[names[0]].stage == "detail")
    assert [session.session_id for session in console.answers[-1].sessions] == [names[0]]
    assert {name: session.products_found for name, session in (await stands(service, metadata)).items()} == {
        name: session.products_found for name, session in console.held.items()
    }
    console.close()


async def test_one_that_comes_back_gets_packed_what_it_knows_and_in_full_what_it_does_not(
    service: RunningService,
) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker, console = Worker(service, metadata), Console(service, metadata, packed=True)
    # Its feed lives on in another's, whose place it does not share.
    other = Console(service, metadata, packed=True)
    await worker.start("a", "b")
    await worker.page("a", "b", page=1)
    for watcher in (console, other):
        watcher.open()
        await watcher.read_until(lambda held: len(held) == 2)
    console.close()
    await worker.page("a", page=2)
    await worker.page("b", page=2, state=pb.SESSION_STATE_PAUSED)
    await worker.start("c")
    await other.read_until(lambda held: "c" in held and held["b"].state == pb.SESSION_STATE_PAUSED)
    console.open()
    answer = await console.read()
    assert not answer.snapshot
    assert {session.session_id for session in answer.sessions} >= {"b", "c"}
    assert comparable(console.held) == comparable(other.held) == comparable(await stands(service, metadata))
    for watcher in (console, other):
        watcher.close()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_reports_ends_and_absences_leave_all_with_what_stands(service: RunningService, seed: int) -> None:
    dice = random.Random(seed)
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    consoles = [
        Console(service, metadata, packed=packed, **fields)
        for packed in (True, False)
        for fields in ({}, {"slot_id": "slot-1"}, {"states": [pb.SESSION_STATE_RUNNING]}, {"stage": "list"})
    ]
    names = {f"s{number:02}" for number in range(40)}
    live: set[str] = set()
    for console in consoles:
        console.open()
    for page in range(1, 41):
        for name in dice.sample(sorted(names - live), min(3, len(names - live))):
            live.add(name)
            await worker.start(name, slot_id=f"slot-{int(name[1:]) % 3}", stage="list")
        await worker.page(
            *dice.sample(sorted(live), min(len(live), 10)),
            page=page,
            state=dice.choice([2, 2, 2, 3, 4]),
            stage=dice.choice(["", "", "list", "detail"]),
        )
        if dice.random() < 0.3:
            ended = dice.choice(sorted(live))
            live.discard(ended)
            names.discard(ended)
            await worker.complete(ended)
        console = dice.choice(consoles)
        console.close()
        console.open()
        if dice.random() < 0.7:
            await console.read()
    # One that all filters select tells them that they have been told of all before.
    await worker.start("last", slot_id="slot-1", stage="list")
    await worker.page("last", page=1)
    for console in consoles:
        await console.read_until(lambda held: "last" in held and held["last"].current_page == 1)
        console.close()
    now = await stands(service, metadata)
    assert set(now) == {*live, "last"}
    expected = [
        now,
        {name: session for name, session in now.items() if session.slot_id == "slot-1"},
        {name: session for name, session in now.items() if session.state == pb.SESSION_STATE_RUNNING},
        {name: session for name, session in now.items() if session.stage == "list"},
    ]
    for console, wanted in zip(consoles, expected * 2, strict=True):
        # Finished sessions are shown for a while, and not listed.
        held = {name: session for name, session in console.held.items() if session.state <= pb.SESSION_STATE_LOST}
        assert comparable(held) == comparable(wanted)


async def test_those_who_do_not_read_cost_others_nothing_and_get_the_latest(service: RunningService) -> None:
    metadata = await service.metadata(Role.WORKER)
    worker = Worker(service, metadata)
    # Windows that stay small, so that what the slow ones do not read soon stands in nobody's buffers.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    narrow = grpc.aio.insecure_channel(service.address, options=options)
    names = [f"s{number:03}" for number in range(900)]
    await worker.start(*names)
    slow = [Console(service, metadata, channel=narrow, packed=True) for _ in range(10)]
    quick = Console(service, metadata, packed=True)
    merged = REGISTRY.get_sample_value("muster_tracker_watch_merged_total") or 0.0
    for console in (*slow, quick):
        console.open()
        await console.read_until(lambda held: len(held) > 200)
    rounds = 40
    for page in range(1, rounds + 1):
        await worker.page(*names, page=page)
        await quick.read_until(lambda held, page=page: held.get(names[-1], pb.Session()).current_page == page)
    for console in slow:
        await console.read_until(
            lambda held: len(held) == 900 and all(session.current_page == rounds for session in held.values())
        )
        assert len(console.answers) < len(quick.answers)
        console.close()
    assert (REGISTRY.get_sample_value("muster_tracker_watch_merged_total") or 0.0) > merged
    quick.close()
    await narrow.close()
