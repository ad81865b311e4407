"""One conformance suite for both engines of the object store: the local file system and a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from services.errors import StartupError
from services.objects import ObjectStore, ObjectStoreConfig, ObjectStoreUnavailable
from tests.support.s3 import S3Server, make_bucket

MIB = 2**20


@pytest.fixture(params=["local", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    if request.param == "local":
        yield await ObjectStore.open(ObjectStoreConfig(engine="local", folder=tmp_path / "objects"))
        return
    server: S3Server = request.getfixturevalue("s3_server")
    with make_bucket(server, "objects") as bucket:
        yield await ObjectStore.open(s3_config(server, bucket, prefix="some/prefix"))


def s3_config(server: S3Server, bucket: str, **more: object) -> ObjectStoreConfig:
    return ObjectStoreConfig.model_validate(
        {
            "engine": "s3",
            "endpoint": server.endpoint,
            "bucket": bucket,
            "access_key": server.access_key,
            "secret_key": server.secret_key,
            **more,
        }
    )


async def test_a_bucket_made_here_drops_abandoned_uploads(s3_server: S3Server) -> None:
    with make_bucket(s3_server, "lifecycle") as given:
        client = s3_server.client()
        made = f"{given}-made"
        try:
            await ObjectStore.open(s3_config(s3_server, made))
            await ObjectStore.open(s3_config(s3_server, given))
            if s3_server.kind.startswith("rclone"):
                pytest.skip("rclone serve s3 knows no lifecycles; the store was opened all the same")
            found = client.get_bucket_lifecycle(made)
            assert found is not None
            [rule] = found.rules
            assert rule.abort_incomplete_multipart_upload is not None
            assert rule.abort_incomplete_multipart_upload.days_after_initiation == 7
            assert client.get_bucket_lifecycle(given) is None
        finally:
            client.remove_bucket(made)


async def everything(store: ObjectStore, prefix: str = "") -> dict[str, int]:
    return {info.key: info.size_bytes async for info in store.list(prefix)}


@pytest.mark.parametrize("size", [0, 1, 65_536, 9 * MIB + 1])
async def test_what_is_put_is_got(store: ObjectStore, size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    assert await store.put("v1/ab/cd/x", data)
    file = tmp_path / "source"
    file.write_bytes(data)
    await store.put_file("v1/ab/cd/y", file)
    for key in ("v1/ab/cd/x", "v1/ab/cd/y"):
        assert await store.get(key) == data
        info = await store.head(key)
        assert info is not None
        assert (info.key, info.size_bytes) == (key, size)
        assert info.written_at.tzinfo is not None
        pieces = [piece async for piece in store.stream(key, 256 * 1024)]
        assert b"".join(pieces) == data
    assert await everything(store, "v1/") == {"v1/ab/cd/x": size, "v1/ab/cd/y": size}


async def test_what_is_not_there_is_none(store: ObjectStore) -> None:
    assert await store.get("v1/none") is None
    assert await store.head("v1/none") is None
    assert [piece async for piece in store.stream("v1/none", 1024)] == []
    assert await everything(store, "v2/") == {}
    await store.delete(["v1/none", "v1/deep/er/none"])


async def test_a_put_overwrites_whole(store: ObjectStore) -> None:
    await store.put("a/b", b"longer than the next")
    await store.put("a/b", b"short")
    assert await store.get("a/b") == b"short"


async def test_if_absent_never_says_written_when_it_was_not(store: ObjectStore) -> None:
    assert await store.put("a/b", b"same", if_absent=True)
    # Servers without conditional puts overwrite, which is why callers put the same bytes.
    await store.put("a/b", b"same", if_absent=True)
    assert await store.get("a/b") == b"same"


async def test_deleting_is_repeatable_and_leaves_the_others(store: ObjectStore) -> None:
    for key in ("p/1/a", "p/1/b", "p/2/a"):
        await store.put(key, b"x")
    await store.delete(["p/1/a", "p/1/missing"])
    assert set(await everything(store)) == {"p/1/b", "p/2/a"}
    await store.delete(["p/1/a", "p/1/b"])
    assert set(await everything(store)) == {"p/2/a"}


async def test_lists_keep_to_their_folder(store: ObjectStore) -> None:
    for key in ("p/1/a", "p/10/a", "p/2/a"):
        await store.put(key, b"x")
    assert set(await everything(store, "p/1/")) == {"p/1/a"}


async def test_readers_see_the_old_object_or_the_new_one(store: ObjectStore) -> None:
    versions = [bytes([n]) * (64 * 1024) for n in range(2)]
    await store.put("a/b", versions[0])

    async def write() -> None:
        for n in range(20):
            await store.put("a/b", versions[n % 2])

    async def read() -> None:
        for _ in range(40):
            assert await store.get("a/b") in versions

    await asyncio.gather(write(), read(), read())


async def test_puts_and_deletes_in_one_local_folder_do_not_hinder_each_other(tmp_path: Path) -> None:
    store = await ObjectStore.open(ObjectStoreConfig(folder=tmp_path))

    async def work(worker: int) -> None:
        for _ in range(25):
            key = f"p/shared/{worker}"
            await store.put(key, b"x")
            assert await store.get(key) == b"x"
            await store.delete([key])

    await asyncio.gather(*(work(worker) for worker in range(6)))
    assert await everything(store) == {}


async def test_a_local_folder_is_gone_with_its_last_object(tmp_path: Path) -> None:
    store = await ObjectStore.open(ObjectStoreConfig(folder=tmp_path))
    await store.put("p/1/a", b"x")
    await store.put("p/1/b", b"x")
    await store.delete(["p/1/a"])
    assert (tmp_path / "p/1").is_dir()
    await store.delete(["p/1/b"])
    assert list((tmp_path / "p").iterdir()) == []


class Relay:
    """Passes bytes on to the S3 server from a port of its own, so that a test can take the server away."""

    def __init__(self, server: S3Server) -> None:
        self._target = urlsplit(server.endpoint)
        self._writers: list[asyncio.StreamWriter] = []
        self._listener: asyncio.Server | None = None

    async def start(self) -> str:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_a_server_that_stops_is_unavailable(s3_server: S3Server) -> None:
    between = Relay(s3_server)
    endpoint = await between.start()
    with make_bucket(s3_server, "gone") as bucket:
        store = await ObjectStore.open(s3_config(s3_server, bucket, endpoint=endpoint, timeout_seconds=1.0))
        await store.put("a/b", b"x")
        between.stop()
        for call in (store.put("a/b", b"y"), store.get("a/b"), store.head("a/b"), store.delete(["a/b"])):
            with pytest.raises(ObjectStoreUnavailable) as caught:
                await call
            assert caught.value.retry_after_seconds
        with pytest.raises(ObjectStoreUnavailable):
            _ = [info async for info in store.list("a/")]
        with pytest.raises(ObjectStoreUnavailable):
            _ = [piece async for piece in store.stream("a/b", 1024)]


async def test_a_server_that_is_not_there_stops_the_start(s3_server: S3Server) -> None:
    dead = s3_config(s3_server, "some-bucket", endpoint="http://127.0.0.1:1", timeout_seconds=1.0)
    with pytest.raises(StartupError, match=r"the object store http://127\.0\.0\.1:1/.*cannot be used"):
        await ObjectStore.open(dead)


async def test_a_folder_that_is_lost_is_unavailable(tmp_path: Path) -> None:
    store = await ObjectStore.open(ObjectStoreConfig(folder=tmp_path / "objects"))
    await store.put("a/b", b"x")
    (tmp_path / "objects/a/b").unlink()
    (tmp_path / "objects/a").rmdir()
    (tmp_path / "objects").rmdir()
    (tmp_path / "objects").write_text("in the way")
    with pytest.raises(ObjectStoreUnavailable):
        await store.put("a/b", b"x")


async def test_a_store_that_cannot_be_used_stops_the_start(tmp_path: Path, s3_server: S3Server) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupError, match=r"file.*cannot be used.*correct objects"):
        await ObjectStore.open(ObjectStoreConfig(folder=tmp_path / "file"))
    with pytest.raises(StartupError, match="no object store is named"):
        await ObjectStore.open(ObjectStoreConfig())
    wrong = s3_config(s3_server, "some-bucket", access_key="wrong", secret_key="wrong wrong")
    with pytest.raises(StartupError, match="cannot be used"):
        await ObjectStore.open(wrong)


def test_half_a_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="engine s3 needs endpoint and bucket"):
        ObjectStoreConfig(engine="s3")
