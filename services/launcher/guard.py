"""Starts a program that dies with its parent, and that gives up root first where it should.

The kernel forgets the parent-death signal when a process changes its user, so a wrapper between fork and exec asks for
it last. What was tried: `docs/decisions/0003-embedded-postgresql.md`. Linux only, by `PR_SET_PDEATHSIG`.
"""

import inspect
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Owner:
    """The unprivileged user a process becomes before its program runs.

    Attributes:
        uid: User id, not 0.
        gid: The only group id it keeps.
        keeps_file_access: Keep `CAP_DAC_OVERRIDE`, for a program or data below a folder that this user cannot enter.
    """

    uid: int
    gid: int
    keeps_file_access: bool = False


def _exec_guarded() -> None:
    # This runs as a program of its own (`guarded_argv`), so it names everything it needs. It is not a preexec_fn: that
    # would fork a process which has threads (gRPC's among them), where a lock held by a thread is held for ever.
    import ctypes
    import json
    import os
    import sys

    spec = json.loads(sys.argv[1])
    argv = sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    doing = f"start {argv[0]}"
    try:
        if spec["owner"] is not None:
            uid, gid, keeps_file_access = spec["owner"]
            if keeps_file_access:
                doing = f"keep CAP_DAC_OVERRIDE as user {uid}"
                # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP: else setuid clears every capability, and later access(2),
                # which the server asks about its own binaries, leaves them out for a user other than 0.
                must(libc.prctl(28, 1 << 2, 0, 0, 0))
            doing = f"become user {uid}"
            os.setgroups([gid])
            os.setgid(gid)
            os.setuid(uid)
            if keeps_file_access:
                doing = f"keep CAP_DAC_OVERRIDE as user {uid}"
                bit = 1 << 1  # CAP_DAC_OVERRIDE; every other capability is given up here
                must(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)))
                must(libc.prctl(47, 2, 1, 0, 0))  # PR_CAP_AMBIENT_RAISE: only the ambient set survives the exec
            doing = f"start {argv[0]}"
        # After setuid, which clears it; exec of a program without set-user-id or file capabilities keeps it.
        must(libc.prctl(1, spec["signal"], 0, 0, 0))  # PR_SET_PDEATHSIG
        if os.getppid() != spec["parent"]:
            sys.exit(0)  # the parent died before the line above could see it
        os.execvp(argv[0], argv)  # noqa: S606  # a shell between would be the parent
    except OSError as error:
        sys.stderr.write(f"cannot {doing}: {error.strerror}\n")
        sys.exit(2)


_EXEC_GUARDED = inspect.getsource(_exec_guarded) + "\n_exec_guarded()\n"


def guarded_argv(argv: Sequence[str], *, on_parent_death: signal.Signals, owner: Owner | None = None) -> list[str]:
    """Wrap a command so that it gets a signal when its parent dies, and optionally gives up root.

    The kernel sends the signal when the *thread* that spawned the process ends: spawn from a thread that lives as long
    as the process should. The wrapper is a bare interpreter that replaces itself by the command (measured: 10 ms), so
    the process id is the command's own. A command that cannot be run prints one line and exits with code 2, which the
    supervisor takes for a bad start.

    Args:
        argv: Program (a path, or a name on `PATH`) and arguments.
        on_parent_death: What the kernel sends to the command.
        owner: The user it becomes first; only root can do that. None keeps the caller's.

    Returns:
        The argv to spawn, from this process and no other.
    """
    spec = {
        "parent": os.getpid(),
        "signal": int(on_parent_death),
        "owner": [owner.uid, owner.gid, owner.keeps_file_access] if owner else None,
    }
    # -I and -S: neither the caller's environment nor its site-packages can change what runs here, perhaps as root.
    return [sys.executable, "-I", "-S", "-c", _EXEC_GUARDED, json.dumps(spec), *argv]
