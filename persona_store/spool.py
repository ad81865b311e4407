"""A streamed save on its way in: parts are received into files, so that memory stays bounded whatever their size."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from persona_store.bundle_store import Digest
from persona_store.bundles import Content
from services.objects import ObjectStoreUnavailable


class PartMismatch(Exception):
    """The bytes received are not the ones that were announced; the message says how."""


class Spool:
    """Receives one part after the other into a folder.

    Every method raises ObjectStoreUnavailable when the disk does not take the bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._announced: Digest | None = None
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._size = 0
        self.contents: list[Content] = []

    async def begin(self, announced: Digest) -> None:
        """Begins a part. Raises: PartMismatch, about the part before."""
        await self.finish()
        self._announced = announced
        self._hash, self._size = hashlib.sha256(), 0
        try:
            self._open(self._path(announced))
        except OSError as error:
            raise _refused(error) from error

    async def write(self, data: bytes) -> None:
        """Takes the next bytes of the part in hand. Raises: PartMismatch, when there are more than announced."""
        assert self._announced is not None
        assert self._file is not None
        self._size += len(data)
        if self._size > self._announced.size_bytes:
            raise PartMismatch(f"{self._announced.kind.file_name} has more bytes than announced")
        self._hash.update(data)
        try:
            await asyncio.to_thread(self._file.write, data)
        except OSError as error:
            raise _refused(error) from error

    async def finish(self) -> None:
        """Ends the part in hand, if there is one. Raises: PartMismatch."""
        announced = self._announced
        if announced is None or self._file is None:
            return
        try:
            await asyncio.to_thread(self._file.close)
        except OSError as error:
            raise _refused(error) from error
        self._file = None
        if self._size != announced.size_bytes:
            raise PartMismatch(f"{announced.kind.file_name} has {self._size} bytes, {announced.size_bytes} announced")
        if self._hash.digest() != announced.sha256:
            raise PartMismatch(f"{announced.kind.file_name} does not have the SHA-256 announced")
        self.contents.append(Content(announced, self._path(announced)))
        self._announced = None

    @property
    def receives(self) -> bool:
        """Whether a part is in hand."""
        return self._announced is not None

    def close(self) -> None:
        """Closes a file that a broken stream left open."""
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path) -> None:
        # Not in a thread: it takes microseconds, and a wait that is cancelled would leave the open file to nobody.
        self._file = path.open("wb")

    def _path(self, announced: Digest) -> Path:
        return self._folder / str(announced.kind.number)


@asynccontextmanager
async def spool() -> AsyncIterator[Spool]:
    """A spool in a folder of its own, which is removed at the end.

    Raises:
        ObjectStoreUnavailable: the disk has no room for it.
    """
    try:
        # Not in a thread, as in Spool._open.
        folder = tempfile.TemporaryDirectory(prefix="muster-save-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _refused(error) from error
    spooled = Spool(Path(folder.name))
    try:
        yield spooled
    finally:
        spooled.close()
        await asyncio.to_thread(folder.cleanup)


def _refused(error: OSError) -> ObjectStoreUnavailable:
    return ObjectStoreUnavailable(f"no room to receive the parts ({error.strerror or error})", retry_after_seconds=5.0)
