"""The parts of a bundle: their names and limits, the manifest of a generation, and where objects lie."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Self
from uuid import UUID

INLINE_BYTES = 3 * 2**20
# Four parts of a generation and its time: what the answer to a save holds.
_HEAD = struct.Struct(">Iq")
_ENTRY = struct.Struct(">BII32s")


class PartKind(Enum):
    """A part's number in manifests, its file name and the most bytes it may have."""

    FINGERPRINT = (1, "fingerprint.json", 256 * 2**10)
    COOKIES = (2, "cookies.tar.gz", 64 * 2**20)
    STATE = (3, "state.json", 2**20)
    HISTORY = (4, "history.json", 4 * 2**20)

    def __init__(self, number: int, file_name: str, limit_bytes: int) -> None:
        self.number = number
        self.file_name = file_name
        self.limit_bytes = limit_bytes


BY_NAME = {kind.file_name: kind for kind in PartKind}
BY_NUMBER = {kind.number: kind for kind in PartKind}


@dataclass(frozen=True, slots=True)
class Part:
    """A part as a generation has it.

    Attributes:
        kind: Which part.
        written: The number under which its object was written; an unchanged part keeps the old one.
        size_bytes: The object's size.
        sha256: The object's digest, 32 bytes.
    """

    kind: PartKind
    written: int
    size_bytes: int
    sha256: bytes


Manifest = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """A committed bundle. `parts` are in the order of their numbers."""

    generation: int
    committed_at: datetime
    parts: Manifest

    def packed(self) -> bytes:
        """Returns it as bytes, for the record of answers."""
        # Whole microseconds, as PostgreSQL has them; a float would round the last one.
        elapsed = self.committed_at - datetime(1970, 1, 1, tzinfo=UTC)
        micros = (elapsed.days * 86400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds
        return _HEAD.pack(self.generation, micros) + pack(self.parts)

    @classmethod
    def unpacked(cls, data: bytes) -> Self:
        """Returns what `packed` was called on."""
        generation, micros = _HEAD.unpack_from(data)
        seconds, rest = divmod(micros, 1_000_000)
        committed_at = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
        return cls(generation, committed_at, unpack(data[_HEAD.size :]))


def pack(parts: Iterable[Part]) -> bytes:
    """Returns a manifest as it is stored: 41 bytes for each part, by number."""
    ordered = sorted(parts, key=lambda part: part.kind.number)
    return b"".join(_ENTRY.pack(part.kind.number, part.written, part.size_bytes, part.sha256) for part in ordered)


def unpack(data: bytes) -> Manifest:
    """Returns the parts of a stored manifest."""
    return tuple(
        Part(BY_NUMBER[number], written, size_bytes, sha256)
        for number, written, size_bytes, sha256 in _ENTRY.iter_unpack(data)
    )


def object_key(persona_id: UUID, written: int, kind: PartKind) -> str:
    """Returns where a part's object lies.

    The prefix is a hash of the id, since ids begin with the time and would pile into one folder. 65,536 folders hold
    10 million personas at 153 each.
    """
    spread = hashlib.sha256(str(persona_id).encode()).hexdigest()
    return f"v1/{spread[:2]}/{spread[2:4]}/{persona_id}/{written}/{kind.file_name}"
