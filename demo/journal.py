"""What the workers say they did: a line of JSON per step, written before the next step is taken.

The demo's summary compares these with what the database, the object store and the archive hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Leased:
    """A unit was handed to the worker."""

    worker: str
    allocation_key: str
    slot_id: str
    keyword: str
    exit_endpoint: str
    persona_id: str


@dataclass(frozen=True, slots=True)
class Crawled:
    """The crawl of a unit ended, whatever became of its result."""

    worker: str
    allocation_key: str
    pages: int
    requests: int
    products: int
    persona_id: str
    visits: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A bundle's new generation was acknowledged."""

    worker: str
    allocation_key: str
    persona_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Submitted:
    """A result was acknowledged."""

    worker: str
    allocation_key: str
    outcome: str
    disposition: str
    products: int


Entry = Leased | Crawled | Saved | Submitted
_KINDS = {kind.__name__: kind for kind in (Leased, Crawled, Saved, Submitted)}


class Journal:
    """One worker's journal."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Entry) -> None:
        """Writes an entry; it survives the death of the process, since the kernel has it."""
        self._file.write(json.dumps({"kind": type(entry).__name__, **asdict(entry)}) + "\n")
        self._file.flush()


def read(folder: Path) -> Iterator[Entry]:
    """Yields the entries of all journals in a folder; a last line cut short by a kill is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            yield _KINDS[values.pop("kind")](**values)
