"""`muster exit`: pooled exits, their health, and external providers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click
from muster import Client, ExitCapMode, ExitSpec
from muster.exits import Exit

from services.cli.acting import repeatable
from services.cli.connection import connected
from services.cli.output import json_option, parsed_duration, show_json, show_table

_MODES = [mode.name.lower().replace("_", "-") for mode in ExitCapMode if mode]
_COLUMNS = ("endpoint", "region", "cap_mode", "cap", "window_seconds")
# The contract's bound on one request, which registers all of its exits or none.
_ROWS = 500


@click.group("exit")
def exit_() -> None:
    """Exits: the proxies that runs leave through, and external providers of them."""


@exit_.command()
@click.argument("endpoints", nargs=-1, required=True, metavar="ENDPOINT...")
@click.option("--region", default="", help="The region they leave from.")
@click.option("--cap", type=click.IntRange(0, 2**32 - 1), default=0, help="The most uses; 0 means 20.")
@click.option(
    "--cap-mode",
    type=click.Choice(_MODES),
    default="until-toggle",
    show_default=True,
    help="When a use is given back: at a toggle, at its lease's end, or at the window's end.",
)
@click.option("--window", callback=parsed_duration, help="The window of per-window, such as 1h.")
@json_option
@connected
async def add(
    client: Client,
    endpoints: tuple[str, ...],
    region: str,
    cap: int,
    cap_mode: str,
    window: timedelta | None,
    as_json: bool,
) -> None:
    """Register exits, such as http://10.0.0.5:3128; one that stands keeps its counters. Safe to repeat."""
    specs = [ExitSpec(endpoint, region, _mode(cap_mode), cap, window or timedelta(0)) for endpoint in endpoints]
    _show(await client.exits.add(specs), as_json)


@exit_.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@json_option
@connected
async def import_file(client: Client, file: Path, as_json: bool) -> None:
    """Register the exits of a CSV FILE: endpoint, region, cap_mode, cap and window_seconds. Safe to repeat.

    Only endpoint is required. A file with a wrong row registers nothing; one of more than 500 rows goes in pieces of
    500, each of which is registered whole or not at all.
    """
    specs = _specs(file)
    made: list[Exit] = []
    for start in range(0, len(specs), _ROWS):
        made += await client.exits.add(specs[start : start + _ROWS])
    if as_json:
        show_json(made)
    else:
        click.echo(f"{len(made)} exit(s) registered")


@exit_.command("list")
@json_option
@connected
async def list_exits(client: Client, as_json: bool) -> None:
    """List exits with their uses."""
    _show([one async for one in client.exits.list(page_size=1000)], as_json)


@exit_.command()
@click.argument("exit_id")
@click.option("--reason", default="", help="For the log.")
@json_option
@connected
@repeatable
async def toggle(client: Client, exit_id: str, reason: str, request_id: str, as_json: bool) -> None:
    """Say that an exit has a new address: its uses start from 0."""
    _show([await client.exits.toggle(exit_id, reason=reason, request_id=request_id)], as_json)


@exit_.command()
@click.argument("exit_id")
@connected
async def enable(client: Client, exit_id: str) -> None:
    """Hand an exit out again."""
    await client.exits.set_enabled(exit_id, True)
    click.echo("enabled")


@exit_.command()
@click.argument("exit_id")
@connected
async def disable(client: Client, exit_id: str) -> None:
    """Take an exit out of use; live leases keep it."""
    await client.exits.set_enabled(exit_id, False)
    click.echo("disabled")


@exit_.command()
@click.argument("exit_ids", nargs=-1, required=True, metavar="EXIT_ID...")
@connected
async def delete(client: Client, exit_ids: tuple[str, ...]) -> None:
    """Forget exits that are disabled and that no live lease has; their toggles stay."""
    for exit_id in exit_ids:
        click.echo(f"{exit_id} {'deleted' if await client.exits.delete(exit_id) else 'was not there'}")


@exit_.command()
@click.argument("exit_id", default="")
@json_option
@connected
async def toggles(client: Client, exit_id: str, as_json: bool) -> None:
    """List the toggles of one exit, or of all, newest first."""
    found = [one async for one in client.exits.toggles(exit_id)]
    if as_json:
        show_json(found)
        return
    rows = [(one.exit_id, one.toggled_at, one.use_count_before, one.actor, one.reason) for one in found]
    show_table(("exit", "when", "uses before", "key", "reason"), rows)


@exit_.command()
@click.argument("exit_id", default="")
@click.option("--target", default="", help="Only towards this target.")
@json_option
@connected
async def health(client: Client, exit_id: str, target: str, as_json: bool) -> None:
    """List the exits that cool down, or did lately, for a target."""
    found = [one async for one in client.exits.health(exit_id=exit_id, target=target, page_size=1000)]
    if as_json:
        show_json(found)
        return
    show_table(
        ("exit", "target", "signal", "faults", "cooling until", "reported"),
        [(one.exit_id, one.target, one.signal, one.faults, one.cooling_until, one.reported_at) for one in found],
    )


@exit_.command()
@click.argument("exit_id")
@click.option("--target", help="Only for this target; else for all.")
@connected
async def clear(client: Client, exit_id: str, target: str | None) -> None:
    """End the cool-downs of an exit."""
    click.echo(f"{await client.exits.clear_health(exit_id, target=target)} cool-down(s) ended")


@exit_.command()
@click.option("--region", default="", help="Only exits of this region.")
@json_option
@connected
async def forecast(client: Client, region: str, as_json: bool) -> None:
    """Say when the pool will be used up, at the pace of the last 15 minutes."""
    found = await client.exits.forecast(region=region)
    if as_json:
        show_json(found)
        return
    pace = f"{found.uses_per_minute:.4g} a minute" if found.observed else "at a pace not known yet"
    end = f"empty at {found.empty_at.astimezone():%Y-%m-%d %H:%M:%S}" if found.empty_at else "not being used up"
    click.echo(f"{found.room} of {found.capacity} use(s) left, taken {pace}: {end}")


@exit_.command()
@json_option
@connected
async def providers(client: Client, as_json: bool) -> None:
    """List the external providers and how their last calls went."""
    found = await client.exits.providers()
    if as_json:
        show_json(found)
        return
    show_table(
        ("provider", "available", "answered", "held", "orphans released", "releases pending", "last error"),
        [
            (
                one.name,
                one.available,
                one.answered_at,
                one.held,
                one.orphans_released,
                one.releases_pending,
                one.last_error,
            )
            for one in found
        ],
    )


def _mode(name: str) -> ExitCapMode:
    return ExitCapMode[name.upper().replace("-", "_")]


def _specs(file: Path) -> list[ExitSpec]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            unknown = sorted(set(reader.fieldnames or ()) - set(_COLUMNS))
            if unknown or "endpoint" not in (reader.fieldnames or ()):
                fault = f"unknown columns {', '.join(unknown)}" if unknown else "missing column endpoint"
                raise click.ClickException(f"{file}: {fault}; known are {', '.join(_COLUMNS)}")
            return [_spec(file, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise click.ClickException(f"{file} cannot be read as CSV in UTF-8: {error}") from None


def _spec(file: Path, line: int, row: dict[str, str]) -> ExitSpec:
    if None in row or None in row.values():
        raise click.ClickException(f"{file}, line {line}: another number of columns than the first line")
    mode = (row.get("cap_mode") or "until_toggle").strip().lower().replace("_", "-")
    if mode not in _MODES:
        raise click.ClickException(f"{file}, line {line}: cap_mode must be one of {', '.join(_MODES)}")
    numbers = []
    for name in ("cap", "window_seconds"):
        text = (row.get(name) or "0").strip()
        if not (text.isascii() and text.isdigit()) or int(text) >= 2**31:
            raise click.ClickException(f"{file}, line {line}: {name} must be a whole number, is {text[:50]!r}")
        numbers.append(int(text))
    cap, window = numbers
    return ExitSpec(row["endpoint"], row.get("region") or "", _mode(mode), cap, timedelta(seconds=window))


def _show(exits: Sequence[Exit], as_json: bool) -> None:
    if as_json:
        show_json(exits)
        return
    show_table(
        ("exit", "endpoint", "region", "uses", "cap", "mode", "window ends", "enabled", "toggles", "toggled"),
        [
            (
                one.exit_id,
                one.spec.endpoint,
                one.spec.region,
                one.use_count,
                one.spec.cap,
                one.spec.cap_mode,
                one.window_ends_at,
                one.enabled,
                one.toggle_epoch,
                one.toggled_at,
            )
            for one in exits
        ],
    )
