"""A real PostgreSQL for tests, and fresh databases on it in tens of milliseconds.

Which server: `MUSTER_TEST_POSTGRES_DSN` (a superuser's URI) if set; with `MUSTER_TEST_USE_CONTAINERS=1` one in a
container, where a Docker engine answers; else the embedded one, with the binaries of `muster up`. It is the default
even beside Docker: it needs no image and starts in half a second.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql

from services.launcher.databases import ensure_database
from services.launcher.postgres import EmbeddedPostgres
from tests.support import docker_answers

# The data of a test run may be lost with the machine; what the server answers does not depend on these.
_VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_wal_size": "512MB"}
_IMAGE = "postgres:18"
_MEMORY = Path("/dev/shm")
_MEMORY_FREE_BYTES = 2 * 1024**3
_PREFIX = "muster-test-postgres-"
_DATA = "data"


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running server.

    Attributes:
        superuser_dsn: URI of a superuser, on any database of the server.
    """

    superuser_dsn: str

    def dsn(self, database: str, role: str | None = None) -> str:
        """Name a database for asyncpg, psycopg and libpq alike.

        Args:
            database: Its name.
            role: A login role made by `ensure_database`; None is the superuser.

        Returns:
            A URI.
        """
        parts = urlsplit(self.superuser_dsn)
        login, _, place = parts.netloc.rpartition("@")
        if role is not None:
            login = f"{quote(role, safe='')}:{quote(role, safe='')}"
        return parts._replace(netloc=f"{login}@{place}", path=f"/{quote(database, safe='')}").geturl()

    def ensure_database(self, database: str, roles: Mapping[str, str]) -> None:
        """Do as the launcher does, and give each role its own name as password, for servers that ask for one.

        Args:
            database: Its name.
            roles: Schema by login role.
        """
        ensure_database(self.superuser_dsn, database, roles)
        for role in roles:
            self._execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(role)))

    def create_database(self, prefix: str = "test", template: str | None = None) -> str:
        """Create a database under a name no other run on this server uses.

        Args:
            prefix: What the name begins with; other than letters, digits and underscores is dropped.
            template: Database to copy, with nobody connected to it. None makes an empty one.

        Returns:
            Its name. Rights on the database itself are not copied: every role can connect.
        """
        name = f"{re.sub(r'[^a-z0-9_]', '', prefix.lower())[:40]}_{secrets.token_hex(6)}"
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self._execute(statement.format(sql.Identifier(name), sql.Identifier(template or "template0")))
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database with every connection to it; nothing if there is none.

        Args:
            name: Its name.
        """
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def close_to_connections(self, name: str) -> None:
        """Let nobody connect any more, so that copies of the database cannot fail over a forgotten connection.

        Args:
            name: Its name.
        """
        self._execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.superuser_dsn, autocommit=True) as connection:
            connection.execute(statement)


class TemplateDatabases:
    """Fresh migrated databases: each kind is migrated once per session and then copied."""

    def __init__(self, server: PostgresServer) -> None:
        """Begin without templates.

        Args:
            server: Where they live.
        """
        self._server = server
        self._templates: dict[str, str] = {}

    @contextlib.contextmanager
    def fresh(self, key: str, migrate: Callable[[str], None]) -> Iterator[str]:
        """Give a database of its own, dropped at the end.

        Args:
            key: The kind; the first call with it makes the template.
            migrate: Called with the name of a new empty database, once per key; must close its connections.

        Yields:
            The database's name, for `PostgresServer.dsn`.
        """
        if key not in self._templates:
            template = self._server.create_database(f"template_{key}")
            try:
                migrate(template)
            except BaseException:
                self._server.drop_database(template)
                raise
            self._server.close_to_connections(template)
            self._templates[key] = template
        name = self._server.create_database(key, self._templates[key])
        try:
            yield name
        finally:
            self._server.drop_database(name)

    def close(self) -> None:
        """Drop the templates."""
        while self._templates:
            self._server.drop_database(self._templates.popitem()[1])


def chosen_server() -> str:
    """Tell which server this session uses, without starting it."""
    if os.environ.get("MUSTER_TEST_POSTGRES_DSN"):
        return "MUSTER_TEST_POSTGRES_DSN"
    if os.environ.get("MUSTER_TEST_USE_CONTAINERS") == "1" and docker_answers():
        return f"container {_IMAGE}"
    return "embedded"


def pytest_report_header() -> str:
    """Name the choice in the report's header."""
    return f"postgresql: {chosen_server()}"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The session's server."""
    chosen = chosen_server()
    if chosen == "embedded":
        with (
            _volatile_folder(tmp_path_factory) as folder,
            EmbeddedPostgres(folder / _DATA, _VOLATILE) as server,
        ):
            yield PostgresServer(server.dsn())
    elif chosen == "MUSTER_TEST_POSTGRES_DSN":
        yield PostgresServer(os.environ["MUSTER_TEST_POSTGRES_DSN"])
    else:
        # Imported here, since most sessions never need it and it takes a quarter of a second.
        from testcontainers.community.postgres import PostgresContainer

        with PostgresContainer(_IMAGE, driver=None) as container:
            yield PostgresServer(container.get_connection_url())


@contextlib.contextmanager
def _volatile_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder in memory where there is room: a database is 300 files, and making them is what a fresh one costs.

    Measured: 15 ms a database in memory, 60 to 270 ms on a virtual machine's ext4.
    """
    if not _MEMORY.is_dir() or not os.access(_MEMORY, os.W_OK) or shutil.disk_usage(_MEMORY).free < _MEMORY_FREE_BYTES:
        yield tmp_path_factory.mktemp("postgres")
        return
    for left in _MEMORY.glob(f"{_PREFIX}*"):
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    """Free the memory of a run that was killed: nothing else would before the machine's restart."""
    try:
        with contextlib.ExitStack() as locks:
            for name in ("launcher.lock", "server.lock"):
                lock = locks.enter_context((folder / _DATA / name).open("rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:
        return  # another user's, in use, or about to be


@pytest.fixture(scope="session")
def template_databases(postgres_server: PostgresServer) -> Iterator[TemplateDatabases]:
    """Fresh migrated databases on the session's server."""
    databases = TemplateDatabases(postgres_server)
    yield databases
    databases.close()
