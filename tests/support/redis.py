"""A real Redis for tests: a server of a test's own, to be killed, stopped and restarted.

Which program: `redis-server` on PATH; else Debian's package, unpacked once into `.cache/redis` without being installed;
else tests that need it skip and say so.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launcher.guard import guarded_argv

_CACHE = Path(__file__).parents[2] / ".cache" / "redis"
# What the server links to beyond the C library; names that a release of Debian does not know are left out.
_PACKAGES = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libssl3", "libsystemd0", "libatomic1")
_SECONDS = 20.0
_POLL_SECONDS = 0.005


@functools.cache
def find_program() -> tuple[str, str] | None:
    """Tell where the server's program is and which folders its libraries need; None where there is none."""
    found = shutil.which("redis-server")
    if found is not None:
        return found, ""
    program = _CACHE / "usr/bin/redis-server"
    if not program.exists() and not _unpack():
        return None
    return str(program), ":".join(sorted({str(path.parent) for path in _CACHE.rglob("*.so*")}))


def _unpack() -> bool:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return False
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (_CACHE / "usr/bin/redis-server").exists():
            return True
        for package in _PACKAGES:
            subprocess.run(["apt-get", "download", package], cwd=_CACHE, capture_output=True, check=False)
        for archive in _CACHE.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=_CACHE, capture_output=True, check=False)
    return (_CACHE / "usr/bin/redis-server").exists()


def pytest_report_header() -> str:
    """Name the program in the report's header."""
    # Not looked up by `find_program`, which may download one: most sessions need none.
    found = shutil.which("redis-server")
    return f"redis: {found or 'the package unpacked into .cache/redis, if a test needs it'}"


class RedisServer:
    """A server on a socket of its own, which keeps nothing on disk.

    Attributes:
        url: Where it answers; the same after a restart.
        pid: Of the running process.
    """

    def __init__(self, folder: Path, program: str, libraries: str) -> None:
        """Prepare it.

        Args:
            folder: Its own, with a short path: the name of a socket has at most 107 characters.
            program: The server.
            libraries: Folders of its libraries; empty for the system's.
        """
        self._socket = folder / "redis.sock"
        self._folder = folder
        self._program = program
        self._environment = os.environ | ({"LD_LIBRARY_PATH": libraries} if libraries else {})
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        assert self._process is None, "it runs"
        self._socket.unlink(missing_ok=True)
        # fmt: off
        argv = [
            self._program, "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder), "--save", "",
            "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning", "--logfile", "redis.log",
        ]
        # fmt: on
        self._process = subprocess.Popen(
            guarded_argv(argv, on_parent_death=signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment,
        )
        deadline = time.monotonic() + _SECONDS
        while not self._answers():
            assert self._process.poll() is None, f"it ended with code {self._process.returncode}"
            assert time.monotonic() < deadline, "it does not answer"
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
            except OSError:
                return False

    def kill(self) -> None:
        """Kill it at once, as a failed machine does; everything it held is gone."""
        assert self._process is not None, "it does not run"
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Kill it and start it empty."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop its process: connections stay open and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let its process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def call(self, *words: str) -> bytes:
        """Send a command on a connection of its own and return the answer, unparsed.

        Args:
            words: The command and its arguments.
        """
        request = b"".join(
            [f"*{len(words)}\r\n".encode(), *(f"${len(word.encode())}\r\n{word}\r\n".encode() for word in words)]
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(str(self._socket))
            connection.sendall(request)
            return connection.recv(2**20)

    def close(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self.kill()


@contextlib.contextmanager
def running_redis() -> Iterator[RedisServer]:
    """Give a server of one's own; skips the test where there is no program."""
    found = find_program()
    if found is None:
        pytest.skip("no redis-server: it is neither on PATH nor can apt-get download it")
    folder = Path(tempfile.mkdtemp(prefix="muster-redis-"))
    server = RedisServer(folder, *found)
    try:
        server.start()
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of the test's own."""
    with running_redis() as server:
        yield server
