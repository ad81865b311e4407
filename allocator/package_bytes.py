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


def packages_bytes(packages: Sequence[Package], lease_seconds: float) -> bytes:
    """Returns an AllocateWorkResponse.

    Args:
        packages: Its allocations.
        lease_seconds: How long a lease lasts from its grant or renewal.
    """
    parts: list[bytes] = []
    for package in packages:
        unit = b"".join(
            (
                _KEY,
                str(package.key).encode(),
                _TOKEN,
                package.token.bytes,
                _of_terms(package.terms, lease_seconds),
                _of_task(package.task),
                _of_exit(package.exit) if package.exit is not None else b"",
                _of_persona(package) if package.persona is not None else b"",
                _TRACEPARENT,
                package.own_traceparent().encode(),
            )
        )
        parts += (_ALLOCATIONS, varint(len(unit)), unit)
    return b"".join(parts)


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
