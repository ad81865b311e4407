"""The object-store seam: bytes under keys, on the local file system or any S3 API.

Both engines are obstore's, which moves bytes asynchronously and writes atomically: a key shows the old object, the new
one, or none, never a part of one. An acknowledged put is durable: on the local file system file and folder are synced,
and S3 promises it. Buckets are made with the minio client, which speaks the administrative calls too. Reads after
writes see the write (both engines promise it), so no caller needs to wait or to ask twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import minio
import obstore
import structlog
import urllib3
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, S3Store
from pydantic import Field, SecretStr, model_validator
from urllib3.exceptions import HTTPError

from services.config import Section, read_secret
from services.errors import DomainError, StartupError, first_line

_RETRY_AFTER_SECONDS = 2.0
# Longer than any upload takes, shorter than anybody minds.
_ABANDONED_DAYS = 7

_log = structlog.get_logger("objects")


class ObjectStoreUnavailable(DomainError):
    """The object store refused, did not answer, or is full. Nothing was overwritten."""

    reason = "OBJECT_STORE_UNAVAILABLE"


class ObjectStoreConfig(Section):
    """Where objects lie: a folder (engine local) or a bucket with a prefix (engine s3)."""

    engine: Literal["local", "s3"] = "local"
    folder: Path | None = None
    endpoint: str = ""
    bucket: str = ""
    prefix: str = ""
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    secret_key_file: Path | None = None
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.engine == "s3" and not (self.endpoint and self.bucket):
            raise ValueError("engine s3 needs endpoint and bucket")
        if self.secret_key.get_secret_value() and self.secret_key_file:
            raise ValueError("set secret_key or secret_key_file, not both")
        return self

    def secret(self) -> str:
        """Returns the S3 secret key. Raises: StartupError, when its file cannot be read."""
        return read_secret(self.secret_key_file) if self.secret_key_file else self.secret_key.get_secret_value()


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object's key, its size in bytes and when it was written."""

    key: str
    size_bytes: int
    written_at: datetime


class ObjectStore:
    """Bytes under keys such as `v1/ab/cd/…`, relative to the store's folder or prefix.

    Every method raises `ObjectStoreUnavailable` when the store does not do its part.
    """

    def __init__(self, store: LocalStore | S3Store, folder: Path | None, where: str) -> None:
        self._store = store
        self._folder = folder
        self.where = where

    @classmethod
    async def open(cls, config: ObjectStoreConfig) -> ObjectStore:
        """Opens the store, making its folder or bucket when there is none, and proves that it can be written.

        Raises:
            StartupError: it cannot be reached, made or written; says what to do.
        """
        try:
            store = await asyncio.to_thread(_open_local if config.engine == "local" else _open_s3, config)
            probe = f"probe-{os.getpid()}"
            await store.put(probe, b"muster")
            await store.delete([probe])
        except (BaseError, OSError, HTTPError, minio.error.MinioException, ValueError) as error:
            where = config.folder if config.engine == "local" else f"{config.endpoint}/{config.bucket}"
            raise StartupError(
                f"the object store {where} cannot be used ({_said(error)}): correct objects.*, or mend the store"
            ) from None
        except ObjectStoreUnavailable as error:
            raise StartupError(f"{error.message}: correct objects.*, or mend the store") from None
        return store

    async def put(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Writes an object whole.

        Args:
            key: Where to.
            data: The bytes.
            if_absent: Leave an object that stands. Some S3 servers ignore the condition and overwrite; callers
                therefore only use it where both writers would write the same bytes.

        Returns:
            False when `if_absent` found an object.
        """
        try:
            await obstore.put_async(self._store, key, data, mode="create" if if_absent else "overwrite")
            if self._folder is not None:
                await asyncio.to_thread(_sync, self._folder, key)
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        return True

    async def put_file(self, key: str, file: Path) -> None:
        """Writes an object from a file, in parts when it is large."""
        try:
            await obstore.put_async(self._store, key, file)
            if self._folder is not None:
                await asyncio.to_thread(_sync, self._folder, key)
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    async def get(self, key: str) -> bytes | None:
        """Returns an object's bytes, or None when there is none."""
        try:
            result = await obstore.get_async(self._store, key)
            return bytes(await result.bytes_async())
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    async def stream(self, key: str, chunk_bytes: int) -> AsyncIterator[bytes]:
        """Yields an object's bytes in pieces of about `chunk_bytes`; nothing when there is no object."""
        try:
            result = await obstore.get_async(self._store, key)
            async for piece in result.stream(min_chunk_size=chunk_bytes):
                yield bytes(piece)
        except (NotFoundError, FileNotFoundError):
            return
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    async def head(self, key: str) -> ObjectInfo | None:
        """Returns what is known of an object without reading it, or None when there is none."""
        try:
            meta = await obstore.head_async(self._store, key)
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error
        return ObjectInfo(key, meta["size"], meta["last_modified"])

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yields the objects below a prefix that ends at a `/`, in the store's own order."""
        try:
            async for page in obstore.list(self._store, prefix=prefix):
                for meta in page:
                    yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"])
        except (BaseError, OSError) as error:
            raise self._unavailable(error) from error

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; one that is not there is no error."""
        for key in keys:
            try:
                await obstore.delete_async(self._store, key)
                if self._folder is not None and "/" in key:
                    await asyncio.to_thread(_remove_empty, (self._folder / key).parent)
            except (NotFoundError, FileNotFoundError):
                continue
            except (BaseError, OSError) as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> ObjectStoreUnavailable:
        return ObjectStoreUnavailable(
            f"the object store does not do its part ({_said(error)})",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )


def _open_local(config: ObjectStoreConfig) -> ObjectStore:
    if config.folder is None:
        raise StartupError("no object store is named: set objects.folder, or objects.engine = 's3' with a bucket")
    folder = config.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return ObjectStore(LocalStore(folder, automatic_cleanup=False), folder, str(folder))


def _open_s3(config: ObjectStoreConfig) -> ObjectStore:
    endpoint = urlsplit(config.endpoint)
    secure = endpoint.scheme == "https"
    client = minio.Minio(
        endpoint.netloc,
        access_key=config.access_key,
        secret_key=config.secret(),
        secure=secure,
        region=config.region,
        # Its default would try a dead server for 6 s and more; a start that fails should say so at once.
        http_client=urllib3.PoolManager(timeout=config.timeout_seconds, retries=urllib3.Retry(total=1)),
    )
    if not client.bucket_exists(config.bucket):
        client.make_bucket(config.bucket)
        _expire_abandoned_uploads(client, config.bucket)
    store = S3Store(
        config.bucket,
        prefix=config.prefix or None,
        endpoint=config.endpoint,
        region=config.region,
        access_key_id=config.access_key,
        secret_access_key=config.secret(),
        virtual_hosted_style_request=False,
        client_options={"allow_http": not secure, "timeout": timedelta(seconds=config.timeout_seconds)},
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=config.timeout_seconds)},
    )
    return ObjectStore(store, None, f"{config.endpoint}/{config.bucket}/{config.prefix}".rstrip("/"))


def _expire_abandoned_uploads(client: minio.Minio, bucket: str) -> None:
    """Lets the server drop the parts of uploads that were never finished, which no listing shows and somebody pays for.

    Only on a bucket made here: another's rules are its operator's. A server without lifecycles does without.
    """
    rule = Rule(
        ENABLED,
        rule_filter=Filter(prefix=""),
        rule_id="abandoned-uploads",
        abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(days_after_initiation=_ABANDONED_DAYS),
    )
    try:
        client.set_bucket_lifecycle(bucket, LifecycleConfig([rule]))
    except minio.error.MinioException as error:
        _log.warning("the object store takes no lifecycle rule", bucket=bucket, error=_said(error))


def _sync(folder: Path, key: str) -> None:
    # The rename is durable when its folder is; new folders only when theirs are, up to the root of the store.
    depth = len(Path(key).parts)
    file = folder / key
    for path, flags in ((file, os.O_RDONLY), *((parent, os.O_DIRECTORY) for parent in list(file.parents)[:depth])):
        handle = os.open(path, flags)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_empty(folder: Path) -> None:
    # Only the innermost one: a put that is under way makes it again, but fails when folders above it vanish as well,
    # which is why the engine's own clean-up stays off.
    with contextlib.suppress(OSError):
        folder.rmdir()


def _said(error: Exception) -> str:
    # An S3 server may answer with a whole page on one line.
    return first_line(error)[:300]
