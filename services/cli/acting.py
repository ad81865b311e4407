"""What the commands have in common that act by hand: a reason, a dry run, a request id, and answers item by item."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click
from muster import Client
from muster.acts import ActedItem
from muster.errors import DeadlineExceeded, Unavailable

from services.cli.connection import told
from services.cli.output import show_json


def act_options(command: Any) -> Any:
    """Gives a command --reason and --dry-run."""
    command = click.option("--dry-run", is_flag=True, help="Only say what would be done.")(command)
    return click.option("--reason", required=True, help="For the audit entry.")(command)


def repeatable(act: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Gives a command that is not safe to repeat by itself --request-id; stands between it and `connected`.

    The command gets a fresh `request_id` where none is given. When no answer came, it may have been done: the error
    then tells the id under which it is done once.
    """

    @click.option(
        "--request-id",
        type=click.UUID,
        default=uuid.uuid4,
        help="Of a command that got no answer, to repeat it within 24 hours without doing it twice.",
    )
    @functools.wraps(act)
    async def run(client: Client, /, *args: Any, request_id: uuid.UUID, **kwargs: Any) -> None:
        try:
            await act(client, *args, request_id=str(request_id), **kwargs)
        except (DeadlineExceeded, Unavailable) as error:
            if kwargs.get("dry_run"):
                raise
            raise click.ClickException(
                f"{told(error)}; it may have been done: repeat it with --request-id {request_id}, which does it once"
            ) from None

    return run


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
