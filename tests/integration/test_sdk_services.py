"""The client on the real services: a fleet of one does the main job, leases are lost and kept, bundles come back."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from muster import (
    AllocationStatus,
    BlockerKind,
    Client,
    ExitSpec,
    Job,
    PersonaNeed,
    Product,
    ResultDisposition,
    RetryPolicy,
    SessionState,
    SlotSpec,
    Worker,
    errors,
)

from services.call import Role
from tests.support.postgres import PostgresServer
from tests.support.services import RunningService, StartService

SLOT = SlotSpec(
    "json", date(2020, 1, 1), date(2099, 12, 31), 2, target="pydoc", settings={"max_pages": 3}, external_id="s-json"
)


@dataclass(frozen=True, slots=True)
class Suite:
    allocator: RunningService
    persona_store: RunningService
    session_tracker: RunningService
    operator: Client
    worker: Client


@pytest.fixture
async def suite(start_service: StartService, postgres_server: PostgresServer, tmp_path: Path) -> AsyncIterator[Suite]:
    """Three services that know each other, and a client for an operator and one for a worker."""
    objects = {"folder": str(tmp_path / "objects")}
    personas = await start_service("persona_store", objects=objects)
    identity = {"dsn": postgres_server.dsn(personas.database, "muster_identity"), "pool_min": 0, "pool_max": 2}
    key_file = tmp_path / "service.key"
    key_file.write_text(await personas.key(Role.SERVICE))
    peer = {"target": personas.address, "key_file": str(key_file)}
    allocator = await start_service(
        "allocator", identity=identity, persona_store=peer, leases={"duration_seconds": 3, "sweep_seconds": 0.2}
    )
    tracker = await start_service(
        "session_tracker",
        identity=identity,
        allocator={"target": allocator.address, "key_file": str(key_file)},
        renewal={"interval_seconds": 0.5},
    )

    async def client(role: Role) -> Client:
        return Client(
            api_key=await personas.key(role),
            allocator=allocator.address,
            persona_store=personas.address,
            session_tracker=tracker.address,
            policy=RetryPolicy(call_seconds=5, total_seconds=20),
        )

    async with await client(Role.OPERATOR) as operator, await client(Role.WORKER) as worker:
        yield Suite(allocator, personas, tracker, operator, worker)


async def work(suite: Suite, body: Any) -> None:
    failed: list[Exception] = []
    async with Worker(suite.worker, client_id="pc-1", folder=1) as worker:
        async for job in worker.jobs(stop_when_idle=timedelta(seconds=0.5)):
            async with job:
                try:
                    await body(job)
                except AssertionError as error:
                    failed.append(error)
                    raise
    if failed:
        raise failed[0]


async def test_the_main_job(suite: Suite, tmp_path: Path) -> None:
    operator = suite.operator
    slot = await operator.slots.create(SlotSpec(**{**_fields(SLOT), "persona": PersonaNeed()}))
    await operator.exits.add([ExitSpec("http://127.0.0.1:3128")])
    persona = await operator.personas.create(b'{"ua":"x"}', tags=["a"])
    with pytest.raises(errors.FingerprintExists) as caught:
        await operator.personas.create(b'{ "ua": "x" }')
    assert caught.value.metadata["persona_id"] == persona.persona_id
    visits: list[int] = []

    async def body(job: Job) -> None:
        assert job.exit is not None
        assert job.persona is not None
        assert (job.keyword, job.settings, job.exit.endpoint) == ("json", {"max_pages": 3}, "http://127.0.0.1:3128")
        folder = tmp_path / job.key
        bundle = await job.load_bundle()
        assert bundle.fingerprint == {"ua": "x"}
        seen = int((folder / "Cookies").read_text()) if bundle.restore_profile(folder) else 0
        visits.append(seen)
        folder.mkdir(exist_ok=True)
        (folder / "Cookies").write_text(str(seen + 1))
        for page in range(1, 4):
            job.progress(page, 3, page * 2, stage="results")
        generation = await job.save_bundle(profile=folder, state={"page": 3}, history=[job.keyword])
        assert generation.generation == bundle.generation + 1
        found = [Product("json", "json", "http://x/json", 1, {"stars": 5})]
        assert await job.succeed(products=found) is ResultDisposition.RECORDED

    async with asyncio.timeout(40):
        await work(suite, body)
    assert visits == [0, 1]
    today = (await operator.slots.get(slot.slot_id)).today
    assert today is not None
    # A unit for which no persona was idle yet is withdrawn within the allocator and leaves no trace.
    assert (today.allocated, today.released, today.succeeded) == (2, 0, 2)
    results = [result async for result in operator.sessions.results()]
    assert [(result.state, result.total_pages, result.products_found) for result in results] == [
        (SessionState.COMPLETED, 3, 6)
    ] * 2
    assert {result.slot_id for result in results} == {slot.slot_id}
    totals = await operator.insight.totals()
    assert (totals.leased, totals.clients) == (0, 1)
    assert len(await operator.personas.generations(persona.persona_id)) == 3


async def test_an_error_in_the_body_and_a_unit_left_alone(suite: Suite) -> None:
    operator = suite.operator
    slot = await operator.slots.create(SLOT)
    await operator.exits.add([ExitSpec("http://127.0.0.1:3128")])
    turns = 0

    async def body(job: Job) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            raise RuntimeError("\x1b[31mno page")
        if turns == 3:
            await job.blocked("http_429", retry_after=timedelta(seconds=1))

    async with asyncio.timeout(40):
        await work(suite, body)
    today = (await operator.slots.get(slot.slot_id)).today
    assert today is not None
    assert (today.failed, today.blocked, today.released, today.allocated) == (1, 1, 1, 3)
    # The quota is taken by what failed and what was blocked, and it says so.
    kinds = [blocker.kind.name for blocker in (await operator.insight.explain(slot_id=slot.slot_id)).blockers]
    assert kinds[0] == "QUOTA_EXHAUSTED"


@pytest.mark.parametrize("reporting", [True, False])
async def test_a_lease_outlives_its_duration_while_the_worker_lives(suite: Suite, reporting: bool) -> None:
    """With reports the tracker renews it, and without them the worker does."""
    await suite.operator.slots.create(SLOT)
    await suite.operator.exits.add([ExitSpec("http://127.0.0.1:3128")])
    clock = asyncio.get_running_loop().time
    dispositions: list[ResultDisposition] = []

    async def body(job: Job) -> None:
        began, page = clock(), 0
        # One and a half of the lease's 3 s.
        while clock() - began < 4.5 and not dispositions:
            page += 1
            if reporting:
                job.progress(page)
            try:
                async with asyncio.timeout(0.2):
                    await job.lease_lost.wait()
                raise AssertionError("the lease was lost")
            except TimeoutError:
                pass
        dispositions.append(await job.succeed())

    async with asyncio.timeout(40):
        await work(suite, body)
    assert dispositions == [ResultDisposition.RECORDED] * 2


async def test_a_lease_that_ran_out_is_noticed_and_its_result_comes_late(suite: Suite) -> None:
    slot = await suite.operator.slots.create(SLOT)
    await suite.operator.exits.add([ExitSpec("http://127.0.0.1:3128")])
    dispositions: list[ResultDisposition] = []

    async def body(job: Job) -> None:
        if not dispositions:
            connection = await asyncpg.connect(suite.allocator.dsn)
            try:
                moved = await connection.execute(
                    "UPDATE allocator.leases SET expires_at = now() - interval '1 hour' WHERE allocation_key = $1",
                    job.key,
                )
                assert moved == "UPDATE 1"
            finally:
                await connection.close()
            async with asyncio.timeout(10):
                await job.lease_lost.wait()
        dispositions.append(await job.succeed())

    async with asyncio.timeout(40):
        await work(suite, body)
    assert dispositions[0] in (ResultDisposition.RECORDED_LATE, ResultDisposition.QUARANTINED)
    late = [
        record
        async for record in suite.operator.insight.allocations(slot_id=slot.slot_id)
        if record.late or record.status is AllocationStatus.EXPIRED
    ]
    assert len(late) == 1


async def test_a_worker_that_is_told_goodbye_for_gives_everything_back(suite: Suite) -> None:
    await suite.operator.slots.create(SLOT)
    await suite.operator.exits.add([ExitSpec("http://127.0.0.1:3128")])
    async with Worker(suite.worker, client_id="pc-1") as worker:
        async for _ in worker.jobs():
            break
    totals = await suite.operator.insight.totals()
    assert (totals.leased, totals.today.released) == (0, 1)


async def test_a_worker_that_is_drained_finishes_what_it_holds_and_takes_nothing_new(suite: Suite) -> None:
    await suite.operator.slots.create(SlotSpec(**{**_fields(SLOT), "without_exit": True, "daily_quota": 9}))
    done = []
    async with asyncio.timeout(20), Worker(suite.worker, client_id="pc-1") as worker:
        async for job in worker.jobs():
            async with job:
                machine = await suite.operator.machines.set_draining("pc-1", True)
                assert (machine.draining, machine.leases) == (True, 1)
                done.append(await job.succeed())
        assert worker.stopping
    assert done == [ResultDisposition.RECORDED]
    (machine,) = [found async for found in suite.operator.machines.list()]
    assert machine.leases == 0
    explained = await suite.operator.insight.explain(client_id="pc-1")
    assert explained.blockers[0].kind is BlockerKind.CLIENT_DRAINING


async def test_a_worker_may_not_administer_and_strangers_may_nothing(suite: Suite) -> None:
    with pytest.raises(errors.PermissionDenied) as caught:
        await suite.worker.slots.create(SLOT)
    assert caught.value.metadata["needs"] == "operator"
    async with Client(api_key="x" * 40, allocator=suite.allocator.address) as stranger:
        with pytest.raises(errors.Unauthenticated):
            await stranger.insight.totals()
    with pytest.raises(errors.NotFound):
        await suite.operator.slots.get("123e4567-e89b-12d3-a456-426614174000")
    with pytest.raises(errors.InvalidField) as wrong:
        await suite.operator.slots.get("no-uuid")
    assert [violation.field for violation in wrong.value.violations] == ["slot_id"]


async def test_a_csv_of_many_rows_imports_twice_to_the_same_slots(suite: Suite) -> None:
    rows = [(number, SlotSpec(**{**_fields(SLOT), "external_id": f"x-{number}"})) for number in range(1500)]
    first = [answer async for answer in suite.operator.slots.import_rows(rows)]
    assert len(first) == 1500
    assert all(answer.created and answer.error is None for answer in first)
    again = [answer async for answer in suite.operator.slots.import_rows(rows)]
    assert not any(answer.created for answer in again)
    assert {answer.slot_id for answer in again} == {answer.slot_id for answer in first}
    assert len([slot async for slot in suite.operator.slots.list(page_size=500)]) == 1500


@pytest.mark.parametrize("named", [True, False], ids=["with an etag", "without one"])
async def test_an_update_that_is_made_twice_is_one_change(suite: Suite, named: bool) -> None:
    """So the client may repeat it after a lost answer."""
    slots = suite.operator.slots
    slot = await slots.create(SLOT)
    spec, etag = replace(SLOT, daily_quota=5), slot.etag if named else ""
    first = await slots.update(slot.slot_id, spec, ["daily_quota"], etag=etag)
    assert await slots.update(slot.slot_id, spec, ["daily_quota"], etag=etag) == first
    assert [change.difference async for change in slots.history(slot.slot_id)] == [{"daily_quota": [2, 5]}]


def _fields(spec: SlotSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in SlotSpec.__dataclass_fields__}
