"""What every client asked and was told: a line of JSON before each call, and one after it.

A line is one write to a file that is only appended to, so it survives the death of its process: nothing acknowledged is
missing from the history. An attempt without a second line has an unknown end, as has one whose answer never came; it
may have been carried out at any time after it began, even after later calls of the same process.

All processes run on one machine, so their clock and the database's are the same one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class End(StrEnum):
    """How an attempt ended, as its caller knows."""

    OK = "ok"
    # Refused as a whole: it changed nothing.
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Attempt:
    """One call to one replica.

    Attributes:
        name: Unique in the whole history.
        process: Whose it is; a process that was killed and started again keeps its name.
        kind: `allocate`, `renew`, `release`, `submit`, `goodbye`, or an operator's act.
        begun_at: Seconds of the epoch, before the call.
        asked: What it asked.
        end: How it ended.
        ended_at: After the call; infinity while that is unknown.
        told: The answer, or `{"reason": ...}`.
    """

    name: str
    process: str
    kind: str
    begun_at: float
    asked: dict[str, Any]
    end: End = End.UNKNOWN
    ended_at: float = float("inf")
    told: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The history of one process."""

    def __init__(self, folder: Path, process: str) -> None:
        self._process = process
        self._file = os.open(_path(folder, process), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._begun = 0

    def begin(self, kind: str, asked: dict[str, Any]) -> str:
        """Notes an attempt before it is made, and returns its name."""
        self._begun += 1
        name = f"{self._process}/{os.getpid()}/{self._begun}"
        self._write({"name": name, "kind": kind, "at": time.time(), "asked": asked})
        return name

    def end(self, name: str, end: End, told: dict[str, Any]) -> None:
        """Notes how it ended."""
        self._write({"name": name, "end": end, "at": time.time(), "told": told})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        # The line end comes first: a line that a kill has cut short then spoils no other one.
        os.write(self._file, b"\n" + json.dumps(line).encode())


def read(folder: Path, processes: Iterable[str] | None = None) -> list[Attempt]:
    """Returns the attempts of all processes, or of some, in the order in which they began."""
    paths = sorted(folder.glob("*.jsonl")) if processes is None else [_path(folder, name) for name in processes]
    attempts: dict[str, Attempt] = {}
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            name = values["name"]
            if "kind" in values:
                attempts[name] = Attempt(name, path.stem, values["kind"], values["at"], values["asked"])
            else:
                attempt = attempts[name]
                attempt.end, attempt.told = End(values["end"]), values["told"]
                if attempt.end is not End.UNKNOWN:
                    attempt.ended_at = values["at"]
    return sorted(attempts.values(), key=lambda attempt: attempt.begun_at)


def _path(folder: Path, process: str) -> Path:
    return folder / f"{process}.jsonl"
