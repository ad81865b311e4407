"""What one transaction of allocation does: from proposals to leases.

Targets are locked first, then the days of slots, then exits; leases and the ids of requests are written last. Other
transactions' rows are waited for, so what is refused is really taken.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from asyncpg.pgproto import pgproto

from allocator.array_text import array, ids, numbers, texts
from allocator.packages import TASKS, AssignedExit, AssignedPersona, Demand, Package, Pick, Task, Terms
from allocator.slots import PersonaNeed
from services.errors import DomainError, RequestIdReused
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.slot_windows import SlotClass
    from services.postgres import Connection

_SQL = queries("allocator", "allocation.sql")
_CONCURRENT = 2
_NAMES_AHEAD = 8192
# Of a UUIDv7: its version with the place within the millisecond, and its variant with what a byte of noise leaves.
_ORDERS = [(0x7000 | order).to_bytes(2, "big") for order in range(0x1000)]
_VARIANTS = [bytes((noise & 0x3F | 0x80,)) for noise in range(0x100)]

Answer = list[Package] | DomainError


class RequestServed(Exception):
    """Another transaction served one of the requests meanwhile: this one must not stand."""


@dataclass(frozen=True, slots=True)
class ReservedExit:
    """A pooled exit of which uses were reserved: its toggle epoch then, and whether a use ends with its lease."""

    way: AssignedExit
    epoch: int
    returns: bool


@dataclass(slots=True, eq=False)
class Unit:
    """One unit of a demand on its way to a lease: `number` is its demand's."""

    number: int
    pick: Pick
    target: str
    task: Task | None = None
    exit: ReservedExit | None = None


@dataclass(slots=True)
class Beginning:
    """What a transaction finds first: answers on record by number of the demand, and targets it has locked."""

    answers: dict[int, Answer] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)


class Names:
    """Makes allocation keys and tokens."""

    def __init__(self) -> None:
        self._noise = b""
        self._at = 0

    def fresh(self, count: int) -> list[tuple[UUID, UUID]]:
        """Returns so many keys, UUIDv7 in ascending order, each with a token of 16 random bytes."""
        head = (time.time_ns() // 1_000_000).to_bytes(6, "big")
        noise = self._draw(24 * count)
        make = pgproto.UUID
        return [
            (
                make(head + _ORDERS[number & 0x0FFF] + _VARIANTS[noise[at]] + noise[at + 1 : at + 8]),
                make(noise[at + 8 : at + 24]),
            )
            for number, at in enumerate(range(0, 24 * count, 24))
        ]

    def _draw(self, size: int) -> bytes:
        # Every system call gives the interpreter away, and taking it back costs more than the randomness.
        if self._at + size > len(self._noise):
            self._noise, self._at = os.urandom(max(size, 24 * _NAMES_AHEAD)), 0
        self._at += size
        return self._noise[self._at - size : self._at]


async def begin(
    connection: Connection, organization_id: UUID, demands: Sequence[Demand], targets: Sequence[str]
) -> Beginning:
    """Finds the requests that are on record and what they were given, and locks the targets that have a row."""
    rows = await connection.fetch(
        _SQL["begin_batch"], organization_id, [demand.request_id for demand in demands], targets
    )
    beginning = Beginning()
    on_record = {}
    for row in rows:
        if row["target"] is not None:
            beginning.targets.add(row["target"])
        else:
            on_record[row["request_id"]] = row
    if on_record:
        for number, demand in enumerate(demands):
            if demand.request_id in on_record:
                known = on_record[demand.request_id]
                beginning.answers[number] = await _replay(connection, organization_id, demand, known)
    return beginning


async def _replay(connection: Connection, organization_id: UUID, demand: Demand, row: Any) -> Answer:
    reused = RequestIdReused(
        "request_id stands for another request, or its leases have ended: take a fresh one",
        request_id=str(demand.request_id),
    )
    if row["request_sha256"] != demand.digest:
        return reused
    keys = [UUID(bytes=row["answer"][at : at + 16]) for at in range(0, len(row["answer"]), 16)]
    live = await connection.fetch(_SQL["live_leases"], organization_id, keys)
    return [_stored_package(demand, lease) for lease in live] or reused


async def reserve(
    connection: Connection, organization_id: UUID, work_date: date, units: Sequence[Unit], targets: set[str]
) -> list[Unit]:
    """Reserves targets, slots, then exits for what was granted; what finds no exit goes back to its slot.

    Args:
        connection: In the transaction that has locked the targets.
        organization_id: The tenant.
        work_date: The day that the proposals are of; when it has passed, nothing is granted.
        units: What is proposed.
        targets: Those that have a row.

    Returns:
        The units that are granted.
    """
    if targets:
        units = await _within_targets(connection, organization_id, units, targets)
    if not units:
        return []
    asked: dict[UUID, int] = {}
    classes: dict[UUID, Pick] = {}
    for unit in units:
        slot_id = unit.pick.slot_id
        asked[slot_id] = asked.get(slot_id, 0) + 1
        classes[slot_id] = unit.pick
    ids = list(asked)
    rows = await connection.fetch(
        _SQL["reserve_slots"],
        organization_id,
        work_date,
        ids,
        [classes[slot_id].slot_class.class_id for slot_id in ids],
        [asked[slot_id] for slot_id in ids],
        [classes[slot_id].place for slot_id in ids],
    )
    tasks = {
        row["slot_id"]: _task(
            row["slot_id"], row["keyword"], row["code"], row["settings"], classes[row["slot_id"]].slot_class
        )
        for row in rows
    }
    left = {row["slot_id"]: row["units"] for row in rows}
    granted = []
    wanted: dict[UUID, Pick] = {}
    uses: dict[UUID, int] = {}
    for unit in units:
        pick = unit.pick
        slot_id = pick.slot_id
        if left.get(slot_id, 0) > 0:
            left[slot_id] -= 1
            unit.task = tasks[slot_id]
            granted.append(unit)
            if pick.exit is not None:
                exit_id = pick.exit.exit_id
                wanted[exit_id] = pick
                uses[exit_id] = uses.get(exit_id, 0) + 1
    if not wanted:
        return granted
    exits = await _reserve_exits(connection, organization_id, wanted, uses)
    free = {exit_id: row["uses"] for exit_id, row in exits.items()}
    reserved = {
        exit_id: ReservedExit(
            _way(exit_id, row["endpoint"], row["region"]), row["toggle_epoch"], row["cap_mode"] == _CONCURRENT
        )
        for exit_id, row in exits.items()
    }
    served = []
    surplus: Counter[UUID] = Counter()
    for unit in granted:
        exit_ = unit.pick.exit
        if exit_ is not None:
            if free.get(exit_.exit_id, 0) <= 0:
                surplus[unit.pick.slot_id] += 1
                continue
            free[exit_.exit_id] -= 1
            unit.exit = reserved[exit_.exit_id]
        served.append(unit)
    if surplus:
        await connection.execute(
            _SQL["return_slots"], organization_id, work_date, list(surplus), list(surplus.values())
        )
    return served


async def _within_targets(
    connection: Connection, organization_id: UUID, units: Sequence[Unit], targets: set[str]
) -> list[Unit]:
    """Cuts what locked targets do not let out, by a look that begins after they are locked."""
    rows = await connection.fetch(_SQL["room_of_targets"], organization_id, sorted(targets))
    rooms = {row["target"]: row["room"] for row in rows}
    kept = []
    for unit in units:
        room = rooms.get(unit.target)
        if room is not None:
            if room <= 0:
                continue
            rooms[unit.target] = room - 1
        kept.append(unit)
    return kept


async def _reserve_exits(
    connection: Connection, organization_id: UUID, wanted: dict[UUID, Pick], uses: dict[UUID, int]
) -> dict[UUID, Any]:
    """Reserves uses of exits, and notes where their rows are now."""
    exits = [pick.exit for pick in wanted.values() if pick.exit is not None]
    rows = await connection.fetch(
        _SQL["reserve_exits"],
        organization_id,
        [exit_.exit_id for exit_ in exits],
        [uses[exit_.exit_id] for exit_ in exits],
        [exit_.place for exit_ in exits],
        [exit_.region for exit_ in exits],
    )
    found = {row["exit_id"]: row for row in rows}
    for exit_ in exits:
        # Only a hint: if this transaction does not stand, the next one does not find the row there.
        row = found.get(exit_.exit_id)
        exit_.place = row["ctid"] if row is not None else None
    return found


async def grant(
    connection: Connection,
    organization_id: UUID,
    work_date: date,
    demands: Sequence[Demand],
    units: Sequence[Unit],
    targets: set[str],
    names: Sequence[tuple[UUID, UUID]],
    duration_seconds: float,
    greatest_age_seconds: float,
) -> dict[int, list[Package]]:
    """Writes the leases and the answers of their requests; returns the packages by number of the demand.

    Raises:
        RequestServed: a request was served by another transaction meanwhile.
    """
    if not units:
        return {}
    answers: dict[int, list[bytes]] = {}
    speakers: list[Demand] = []
    for unit, (key, _) in zip(units, names, strict=True):
        answers.setdefault(unit.number, []).append(key.bytes)
        speakers.append(demands[unit.number])
    served = sorted(answers, key=lambda number: demands[number].request_id.bytes)
    classes = [unit.pick.slot_class for unit in units]
    exits = [unit.exit for unit in units]
    row = await connection.fetchrow(
        _SQL["grant_leases"],
        organization_id,
        work_date,
        ids([key for key, _ in names]),
        ids([token for _, token in names]),
        ids([unit.pick.slot_id for unit in units]),
        texts([demand.client_id for demand in speakers]),
        array(demand.instance_number for demand in speakers),
        texts([slots.target for slots in classes]),
        ids([exit_.way.exit_id if exit_ else None for exit_ in exits]),
        numbers([exit_.epoch if exit_ else None for exit_ in exits]),
        numbers([True if exit_ and exit_.returns else None for exit_ in exits]),
        texts([slots.exit_provider for slots in classes]),
        texts([slots.persona_need or "" for slots in classes]),
        texts([demand.traceparent for demand in speakers]),
        duration_seconds,
        greatest_age_seconds,
        [demands[number].request_id for number in served],
        [demands[number].digest for number in served],
        [b"".join(answers[number]) for number in served],
    )
    assert row is not None
    if row["answered"] != len(served):
        raise RequestServed
    if targets:
        last = {unit.target: key for unit, (key, _) in zip(units, names, strict=True) if unit.target in targets}
        await connection.execute(_SQL["note_targets"], organization_id, list(last), list(last.values()))
    terms = Terms(work_date, row["expires_at"], row["renewable_until"])
    packages: dict[int, list[Package]] = {}
    for unit, (key, token) in zip(units, names, strict=True):
        assert unit.task is not None
        package = Package(key, token, unit.task, terms, demands[unit.number], unit.exit.way if unit.exit else None)
        packages.setdefault(unit.number, []).append(package)
    return packages


# By content: a slot that has not changed since its last turn is neither parsed nor encoded again.
@lru_cache(maxsize=TASKS)
def _task(slot_id: UUID, keyword: str, code: str, settings: str, slots: SlotClass) -> Task:
    return Task(
        slot_id=slot_id,
        keyword=keyword,
        code=code,
        target=slots.target,
        settings=json.loads(settings),
        need=slots.need,
        exit_region=slots.exit_region,
        exit_provider=slots.exit_provider,
    )


@lru_cache(maxsize=4096)
def _way(exit_id: UUID, endpoint: str, region: str) -> AssignedExit:
    return AssignedExit(exit_id, endpoint, region)


def _stored_package(demand: Demand, row: Any) -> Package:
    """Returns a package again; of an external exit only its address is known, its provider gives the rest anew."""
    way = None
    if row["exit_id"]:
        way = AssignedExit(row["exit_id"], row["endpoint"], row["region"])
    elif row["exit_ip"]:
        way = AssignedExit(None, "", "", row["exit_provider"], row["exit_ip"])
    return Package(
        key=row["allocation_key"],
        token=row["lease_token"],
        task=Task(
            slot_id=row["slot_id"],
            keyword=row["keyword"],
            code=row["code"],
            target=row["target"],
            settings=json.loads(row["settings"]),
            need=PersonaNeed.from_json(row["persona_need"]),
            exit_region=row["exit_region"],
            exit_provider=row["exit_provider"],
        ),
        terms=Terms(row["work_date"], row["expires_at"], row["renewable_until"]),
        demand=demand,
        exit=way,
        persona=AssignedPersona(row["persona_id"], row["persona_token"], row["persona_generation"])
        if row["persona_id"]
        else None,
    )
