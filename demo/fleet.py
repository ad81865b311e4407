"""The fleet: eight worker processes, and what is done to them on purpose."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from demo import journal
from demo.children import start_child, stop_child

SIZE = 8
_RUN_WORKER = "from demo.worker import run; run()"


class Fleet:
    """Worker processes by name, `worker-1` and so on.

    Args:
        site: The site's base URL.
        folder: Where journals, profiles and logs go.
        environ: The MUSTER_* variables for the client package.
        idle_seconds: After how long without work a worker ends.
    """

    def __init__(self, site: str, folder: Path, environ: Mapping[str, str], idle_seconds: float) -> None:
        self._site = site
        self._folder = folder
        self._environ = {**os.environ, **environ}
        self._idle_seconds = idle_seconds
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._expected_to_fail: set[int] = set()
        for name in ("journals", "profiles", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def journals(self) -> Path:
        """The folder of the workers' journals."""
        return self._folder / "journals"

    async def start(self, name: str) -> None:
        """Starts a worker, or another in the place of one that was killed."""
        number = len(list((self._folder / "logs").glob(f"{name}*.log")))
        self._processes[name] = await start_child(
            _RUN_WORKER,
            *("--name", name, "--site", self._site, "--work", str(self._folder)),
            *("--idle-seconds", str(self._idle_seconds)),
            error_path=self._folder / "logs" / f"{name}-{number}.log",
            environ=self._environ,
        )

    async def start_all(self) -> None:
        """Starts the whole fleet."""
        for number in range(1, SIZE + 1):
            await self.start(f"worker-{number}")

    def running(self) -> list[str]:
        """Returns the names of the workers that have not ended."""
        return [name for name, process in self._processes.items() if process.returncode is None]

    async def kill(self, name: str) -> None:
        """Ends a worker as a power cut would."""
        process = self._processes[name]
        self._expected_to_fail.add(process.pid)
        process.kill()
        await process.wait()

    def pause(self, name: str) -> None:
        """Stops a worker in its tracks; it does not notice."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Lets a paused worker go on."""
        self._processes[name].send_signal(signal.SIGCONT)

    async def wait(self) -> list[str]:
        """Waits until all have ended; returns those that ended badly, with their last words."""
        await asyncio.gather(*(process.wait() for process in self._processes.values()))
        return [
            f"{name}: code {process.returncode}: {self._last_words(name)}"
            for name, process in self._processes.items()
            if process.returncode != 0 and process.pid not in self._expected_to_fail
        ]

    async def stop(self) -> None:
        """Stops whoever still runs."""
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        await asyncio.gather(*(stop_child(process, 5) for process in self._processes.values()))

    def under_way(self) -> dict[str, journal.Leased]:
        """Returns what each running worker holds by its own journal: leased, and neither crawled nor submitted."""
        held: dict[str, journal.Leased] = {}
        for entry in journal.read(self.journals):
            if isinstance(entry, journal.Leased):
                held[entry.worker] = entry
            elif held.get(entry.worker) is not None and held[entry.worker].allocation_key == entry.allocation_key:
                del held[entry.worker]
        return {name: entry for name, entry in held.items() if name in self.running()}

    def _last_words(self, name: str) -> str:
        logs = sorted((self._folder / "logs").glob(f"{name}-*.log"))
        lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines() if logs else []
        return lines[-1] if lines else "it said nothing"
