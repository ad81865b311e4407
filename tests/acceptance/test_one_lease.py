"""One lease from end to end, as the design's first picture draws it: through the client package, over real gRPC.

The same test runs on the suite as separate processes and on all four services bound into this one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import date, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import muster
import pytest

from services.call import Role
from services.chassis import Chassis
from services.config import PostgresConfig, load, read_secret
from services.identity.keys import KeyStore
from services.launcher.suite import Ports, Suite
from services.migrations import SCHEMAS, migrate
from services.postgres import Database
from tests.support.postgres import PostgresServer
from tests.support.services import ROLES


async def one_process(server: PostgresServer, folder: Path, stack: AsyncExitStack) -> muster.Client:
    """Binds all four services into this process."""
    database = server.create_database("one_process")
    stack.callback(server.drop_database, database)
    server.ensure_database(database, ROLES)
    for name, schema in SCHEMAS.items():
        migrate(schema, server.dsn(database, f"muster_{name}"))
    identity = PostgresConfig.model_validate(
        {"dsn": server.dsn(database, "muster_identity"), "pool_min": 0, "pool_max": 2}
    )
    keys = await Database.connect(identity, "keys")
    stack.push_async_callback(keys.close)
    _, service_key = await KeyStore(keys).create("default", Role.SERVICE)
    _, admin_key = await KeyStore(keys).create("default", Role.ADMIN)
    key_file = folder / "service.key"
    key_file.write_text(service_key, encoding="utf-8")
    addresses: dict[str, str] = {}
    peers = {"allocator": "persona_store", "session_tracker": "allocator"}
    for name in ("persona_store", "allocator", "session_tracker", "archiver"):
        app = import_module(f"{name}.app")
        tables: dict[str, Any] = {"metrics": {"listen": "127.0.0.1:0"}, "drain": {"grace_seconds": 1}}
        if name in peers:
            tables[peers[name]] = {"target": addresses[peers[name]], "key_file": str(key_file)}
        if name in ("persona_store", "archiver"):
            tables["objects"] = {"folder": str(folder / name)}
        config = type(load(app.CONFIG, name, None, {}))(
            grpc={"listen": "127.0.0.1:0"},
            postgres={"dsn": server.dsn(database, f"muster_{name}")},
            identity=identity,
            **tables,
        )
        chassis = Chassis(name, config)
        addresses[name] = await chassis.start(app.bind)
        stack.push_async_callback(chassis.drain)
    return muster.Client(api_key=admin_key, **addresses)  # type: ignore[arg-type]


async def separate_processes(_: PostgresServer, folder: Path, stack: AsyncExitStack) -> muster.Client:
    """Runs the suite as `muster up` does."""
    suite = Suite(folder / "suite", Ports(0, 0), on_event=lambda _: None)
    stack.push_async_callback(suite.stop)
    await suite.start()
    environ = suite.client_environment()
    return muster.Client.from_environment({**environ, "MUSTER_API_KEY": read_secret(suite.operator_key_file)})


@pytest.fixture(params=[one_process, separate_processes], ids=lambda mode: mode.__name__)
async def client(
    request: pytest.FixtureRequest, postgres_server: PostgresServer, tmp_path: Path
) -> AsyncIterator[muster.Client]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(await request.param(postgres_server, tmp_path, stack))


async def furnish(client: muster.Client, quota: int) -> muster.Slot:
    await client.exits.add([muster.ExitSpec(endpoint="http://127.0.0.1:3128")])
    await client.personas.create(b'{"screen": [1280, 720]}', tags=["kr"])
    return await client.slots.create(
        muster.SlotSpec(
            keyword="노트북",
            code="12345",
            start_date=date(2024, 1, 1),
            end_date=date(2099, 1, 31),
            daily_quota=quota,
            settings={"cart_click_enabled": False, "block_thumbnail_cdn": True, "pages": 3, "ratio": 0.5},
            persona=muster.PersonaNeed(tags=["kr"]),
        )
    )


async def work(job: muster.Job, profile: Path, done: int) -> int:
    """Does one unit in a profile folder, as the `done` + 1st of its persona, and returns the generation it saved."""
    assert job.settings == {"cart_click_enabled": False, "block_thumbnail_cdn": True, "pages": 3, "ratio": 0.5}
    assert job.exit is not None
    assert job.exit.endpoint == "http://127.0.0.1:3128"
    bundle = await job.load_bundle()
    assert bundle.fingerprint == {"screen": [1280, 720]}
    profile.mkdir()
    assert bundle.restore_profile(profile) == bool(done)
    visits = profile / "Cookies"
    assert len(visits.read_text() if visits.exists() else "") == done
    visits.write_text("x" * (done + 1))
    job.progress(page=1, total=2, products=1)
    generation = await job.save_bundle(profile=profile, state={"run": done}, history=[job.keyword])
    job.progress(page=2, total=2, products=2)
    product = muster.Product(product_id="p", title="A laptop", rank=1)
    disposition = await job.succeed(products=[product], exit_ip="203.0.113.7")
    assert disposition is muster.ResultDisposition.RECORDED
    return generation.generation


async def test_a_worker_does_its_quota_and_everything_adds_up(client: muster.Client, tmp_path: Path) -> None:
    slot = await furnish(client, quota=3)
    keys: list[str] = []
    generations: list[int] = []
    wrong: list[AssertionError] = []
    async with muster.Worker(client, client_id="pc-1", instance_number=2) as worker:
        async for job in worker.jobs(stop_when_idle=timedelta(seconds=2)):
            async with job:
                # What a body raises is recorded as a failure of the unit; a test wants to see it.
                try:
                    generations.append(await work(job, tmp_path / str(len(keys)), done=len(keys)))
                except AssertionError as error:
                    wrong.append(error)
                    raise
                keys.append(job.key)
    assert wrong == []
    assert len(set(keys)) == 3
    assert generations == sorted(set(generations))

    today = (await client.slots.get(slot.slot_id)).today
    assert today is not None
    assert (today.allocated, today.succeeded, today.expired, today.released) == (3, 3, 0, 0)
    explained = await client.insight.explain()
    assert [blocker.kind for blocker in explained.blockers] == [muster.BlockerKind.QUOTA_EXHAUSTED]
    async with asyncio.timeout(10):
        while (await client.insight.totals()).check_ins_pending:
            await asyncio.sleep(0.05)
    [persona] = [persona async for persona in client.personas.list()]
    assert (persona.total_uses, persona.success_count, persona.held_by) == (3, 3, "")
    bundle = await client.bundles.load(persona.persona_id)
    assert (bundle.state, bundle.generation) == ({"run": 2}, generations[-1])
    results = {result.session_id: result async for result in client.sessions.results()}
    assert set(results) == set(keys)
    assert all(result.state is muster.SessionState.COMPLETED for result in results.values())
    assert {result.products_found for result in results.values()} == {2}


async def test_a_worker_that_fails_leaves_nothing_held(client: muster.Client) -> None:
    slot = await furnish(client, quota=2)
    fates = iter(["raise", "leave"])
    async with muster.Worker(client, client_id="pc-1") as worker:
        async for job in worker.jobs(stop_when_idle=timedelta(seconds=2)):
            fate = next(fates, "stop")
            async with job:
                if fate == "raise":
                    raise ValueError("the page has changed")
                if fate == "stop":
                    worker.stop()
    today = (await client.slots.get(slot.slot_id)).today
    assert today is not None
    assert today.failed == 1
    assert today.released >= 1
    assert today.allocated == today.failed + today.released
    async with asyncio.timeout(10):
        while (await client.insight.totals()).check_ins_pending:
            await asyncio.sleep(0.05)
    [persona] = [persona async for persona in client.personas.list()]
    assert persona.held_by == ""


async def test_refusals_are_typed_and_name_their_field(client: muster.Client) -> None:
    with pytest.raises(muster.InvalidField) as caught:
        await client.slots.create(
            muster.SlotSpec(keyword="", start_date=date(2024, 2, 1), end_date=date(2024, 1, 1), daily_quota=0)
        )
    fields = {violation.field for violation in caught.value.violations}
    assert {"spec.keyword", "spec.daily_quota"} <= fields
    await client.personas.create(b'{"a": 1, "b": 2.0}')
    with pytest.raises(muster.FingerprintExists):
        await client.personas.create(json.dumps({"b": 2, "a": 1}).encode())
