"""Allocation in the database: reservations of quota and exit uses, and the leases that come of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.availability import AvailableExit, AvailableSlot, Selection
from allocator.leases import new_key, new_token
from allocator.packages import AssignedExit, AssignedPersona, Demand, Package, Pick
from allocator.slots import PersonaNeed
from allocator.store import Store
from services.errors import DomainError, RequestIdReused
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "allocation.sql")
_LEASES = queries("allocator", "leases.sql")


class AllocationStore(Store):
    """Reads what is available and reserves it. Every method is bound to one organization."""

    async def slots_with_room(self, organization_id: UUID, selection: Selection, at_most: int) -> list[AvailableSlot]:
        """Returns slots of a selection that have room today, the best first. Raises: DatabaseUnavailable."""
        rows = await self.database.fetch(
            _SQL["slots_with_room"],
            organization_id,
            selection.target,
            selection.exitless,
            list(selection.avoid),
            at_most,
        )
        return [AvailableSlot(*row) for row in rows]

    async def exits_with_room(self, organization_id: UUID) -> tuple[list[AvailableExit], frozenset[str]]:
        """Returns the exits with head-room, and the clients that are to drain. Raises: DatabaseUnavailable."""
        async with self.database.connection() as connection:
            exits = await connection.fetch(_SQL["exits_with_room"], organization_id)
            clients = await connection.fetch(_SQL["draining_clients"], organization_id)
        return [AvailableExit(*row) for row in exits], frozenset(row["client_id"] for row in clients)

    async def ensure_tracking(self, organization_id: UUID, slots: Sequence[UUID] | None) -> None:
        """Makes today's rows of slots that have none; None for all eligible ones. Raises: DatabaseUnavailable."""

        async def work(connection: Connection) -> None:
            await connection.execute(_SQL["ensure_tracking"], organization_id, slots)

        await self.atomically(work)

    async def allocate(
        self,
        organization_id: UUID,
        demands: Sequence[Demand],
        picks: Sequence[Sequence[Pick]],
        *,
        duration_seconds: float,
        greatest_age_seconds: float,
    ) -> list[list[Package] | DomainError]:
        """Turns proposals into leases, as far as the database agrees; all of it in one transaction.

        Waits for rows that others hold, so what is refused is really taken. A demand whose request id was served
        before gets the leases of then that still live. One that gets nothing leaves no trace of its request id.

        Args:
            organization_id: The tenant.
            demands: With distinct request ids.
            picks: What is proposed for each, one pick a unit.
            duration_seconds: How long a lease lasts.
            greatest_age_seconds: How old renewals may make it.

        Returns:
            For each demand its packages, maybe none, or RequestIdReused.

        Raises:
            DatabaseUnavailable: nothing was handed out, or the answer of the commit was lost.
        """

        async def work(connection: Connection) -> list[list[Package] | DomainError]:
            answers = await _replay(connection, organization_id, demands)
            fresh = [number for number in range(len(demands)) if number not in answers]
            units = await _reserve(
                connection, organization_id, [(number, pick) for number in fresh for pick in picks[number]]
            )
            granted: dict[int, list[_Unit]] = {number: [] for number in fresh}
            for unit in units:
                granted[unit.number].append(unit)
            packages = await _grant(
                connection, organization_id, demands, granted, duration_seconds, greatest_age_seconds
            )
            return [answers[number] if number in answers else packages[number] for number in range(len(demands))]

        return await self.atomically(work)

    async def attach_personas(
        self, organization_id: UUID, personas: Sequence[tuple[UUID, AssignedPersona]]
    ) -> set[UUID]:
        """Notes check-outs on their leases; returns the keys of those that still live.

        The check-outs of the others are put into the outbox, to be ended. One transaction. Raises: DatabaseUnavailable.
        """

        async def work(connection: Connection) -> set[UUID]:
            rows = await connection.fetch(
                _SQL["attach_personas"],
                organization_id,
                [key for key, _ in personas],
                [persona.persona_id for _, persona in personas],
                [persona.lease_token for _, persona in personas],
                [persona.generation for _, persona in personas],
            )
            noted = {row["allocation_key"] for row in rows}
            if lost := [key for key, _ in personas if key not in noted]:
                await connection.execute(_LEASES["enqueue_check_ins"], organization_id, lost)
            return noted

        return await self.atomically(work)


class _Unit:
    """One unit of a demand on its way to a lease."""

    __slots__ = ("exit", "number", "pick", "slot")

    def __init__(self, number: int, pick: Pick, slot: Any) -> None:
        self.number = number
        self.pick = pick
        self.slot = slot
        self.exit: Any = None


async def _replay(
    connection: Connection, organization_id: UUID, demands: Sequence[Demand]
) -> dict[int, list[Package] | DomainError]:
    """Claims the request ids; returns the answers of those on record."""
    ordered = sorted(demands, key=lambda demand: demand.request_id)
    rows = await connection.fetch(
        _SQL["claim_requests"],
        organization_id,
        [demand.request_id for demand in ordered],
        [demand.digest for demand in ordered],
    )
    claimed = {row["request_id"] for row in rows}
    repeated = {demand.request_id for demand in demands} - claimed
    if not repeated:
        return {}
    rows = await connection.fetch(_SQL["find_requests"], organization_id, list(repeated))
    on_record = {row["request_id"]: row for row in rows}
    answers: dict[int, list[Package] | DomainError] = {}
    for number, demand in enumerate(demands):
        if demand.request_id in claimed:
            continue
        row = on_record.get(demand.request_id)
        reused = RequestIdReused(
            "request_id stands for another request, or its leases have ended: take a fresh one",
            request_id=str(demand.request_id),
        )
        if row is None or row["request_sha256"] != demand.digest:
            answers[number] = reused
            continue
        keys = [UUID(bytes=row["answer"][at : at + 16]) for at in range(0, len(row["answer"]), 16)]
        live = await connection.fetch(_SQL["live_leases"], organization_id, keys)
        answers[number] = [_stored_package(lease) for lease in live] or reused
    return answers


async def _reserve(connection: Connection, organization_id: UUID, picks: Sequence[tuple[int, Pick]]) -> list[_Unit]:
    """Reserves slots, then exits for what was granted; what finds no exit goes back to its slot."""
    if not picks:
        return []
    asked = Counter(pick.slot_id for _, pick in picks)
    ids = sorted(asked)
    rows = await connection.fetch(_SQL["reserve_slots"], organization_id, ids, [asked[slot] for slot in ids])
    slots = {row["slot_id"]: row for row in rows}
    left = {slot: row["units"] for slot, row in slots.items()}
    units = []
    for number, pick in picks:
        if left.get(pick.slot_id, 0) > 0:
            left[pick.slot_id] -= 1
            units.append(_Unit(number, pick, slots[pick.slot_id]))
    wanted = Counter(unit.pick.exit_id for unit in units if unit.pick.exit_id and not unit.slot["without_exit"])
    exits = {}
    if wanted:
        ids = sorted(exit_id for exit_id in wanted if exit_id)
        rows = await connection.fetch(_SQL["reserve_exits"], organization_id, ids, [wanted[exit_] for exit_ in ids])
        exits = {row["exit_id"]: row for row in rows}
    uses = {exit_id: row["uses"] for exit_id, row in exits.items()}
    served = []
    for unit in units:
        if unit.slot["without_exit"]:
            served.append(unit)
        elif unit.pick.exit_id and uses.get(unit.pick.exit_id, 0) > 0:
            uses[unit.pick.exit_id] -= 1
            unit.exit = exits[unit.pick.exit_id]
            served.append(unit)
    surplus = Counter(unit.pick.slot_id for unit in units) - Counter(unit.pick.slot_id for unit in served)
    if surplus:
        ids = sorted(surplus)
        await connection.execute(
            _SQL["return_slots"],
            organization_id,
            units[0].slot["work_date"],
            ids,
            [surplus[slot] for slot in ids],
        )
    return served


async def _grant(
    connection: Connection,
    organization_id: UUID,
    demands: Sequence[Demand],
    granted: dict[int, list[_Unit]],
    duration_seconds: float,
    greatest_age_seconds: float,
) -> dict[int, list[Package]]:
    """Writes the leases and the answers of their requests."""
    if not granted:
        return {}
    keyed = [(new_key(), new_token(), demands[number], unit) for number, units in granted.items() for unit in units]
    answers: dict[UUID, bytearray] = {}
    for key, _, demand, _ in keyed:
        answers.setdefault(demand.request_id, bytearray()).extend(key.bytes)
    times = await connection.fetchrow(
        _SQL["grant_leases"],
        organization_id,
        [key for key, _, _, _ in keyed],
        [token for _, token, _, _ in keyed],
        [unit.slot["work_date"] for *_, unit in keyed],
        [unit.slot["slot_id"] for *_, unit in keyed],
        [unit.exit["exit_id"] if unit.exit else None for *_, unit in keyed],
        [unit.exit["toggle_epoch"] if unit.exit else None for *_, unit in keyed],
        [demand.client_id for _, _, demand, _ in keyed],
        [demand.instance_number for _, _, demand, _ in keyed],
        [unit.slot["persona_need"] for *_, unit in keyed],
        [demand.traceparent or None for _, _, demand, _ in keyed],
        duration_seconds,
        greatest_age_seconds,
        list(answers),
        [bytes(answer) for answer in answers.values()],
        [demands[number].request_id for number, units in granted.items() if not units],
    )
    assert times is not None
    settings: dict[UUID, Any] = {}
    packages: dict[int, list[Package]] = {number: [] for number in granted}
    for key, token, demand, unit in keyed:
        slot = unit.slot
        if slot["slot_id"] not in settings:
            settings[slot["slot_id"]] = json.loads(slot["settings"])
        packages[unit.number].append(
            Package(
                key=key,
                token=token,
                expires_at=times["expires_at"],
                renewable_until=times["renewable_until"],
                slot_id=slot["slot_id"],
                work_date=slot["work_date"],
                keyword=slot["keyword"],
                code=slot["code"],
                target=slot["target"],
                settings=settings[slot["slot_id"]],
                exit=AssignedExit(unit.exit["exit_id"], unit.exit["endpoint"], unit.exit["region"])
                if unit.exit
                else None,
                need=PersonaNeed.from_json(slot["persona_need"]),
                persona=None,
                traceparent=demand.traceparent,
            )
        )
    return packages


def _stored_package(row: Any) -> Package:
    return Package(
        key=row["allocation_key"],
        token=row["lease_token"],
        expires_at=row["expires_at"],
        renewable_until=row["renewable_until"],
        slot_id=row["slot_id"],
        work_date=row["work_date"],
        keyword=row["keyword"],
        code=row["code"],
        target=row["target"],
        settings=json.loads(row["settings"]),
        exit=AssignedExit(row["exit_id"], row["endpoint"], row["region"]) if row["exit_id"] else None,
        need=PersonaNeed.from_json(row["persona_need"]),
        persona=AssignedPersona(row["persona_id"], row["persona_token"], row["persona_generation"])
        if row["persona_id"]
        else None,
        traceparent=row["traceparent"] or "",
    )
