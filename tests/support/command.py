"""The `muster` command as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Returns the one JSON document that it printed."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def json_lines(self) -> list[Any]:
        """Returns the documents that it printed, one in each line, however it ended."""
        return [json.loads(line) for line in self.out.splitlines()]


class Muster:
    """Runs `muster` in a folder, with the variables that are given and no others of its own."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("MUSTER_")} | variables

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Starts a command."""
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.cli.main",
            *arguments,
            cwd=self.folder,
            env=self.environ | {"PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "sdk" / "python")))},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def __call__(self, *arguments: str) -> Ended:
        """Runs a command to its end, which must come within 30 s and without a traceback."""
        process = await self.start(*arguments)
        try:
            async with asyncio.timeout(30):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        assert "Traceback" not in err.decode(), err.decode()
        return Ended(process.returncode, out.decode(), err.decode())
