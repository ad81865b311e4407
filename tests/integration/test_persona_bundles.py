"""BundleService on both engines of the object store: atomic generations, fencing, corruption, collection."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
from muster.persona_store.v1 import bundle_pb2, checkout_pb2, persona_pb2

from persona_store.bundle_store import BundleStore
from persona_store.collector import Collector
from persona_store.config import BundlesConfig
from persona_store.parts import PartKind, object_key
from persona_store.store import PersonaStore
from services.config import PostgresConfig
from services.objects import ObjectStore, ObjectStoreConfig, ObjectStoreUnavailable
from services.postgres import Database
from tests.support.personas import PersonaClient, new_id, refused, s3_settings, start_personas
from tests.support.s3 import S3Server
from tests.support.services import StartService

MIB = 2**20
NAMES = {kind.file_name: kind for kind in PartKind}


@pytest.fixture(params=["local", "s3"])
async def objects(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    if request.param == "local":
        yield {"engine": "local", "folder": tmp_path / "objects"}
        return
    server: S3Server = request.getfixturevalue("s3_server")
    async with s3_settings(server) as settings:
        yield settings


@pytest.fixture
async def client(start_service: StartService, tmp_path: Path, objects: dict[str, Any]) -> PersonaClient:
    return await start_personas(start_service, tmp_path, objects=objects)


@pytest.fixture
async def store(objects: dict[str, Any], client: PersonaClient) -> ObjectStore:
    """The store itself, past the service."""
    return await ObjectStore.open(ObjectStoreConfig.model_validate(objects))


@pytest.fixture
async def local(start_service: StartService, tmp_path: Path) -> PersonaClient:
    """A store on a folder, for what does not depend on the engine."""
    return await start_personas(start_service, tmp_path)


async def keys(store: ObjectStore) -> set[str]:
    return {"/".join(info.key.split("/")[-2:]) async for info in store.list("v1/")}


async def held_persona(client: PersonaClient, holder: str = "h") -> checkout_pb2.CheckOut:
    return await client.held(holder, (await client.create()).persona_id)


def chunks(
    check_out: checkout_pb2.CheckOut, parts: dict[str, bytes], *, request_id: str = "", piece: int = MIB
) -> Iterator[bundle_pb2.SaveBundleStreamRequest]:
    header = bundle_pb2.SaveBundleHeader(
        request_id=request_id or new_id(),
        persona_id=check_out.persona.persona_id,
        lease_token=check_out.lease_token,
    )
    yield bundle_pb2.SaveBundleStreamRequest(header=header)
    for name, data in parts.items():
        info = persona_pb2.PartInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).digest())
        yield bundle_pb2.SaveBundleStreamRequest(part=info)
        for begin in range(0, len(data), piece):
            yield bundle_pb2.SaveBundleStreamRequest(data=data[begin : begin + piece])


async def save_stream(
    client: PersonaClient, requests: Iterator[bundle_pb2.SaveBundleStreamRequest]
) -> persona_pb2.Generation:
    async def each() -> AsyncIterator[bundle_pb2.SaveBundleStreamRequest]:
        for request in requests:
            yield request

    return (await client.bundles.SaveBundleStream(each(), metadata=client.worker)).generation


async def load_stream(client: PersonaClient, persona_id: str, **more: Any) -> tuple[int, dict[str, bytes]]:
    request = bundle_pb2.LoadBundleStreamRequest(persona_id=persona_id, **more)
    generation, infos, parts = 0, {}, {}
    name = ""
    async for response in client.bundles.LoadBundleStream(request, metadata=client.worker):
        piece = response.WhichOneof("piece")
        if piece == "generation":
            generation = response.generation
        elif piece == "part":
            name = response.part.name
            infos[name], parts[name] = response.part, b""
        else:
            assert len(response.data) <= 256 * 1024
            parts[name] += response.data
    for name, info in infos.items():
        assert (info.size_bytes, info.sha256) == (len(parts[name]), hashlib.sha256(parts[name]).digest())
    return generation, parts


async def test_a_save_is_visible_whole_and_at_once(client: PersonaClient, store: ObjectStore) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    fingerprint = await client.load(persona_id)
    parts = {"cookies.tar.gz": os.urandom(50_000), "state.json": b'{"checkpoint":7}', "history.json": b""}
    generation = await client.save(held, parts)
    assert generation.generation == 2
    assert [part.name for part in generation.parts] == sorted([*parts, "fingerprint.json"])
    assert await client.load(persona_id) == {**fingerprint, **parts}
    assert await client.load(persona_id, generation=1) == fingerprint
    assert await client.load(persona_id, parts=["state.json"]) == {"state.json": parts["state.json"]}
    assert await load_stream(client, persona_id) == (2, {**fingerprint, **parts})
    assert (await client.get(persona_id)).generation == 2
    assert await keys(store) == {"1/fingerprint.json", "2/cookies.tar.gz", "2/state.json", "2/history.json"}
    assert await client.sql("SELECT * FROM pending_objects") == []


async def test_what_one_replica_saved_another_loads_at_once(
    client: PersonaClient, objects: dict[str, Any], start_service: StartService
) -> None:
    replica = await PersonaClient.of(
        await start_service("persona_store", database=client.service.database, objects=objects)
    )
    held = await held_persona(client)
    for run in range(5):
        state = b'{"run": %d}' % run
        await client.save(held, {"state.json": state})
        assert await replica.load(held.persona.persona_id, parts=["state.json"]) == {"state.json": state}


async def test_an_unchanged_part_is_not_written_again(client: PersonaClient, store: ObjectStore) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    await client.save(held, {"state.json": b"one", "cookies.tar.gz": b"jar"})
    generation = await client.save(held, {"state.json": b"two", "cookies.tar.gz": b"jar"})
    assert await keys(store) == {"1/fingerprint.json", "2/cookies.tar.gz", "2/state.json", "3/state.json"}
    assert (await client.load(persona_id, 3))["cookies.tar.gz"] == b"jar"
    assert (await client.load(persona_id, 2))["state.json"] == b"one"
    sizes = {part.name: part.size_bytes for part in generation.parts}
    assert (sizes["cookies.tar.gz"], sizes["state.json"]) == (3, 3)
    assert (await client.save(held, {"state.json": b"two"})).generation == 4
    assert len(await keys(store)) == 4


async def test_large_bundles_travel_as_streams(client: PersonaClient) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    parts = {"cookies.tar.gz": os.urandom(5 * MIB + 17), "state.json": os.urandom(MIB)}
    assert (await save_stream(client, chunks(held, parts))).generation == 2
    generation, loaded = await load_stream(client, persona_id, parts=list(parts))
    assert (generation, loaded) == (2, parts)
    refusal = await refused(client.load(persona_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PART_TOO_LARGE")
    assert refusal.metadata["limit"] == str(3 * MIB)
    assert await client.load(persona_id, parts=["state.json"]) == {"state.json": parts["state.json"]}


async def test_retries_of_a_save_get_the_first_answer(client: PersonaClient, store: ObjectStore) -> None:
    held = await held_persona(client)
    request_id = new_id()
    first = await client.save(held, {"state.json": b"one"}, request_id=request_id)
    streamed = list(chunks(held, {"history.json": b"h"}))
    second = await save_stream(client, iter(streamed))
    before = await keys(store)
    # Also when the check-out has ended meanwhile: the acknowledgement was lost, not the save.
    await client.bring_back("h")
    assert await client.save(held, {"state.json": b"one"}, request_id=request_id) == first
    assert await save_stream(client, iter(streamed)) == second
    assert await client.generations(held.persona.persona_id) == [3, 2, 1]
    assert await keys(store) == before
    refusal = await refused(client.save(held, {"state.json": b"other"}, request_id=request_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


async def test_racing_saves_of_one_holder_all_count(client: PersonaClient) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    names = ["state.json", "cookies.tar.gz", "history.json"]
    made = await asyncio.gather(*(client.save(held, {names[n % 3]: f"{names[n % 3]} {n}".encode()}) for n in range(9)))
    numbers = sorted(generation.generation for generation in made)
    assert len(set(numbers)) == 9
    newest = (await client.get(persona_id)).generation
    assert newest == numbers[-1]
    assert await client.generations(persona_id) == numbers[:-6:-1]
    # Nobody's part was lost to a save of another part, and every kept generation is whole.
    loaded = await client.load(persona_id)
    assert set(loaded) == {*names, "fingerprint.json"}
    for name in names:
        assert loaded[name].startswith(name.encode())
    for number in numbers[:-6:-1]:
        await client.load(persona_id, number)


async def test_racing_retries_of_one_save_are_one_generation(client: PersonaClient) -> None:
    held = await held_persona(client)
    request_id = new_id()
    made = await asyncio.gather(*(client.save(held, {"state.json": b"one"}, request_id=request_id) for _ in range(6)))
    assert len({generation.SerializeToString(deterministic=True) for generation in made}) == 1
    assert len(await client.generations(held.persona.persona_id)) == 2


async def test_a_stale_token_saves_nothing(client: PersonaClient, store: ObjectStore) -> None:
    stale = await held_persona(client, "first")
    await client.bring_back("first")
    fresh = await client.held("second", stale.persona.persona_id)
    before, stored = await client.snapshot(), await keys(store)
    for call in (
        client.save(stale, {"state.json": b"stale"}),
        save_stream(client, chunks(stale, {"state.json": b"stale"})),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHECK_OUT_LOST")
    assert await client.snapshot() == before
    assert await keys(store) == stored
    assert (await client.save(fresh, {"state.json": b"fresh"})).generation == 2


async def test_a_lease_lost_between_write_and_commit_saves_nothing(
    local: PersonaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await held_persona(local)
    commit = BundleStore.commit

    async def after_the_end(self: BundleStore, *arguments: Any) -> Any:
        await local.expire("h")
        return await commit(self, *arguments)

    monkeypatch.setattr(BundleStore, "commit", after_the_end)
    assert (await refused(local.save(held, {"state.json": b"late"}))).reason == "CHECK_OUT_LOST"
    assert set(await local.load(held.persona.persona_id)) == {"fingerprint.json"}


async def test_a_kill_before_the_commit_leaves_the_last_generation_and_an_orphan_to_collect(
    client: PersonaClient, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    await client.save(held, {"state.json": b"whole", "cookies.tar.gz": b"jar"})

    async def killed(*_: Any) -> None:
        raise RuntimeError("killed between put and commit")

    with monkeypatch.context() as patch:
        patch.setattr(BundleStore, "commit", killed)
        refusal = await refused(client.save(held, {"state.json": b"torn"}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_FAULT")
    loaded = await client.load(persona_id)
    assert (loaded["state.json"], loaded["cookies.tar.gz"]) == (b"whole", b"jar")
    assert "3/state.json" in await keys(store)

    collect = collector_of(client, store)
    assert await collect() == 0, "within the grace nothing is collected"
    await client.sql("UPDATE pending_objects SET collect_at = now()")
    assert await collect() == 1
    assert await keys(store) == {"1/fingerprint.json", "2/state.json", "2/cookies.tar.gz"}
    assert await client.sql("SELECT * FROM pending_objects") == []
    # The number of the orphan is not used again.
    assert (await client.save(held, {"state.json": b"next"})).generation == 4
    assert (await client.load(persona_id))["state.json"] == b"next"


def collector_of(client: PersonaClient, store: ObjectStore) -> Callable[[], Awaitable[int]]:
    """Returns the collector's work on the service's database, as another replica would do it."""

    async def collect() -> int:
        config = PostgresConfig.model_validate({"dsn": client.service.dsn})
        database = await Database.connect(config, "collector test", search_path="persona_store")
        try:
            generations = BundleStore(database, generations_kept=5, grace=timedelta(hours=1))
            return await Collector(generations, PersonaStore(database), store).collect()
        finally:
            await database.close()

    return collect


async def test_a_failed_creation_leaves_an_orphan_to_collect(
    client: PersonaClient, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*_: Any) -> None:
        raise RuntimeError("killed between put and commit")

    request_id = new_id()
    with monkeypatch.context() as patch:
        patch.setattr(PersonaStore, "create", killed)
        await refused(client.create(fingerprint=b'{"a":1}', request_id=request_id))
    assert await keys(store) == {"1/fingerprint.json"}
    persona = await client.create(fingerprint=b'{"a":1}', request_id=request_id)
    await client.sql("UPDATE pending_objects SET collect_at = now()")
    assert await collector_of(client, store)() == 1
    assert await client.load(persona.persona_id) == {"fingerprint.json": b'{"a":1}'}


async def test_a_collected_save_cannot_commit(
    local: PersonaClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await held_persona(local)
    store = await ObjectStore.open(ObjectStoreConfig(folder=tmp_path))
    commit = BundleStore.commit

    async def after_the_collector(self: BundleStore, *arguments: Any) -> Any:
        await local.sql("UPDATE pending_objects SET collect_at = now()")
        await collector_of(local, store)()
        return await commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(BundleStore, "commit", after_the_collector)
        refusal = await refused(local.save(held, {"state.json": b"slow"}))
    assert refusal.reason == "OBJECT_STORE_UNAVAILABLE"
    assert (await local.save(held, {"state.json": b"again"})).generation == 3


async def test_old_generations_are_dropped_and_their_objects_collected_after_the_grace(
    client: PersonaClient, store: ObjectStore
) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    await client.save(held, {"cookies.tar.gz": b"jar", "state.json": b"2"})
    for number in range(3, 9):
        await client.save(held, {"state.json": str(number).encode()})
    assert await client.generations(persona_id) == [8, 7, 6, 5, 4]
    refusal = await refused(client.load(persona_id, 3))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_NOT_FOUND")
    assert (await refused(client.load(persona_id, 2**40))).reason == "GENERATION_NOT_FOUND"
    # A reader that began before still finds every byte.
    assert await store.get(object_key(UUID(persona_id), 3, PartKind.STATE)) == b"3"
    await client.sql("UPDATE pending_objects SET collect_at = now()")
    assert await collector_of(client, store)() == 2
    expected = {"1/fingerprint.json", "2/cookies.tar.gz", *(f"{n}/state.json" for n in range(4, 9))}
    assert await keys(store) == expected
    assert set(await client.load(persona_id, 4)) == {"fingerprint.json", "cookies.tar.gz", "state.json"}


@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
async def test_a_corrupt_part_is_told_and_never_handed_out(
    client: PersonaClient, store: ObjectStore, damage: str
) -> None:
    held = await held_persona(client)
    persona_id = held.persona.persona_id
    await client.save(held, {"state.json": b"good"})
    await client.save(held, {"state.json": b"evil"})
    key = object_key(UUID(persona_id), 3, PartKind.STATE)
    if damage == "gone":
        await store.delete([key])
    else:
        await store.put(key, {"changed": b"live", "shorter": b"evi", "longer": b"evil!"}[damage])
    for call in (client.load(persona_id), load_stream(client, persona_id)):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "PART_CORRUPT")
        assert refusal.metadata == {"persona_id": persona_id, "generation": "3", "part": "state.json"}
    assert (await client.load(persona_id, 2))["state.json"] == b"good"
    assert set(await client.load(persona_id, parts=["fingerprint.json"])) == {"fingerprint.json"}


async def test_a_stream_that_breaks_off_leaves_nothing(client: PersonaClient, store: ObjectStore) -> None:
    held = await held_persona(client)
    before, stored = await client.snapshot(), await keys(store)
    requests = list(chunks(held, {"cookies.tar.gz": os.urandom(3 * MIB)}))
    begun = asyncio.Event()

    async def breaks_off() -> AsyncIterator[bundle_pb2.SaveBundleStreamRequest]:
        for request in requests[:-1]:
            yield request
        begun.set()
        await asyncio.Event().wait()

    call = client.bundles.SaveBundleStream(breaks_off(), metadata=client.worker)
    await begun.wait()
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    assert await client.snapshot() == before
    assert await keys(store) == stored


class Broken:
    """Makes the puts of a running service fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def refuse(*_: Any, **__: Any) -> None:
            raise ObjectStoreUnavailable("no space left on device", retry_after_seconds=2.0)

        monkeypatch.setattr(ObjectStore, "put", refuse)
        monkeypatch.setattr(ObjectStore, "put_file", refuse)


async def test_a_store_that_refuses_leaves_the_last_generation(
    client: PersonaClient, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await held_persona(client)
    await client.save(held, {"state.json": b"whole"})
    with monkeypatch.context() as patch:
        Broken(patch)
        for call in (
            client.save(held, {"state.json": b"torn"}),
            save_stream(client, chunks(held, {"state.json": b"torn"})),
            client.create(),
        ):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "OBJECT_STORE_UNAVAILABLE")
            assert refusal.retry_seconds == 2.0
    assert (await client.load(held.persona.persona_id))["state.json"] == b"whole"
    assert (await client.save(held, {"state.json": b"next"})).generation == 5
    assert len(await client.sql("SELECT * FROM personas")) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
async def test_a_full_disk_leaves_the_last_generation(start_service: StartService, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    mounted = await asyncio.to_thread(subprocess.run, command, capture_output=True)
    if mounted.returncode:
        pytest.skip("this root may not mount")
    try:
        client = await start_personas(start_service, small)
        held = await held_persona(client)
        await client.save(held, {"state.json": b"whole"})
        refusal = await refused(client.save(held, {"cookies.tar.gz": os.urandom(2 * MIB)}))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "OBJECT_STORE_UNAVAILABLE")
        assert refusal.retry_seconds
        assert (await client.load(held.persona.persona_id))["state.json"] == b"whole"
        # What did not fit is not left behind either.
        assert (await client.save(held, {"cookies.tar.gz": os.urandom(MIB // 2)})).generation == 4
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(small)], check=True)


async def test_parts_are_limited(local: PersonaClient) -> None:
    held = await held_persona(local)
    before = await local.snapshot()
    for name, limit in (("state.json", MIB), ("fingerprint.json", 256 * 1024)):
        refusal = await refused(local.save(held, {name: b"x" * (limit + 1)}))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PART_TOO_LARGE")
        assert refusal.metadata == {"part": name, "size": str(limit + 1), "limit": str(limit)}
    refusal = await refused(local.save(held, {"history.json": b"x" * (3 * MIB + 1)}))
    assert (refusal.reason, refusal.metadata["part"]) == ("PART_TOO_LARGE", "bundle")
    for name, kind in NAMES.items():
        header, *_ = chunks(held, {})
        info = persona_pb2.PartInfo(name=name, size_bytes=kind.limit_bytes + 1, sha256=b"s" * 32)
        pieces: Sequence[bundle_pb2.SaveBundleStreamRequest] = (
            header,
            bundle_pb2.SaveBundleStreamRequest(part=info),
        )
        refusal = await refused(save_stream(local, iter(pieces)))
        assert (refusal.reason, refusal.metadata["part"]) == ("PART_TOO_LARGE", name)
    assert await local.snapshot() == before


async def test_a_whole_day_of_saves_keeps_folders_few(local: PersonaClient, tmp_path: Path) -> None:
    held = await held_persona(local)
    for number in range(12):
        await local.save(held, {"state.json": str(number).encode()})
    await local.sql("UPDATE pending_objects SET collect_at = now()")
    store = await ObjectStore.open(ObjectStoreConfig(folder=tmp_path))
    await collector_of(local, store)()
    (folder,) = tmp_path.glob("v1/*/*/*")
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 9, 10, 11, 12, 13]


def test_a_save_fits_twice_into_the_grace() -> None:
    with pytest.raises(ValueError, match="twice"):
        BundlesConfig(save_seconds=100, grace_seconds=199)
