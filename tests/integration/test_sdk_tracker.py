"""The client on the real session tracker: followed, commanded, watched, restarted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest
from muster import CheckpointPolicy, Client, CommandKind, RetryPolicy, Session, SessionFilter, SessionState, errors

from services.call import Role
from tests.support.redis import RedisServer
from tests.support.services import RunningService, StartService

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(slots=True)
class Tracked:
    service: RunningService
    worker: Client
    operator: Client


@pytest.fixture
async def tracked(start_service: StartService) -> AsyncIterator[Tracked]:
    service = await start_service("session_tracker")
    policy = RetryPolicy(call_seconds=5, total_seconds=20)

    async def client(role: Role) -> Client:
        return Client(api_key=await service.key(role), session_tracker=service.address, policy=policy)

    async with await client(Role.WORKER) as worker, await client(Role.OPERATOR) as operator:
        yield Tracked(service, worker, operator)


async def seen(client: Client, condition: Callable[[Session], bool], session_id: str = "s") -> Session:
    """Watches until a session is as wanted, and returns it."""
    async with asyncio.timeout(15):
        async for held in client.watch_sessions(interval=timedelta(milliseconds=20)):
            if session_id in held and condition(held[session_id]):
                return held[session_id]
    raise AssertionError("the watch ended")


async def test_a_run_is_followed_and_its_result_recorded(tracked: Tracked) -> None:
    """ST-05, ST-06, ST-07, ST-12, B3-20, B3-25: start, progress from memory, errors by class, the final row."""
    async with tracked.worker.session(
        "s",
        total_pages=100,
        stage="list",
        slot_id="slot",
        client_id="pc",
        tags=["a"],
        settings={"depth": 2, "password": "p"},
        checkpoint=CheckpointPolicy(every_pages=50),
        traceparent=TRACE,
    ) as session:
        assert await session.permit()
        session.page(products=3)
        session.error("http_503", "busy")
        session.error(ValueError("no price"))
        shown = await seen(tracked.operator, lambda one: one.errors_count == 2)
        assert (shown.state, shown.stage, shown.current_page, shown.total_pages) == (
            SessionState.RUNNING,
            "list",
            1,
            100,
        )
        assert (shown.products_found, shown.slot_id, shown.client_id, shown.tags) == (3, "slot", "pc", ("a",))
        assert shown.errors_by_class == {"http_503": 1, "ValueError": 1}
        assert (shown.important, shown.traceparent) == (True, TRACE)
        detail = await tracked.operator.sessions.detail("s")
        assert [(one.error_class, one.message, one.page) for one in detail.last_errors] == [
            ("http_503", "busy", 1),
            ("ValueError", "no price", 1),
        ]
        assert "depth" in detail.config_snapshot_json
        assert '"p"' not in detail.config_snapshot_json
        session.hold("429 from the target")
        held = await seen(tracked.operator, lambda one: one.state is SessionState.RATE_LIMITED)
        assert held.reason == "429 from the target"
        assert (await tracked.operator.sessions.totals(slot_id="slot")).by_state["RATE_LIMITED"] == 1
        session.page(products=2, stage="detail")
        await seen(tracked.operator, lambda one: one.state is SessionState.RUNNING and one.stage == "detail")
        # The first page came with the registration: when it was done is not known.
        assert sum((await tracked.operator.sessions.detail("s")).pages_per_span) == 1
    await tracked.worker.close()
    (result,) = [one async for one in tracked.operator.sessions.results(client_id="pc")]
    assert (result.state, result.total_pages, result.products_found, result.errors_count) == (
        SessionState.COMPLETED,
        2,
        5,
        2,
    )
    assert (result.slot_id, result.stage) == ("slot", "detail")


async def test_operators_pause_resume_limit_and_stop(tracked: Tracked) -> None:
    """B3-18: the down-link, by id and by filter, until it is acknowledged."""
    operator, pages = tracked.operator.sessions, 0

    async def crawl() -> None:
        nonlocal pages
        async with tracked.worker.session("s", slot_id="slot") as session:
            while await session.permit():
                pages += 1
                session.page()
                await asyncio.sleep(0.001)

    crawling = asyncio.create_task(crawl())
    await seen(tracked.operator, lambda one: one.current_page > 0)
    answer = await operator.control(CommandKind.PAUSE, ["s", "none"], reason="night")
    assert (answer.told, answer.unknown_sessions) == (1, ("none",))
    paused = await seen(tracked.operator, lambda one: one.state is SessionState.PAUSED and one.acknowledged_command > 0)
    assert paused.reason == "night"
    stood = pages
    answer = await operator.control(CommandKind.RESUME, filter=SessionFilter(slot_id="slot"))
    assert answer.told == 1
    await seen(tracked.operator, lambda one: one.current_page > stood)
    await operator.control(CommandKind.SPEED_LIMIT, ["s"], pages_per_minute=60_000.0)
    limited = await seen(tracked.operator, lambda one: one.pages_per_minute_limit == 60_000.0)
    assert limited.pages_per_minute_limit == 60_000.0
    await operator.control(CommandKind.STOP, ["s"], reason="enough")
    async with asyncio.timeout(15):
        await crawling
    await tracked.worker.close()
    (result,) = [one async for one in operator.results()]
    assert (result.state, result.message, result.total_pages) == (SessionState.STOPPED, "enough", pages)
    with pytest.raises(errors.InvalidField):
        await operator.control(CommandKind.STOP)
    with pytest.raises(errors.PermissionDenied):
        await tracked.worker.sessions.control(CommandKind.STOP, ["s"])


async def test_many_sessions_are_watched_to_their_latest_state(tracked: Tracked) -> None:
    """A view kept by packed changes equals what a list reads."""
    sessions = [tracked.worker.session(f"s-{number:03}", tags=[f"t{number % 2}"]) for number in range(200)]
    for session in sessions:
        session.begin()
    views: dict[str, Session] = {}

    async def watch() -> None:
        async for held in tracked.operator.watch_sessions(SessionFilter(tag="t1"), interval=timedelta(milliseconds=20)):
            views.clear()
            views.update(held)
            if len(held) == 100 and all(one.current_page == 50 for one in held.values()):
                return

    watching = asyncio.create_task(watch())
    for _ in range(50):
        for session in sessions:
            session.page(products=2)
        await asyncio.sleep(0.005)
    async with asyncio.timeout(20):
        await watching
    listed = {one.session_id: one async for one in tracked.operator.sessions.list(SessionFilter(tag="t1"))}
    assert listed.keys() == views.keys()
    assert all(
        (listed[name].products_found, listed[name].sequence) == (one.products_found, one.sequence)
        for name, one in views.items()
    )


async def test_a_restart_of_the_tracker_loses_no_session(start_service: StartService) -> None:
    """B3-14: the next report of each session brings it back, and its commands' numbers go on."""
    first = await start_service("session_tracker")
    host, port = first.address.rsplit(":", 1)
    policy = RetryPolicy(call_seconds=5, total_seconds=20)
    worker = Client(api_key=await first.key(Role.WORKER), session_tracker=first.address, policy=policy)
    operator = Client(api_key=await first.key(Role.OPERATOR), session_tracker=first.address, policy=policy)
    async with worker, operator, worker.session("s", total_pages=9, tags=["a"]) as session:
        for _ in range(4):
            session.page(products=2)
        before = await seen(operator, lambda one: one.current_page == 4)
        await first.chassis.drain()
        session.page(products=2)
        await start_service("session_tracker", database=first.database, grpc={"listen": f"{host}:{port}"})
        after = await seen(operator, lambda one: one.current_page == 5)
        assert (after.products_found, after.total_pages, after.tags) == (10, 9, ("a",))
        assert after.sequence > before.sequence
        assert after.started_at == before.started_at


async def test_a_worker_with_two_replicas_goes_on_when_one_stops(
    start_service: StartService, redis_server: RedisServer
) -> None:
    """B3-15: whichever replica a call reaches, the session is the same; a watcher of the other one sees all of it."""
    engine = {"kind": "redis", "url": redis_server.url, "beat_seconds": 0.1, "replica_life_seconds": 1}
    first = await start_service("session_tracker", engine=engine)
    second = await start_service("session_tracker", engine=engine, database=first.database)
    policy = RetryPolicy(call_seconds=5, total_seconds=20)
    both = f"ipv4:{first.address},{second.address}"
    worker = Client(api_key=await first.key(Role.WORKER), session_tracker=both, policy=policy)
    operator = Client(api_key=await first.key(Role.OPERATOR), session_tracker=second.address, policy=policy)
    async with worker, operator:
        async with worker.session("s", total_pages=9, tags=["a"]) as session:
            for page in range(1, 5):
                session.page(products=2)
                await seen(operator, lambda one, page=page: one.current_page == page)  # type: ignore[misc]
            await first.chassis.drain()
            session.page(products=2)
            session.error("http_503")
            shown = await seen(operator, lambda one: one.current_page == 5 and one.errors_count == 1)
            assert (shown.products_found, shown.tags, shown.errors_by_class) == (10, ("a",), {"http_503": 1})
            await operator.sessions.control(CommandKind.STOP, ["s"], reason="enough")
            async with asyncio.timeout(15):
                while await session.permit():
                    await asyncio.sleep(0.01)
        await worker.close()
        (result,) = [one async for one in operator.sessions.results()]
        assert (result.state, result.total_pages, result.message) == (SessionState.STOPPED, 5, "enough")
