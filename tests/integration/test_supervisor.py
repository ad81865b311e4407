"""The supervisor keeps its children running, stops them in order, and takes them along when it dies."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from services.launcher.errors import LauncherError
from services.launcher.supervisor import Backoff, Child, Event, Exited, Restarting, Started, Supervisor

REPOSITORY = Path(__file__).parents[2]
SECONDS = 30.0

FOREVER = "print('up', flush=True); signal.pause()"
# Ends by itself on SIGTERM, with a word, so that the order of stops can be seen.
# Not by print, which a signal in the middle of another print makes fail.
POLITE = "import os; signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'bye\\n'), sys.exit(0))); " + FOREVER
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER
SUPERVISOR = """
import asyncio, sys
from services.launcher.supervisor import Child, Supervisor

async def main():
    children = [Child(str(n), [sys.executable, "-c", sys.argv[1]]) for n in range(3)]
    up = asyncio.Semaphore(0)
    supervisor = Supervisor(children, on_line=lambda name, line: up.release(), on_event=lambda event: None)
    await supervisor.start()
    for _ in children:
        await up.acquire()
    print(*(supervisor.pid(child.name) for child in children), flush=True)
    await supervisor.wait()

asyncio.run(main())
"""


def child(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-c", "import os, signal, sys, time; " + code])


class Watched:
    """A supervisor with everything it told, and a way to wait for it."""

    def __init__(self, *children: Child, grace_seconds: float = SECONDS) -> None:
        self.lines: list[tuple[str, str]] = []
        self.events: list[Event] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.supervisor = Supervisor(
            children, on_line=self._on_line, on_event=self._on_event, grace_seconds=grace_seconds
        )

    def _on_line(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._tell()

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self._tell()

    def _tell(self) -> None:
        async def notify() -> None:
            async with self._news:
                self._news.notify_all()

        task = asyncio.create_task(notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS), self._news:
            await self._news.wait_for(true)

    def count(self, kind: type[Event], name: str) -> int:
        return sum(isinstance(event, kind) and event.name == name for event in self.events)


@contextlib.asynccontextmanager
async def running(*children: Child, grace_seconds: float = SECONDS) -> AsyncIterator[Watched]:
    watched = Watched(*children, grace_seconds=grace_seconds)
    await watched.supervisor.start()
    try:
        yield watched
    finally:
        await watched.supervisor.stop()


async def test_a_child_that_ends_is_started_again_later_and_later() -> None:
    async with running(child("a", "sys.exit(1)")) as watched:
        await watched.until(lambda: watched.count(Started, "a") == 4)
        delays = [event.delay_seconds for event in watched.events if isinstance(event, Restarting)]
        assert delays[:3] == [0.2, 0.4, 0.8]
        assert Exited("a", 1) in watched.events


def test_the_backoff_is_bounded_and_forgets_after_a_long_life() -> None:
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert backoff.after(30.0) == 0.2
    assert backoff.after(29.9) == 0.4


async def test_a_killed_child_comes_back_under_another_id_and_the_others_stay() -> None:
    async with running(child("a", FOREVER), child("b", FOREVER)) as watched:
        await watched.until(lambda: len(watched.lines) == 2)
        first, other = watched.supervisor.pid("a"), watched.supervisor.pid("b")
        watched.supervisor.kill("a")
        await watched.until(lambda: watched.lines.count(("a", "up")) == 2)
        assert Exited("a", -signal.SIGKILL) in watched.events
        assert watched.supervisor.pid("a") not in (None, first)
        assert watched.supervisor.pid("b") == other


async def test_children_stop_one_after_the_other_in_reverse_order() -> None:
    async with running(*(child(name, POLITE) for name in "abc")) as watched:
        await watched.until(lambda: len(watched.lines) == 3)
        await asyncio.gather(watched.supervisor.stop(), watched.supervisor.stop())
        ends = [event for event in watched.events if not isinstance(event, Started)]
        assert ends == [Exited("c", 0), Exited("b", 0), Exited("a", 0)]
        assert [line for line in watched.lines if line[1] == "bye"] == [("c", "bye"), ("b", "bye"), ("a", "bye")]
        assert watched.supervisor.pid("a") is None
        watched.supervisor.kill("a")
        await watched.supervisor.wait()


async def test_a_child_that_ignores_the_request_is_killed() -> None:
    async with running(child("deaf", DEAF), grace_seconds=0.2) as watched:
        await watched.until(lambda: len(watched.lines) == 1)
        await watched.supervisor.stop()
        assert watched.events[-1] == Exited("deaf", -signal.SIGKILL)


async def test_a_bad_start_stops_everything_and_is_reported() -> None:
    bad = child("bad", "sys.stdin.read(); print('port 50051 is in use; choose another', file=sys.stderr); sys.exit(2)")
    async with running(child("good", POLITE), bad) as watched:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(
                LauncherError, match=r"bad refused to start \(exit code 2\); its last line above says why"
            ):
                await watched.supervisor.wait()
        assert ("bad", "port 50051 is in use; choose another") in watched.lines
        assert watched.count(Restarting, "bad") == 0
        assert watched.count(Exited, "good") == 1


async def test_a_program_that_is_not_there_is_a_bad_start() -> None:
    async with running(Child("gone", ["/nowhere/program"])) as watched:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(LauncherError, match="gone refused to start"):
                await watched.supervisor.wait()
        assert watched.lines == [("gone", "cannot start /nowhere/program: No such file or directory")]


async def test_stop_is_harmless_before_start_and_during_a_backoff() -> None:
    never = Watched(child("a", FOREVER))
    await never.supervisor.stop()
    await never.supervisor.wait()
    async with running(child("a", "sys.exit(1)")) as watched:
        await watched.until(lambda: watched.count(Restarting, "a") == 3)
        await watched.supervisor.stop()
        assert watched.supervisor.pid("a") is None
        assert isinstance(watched.events[-1], Restarting)


async def test_lines_of_any_length_and_bytes_arrive() -> None:
    code = "sys.stdout.buffer.write(b'x' * 200_000 + b'\\n\\xff\\n' + b'no end'); sys.stdout.flush(); signal.pause()"
    async with running(child("a", code)) as watched:
        await watched.until(lambda: len(watched.lines) >= 5)
        await watched.supervisor.stop()
        text = [line for _, line in watched.lines]
        assert text[-2:] == ["\ufffd", "no end"]
        assert "".join(text[:-2]) == "x" * 200_000


async def test_a_callback_that_fails_stops_everything() -> None:
    def broken(name: str, line: str) -> None:
        raise BrokenPipeError(f"{name}: {line}")

    supervisor = Supervisor([child("a", POLITE), child("b", FOREVER)], on_line=broken, on_event=lambda event: None)
    await supervisor.start()
    async with asyncio.timeout(SECONDS):
        with pytest.raises(BrokenPipeError):
            await supervisor.wait()
    assert supervisor.pid("a") is None
    assert supervisor.pid("b") is None


def test_no_child_outlives_a_killed_supervisor() -> None:
    code = "import signal; " + DEAF
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        children = [psutil.Process(int(pid)) for pid in supervisor.stdout.readline().split()]
        assert len(children) == 3
    finally:
        supervisor.kill()
        supervisor.communicate()
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    assert alive == []


def test_two_children_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        Watched(child("a", FOREVER), child("a", FOREVER))
