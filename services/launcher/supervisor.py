"""Keeps named child processes running, and never lets one outlive the supervisor.

A child's life:

```
            spawn            exits by itself
  stopped --------> running ----------------------------> waiting (backoff) --> running
     ^                 |  exits with code 2 at its first start
     |   stop()        v
     +------------- stopping: every child is stopped, wait() raises
```

Guarantees: a child runs in a process group of its own, so Ctrl-C reaches only the supervisor, which then stops the
children in order; a child dies with the supervisor, also when that is killed with SIGKILL. Not guaranteed: that what a
child itself has started dies with it. Linux only, by `PR_SET_PDEATHSIG`.
"""

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.launcher.errors import LauncherError
from services.launcher.guard import guarded_argv

BAD_START_CODE = 2
"""Exit code of a child that cannot start as configured. At its first start that is final: the next would fail alike.

Later it is a crash like any other: with this configuration the child has run before, so what it misses (a database in
recovery, a port just taken) may come back.
"""

_FIRST_DELAY_SECONDS = 0.2
_LONGEST_DELAY_SECONDS = 10.0
_SETTLED_AFTER_SECONDS = 30.0
_LONGEST_LINE_BYTES = 64 * 1024
# A grandchild may hold the pipe open after the child's exit; its lines are not worth delaying the restart.
_DRAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Child:
    """A process to keep running.

    Attributes:
        name: Unique within the supervisor.
        argv: Program and arguments.
        env: Its whole environment; None inherits the supervisor's.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A child runs (again)."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A child has ended. `code` is its exit code, or minus the number of the signal that ended it."""

    name: str
    code: int


@dataclass(frozen=True, slots=True)
class Restarting:
    """A child that ended unexpectedly will be started again after `delay_seconds`."""

    name: str
    delay_seconds: float


Event = Started | Exited | Restarting


class BadStart(LauncherError):
    """A child exited with `BAD_START_CODE` at its first start.

    Attributes:
        name: The child's.
    """

    def __init__(self, name: str) -> None:
        """Name the child.

        Args:
            name: The child's.
        """
        super().__init__(
            f"{name} refused to start (exit code {BAD_START_CODE})",
            "its last line above says why; everything else was stopped",
        )
        self.name = name


class Backoff:
    """How long to wait before the next start: 0.2 s, doubled up to 10 s, and from the front after 30 s of life."""

    def __init__(self) -> None:
        """Begin at the shortest delay."""
        self._next_seconds = _FIRST_DELAY_SECONDS

    def after(self, lived_seconds: float) -> float:
        """Tell the delay after a life of `lived_seconds`, and remember that it was used.

        Args:
            lived_seconds: From spawn to exit.

        Returns:
            Seconds to wait.
        """
        if lived_seconds >= _SETTLED_AFTER_SECONDS:
            self._next_seconds = _FIRST_DELAY_SECONDS
        delay = self._next_seconds
        self._next_seconds = min(delay * 2, _LONGEST_DELAY_SECONDS)
        return delay


class _Keeper:
    """One child: its process, its restarts, its lines."""

    def __init__(
        self,
        child: Child,
        on_line: Callable[[str, str], None],
        on_event: Callable[[Event], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._child = child
        self._on_line = on_line
        self._on_event = on_event
        self._on_failure = on_failure
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        await self._spawn()
        self._task = self._background(self._keep(), f"keep {self._child.name}")

    async def stop(self, grace_seconds: float) -> None:
        self._stopping.set()
        if self._task is None:
            return
        self.signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._task}, timeout=grace_seconds)
        if not done:
            self.signal(signal.SIGKILL)
            await asyncio.wait({self._task})
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGKILL)  # _keep failed and left it running
            await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended this moment; _keep sees that
                self._process.send_signal(number)

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._report)
        return task

    def _report(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            # SIGKILL: after a killed supervisor nobody is left to end a child whose drain hangs.
            *guarded_argv(self._child.argv, on_parent_death=signal.SIGKILL),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._child.env,
            process_group=0,
        )
        self._on_event(Started(self._child.name, self._process.pid))

    async def _keep(self) -> None:
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        for life in itertools.count():
            process = self._process
            assert process is not None
            assert process.stdout is not None
            began = loop.time()
            pump = self._background(self._pump(process.stdout), f"lines of {self._child.name}")
            code = await process.wait()
            await asyncio.wait({pump}, timeout=_DRAIN_SECONDS)
            pump.cancel()
            self._on_event(Exited(self._child.name, code))
            if self._stopping.is_set():
                return
            if code == BAD_START_CODE and life == 0:
                raise BadStart(self._child.name)
            lived_seconds = loop.time() - began
            while self._process is process:
                delay = backoff.after(lived_seconds)
                self._on_event(Restarting(self._child.name, delay))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
                    return
                try:
                    await self._spawn()
                except OSError as error:
                    # Out of memory or process ids: a state of the machine that passes, unlike a bad start.
                    self._on_line(self._child.name, f"cannot spawn: {error.strerror}")
                    lived_seconds = 0.0
            if self._stopping.is_set():
                self.signal(signal.SIGTERM)  # stop() came during the spawn and found no process to signal

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        # Not readline(): it raises on a line above its limit and loses the rest. Here such a line comes in pieces.
        rest = b""
        while chunk := await stream.read(_LONGEST_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _LONGEST_LINE_BYTES:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._on_line(self._child.name, line.decode("utf-8", "replace"))
        if rest:
            self._on_line(self._child.name, rest.decode("utf-8", "replace"))


class Supervisor:
    """Runs children until it is stopped or one of them reports a bad start at its first.

    The event loop's thread must live as long as the children: when it ends, the kernel kills them (`guarded_argv`).
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        on_line: Callable[[str, str], None],
        on_event: Callable[[Event], None],
        grace_seconds: float = 15.0,
    ) -> None:
        """Take the children; nothing is started yet.

        Args:
            children: In start order; they are stopped in the reverse order.
            on_line: Called in the loop with the child's name and one line of its stdout or stderr, without its end.
                Lines above 64 KiB come in pieces; bytes that are not UTF-8 come replaced. If it raises, all stop and
                `wait` raises that.
            on_event: Called in the loop for each change of a child. If it raises, all stop and `wait` raises that.
            grace_seconds: How long each child may take from SIGTERM to its exit before it gets SIGKILL.

        Raises:
            ValueError: Two children share a name.
        """
        self._failure: BaseException | None = None
        self._ended = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._grace_seconds = grace_seconds
        self._keepers = {child.name: _Keeper(child, on_line, on_event, self._fail) for child in children}
        if len(self._keepers) != len(children):
            raise ValueError("children must have different names")

    async def start(self) -> None:
        """Spawn every child in order, without waiting for any to be ready. Call it once.

        Raises:
            OSError: A process cannot be spawned at all (no memory, no process ids). Those already started are stopped.
        """
        try:
            for keeper in self._keepers.values():
                if self._stopping is not None:
                    return
                await keeper.start()
        except OSError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop every child in reverse start order: SIGTERM, a bounded wait, SIGKILL, and only then the next.

        Idempotent: later and concurrent calls wait for the first. Harmless before `start`.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop children")
        await asyncio.shield(self._stopping)

    async def wait(self) -> None:
        """Wait until every child has been stopped, whoever asked for it.

        Raises:
            BadStart: A child exited with `BAD_START_CODE` at its first start, and so all were stopped.
            Exception: A callback raised this, and so all were stopped.
        """
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    def pid(self, name: str) -> int | None:
        """Tell a child's process id.

        Args:
            name: The child's name.

        Returns:
            The id, or None while it does not run (not started, between two starts, stopped).

        Raises:
            KeyError: No child has this name.
        """
        return self._keepers[name].pid

    def kill(self, name: str) -> None:
        """Send SIGKILL to one child, as a fault; it is started again like after any crash. Nothing if it does not run.

        Args:
            name: The child's name.

        Raises:
            KeyError: No child has this name.
        """
        self._keepers[name].signal(signal.SIGKILL)

    async def _stop(self) -> None:
        for keeper in reversed(self._keepers.values()):
            await keeper.stop(self._grace_seconds)
        self._ended.set()

    def _fail(self, error: BaseException) -> None:
        if self._stopping is None:
            self._failure = error
            self._stopping = asyncio.create_task(self._stop(), name="stop children")
