"""What every process did, asked and saw: lines of JSON, each one write to a file that is only appended to.

A line survives the death of its process, so nothing acknowledged is missing. All processes run on one machine and share
its clock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """A line.

    Attributes:
        process: Whose.
        kind: See `worker` and `watcher`.
        at: Seconds of the epoch.
        of: The particulars.
    """

    process: str
    kind: str
    at: float
    of: dict[str, Any]


class Journal:
    """The history of one process."""

    def __init__(self, folder: Path, process: str) -> None:
        self._file = os.open(folder / f"{process}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(self, kind: str, **of: Any) -> None:
        """Writes a line."""
        # The line end comes first: a line that a kill has cut short then spoils no other one.
        os.write(self._file, b"\n" + json.dumps({"kind": kind, "at": time.time(), "of": of}).encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def read(folder: Path) -> list[Event]:
    """Returns the events of all processes; those of one process in their order."""
    return [event for path in sorted(folder.glob("*.jsonl")) for event in _read(path)]


def _read(path: Path) -> Iterator[Event]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        yield Event(path.stem, values["kind"], values["at"], values["of"])
