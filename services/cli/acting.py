"""What the commands have in common that act by hand: a reason, a dry run, and answers item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from muster.acts import ActedItem

from services.cli.connection import told
from services.cli.output import show_json


def act_options(command: Any) -> Any:
    """Gives a command --reason and --dry-run."""
    command = click.option("--dry-run", is_flag=True, help="Only say what would be done.")(command)
    return click.option("--reason", required=True, help="For the audit entry.")(command)


def show_items(items: Sequence[ActedItem], done: str, *, dry_run: bool, as_json: bool) -> None:
    """Prints how an act on items went; `done` is the word for what was done to them.

    Raises:
        ClickException: some were refused.
    """
    refused = [item for item in items if item.error is not None]
    if as_json:
        show_json(
            [
                {"allocation_key": item.allocation_key, "error": told(item.error) if item.error else None}
                for item in items
            ]
        )
    else:
        for item in refused:
            assert item.error is not None
            click.echo(f"{item.allocation_key}: {told(item.error)}", err=True)
        click.echo(f"{len(items) - len(refused)} {'would be ' * dry_run}{done}")
    if refused:
        raise click.ClickException(f"{len(refused)} of {len(items)} were refused")
