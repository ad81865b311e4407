"""Migrations: from nothing, twice, at once, as a role that owns nothing but its schema."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest
from alembic import command

from services.errors import StartupError
from services.migrations import SCHEMAS, migrate, pending
from tests.support.postgres import PostgresServer
from tests.support.services import ROLES


@pytest.fixture
def empty(postgres_server: PostgresServer) -> Iterator[str]:
    name = postgres_server.create_database("migrations")
    postgres_server.ensure_database(name, ROLES)
    yield name
    postgres_server.drop_database(name)


def structure(dsn: str, schema: str) -> list[tuple[str, ...]]:
    """Returns columns, constraints, indexes and functions of a schema as text, sorted."""
    statement = """
        SELECT 'column', table_name, column_name, data_type || coalesce(column_default, '') || is_nullable
          FROM information_schema.columns WHERE table_schema = %(schema)s
        UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
          FROM pg_constraint WHERE connamespace = to_regnamespace(%(schema)s)
        UNION ALL SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = %(schema)s
        UNION ALL SELECT 'function', proname, '', prosrc FROM pg_proc WHERE pronamespace = to_regnamespace(%(schema)s)
    """
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(statement, {"schema": schema}).fetchall()
    return sorted(tuple(str(value) for value in row) for row in rows)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_made_from_nothing_by_its_owner_and_then_left_alone(
    postgres_server: PostgresServer, empty: str, name: str
) -> None:
    dsn = postgres_server.dsn(empty, f"muster_{name}")
    assert pending(SCHEMAS[name], dsn)
    applied = migrate(SCHEMAS[name], dsn)
    assert applied == sorted(applied)
    assert pending(SCHEMAS[name], dsn) == []
    made = structure(dsn, name)
    assert migrate(SCHEMAS[name], dsn) == []
    assert structure(dsn, name) == made


@pytest.mark.parametrize("name", SCHEMAS)
def test_two_deployers_at_once_do_it_once(postgres_server: PostgresServer, empty: str, name: str) -> None:
    dsn = postgres_server.dsn(empty, f"muster_{name}")
    applied: list[list[str]] = []
    deployers = [threading.Thread(target=lambda: applied.append(migrate(SCHEMAS[name], dsn))) for _ in range(3)]
    for deployer in deployers:
        deployer.start()
    for deployer in deployers:
        deployer.join()
    assert sum(bool(revisions) for revisions in applied) == 1
    assert len(applied) == 3


def test_a_failed_migration_leaves_nothing_behind(postgres_server: PostgresServer, empty: str) -> None:
    dsn = postgres_server.dsn(empty, "muster_identity")
    with psycopg.connect(dsn) as connection:
        # Stands where the migration wants to put its last index.
        connection.execute("CREATE TABLE identity.api_keys_organization ()")
    with pytest.raises(StartupError, match="rolled back"):
        migrate(SCHEMAS["identity"], dsn)
    with psycopg.connect(dsn) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'identity'").fetchall()
    assert found == [("api_keys_organization",)]


def test_a_database_ahead_of_this_release_is_left_alone(postgres_server: PostgresServer, empty: str) -> None:
    dsn = postgres_server.dsn(empty, "muster_identity")
    migrate(SCHEMAS["identity"], dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE identity.alembic_version SET version_num = '9999'")
    assert pending(SCHEMAS["identity"], dsn) == []
    assert migrate(SCHEMAS["identity"], dsn) == []


def test_a_role_cannot_touch_another_services_schema(postgres_server: PostgresServer, empty: str) -> None:
    migrate(SCHEMAS["identity"], postgres_server.dsn(empty, "muster_identity"))
    stranger = postgres_server.dsn(empty, "muster_archiver")
    with psycopg.connect(stranger) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT * FROM identity.api_keys")


def test_counters_stand_when_their_tables_lose_their_unique_indexes(
    postgres_server: PostgresServer, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = postgres_server.dsn(empty, "muster_allocator")
    with monkeypatch.context() as at_the_revision_before:
        upgrade = command.upgrade
        at_the_revision_before.setattr(command, "upgrade", lambda config, _: upgrade(config, "0002"))
        migrate(SCHEMAS["allocator"], dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute("SET search_path = allocator")
        connection.execute(
            """CREATE TABLE daily_work_tracking_now PARTITION OF daily_work_tracking
              FOR VALUES FROM ('2026-01-01') TO ('2026-02-01') WITH (fillfactor = 50);
            INSERT INTO organizations VALUES ('00000000-0000-0000-0000-000000000001', 'UTC');
            INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
              settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
            SELECT gen_random_uuid(), organization_id, 'laptop', '', '', '2026-01-01', '2026-01-31', 100, '{}', true, 0,
              1, true, sha256(''), class_of(organization_id, '', 0, true, '', '', NULL)
            FROM organizations;
            SELECT track_slots(organization_id, '2026-01-05', array_agg(slot_id)) FROM work_slots
            GROUP BY organization_id;
            UPDATE daily_work_tracking SET allocated = 7, succeeded = 3;
            UPDATE work_slots SET daily_quota = 50"""
        )
    assert migrate(SCHEMAS["allocator"], dsn) == ["0003"]
    with psycopg.connect(dsn) as connection:
        connection.execute("SET search_path = allocator")
        connection.execute(
            "SELECT track_slots(organization_id, '2026-01-05', array_agg(slot_id)) "
            "FROM work_slots GROUP BY organization_id"
        )
        days = connection.execute("SELECT quota, allocated, succeeded FROM daily_work_tracking").fetchall()
        unique = connection.execute(
            "SELECT indexname FROM pg_indexes WHERE indexdef LIKE 'CREATE UNIQUE%' "
            "AND tablename IN ('exits', 'daily_work_tracking', 'daily_work_tracking_now')"
        ).fetchall()
    assert days == [(50, 7, 3)]
    assert not unique
