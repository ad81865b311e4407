"""The stage of a machine that is not asynchronous: a real allocator in a loop of its own, and companies that use it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import grpc
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.allocator.v1 import admin_pb2, client_pb2, exit_pb2, insight_pb2, slot_pb2, target_pb2, work_pb2

from allocator import app
from allocator.config import BackOffConfig, CoolDownConfig, LeasesConfig
from allocator.lease_store import LeaseStore
from allocator.partitions import Partitions
from services.call import Role
from services.chassis import Chassis
from services.config import DrainConfig, GrpcConfig, PostgresConfig
from services.identity.keys import KeyStore
from services.postgres import Database
from tests.support.allocator import Allocator
from tests.support.allocator_model import PER_WINDOW, Model, ModelExit, ModelSlot, ModelTarget, Unit
from tests.support.postgres import PostgresServer
from tests.support.services import RunningService

Result = TypeVar("Result")
TARGETS = ("", "shop", "market")
CLIENTS = ("pc-1", "pc-2")
_companies = itertools.count()
_SERVICES = {
    name: service
    for module in (work_pb2, slot_pb2, exit_pb2, target_pb2, client_pb2, insight_pb2, admin_pb2)
    for name, service in module.DESCRIPTOR.services_by_name.items()
}


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs work to its end, for at most 30 s."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        """Ends the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(slots=True)
class Stage:
    """What all examples share."""

    loop: Loop
    service: RunningService
    leases: LeaseStore
    door: asyncpg.Connection[asyncpg.Record]
    keys: Database
    own: Database

    async def stop(self) -> None:
        """Ends the service and the connections."""
        await self.service.channel.close()
        await self.door.close()
        await self.service.chassis.drain()
        await self.keys.close()
        await self.own.close()


async def start_stage(loop: Loop, server: PostgresServer, database: str) -> Stage:
    """Starts a service whose own sweep, cool-downs and pauses do not come by themselves."""
    identity = PostgresConfig.model_validate({"dsn": server.dsn(database, "muster_identity")})
    own = PostgresConfig.model_validate({"dsn": server.dsn(database, "muster_allocator")})
    config = app.CONFIG(
        grpc=GrpcConfig(listen="127.0.0.1:0"),
        postgres=own,
        identity=identity,
        leases=LeasesConfig(sweep_seconds=60),
        back_off=BackOffConfig(least_results=1000),
        cool_down=CoolDownConfig(
            rate_limited_seconds=0.001, blocked_seconds=0.001, transport_seconds=0.001, limit_seconds=0.001
        ),
        drain=DrainConfig(grace_seconds=1),
    )
    chassis = Chassis("allocator", config)
    address = await chassis.start(app.bind)
    keys = await Database.connect(identity, "keys")
    swept = await Database.connect(own, "sweep", search_path="allocator")
    door = await asyncpg.connect(server.dsn(database), server_settings={"search_path": "allocator"})
    channel = grpc.aio.insecure_channel(address)
    service = RunningService("allocator", chassis, address, channel, database, server.dsn(database), KeyStore(keys))
    return Stage(loop, service, LeaseStore(swept, Partitions(swept)), door, keys, swept)


class Company:
    """An organization of its own: the service, its database, and the model of it."""

    def __init__(self, stage: Stage, allocator: Allocator, organization_id: UUID) -> None:
        self._stage = stage
        self._organization_id = organization_id
        self._metadata: dict[Role, Any] = {}
        self._offset = 0
        self.allocator = allocator
        self.model = Model()
        self.is_tomorrow = False
        # The outcome of each unit's first submission.
        self.submitted: dict[str, int] = {}

    @classmethod
    async def of(
        cls, stage: Stage, slots: list[tuple[int, str, str, bool]], exits: list[tuple[int, int, str]]
    ) -> Company:
        """Makes one.

        Args:
            stage: What it runs on.
            slots: Quota, target, region and whether each needs no exit.
            exits: Mode, cap and region of each.
        """
        service, name = stage.service, f"company {next(_companies)}"
        hour = await stage.door.fetchval("SELECT extract(hour FROM now() AT TIME ZONE 'UTC')::integer")
        # Afternoon, so that midnight comes when it is called and not by itself.
        offset = next(offset for offset in range(-12, 3) if 13 <= (hour + offset) % 24 <= 22)
        for role in (Role.WORKER, Role.OPERATOR, Role.ADMIN):
            await service.key(role, name, time_zone=_zone(offset))
        allocator = await Allocator.of(service)
        allocator.door = stage.door
        company = cls(stage, allocator, await service.organization_id(name))
        company._offset = offset
        for role in (Role.WORKER, Role.OPERATOR, Role.ADMIN):
            company._metadata[role] = await service.metadata(role, name)
        allocator.worker, allocator.operator = company._metadata[Role.WORKER], company._metadata[Role.OPERATOR]
        await company._furnish(slots, exits)
        return company

    async def _furnish(self, slots: list[tuple[int, str, str, bool]], exits: list[tuple[int, int, str]]) -> None:
        for client in CLIENTS:
            await self.allocator.heartbeat(client)
            self.model.known.add(client)
        self.model.day = await self._today()
        for number, (quota, target, region, without_exit) in enumerate(slots):
            region = "" if without_exit else region
            made = await self.allocator.slot(
                keyword=f"k{number}",
                daily_quota=quota,
                target=target,
                exit_region=region,
                without_exit=without_exit,
            )
            self.model.slots[made.slot_id] = ModelSlot(made.slot_id, quota, target, region, without_exit)
        specs = [
            exit_pb2.ExitSpec(
                endpoint=f"http://10.0.0.{number}:1",
                cap_mode=exit_pb2.ExitCapMode.ValueType(mode),
                cap=cap,
                region=region,
                window_seconds=86_400 if mode == PER_WINDOW else 0,
            )
            for number, (mode, cap, region) in enumerate(exits)
        ]
        imported = await self.call("ExitService/ImportExits", exit_pb2.ImportExitsRequest(exits=specs))
        for exit_ in imported.exits:
            spec = exit_.spec
            self.model.exits[exit_.exit_id] = ModelExit(exit_.exit_id, spec.cap_mode, spec.cap, spec.region)

    async def call(self, method: str, request: Any) -> Any:
        """Calls a method by name, as whoever may."""
        service = _SERVICES[method.partition("/")[0]]
        found = service.methods_by_name[method.partition("/")[2]]
        role = {"WorkService": Role.WORKER, "AdminService": Role.ADMIN}.get(service.name, Role.OPERATOR)
        call: Any = self._stage.service.channel.unary_unary(
            f"/{service.full_name}/{found.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        return await call(request, metadata=self._metadata[role])

    @staticmethod
    def reason(error: grpc.aio.AioRpcError) -> str:
        """Returns the reason of a refusal."""
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        assert status is not None, error
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details), error
        return str(info.reason)

    def slot(self, number: int) -> ModelSlot:
        """Returns one of the slots."""
        return list(self.model.slots.values())[number % len(self.model.slots)]

    def exit(self, number: int) -> ModelExit:
        """Returns one of the exits."""
        return list(self.model.exits.values())[number % len(self.model.exits)]

    def target_name(self, slot: ModelSlot) -> str:
        """Returns what a slot's target is called."""
        return slot.target or f"slot:{slot.slot_id}"

    def target(self, name: str) -> ModelTarget:
        """Returns a target, known from now on."""
        return self.model.targets.setdefault(name, ModelTarget())

    def target_of(self, unit: Unit) -> ModelTarget:
        """Returns the target of a unit."""
        return self.target(unit.allocation.target or f"slot:{unit.slot}")

    async def run_out(self, key: str) -> None:
        """Lets a lease run out; only `sweep` takes it away."""
        await self.allocator.sql(
            """UPDATE leases SET granted_at = granted_at - interval '1 day', expires_at = now() - interval '1 second',
              sweep_at = now() + interval '1 day'
            WHERE allocation_key = $1""",
            UUID(key),
        )

    async def age(self, key: str) -> None:
        """Brings a lease to its greatest age."""
        await self.allocator.sql("UPDATE leases SET renewable_until = expires_at WHERE allocation_key = $1", UUID(key))

    async def sweep(self) -> None:
        """Sweeps this organization's leases, as another replica would."""
        await self.allocator.sql(
            "UPDATE leases SET sweep_at = expires_at WHERE organization_id = $1 AND expires_at < now()",
            self._organization_id,
        )
        await self._stage.leases.expire(self._organization_id, 1000)

    async def end_window(self, exit_: ModelExit) -> None:
        """Lets the window of an exit end."""
        await self.allocator.sql(
            """UPDATE exits SET window_ends_at = now() - interval '1 second'
            WHERE exit_id = $1 AND window_ends_at > '-infinity'""",
            UUID(exit_.exit_id),
        )

    async def pass_hold(self, target: str) -> None:
        """Lets the hold of a target pass."""
        await self.allocator.sql(
            """UPDATE targets SET blocked_until = now() - interval '1 second'
            WHERE organization_id = $1 AND target = $2 AND blocked_until > now()""",
            self._organization_id,
            target,
        )

    async def has_day(self, slot: ModelSlot) -> bool:
        """Whether a slot has counters today."""
        return bool(
            await self.allocator.sql(
                "SELECT FROM daily_work_tracking WHERE slot_id = $1 AND work_date = $2::text::date",
                UUID(slot.slot_id),
                self.model.day,
            )
        )

    async def turn_the_day(self) -> None:
        """Moves the organization twelve hours to the east, where it is tomorrow already."""
        await self.allocator.sql(
            "UPDATE organizations SET time_zone = $2 WHERE organization_id = $1",
            self._organization_id,
            _zone(self._offset + 12),
        )
        self.model.turn(await self._today())
        self.is_tomorrow = True

    async def _today(self) -> str:
        (row,) = await self.allocator.sql(
            "SELECT (now() AT TIME ZONE time_zone)::date::text AS today FROM organizations WHERE organization_id = $1",
            self._organization_id,
        )
        return str(row["today"])

    async def compare(self) -> None:
        """Asserts that the database holds what the model says."""
        mine = self._organization_id
        rows = await self.allocator.sql(
            """SELECT slot_id::text, work_date::text, quota, allocated, succeeded, failed, blocked, expired, released
            FROM daily_work_tracking WHERE organization_id = $1""",
            mine,
        )
        wanted = self.model.counters()
        for row in rows:
            slot, day, *counters = row
            none_yet = [self.model.quota(slot, day), 0, 0, 0, 0, 0, 0]
            # Rows may be made ahead of the day.
            assert counters == wanted.pop((slot, day), none_yet), (day, self.model.day)
        assert not wanted
        rows = await self.allocator.sql("SELECT exit_id::text, use_count FROM exits_now($1)", mine)
        assert dict(map(tuple, rows)) == {name: self.model.uses(one) for name, one in self.model.exits.items()}
        rows = await self.allocator.sql(
            """SELECT allocation_key::text, 1 AS status FROM leases WHERE organization_id = $1
            UNION ALL SELECT allocation_key::text, status FROM work_allocations WHERE organization_id = $1""",
            mine,
        )
        assert sorted(map(tuple, rows)) == sorted((unit.key, unit.status) for unit in self.model.units)
        rows = await self.allocator.sql(
            """SELECT r.allocation_key::text, outcome, late, product_count, (SELECT count(*) FROM product_results p
              WHERE p.organization_id = $1 AND p.allocation_key = r.allocation_key) AS products
            FROM work_results r WHERE organization_id = $1""",
            mine,
        )
        assert sorted(map(tuple, rows)) == sorted((*one, one[-1]) for one in self.model.results())
        rows = await self.allocator.sql(
            "SELECT allocation_key::text FROM quarantined_results WHERE organization_id = $1", mine
        )
        assert {row[0] for row in rows} == {unit.key for unit in self.model.of("quarantined")}


def _zone(offset: int) -> str:
    """Returns the zone that is so many hours ahead of UTC; the names count the other way."""
    return f"Etc/GMT{-offset:+d}" if offset else "Etc/GMT"
