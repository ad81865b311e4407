"""Bundles: the parts of a persona, loaded and saved together."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from muster import personas, profile
from muster.calls import Transport
from muster.errors import DataLoss, PartTooLarge
from muster.persona_store.v1 import bundle_pb2, bundle_pb2_grpc, persona_pb2
from muster.personas import Generation

FINGERPRINT = "fingerprint.json"
COOKIES = "cookies.tar.gz"
STATE = "state.json"
HISTORY = "history.json"

# What travels in one message; the contract's bound.
_INLINE_BYTES = 3 * 2**20
_CHUNK_BYTES = 256 * 2**10
# 73 MiB, the largest bundle, takes 6 s at 100 Mbit/s.
_STREAM_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Bundle:
    """The parts of one generation.

    Attributes:
        persona_id: Whose.
        generation: Which; 0 when nothing was saved yet, and there are no parts then.
        parts: Bytes by name, such as `cookies.tar.gz`.
    """

    persona_id: str
    generation: int
    parts: Mapping[str, bytes]

    @property
    def fingerprint(self) -> Any:
        """What `fingerprint.json` holds; None when there is none."""
        return self._json(FINGERPRINT)

    @property
    def state(self) -> Any:
        """What `state.json` holds; None when there is none."""
        return self._json(STATE)

    @property
    def history(self) -> Any:
        """What `history.json` holds; None when there is none."""
        return self._json(HISTORY)

    def restore_profile(self, folder: Path | str) -> bool:
        """Writes the files of `cookies.tar.gz` into a folder, made if need be; False when there is no such part.

        Raises:
            ProfileRefused: the archive is damaged, too large, or reaches out of its folder; nothing is written then.
            OSError: a file cannot be written.
        """
        packed = self.parts.get(COOKIES)
        if packed is None:
            return False
        profile.unpack(packed, Path(folder))
        return True

    def _json(self, name: str) -> Any:
        data = self.parts.get(name)
        return None if data is None else json.loads(data)


def json_part(value: Any) -> bytes:
    """Returns a value as the bytes of a JSON part: the same bytes for equal values.

    Raises:
        TypeError: it is not made of what JSON has.
        ValueError: it holds NaN or an infinity.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


class Bundles:
    """`client.bundles`: the bytes of personas. Role: worker."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> bundle_pb2_grpc.BundleServiceAsyncStub:
        return self._transport.stub(bundle_pb2_grpc.BundleServiceStub)

    async def load(self, persona_id: str, *, generation: int = 0, parts: Sequence[str] = ()) -> Bundle:
        """Loads a bundle of any size.

        Args:
            persona_id: Whose.
            generation: Which; 0 for the newest.
            parts: Only these; empty for all.

        Raises:
            GenerationNotFound: there is no such bundle.
            DataLoss: a part does not have the hash on record; an older generation may be whole.
            MusterError: it was refused, or did not succeed in time.
        """
        request = bundle_pb2.LoadBundleRequest(persona_id=persona_id, generation=generation, parts=parts)
        try:
            answer = await self._transport.call(self._stub.LoadBundle, request)
        except PartTooLarge:
            return await self._load_stream(persona_id, generation, parts)
        loaded = {part.name: part.data for part in answer.parts}
        return Bundle(persona_id, answer.generation, MappingProxyType(loaded))

    async def save(self, persona_id: str, lease_token: bytes, parts: Mapping[str, bytes]) -> Generation:
        """Commits a new generation of any size; parts that are not named are kept from the one before.

        Args:
            persona_id: Whose.
            lease_token: Of its live exclusive check-out.
            parts: What changed, by name.

        Raises:
            CheckOutLost: the check-out ended; nothing is saved.
            PartTooLarge: a part is over its limit.
            MusterError: it was refused, or did not succeed in time.
        """
        request_id = str(uuid.uuid4())
        if sum(len(data) for data in parts.values()) > _INLINE_BYTES:
            return await self._save_stream(request_id, persona_id, lease_token, parts)
        request = bundle_pb2.SaveBundleRequest(
            request_id=request_id,
            persona_id=persona_id,
            lease_token=lease_token,
            parts=[bundle_pb2.Part(name=name, data=data) for name, data in parts.items()],
        )
        answer = await self._transport.call(self._stub.SaveBundle, request)
        return personas.generation(answer.generation)

    async def _load_stream(self, persona_id: str, generation: int, parts: Sequence[str]) -> Bundle:
        request = bundle_pb2.LoadBundleStreamRequest(persona_id=persona_id, generation=generation, parts=parts)

        async def attempt(seconds: float) -> Bundle:
            found = generation
            infos: dict[str, persona_pb2.PartInfo] = {}
            loaded: dict[str, bytearray] = {}
            name = ""
            call = self._stub.LoadBundleStream(request, timeout=seconds, metadata=self._transport.metadata)
            async for piece in call:
                kind = piece.WhichOneof("piece")
                if kind == "generation":
                    found = piece.generation
                elif kind == "part":
                    name = piece.part.name
                    infos[name], loaded[name] = piece.part, bytearray()
                elif kind == "data" and name:
                    loaded[name] += piece.data
            for part, info in infos.items():
                if len(loaded[part]) != info.size_bytes or hashlib.sha256(loaded[part]).digest() != info.sha256:
                    raise DataLoss("DATA_LOSS", "PART_CORRUPT", f"{part} came with another size or hash than announced")
            return Bundle(persona_id, found, MappingProxyType({part: bytes(data) for part, data in loaded.items()}))

        return await self._transport.repeat(attempt, call_seconds=_STREAM_SECONDS, total_seconds=2 * _STREAM_SECONDS)

    async def _save_stream(
        self, request_id: str, persona_id: str, lease_token: bytes, parts: Mapping[str, bytes]
    ) -> Generation:
        header = bundle_pb2.SaveBundleHeader(request_id=request_id, persona_id=persona_id, lease_token=lease_token)

        async def pieces() -> AsyncIterator[bundle_pb2.SaveBundleStreamRequest]:
            yield bundle_pb2.SaveBundleStreamRequest(header=header)
            for name, data in parts.items():
                info = persona_pb2.PartInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).digest())
                yield bundle_pb2.SaveBundleStreamRequest(part=info)
                for start in range(0, len(data), _CHUNK_BYTES):
                    yield bundle_pb2.SaveBundleStreamRequest(data=data[start : start + _CHUNK_BYTES])

        async def attempt(seconds: float) -> bundle_pb2.SaveBundleStreamResponse:
            return await self._stub.SaveBundleStream(pieces(), timeout=seconds, metadata=self._transport.metadata)

        answer = await self._transport.repeat(attempt, call_seconds=_STREAM_SECONDS, total_seconds=2 * _STREAM_SECONDS)
        return personas.generation(answer.generation)
