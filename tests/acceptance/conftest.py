"""The real `muster` command in processes of its own, and what a test sees of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

MUSTER = Path(sys.executable).with_name("muster")
SERVICES = ("allocator", "persona_store", "session_tracker", "archiver")
# A method of each service that an empty request lists things with, for any key of the operator's.
LISTINGS = {
    "allocator": "/muster.allocator.v1.SlotService/ListSlots",
    "persona_store": "/muster.persona_store.v1.PersonaService/ListPersonas",
    "session_tracker": "/muster.session_tracker.v1.WatchService/ListSessions",
    "archiver": "/muster.archiver.v1.PolicyService/ListPolicies",
}

SECONDS = 60.0
_POLL_SECONDS = 0.02

Found = TypeVar("Found")


def until(found: Callable[[], Found | None], what: str, seconds: float = SECONDS) -> Found:
    """Returns the first answer of `found` that is true.

    Raises:
        AssertionError: there is none within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        if answer := found():
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)


def environment(**more: str) -> dict[str, str]:
    """Returns this process's environment without settings of Muster, and with `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")} | more


def serves(address: str) -> bool:
    """Whether a service answers that it serves."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def answer_to(address: str, method: str, key: str) -> grpc.StatusCode:
    """Returns the status of a call with an empty request."""
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(method)
        try:
            call(b"", metadata=(("authorization", f"Bearer {key}"),), timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK


class Command:
    """A `muster` command that runs."""

    def __init__(self, folder: Path, arguments: list[str], environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # A group of its own, as a shell gives each command, so that Ctrl-C does not reach the tests.
            self.process = subprocess.Popen(
                [str(MUSTER), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(environ),
                process_group=0,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What it has printed so far."""
        return self._err.read_text(encoding="utf-8")

    def logged(self, event: str) -> dict[str, Any] | None:
        """Returns the first log line of an event, or None so far.

        Raises:
            AssertionError: the command has ended, and so will never log it.
        """
        ended = self.process.poll() is not None
        for line in self.stderr.splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                logged: dict[str, Any] = json.loads(line)
                if logged.get("event") == event:
                    return logged
        assert not ended, f"ended with code {self.process.returncode}: {self.stderr}"
        return None

    def family(self) -> list[psutil.Process]:
        """Returns what it has started and this was called for; each is remembered, to be found after its death."""
        # Once it has ended, its process id may be somebody else's, whose children are none of ours.
        if self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    self._seen.setdefault(child.pid, child)
        return list(self._seen.values())

    def press_ctrl_c(self) -> None:
        """Sends what a terminal sends, to all that a terminal sends it to."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = SECONDS) -> int:
        """Waits for its end and returns the exit code."""
        return self.process.wait(seconds)

    def left(self, seconds: float = SECONDS) -> list[psutil.Process]:
        """Returns what still runs of its family after `seconds`."""
        alive = psutil.wait_procs(self._seen.values(), timeout=seconds)[1]
        return [process for process in alive if not _is_zombie(process)]

    def dispose(self) -> None:
        """Kills all of it."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=SECONDS)


class Up(Command):
    """A `muster up` on a data folder."""

    def __init__(self, folder: Path, data: Path, *arguments: str, **environ: str) -> None:
        self.data = data
        super().__init__(
            folder,
            ["up", "--data", str(data), "--port", "0", "--metrics-port", "0", *arguments],
            environment(**environ),
        )

    def _file(self, name: str) -> str | None:
        assert self.process.poll() is None, f"ended with code {self.process.returncode}: {self.stderr}"
        path = self.data / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    def client_environment(self) -> dict[str, str]:
        """Returns the variables of `client.env`, when they are there."""
        text = until(lambda: self._file("client.env"), "client.env")
        return dict(line.split("=", 1) for line in shlex.split(text))

    def endpoint(self, service: str) -> str:
        """Returns where a service's gRPC port is."""
        return self.client_environment()[f"MUSTER_{service.upper()}"]

    def key(self) -> str:
        """Returns the operator's key."""
        return Path(self.client_environment()["MUSTER_API_KEY_FILE"]).read_text(encoding="utf-8").strip()

    def wait_ready(self) -> None:
        """Waits until all services serve and the command has said so."""
        for service in SERVICES:
            address = self.endpoint(service)
            until(lambda address=address: self.alive() and serves(address), f"{service} serves")  # type: ignore[misc]
        until(lambda: self.alive() and "Ctrl-C stops" in self.stdout, "the introduction")
        self.family()

    def alive(self) -> bool:
        """Whether it runs. Raises: AssertionError, if not, with what it said."""
        assert self.process.poll() is None, f"ended with code {self.process.returncode}: {self.stderr}"
        return True

    def service(self, name: str) -> psutil.Process | None:
        """Returns the process of a service, or None while there is none."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                # The wrapper of a start has the service's arguments too, behind its own.
                if child.cmdline()[1:6] == ["-P", "-m", "services.cli.main", "serve", name]:
                    return child
        return None

    def database(self) -> psutil.Process | None:
        """Returns the database's first process, or None while there is none."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "postgres":
                    return child
        return None

    def metrics(self, service: str) -> str:
        """Returns what a service's metrics port says."""
        listen = tomllib.loads((self.data / "muster.toml").read_text())[service]["metrics"]["listen"]
        with urllib.request.urlopen(f"http://{listen}/metrics", timeout=10) as response:
            text: str = response.read().decode()
        return text


def _is_zombie(process: psutil.Process) -> bool:
    # Where process 1 reaps nobody, as in many containers, what lost its parent stays listed after its end.
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class StartUp:
    """Starts `muster up` in folders of a test's own; at the test's end nothing of it is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._started = 0

    def __call__(self, *arguments: str, data: Path | None = None, **environ: str) -> Up:
        """Starts it on `data`, by default one folder for the whole test. Does not wait."""
        self._started += 1
        data = data or self.folder / "data"
        if data.is_dir():
            # What an earlier run wrote says nothing of this one.
            (data / "client.env").unlink(missing_ok=True)
        started = Up(self.folder / f"run-{self._started}", data, *arguments, **environ)
        self._stack.callback(started.dispose)
        return started

    def ready(self) -> Up:
        """Starts it and waits until all serve."""
        started = self()
        started.wait_ready()
        return started

    def close(self) -> None:
        """Kills what is left."""
        self._stack.close()


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """Starts `muster up` in processes of its own."""
    start = StartUp(tmp_path)
    yield start
    start.close()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A suite for the tests of a module that leave it as ready as they found it."""
    start = StartUp(tmp_path_factory.mktemp("suite"))
    try:
        # A path that a shell, TOML, a URI and rich's markup would each read wrongly.
        started = start(data=start.folder / "the [bold] folder of 'x' & \"y\" \u00e4")
        started.wait_ready()
        yield started
    finally:
        start.close()
