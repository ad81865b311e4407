"""Packages as bytes of the contract.

Protobuf messages concatenate: what all units of a slot, an exit or a batch have in common is encoded once, and a unit
adds its own fields. Built field by field in Python, a package costs ten times as much, and more than all else about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

from allocator.packages import TASKS, AssignedExit, Package, Task, Terms
from allocator.translation import day_text, moment, settings_message
from services.varints import varint

_KEY = b"\x0a\x24"
_TOKEN = b"\x12\x10"
_TRACEPARENT = b"\x72\x37"
_ALLOCATIONS = b"\x0a"
# Of key, token and traceparent with their tags, which are always as long.
_OWN_BYTES = len(_KEY) + 36 + len(_TOKEN) + 16 + len(_TRACEPARENT) + 55


def packages_bytes(packages: Sequence[Package], lease_seconds: float) -> bytes:
    """Returns an AllocateWorkResponse.

    Args:
        packages: Its allocations.
        lease_seconds: How long a lease lasts from its grant or renewal.
    """
    parts: list[bytes] = []
    terms: Terms | None = None
    of_terms = b""
    for package in packages:
        if package.terms is not terms:
            terms = package.terms
            of_terms = _of_terms(terms, lease_seconds)
        of_task = _of_task(package.task)
        of_exit = _of_exit(package.exit) if package.exit is not None else b""
        of_persona = _of_persona(package) if package.persona is not None else b""
        parts += (
            _begin(_OWN_BYTES + len(of_terms) + len(of_task) + len(of_exit) + len(of_persona)),
            str(package.key).encode(),
            _TOKEN,
            package.token.bytes,
            of_terms,
            of_task,
            of_exit,
            of_persona,
            _TRACEPARENT,
            package.own_traceparent().encode(),
        )
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _begin(size: int) -> bytes:
    """Returns what stands before the key of an allocation of so many bytes."""
    return _ALLOCATIONS + varint(size) + _KEY


@lru_cache(maxsize=256)
def _of_terms(terms: Terms, lease_seconds: float) -> bytes:
    duration = Duration()
    duration.FromMilliseconds(int(lease_seconds * 1000))
    return work_pb2.Allocation(
        expires_at=moment(terms.expires_at),
        renewable_until=moment(terms.renewable_until),
        lease_duration=duration,
        work_date=day_text(terms.work_date),
    ).SerializeToString()


@lru_cache(maxsize=TASKS)
def _of_task(task: Task) -> bytes:
    return work_pb2.Allocation(
        slot_id=str(task.slot_id),
        keyword=task.keyword,
        code=task.code,
        target=task.target,
        settings=settings_message(task.settings),
    ).SerializeToString()


@lru_cache(maxsize=4096)
def _of_exit(way: AssignedExit) -> bytes:
    return work_pb2.Allocation(
        exit=work_pb2.AssignedExit(
            exit_id=str(way.exit_id) if way.exit_id is not None else "",
            endpoint=way.endpoint,
            region=way.region,
            provider=way.provider,
            exit_ip=way.exit_ip,
        )
    ).SerializeToString()


def _of_persona(package: Package) -> bytes:
    persona = package.persona
    assert persona is not None
    return work_pb2.Allocation(
        persona=work_pb2.AssignedPersona(
            persona_id=str(persona.persona_id), lease_token=persona.lease_token, generation=persona.generation
        )
    ).SerializeToString()
