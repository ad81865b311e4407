"""Cold files as DataFusion reads them, on either engine of the object store."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from urllib.parse import quote

from datafusion import SessionContext
from datafusion.object_store import AmazonS3

from archiver.errors import ArchiveCorrupt
from archiver.store import ColdFile
from services.objects import ObjectStore, ObjectStoreConfig

_CHECKED_FILES = 10_000
_READ_CHUNK_BYTES = 4 * 2**20


class ColdReader:
    """Gives queries access to cold files, after a look whether they are what they should be.

    A file's size is checked before each query. Its SHA-256 is checked when this process reads it for the first time:
    neither Parquet nor DataFusion notices a flipped bit, and files never change.

    Args:
        objects: The store.
        config: How it is reached.
    """

    def __init__(self, objects: ObjectStore, config: ObjectStoreConfig) -> None:
        self._objects = objects
        self._config = config
        self._checked: OrderedDict[str, bytes] = OrderedDict()

    async def check(self, files: list[ColdFile]) -> None:
        """Checks files that are about to be read.

        Raises:
            ArchiveCorrupt: one is missing or is not what its manifest says.
            ObjectStoreUnavailable: the store does not answer.
        """
        for file in files:
            info = await self._objects.head(file.key)
            if info is None or info.size_bytes != file.size_bytes:
                size = "missing" if info is None else f"{info.size_bytes} bytes"
                raise ArchiveCorrupt(f"{file.key} is {size}, should be {file.size_bytes} bytes", key=file.key)
            if self._checked.get(file.key) == file.sha256:
                self._checked.move_to_end(file.key)
                continue
            digest = hashlib.sha256()
            async for piece in self._objects.stream(file.key, _READ_CHUNK_BYTES):
                digest.update(piece)
            if digest.digest() != file.sha256:
                raise ArchiveCorrupt(f"{file.key} does not have the SHA-256 of its manifest", key=file.key)
            self._checked[file.key] = file.sha256
            if len(self._checked) > _CHECKED_FILES:
                self._checked.popitem(last=False)

    def register(self, context: SessionContext) -> None:
        """Lets a context read from the store. The local file system needs nothing."""
        config = self._config
        if config.engine == "s3":
            store = AmazonS3(
                config.bucket,
                region=config.region,
                access_key_id=config.access_key,
                secret_access_key=config.secret(),
                endpoint=config.endpoint,
                allow_http=config.endpoint.startswith("http://"),
            )
            context.register_object_store("s3://", store, host=config.bucket)

    def url(self, key: str) -> str:
        """Returns where a context reads a key."""
        if self._config.engine == "s3":
            prefix = self._config.prefix.strip("/")
            return f"s3://{self._config.bucket}/{prefix}/{key}" if prefix else f"s3://{self._config.bucket}/{key}"
        assert self._config.folder is not None
        return f"file://{quote(str(self._config.folder.absolute() / key))}"
