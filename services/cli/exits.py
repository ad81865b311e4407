"""`muster exit`: pooled exits."""

from __future__ import annotations

from collections.abc import Sequence

import click
from muster import Client, ExitSpec
from muster.exits import Exit

from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table


@click.group("exit")
def exit_() -> None:
    """Pooled exits: the proxies that runs leave through."""


@exit_.command()
@click.argument("endpoints", nargs=-1, required=True, metavar="ENDPOINT...")
@click.option("--region", default="", help="The region they leave from.")
@click.option("--cap", type=click.IntRange(0, 2**32 - 1), default=0, help="The most uses until a toggle; 0 means 20.")
@json_option
@connected
async def add(client: Client, endpoints: tuple[str, ...], region: str, cap: int, as_json: bool) -> None:
    """Register exits, such as http://10.0.0.5:3128; one that stands keeps its counters. Safe to repeat."""
    _show(await client.exits.add([ExitSpec(endpoint, region, cap=cap) for endpoint in endpoints]), as_json)


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
async def toggle(client: Client, exit_id: str, reason: str, as_json: bool) -> None:
    """Say that an exit has a new address: its uses start from 0."""
    _show([await client.exits.toggle(exit_id, reason=reason)], as_json)


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


def _show(exits: Sequence[Exit], as_json: bool) -> None:
    if as_json:
        show_json(exits)
        return
    show_table(
        ("exit", "endpoint", "region", "uses", "cap", "enabled", "toggles", "toggled"),
        [
            (
                one.exit_id,
                one.spec.endpoint,
                one.spec.region,
                one.use_count,
                one.spec.cap,
                one.enabled,
                one.toggle_epoch,
                one.toggled_at,
            )
            for one in exits
        ],
    )
