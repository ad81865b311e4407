"""How the operators' commands reach the services: options, environment, or the file that `muster up` writes."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import click
from muster import Client, RetryPolicy
from muster.errors import DeadlineExceeded, MusterError, NotConfigured, Unauthenticated, Unavailable

P = ParamSpec("P")

CLIENT_FILE = "client.env"

# A person waits at the other end: long enough for a restart of the service, short enough not to look hung.
_POLICY = RetryPolicy(call_seconds=10.0, total_seconds=5.0)

_START = "start it (`muster up` or `muster serve`), or correct its address"

_VARIABLES = (
    "MUSTER_API_KEY",
    "MUSTER_API_KEY_FILE",
    "MUSTER_ALLOCATOR",
    "MUSTER_PERSONA_STORE",
    "MUSTER_SESSION_TRACKER",
    "MUSTER_ARCHIVER",
)


def connected(command: Callable[Concatenate[Client, P], Awaitable[None]]) -> Callable[P, None]:
    """Turns an async function of a client into a command: connects, runs it, and tells errors in one line."""

    @click.option(
        "--api-key-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File with the API key; else MUSTER_API_KEY, MUSTER_API_KEY_FILE, or what `muster up` wrote.",
    )
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        file = kwargs.pop("api_key_file", None)
        try:
            asyncio.run(_with_client(command, file if isinstance(file, Path) else None, args, kwargs))
        except MusterError as error:
            raise click.ClickException(told(error)) from None
        except KeyboardInterrupt:
            raise click.Abort from None

    return run


def told(error: MusterError) -> str:
    """Returns an error as one line for a person: reason, fields with their limits, metadata, and the mend."""
    if isinstance(error, NotConfigured):
        return f"{error.message}, or run `muster up` here"
    if isinstance(error, Unavailable) and not error.reason:
        return f"{_one_line(error.message)}: {_START}"
    if isinstance(error, DeadlineExceeded) and not error.reason:
        return f"{_one_line(error.message)}: it is slow, and its log may say why; or it is not there: {_START}"
    parts = [error.reason or error.code]
    if error.violations:
        parts.append("; ".join(f"{violation.field}: {violation.rule}" for violation in error.violations))
    else:
        parts.append(error.message)
        details = ", ".join(f"{name}={value}" for name, value in sorted(error.metadata.items()))
        if details:
            parts.append(f"({details})")
    if isinstance(error, Unauthenticated):
        parts.append("(`muster key create` makes one)")
    return _one_line(f"{parts[0]}: {' '.join(parts[1:])}")


def environment(api_key_file: Path | None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the client's variables: the option wins over the environment, and that over `muster up`'s file.

    The file is looked for in `$MUSTER_HOME`, or else in `.muster` below the working folder.
    """
    given = os.environ if environ is None else environ
    found = {name: given[name] for name in _VARIABLES if given.get(name)}
    if api_key_file is not None:
        found.pop("MUSTER_API_KEY", None)
        found["MUSTER_API_KEY_FILE"] = str(api_key_file)
    has_key = "MUSTER_API_KEY" in found or "MUSTER_API_KEY_FILE" in found
    for name, value in _written(Path(given.get("MUSTER_HOME") or ".muster") / CLIENT_FILE).items():
        # A key that is named elsewhere is not mixed with the file's: it may belong to another organization.
        if not (has_key and name.startswith("MUSTER_API_KEY")):
            found.setdefault(name, value)
    return found


def _written(file: Path) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read {file}: {error}: mend or remove it") from None
    found = {}
    for line in text.splitlines():
        try:
            # A shell's file: values may be quoted.
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise click.ClickException(f"cannot read {file}: {error}: mend or remove it") from None
        name, separator, value = words[0].partition("=") if len(words) == 1 else ("", "", "")
        if separator and name in _VARIABLES:
            found[name] = value
    return found


async def _with_client(
    command: Callable[..., Awaitable[None]], api_key_file: Path | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    async with Client.from_environment(environment(api_key_file), policy=_POLICY) as client:
        await command(client, *args, **kwargs)


def _one_line(text: str) -> str:
    return " ".join(text.split())
