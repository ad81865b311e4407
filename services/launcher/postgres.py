"""A PostgreSQL server of our own, driven by its binaries, for one machine and for tests.

Below the data folder:

```
cluster/          what initdb made; belongs to the server's user
socket/           the only way in: a private folder with the Unix socket (or a link to it, where the path is too long)
postgresql.log    what the server prints; moved to postgresql.log.1 at a start that finds it above 16 MiB
launcher.lock     locked by the process that owns this folder, and holds its id
server.lock       locked by the server's processes themselves, and so exactly as long as one of them lives
```

Who may run: one launcher (`launcher.lock`), one server (`server.lock`). Both are `flock`, which the kernel gives up
with the process; a process id in a file can be stale or reused, so it is only ever a hint whom to signal. When a
launcher dies its server gets SIGINT, a clean shutdown; one that still runs at the next start is ended before the new
one begins.

Who may connect: no TCP. The socket and its folder are 0700, so only the user who starts the server (and root) reaches
it, and inside there is no password: whoever can enter could read a password file just as well. Why root is handled as
it is: `docs/decisions/0003-embedded-postgresql.md`. Linux only.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self
from urllib.parse import quote

from services.launcher.databases import ensure_database
from services.launcher.errors import LauncherError
from services.launcher.guard import Owner, guarded_argv
from services.launcher.server_host import (
    can_enter,
    chown_tree,
    command_lines,
    command_name,
    find_binaries,
    known_mend,
    make_socket_folder,
    server_environment,
    server_major,
    server_owner,
    spawn_in_own_thread,
    telling_line,
    try_lock,
)

_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "max_connections": "200",
        "shared_buffers": "256MB",
        "wal_level": "replica",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_line_prefix": "%m [%p] %q%u@%d ",
    }
)
_PORT = 5432  # only a part of the socket's file name
# A start may replay as much log as lay between two checkpoints, on a slow disk; a server that hangs must still be told.
_START_SECONDS = 300.0
# The fast shutdown writes a checkpoint. After SIGQUIT the server itself ends its children by SIGKILL within 5 s.
_STOP_STEPS = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))
_POLL_SECONDS = 0.01
_LOG_BYTES = 16 * 1024 * 1024


class EmbeddedPostgres:
    """One server on one data folder.

    Not for concurrent use by several threads; `wait` alone may run in another one.
    """

    def __init__(self, data: Path, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """Name the folder; nothing is touched before `start`.

        Args:
            data: Everything is kept below it; made if missing. Durable: give it the disk that is backed up.
            settings: Server settings on top of the defaults above, as in postgresql.conf. `fsync=off` also makes the
                first start skip its sync, and is for data that may be lost.
        """
        self._data = data.resolve()
        self._cluster = self._data / "cluster"
        self._log = self._data / "postgresql.log"
        # Shown in the title of every server process, which is all that another user may read of it.
        self._title = f"muster-{hashlib.sha256(os.fsencode(self._cluster)).hexdigest()[:12]}"
        self._settings = {**_SETTINGS, **settings}
        self._socket: Path | None = None
        self._launcher_lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_code: concurrent.futures.Future[int] = concurrent.futures.Future()

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def log(self) -> Path:
        """The file with the server's messages."""
        return self._log

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while none runs."""
        return self._process.pid if self._process is not None and not self._exit_code.done() else None

    def start(self) -> None:
        """Start the server, on new or existing data, and return when it takes connections.

        Recovers after a crash of the machine, the server or its launcher. Does nothing while the server runs; starts it
        again after an unexpected exit.

        Raises:
            LauncherError: No binaries, or of another major version than the data; the folder is owned by another
                launcher, server or user, or cannot be written; the server says no. Nothing is left running or locked.
        """
        if self.pid is not None:
            return
        before = self._socket
        self._release()
        try:
            self._start(before)
        except OSError as error:
            self._release()
            cause = f"cannot use {error.filename or self._data} for PostgreSQL: {error.strerror}"
            raise LauncherError(
                cause, self._mend(str(error), "choose a data folder on a disk this user can write")
            ) from error
        except BaseException:
            self._release()
            raise

    def stop(self) -> None:
        """Shut the server down: clients are disconnected, everything is written. Idempotent, harmless before `start`.

        A server which does not end within 60 s is told to abort (SIGQUIT), then killed; it recovers at the next start.

        Raises:
            LauncherError: The server's process outlived even SIGKILL, as one does that hangs on a dead disk.
        """
        process = self._process
        if process is not None:
            for number, seconds in _STOP_STEPS:
                process.send_signal(number)
                if concurrent.futures.wait([self._exit_code], timeout=seconds).done:
                    break
            else:
                raise LauncherError(
                    f"PostgreSQL (process {process.pid}) cannot be ended", f"check the disk of {self._data}"
                )
        self._release()

    def wait(self) -> int:
        """Block until the server's process ends, by `stop` or by itself.

        Returns:
            Its exit code, or minus the number of the signal that ended it.

        Raises:
            RuntimeError: The server was never started.
        """
        if self._process is None:
            raise RuntimeError("the server is not started")
        return self._exit_code.result()

    def dsn(self, role: str = "postgres", database: str = "postgres") -> str:
        """Name the server for asyncpg, psycopg, and libpq (ADBC, psql) alike.

        Args:
            role: Login role; `postgres` is the superuser.
            database: Its name.

        Returns:
            A libpq URI. It stays the same while this object starts the server again; and for the next object too, if
            the data folder's path is short enough for a socket.

        Raises:
            RuntimeError: The server is not started.
        """
        if self._socket is None:
            raise RuntimeError("the server is not started")
        return f"postgresql://{quote(role)}@/{quote(database)}?host={quote(str(self._socket), safe='')}&port={_PORT}"

    def ensure_database(self, database: str, roles: Mapping[str, str]) -> None:
        """Make a database whose roles each own one schema; see the function of this name.

        Args:
            database: Its name.
            roles: Schema by login role.
        """
        ensure_database(self.dsn(), database, roles)

    def _start(self, socket_before: Path | None) -> None:
        binaries = find_binaries()
        major = server_major(binaries)
        made = not self._data.exists()
        self._data.mkdir(parents=True, exist_ok=True)
        owner = server_owner()
        if made:
            # Root's server is another user, who must pass through; what lies inside is guarded by itself.
            self._data.chmod(0o711 if owner else 0o700)
        self._launcher_lock = self._own_folder()
        server_lock = self._end_orphans()
        try:
            if owner and not (can_enter(binaries / "postgres", owner) and can_enter(self._data, owner)):
                owner = Owner(owner.uid, owner.gid, keeps_file_access=True)
            self._check_cluster(major, owner)
            if not self._cluster.exists():
                self._initialize(binaries, major, owner, server_lock)
            self._drop_stale_pid_file()
            self._socket = make_socket_folder(self._data / "socket", _PORT, owner, socket_before)
            self._run(binaries, owner, server_lock)
        finally:
            os.close(server_lock)  # from here on only the server's processes hold it

    def _own_folder(self) -> int:
        path = self._data / "launcher.lock"
        lock = try_lock(path)
        if lock is None:
            holder = path.read_text().strip() or "unknown"
            raise LauncherError(
                f"{self._data} is in use by a running Muster (process {holder})",
                "stop that one, or choose another data folder",
            )
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return lock

    def _end_orphans(self) -> int:
        """End the server of a launcher that died, and return the locked `server.lock`."""
        path = self._data / "server.lock"
        for number, seconds in _STOP_STEPS:
            if (lock := try_lock(path)) is not None:
                return lock
            for pid in self._orphans():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if (lock := try_lock(path)) is not None:
                    return lock
                time.sleep(_POLL_SECONDS)
        raise LauncherError(f"an earlier PostgreSQL on {self._cluster} does not end", "end its processes by hand")

    def _orphans(self) -> list[int]:
        """Find what holds `server.lock`: the server, else children that have outlived it."""
        servers, children = [], []
        for pid, argv in command_lines():
            if self._is_server(pid, argv):
                servers.append(pid)
            elif argv[0].startswith(f"postgres: {self._title}: "):
                children.append(pid)
        return servers or children

    def _is_server(self, pid: int, argv: list[str]) -> bool:
        return str(self._cluster) in argv and command_name(pid) == "postgres"

    def _check_cluster(self, major: int, owner: Owner | None) -> None:
        if not self._cluster.exists():
            return
        found = (self._cluster / "PG_VERSION").read_text().strip()
        if found != str(major):
            raise LauncherError(
                f"{self._cluster} was made by PostgreSQL {found}, the installed one is {major}",
                f"set PG_BIN to the binaries of PostgreSQL {found}, or dump there and restore here",
            )
        uid = self._cluster.stat().st_uid
        if owner is None and uid != os.geteuid():
            raise LauncherError(
                f"{self._cluster} belongs to user {uid}, not to user {os.geteuid()}",
                "start as that user, or change its owner",
            )
        if owner is not None and uid != owner.uid:
            chown_tree(self._cluster, owner)

    def _initialize(self, binaries: Path, major: int, owner: Owner | None, server_lock: int) -> None:
        # Under another name first: an initdb that was killed leaves a folder that looks whole and is not.
        unfinished = self._data / "cluster.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if owner:
            os.chown(unfinished, owner.uid, owner.gid)
        argv = [str(binaries / "initdb"), "-D", str(unfinished), "-U", "postgres", "--encoding=UTF8", "--locale=C"]
        argv += ["--data-checksums", "--no-instructions", "--auth-local=trust", "--auth-host=reject"]
        if major >= 17:
            # Sorts like C, but knows upper and lower case beyond ASCII, alike on every machine.
            argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if self._settings.get("fsync") == "off":
            argv += ["--no-sync"]
        done = subprocess.run(
            guarded_argv(argv, on_parent_death=signal.SIGKILL, owner=owner),
            env=server_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(server_lock,),  # what it has started may outlive it for a moment, and ours
        )
        if done.returncode != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._refused("PostgreSQL cannot make its data folder", done.stderr)
        unfinished.rename(self._cluster)
        # A rename lost in a power cut would let the next start begin anew beside committed data.
        folder = os.open(self._data, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _drop_stale_pid_file(self) -> None:
        # Nobody holds server.lock, so no server of ours lives; but after a restart of a container the id in the file is
        # often in use by something else, and the server would refuse to start over it.
        path = self._cluster / "postmaster.pid"
        if not path.exists():
            return
        first = path.read_text().partition("\n")[0].strip()
        pid = int(first) if first.isdecimal() else 0
        argv = next((argv for other, argv in command_lines() if other == pid), None)
        if argv is not None and self._is_server(pid, argv):
            raise LauncherError(
                f"a PostgreSQL that Muster did not start (process {pid}) runs on {self._cluster}",
                "stop it (pg_ctl stop)",
            )
        if argv is None or command_name(pid) != "postgres":
            path.unlink()

    def _run(self, binaries: Path, owner: Owner | None, server_lock: int) -> None:
        settings = {
            **self._settings,
            "listen_addresses": "",
            "port": str(_PORT),
            "unix_socket_directories": str(self._socket),
            "unix_socket_permissions": "0700",
            "cluster_name": self._title,
        }
        argv = [str(binaries / "postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        if self._log.exists() and self._log.stat().st_size > _LOG_BYTES:
            self._log.replace(self._log.with_name("postgresql.log.1"))
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            printed_bytes = os.fstat(log).st_size
            guarded = guarded_argv(argv, on_parent_death=signal.SIGINT, owner=owner)
            self._process, self._exit_code = spawn_in_own_thread(guarded, log, server_lock)
        finally:
            os.close(log)
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if concurrent.futures.wait([self._exit_code], timeout=_POLL_SECONDS).done:
                with self._log.open("rb") as lines:
                    lines.seek(printed_bytes)
                    said = lines.read().decode("utf-8", "replace")
                raise self._refused("PostgreSQL does not start", said)
            if time.monotonic() > deadline:
                raise LauncherError(f"PostgreSQL is not ready after {_START_SECONDS:.0f} s", f"see {self._log}")

    def _is_ready(self) -> bool:
        # The server's own word (LockFileAddToDataDir: line 8 is its state), without a connection.
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _refused(self, cause: str, said: str) -> LauncherError:
        otherwise = f"see {self._log}" if self._log.exists() else "see the message"
        return LauncherError(f"{cause}: {telling_line(said)}", self._mend(said, otherwise))

    def _mend(self, said: str, otherwise: str) -> str:
        return known_mend(said, self._data) or otherwise

    def _release(self) -> None:
        """Give up what `start` took. A server that still runs here is one whose start failed."""
        if self._process is not None and not self._exit_code.done():
            self._process.send_signal(signal.SIGQUIT)
            concurrent.futures.wait([self._exit_code], timeout=10.0)
        self._process = None
        if self._socket is not None and self._socket.parent != self._data:
            shutil.rmtree(self._socket, ignore_errors=True)
            (self._data / "socket").unlink(missing_ok=True)
        self._socket = None
        if self._launcher_lock is not None:
            os.close(self._launcher_lock)
            self._launcher_lock = None
