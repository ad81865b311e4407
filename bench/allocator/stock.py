"""The databases: an organization with its slots, exits and key, and how to make a database as new between rounds."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import psycopg
import uvloop
from psycopg import sql

from allocator.partitions import Partitions
from services.call import Role
from services.config import ServiceConfig
from services.identity.keys import KeyStore
from services.migrations import IDENTITY, SCHEMAS, migrate
from services.postgres import Database

SLOTS = 30_000
EXITS = 500
# So large that neither runs out within a run: what is measured is the handing out, not the end of it.
QUOTA = 10_000
CAP = 100_000
_TARGETS = 10
_GROWING = ("leases", "requests", "work_allocations", "work_results", "client_activity_logs", "product_results")
_PIECE = 50_000

_MAKE_SLOTS = """
INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota, settings,
  is_active, priority, weight, without_exit, spec_sha256, class_id)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, %(organization)s, 'keyword ' || n, n::text,
  c.target, current_date - 30, current_date + 30, %(quota)s,
  '{"cart_click_enabled": false, "block_mercury": false, "block_image_cdn": true, "block_thumbnail_cdn": true}',
  true, 0, 1, %(without_exit)s, sha256(n::text::bytea), c.class_id
FROM generate_series(1, %(slots)s) n
JOIN (SELECT t, 'shop-' || t AS target,
    class_of(%(organization)s, 'shop-' || t, 0, %(without_exit)s, '', '', NULL) AS class_id
  FROM generate_series(0, %(targets)s - 1) t OFFSET 0) c ON c.t = n %% %(targets)s
"""
_TRACK = """
SELECT track_slots(%(organization)s, %(day)s, array_agg(slot_id)) FROM (
  SELECT slot_id FROM work_slots WHERE organization_id = %(organization)s
  ORDER BY slot_id OFFSET %(offset)s LIMIT %(piece)s) s
"""
_MAKE_EXITS = """
INSERT INTO exits (exit_id, organization_id, endpoint, region, cap_mode, cap)
SELECT gen_random_uuid(), %(organization)s, 'http://10.0.' || n / 250 || '.' || n %% 250 || ':3128', '', 1, %(cap)s
FROM generate_series(1, %(exits)s) n
"""


@dataclass(frozen=True, slots=True)
class Stock:
    """A database of the allocator with work in it."""

    dsn: str
    key: str
    organization_id: UUID

    def renew(self) -> None:
        """Forgets every lease and result, as if the day began; nobody may be asking for work."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("SET search_path = allocator")
            # One by one: the replica looks at some of them even when nobody asks for work, and waits only so long.
            for table in _GROWING:
                connection.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(table)))
            connection.execute(
                "UPDATE daily_work_tracking SET allocated = 0, succeeded = 0, failed = 0, blocked = 0, expired = 0, "
                "released = 0 WHERE allocated > 0"
            )
            connection.execute("UPDATE exits SET use_count = 0 WHERE use_count > 0")
            self._settle(connection)

    def sweep_up(self) -> None:
        """Removes dead rows and writes everything out, so that a round does not pay for the one before."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("SET search_path = allocator")
            self._settle(connection)

    @staticmethod
    def _settle(connection: psycopg.Connection) -> None:
        # Not the tables that were emptied: a plan made for an empty table reads the whole of the one that it becomes.
        connection.execute("VACUUM ANALYZE daily_work_tracking, exits, work_slots")
        connection.execute("CHECKPOINT")


def fill(dsn: str, slots: int, *, quota: int = QUOTA, exits: int = EXITS) -> Stock:
    """Makes the schema in an empty database and puts work into it.

    Args:
        dsn: Of its owner.
        slots: How many.
        quota: Units a day of each.
        exits: How many; with 0 the slots need none.
    """
    migrate(IDENTITY, dsn)
    migrate(SCHEMAS["allocator"], dsn)
    key = uvloop.run(_make_key(dsn))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET search_path = allocator, identity")
        row = connection.execute("SELECT organization_id FROM identity.organizations").fetchone()
        assert row is not None
        organization_id: UUID = row[0]
        values = {
            "organization": organization_id, "slots": slots, "quota": quota, "targets": _TARGETS, "exits": exits,
            "cap": CAP, "without_exit": exits == 0, "piece": _PIECE,
        }  # fmt: skip
        connection.execute("INSERT INTO organizations VALUES (%(organization)s, 'UTC')", values)
        connection.execute(_MAKE_SLOTS, values)
        connection.execute(_MAKE_EXITS, values)
        connection.execute("ANALYZE work_slots")
        (day,) = connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date").fetchone() or (None,)
        for offset in range(0, slots, _PIECE):
            connection.execute(_TRACK, {**values, "offset": offset, "day": day})
        connection.execute("INSERT INTO tracked_days VALUES (%s, %s, NULL, true)", [organization_id, day])
    stock = Stock(dsn, key, organization_id)
    stock.sweep_up()
    return stock


async def _make_key(dsn: str) -> str:
    config = ServiceConfig.model_validate({"postgres": {"dsn": dsn}}).postgres
    keys = await Database.connect(config, "bench", search_path="identity")
    allocator = await Database.connect(config, "bench", search_path="allocator")
    try:
        await Partitions(allocator).ensure()
        return (await KeyStore(keys).create("bench", Role.WORKER, time_zone="UTC"))[1]
    finally:
        await allocator.close()
        await keys.close()
