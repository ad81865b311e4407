"""The S3 server of the tests is what it says it is."""

import io

import obstore
import pytest
from minio.error import MinioException
from obstore.exceptions import AlreadyExistsError, PreconditionError

from tests.support.s3 import S3Server, make_bucket


async def test_bytes_travel_both_ways_by_both_clients(s3_server: S3Server) -> None:
    with make_bucket(s3_server) as bucket:
        store = s3_server.store(bucket)
        await obstore.put_async(store, "a/b/part", b"\0bytes\xff")
        answer = s3_server.client().get_object(bucket, "a/b/part")
        try:
            assert answer.read() == b"\0bytes\xff"
        finally:
            answer.close()
            answer.release_conn()
        s3_server.client().put_object(bucket, "c", io.BytesIO(b"more"), 4)
        assert bytes(await (await obstore.get_async(store, "c")).bytes_async()) == b"more"
        assert {meta["path"] for meta in await obstore.list(store).collect_async()} == {"a/b/part", "c"}


def test_a_bucket_goes_with_its_objects(s3_server: S3Server) -> None:
    with make_bucket(s3_server, "passing") as bucket:
        obstore.put(s3_server.store(bucket), "a/b", b"1")
        assert s3_server.client().bucket_exists(bucket)
    assert not s3_server.client().bucket_exists(bucket)


def test_a_stranger_is_refused(s3_server: S3Server) -> None:
    stranger = S3Server(s3_server.endpoint, s3_server.access_key, "another-secret", False, s3_server.kind)
    with pytest.raises(MinioException):
        stranger.client().list_buckets()


def test_only_one_of_two_conditional_writers_succeeds(s3_server: S3Server) -> None:
    if not s3_server.conditional_puts:
        pytest.skip(f"{s3_server.kind}")
    with make_bucket(s3_server) as bucket:
        store = s3_server.store(bucket)
        obstore.put(store, "generation/1", b"first", mode="create")
        with pytest.raises((AlreadyExistsError, PreconditionError)):
            obstore.put(store, "generation/1", b"second", mode="create")
        assert bytes(obstore.get(store, "generation/1").bytes()) == b"first"
