"""The demo's child processes, which do not outlive it.

Such a child is told by the kernel (on Linux) when its parent is gone, so that a demo killed with `kill -9` leaves
nothing behind.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# PR_SET_PDEATHSIG is 1 in <linux/prctl.h>. The parent may have died before the call, hence the look at the parent's id.
_TIE_TO_PARENT = """\
import ctypes, os, sys
parent, signal_number = int(sys.argv[1]), int(sys.argv[2])
del sys.argv[1:3]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal_number)
if os.getppid() != parent:
    sys.exit("the process that started this one is gone")
"""


class ChildFailed(RuntimeError):
    """A child process ended, or gave no sign of life, before it was ready."""


def child_command(
    code: str, *arguments: str, interpreter_flags: Sequence[str] = (), death_signal: signal.Signals = signal.SIGTERM
) -> list[str]:
    """Build the command line of a Python child that does not outlive this process.

    The tie is to the *thread* that starts the child, as the kernel has it: start children from the main thread.
    Off Linux there is no such tie, and the child must be stopped by its id.

    Args:
        code: Python source which the child runs; it finds `arguments` in `sys.argv[1:]`.
        arguments: The child's own arguments.
        interpreter_flags: Options of the interpreter, such as `-I`.
        death_signal: What the kernel sends the child when its parent dies.

    Returns:
        The command line, to be started by the calling process.
    """
    ids = (str(os.getpid()), str(int(death_signal)))
    return [sys.executable, *interpreter_flags, "-c", _TIE_TO_PARENT + code, *ids, *arguments]


def fresh_folder(folder: Path, *stale: str) -> Path:
    """Make a folder for a child process, or clear it of what an earlier one left.

    Args:
        folder: The folder; its parents are made as well.
        stale: Names of files in it to remove.

    Returns:
        Its absolute path, which means the same in a child with another working directory.

    Raises:
        OSError: It cannot be made, or a file not removed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return folder


async def start_child(
    code: str, *arguments: str, error_path: Path, environ: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start a Python child that leads its own process group and writes what it prints to a file.

    Args:
        code: Python source which the child runs in the folder that holds the package `demo`.
        arguments: The child's own arguments.
        error_path: Where its output and errors go; replaced.
        environ: Its whole environment; None inherits this process's.

    Returns:
        The child, to be stopped with `stop_child`.

    Raises:
        OSError: The file cannot be written, or the process cannot be started.
    """
    with error_path.open("wb") as errors:
        return await asyncio.create_subprocess_exec(
            *child_command(code, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=environ,
            cwd=Path(__file__).parent.parent,
            # Ctrl-C on the terminal reaches the demo alone, which then stops its children in order.
            start_new_session=True,
        )


async def stop_child(process: asyncio.subprocess.Process, grace_seconds: float) -> None:
    """Stop a child that leads its own process group: SIGTERM, and SIGKILL for the group once the grace is over.

    Stopping a child that has ended, or stopping it twice, does nothing.

    Args:
        process: The child, started with `start_new_session=True`.
        grace_seconds: How long it may take to end by itself.
    """
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace_seconds)
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
