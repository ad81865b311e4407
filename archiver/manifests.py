"""Manifests: what makes the archive readable without its catalogue.

Each change of a policy's published files opens a new manifest number in the transaction of the change; the manifest is
then written to the object store as `archive/v1/{policy}/manifest-{number}.json`. It lists every published file, so the
highest number is the whole truth about the policy. A process that dies in between leaves the writing to the next run.
"""

from __future__ import annotations

import json

from archiver.store import ColdFile, Store
from services.objects import ObjectStore

PREFIX = "archive/v1"


class Manifests:
    """Writes manifests.

    Args:
        store: The catalogue.
        objects: Where they go.
    """

    def __init__(self, store: Store, objects: ObjectStore) -> None:
        self._store = store
        self._objects = objects

    async def write(self, policy: str) -> None:
        """Writes the newest manifest of a policy if it is not on the object store yet.

        The caller holds the lock of the policy's table, so the files cannot change between number and list.

        Raises:
            ObjectStoreUnavailable: nothing was noted; the next run writes it.
        """
        number = await self._store.unwritten_manifest(policy)
        if number is None:
            return
        files = await self._store.published_files(policy)
        await self._objects.put(f"{PREFIX}/{policy}/manifest-{number:08}.json", _manifest(policy, number, files))
        await self._store.manifest_written(policy, number)


def _manifest(policy: str, number: int, files: list[ColdFile]) -> bytes:
    listed = [
        {
            "key": file.key,
            "organization_id": None if file.organization_id is None else str(file.organization_id),
            "partition": file.partition,
            "from_date": f"{file.from_date}",
            "to_date": f"{file.to_date}",
            "rows": file.rows,
            "size_bytes": file.size_bytes,
            "sha256": file.sha256.hex(),
            "columns": [[column.name, column.kind] for column in file.columns],
            "published_at": file.published_at.isoformat(),
        }
        for file in files
    ]
    return json.dumps({"format": 1, "policy": policy, "number": number, "files": listed}, indent=1).encode()
