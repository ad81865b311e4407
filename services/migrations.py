"""Schema migrations by Alembic: plain SQL files, under an advisory lock, one version table per schema."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import sqlalchemy
from alembic import command, op
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.errors import StartupError


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema and the package whose folder `migrations` makes it."""

    name: str
    package: str


IDENTITY = Schema("identity", "services.identity")
SCHEMAS: dict[str, Schema] = {
    "identity": IDENTITY,
    "allocator": Schema("allocator", "allocator"),
    "persona_store": Schema("persona_store", "persona_store"),
    "session_tracker": Schema("session_tracker", "session_tracker"),
    "archiver": Schema("archiver", "archiver"),
}


def run_sql(revision_file: str) -> None:
    """Runs the `.sql` file beside a revision's `.py` file. For use in `upgrade`."""
    text = Path(revision_file).with_suffix(".sql").read_text(encoding="utf-8")
    # exec_driver_sql without parameters takes libpq's simple protocol, which allows several statements.
    op.get_bind().exec_driver_sql(text.replace("%", "%%"))


def migrate(schema: Schema, dsn: str) -> list[str]:
    """Brings a schema to the newest revision; safe to run twice and at once.

    Returns:
        The revisions applied, oldest first.

    Raises:
        StartupError: the database does not answer, or a migration fails (it is rolled back whole).
    """
    scripts = _scripts(schema)
    with _connection(schema, dsn) as connection:
        # Two deployers at once: the second waits, then finds nothing to do.
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_lock_number(schema)})")
        # Asked first: CREATE SCHEMA IF NOT EXISTS needs a right on the database that the owner of one schema lacks.
        if connection.exec_driver_sql(f"SELECT to_regnamespace('{schema.name}')").scalar() is None:
            connection.exec_driver_sql(f'CREATE SCHEMA "{schema.name}"')
        connection.exec_driver_sql(f'SET LOCAL search_path = "{schema.name}"')
        before = _revision(schema, connection)
        if before is not None and before not in _known(scripts):
            # The database is ahead: a newer release migrated it, and expand-then-contract lets this one run on it.
            return []
        config = _config(schema)
        config.attributes["connection"] = connection
        config.attributes["schema"] = schema.name
        try:
            command.upgrade(config, "head")
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StartupError(f"migrating {schema.name} failed and was rolled back: {error}") from error
        after = _revision(schema, connection)
    if before == after:
        return []
    applied = [script.revision for script in scripts.iterate_revisions(after or "head", before or "base")]
    return list(reversed(applied))


def pending(schema: Schema, dsn: str) -> list[str]:
    """Returns the revisions that are not applied yet, oldest first.

    Raises:
        StartupError: the database does not answer.
    """
    scripts = _scripts(schema)
    with _connection(schema, dsn) as connection:
        now = _revision(schema, connection)
    known = _known(scripts)
    if now is not None and now not in known:
        return []
    return [revision for revision in reversed(known) if now is None or known.index(revision) < known.index(now)]


def _known(scripts: ScriptDirectory) -> list[str]:
    """Returns this release's revisions, newest first."""
    return [script.revision for script in scripts.walk_revisions()]


def _revision(schema: Schema, connection: sqlalchemy.Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table_schema": schema.name})
    return context.get_current_revision()


@contextmanager
def _connection(schema: Schema, dsn: str) -> Iterator[sqlalchemy.Connection]:
    url = "postgresql+psycopg://"
    engine = sqlalchemy.create_engine(url, creator=lambda: _connect(dsn), poolclass=sqlalchemy.NullPool)
    try:
        with engine.begin() as connection:
            yield connection
    except sqlalchemy.exc.OperationalError as error:
        raise StartupError(
            f"the database of {schema.name} does not answer ({str(error.orig).strip().splitlines()[0]}): "
            "start it, or correct postgres.dsn"
        ) from None
    finally:
        engine.dispose()


def _connect(dsn: str) -> object:
    import psycopg

    return psycopg.connect(dsn, connect_timeout=5)


def _config(schema: Schema) -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("services") / "migration_env"))
    config.set_main_option("version_locations", str(resources.files(schema.package) / "migrations"))
    config.set_main_option("path_separator", "newline")
    return config


def _scripts(schema: Schema) -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(schema))


def _lock_number(schema: Schema) -> int:
    return int.from_bytes(hashlib.sha256(f"muster migrate {schema.name}".encode()).digest()[:8], signed=True)
