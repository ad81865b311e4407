"""`muster lease` and `muster quota`: what is otherwise left to workers and the clock."""

from __future__ import annotations

from datetime import date, timedelta

import click
from muster import Client

from services.cli.acting import act_options, repeatable, show_items
from services.cli.connection import connected
from services.cli.output import json_option, parsed_day, parsed_duration, show_json


@click.group()
def lease() -> None:
    """Leases, ended by hand. Needs a key of role admin."""


@click.group()
def quota() -> None:
    """Quotas, reopened by hand. Needs a key of role admin."""


@lease.command()
@click.argument("allocation_keys", nargs=-1, required=True, metavar="ALLOCATION_KEY...")
@act_options
@json_option
@connected
@repeatable
async def revoke(
    client: Client, allocation_keys: tuple[str, ...], reason: str, dry_run: bool, request_id: str, as_json: bool
) -> None:
    """End leases without their holders; the units can be handed out again."""
    items = await client.acts.revoke_leases(allocation_keys, reason=reason, dry_run=dry_run, request_id=request_id)
    show_items(items, "revoked", dry_run=dry_run, as_json=as_json)


@lease.command()
@click.option(
    "--older-than", callback=parsed_duration, required=True, help="Granted longer ago than this, such as 30m."
)
@click.option("--slot", "slot_id", default="", help="Only of this slot.")
@click.option("--client", "client_id", default="", help="Only of this client.")
@click.option("--at-most", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="At most so many.")
@act_options
@json_option
@connected
@repeatable
async def release(
    client: Client,
    older_than: timedelta,
    slot_id: str,
    client_id: str,
    at_most: int,
    reason: str,
    dry_run: bool,
    request_id: str,
    as_json: bool,
) -> None:
    """End the leases that were granted longest ago."""
    found = await client.acts.release_by_age(
        older_than,
        slot_id=slot_id,
        client_id=client_id,
        at_most=at_most,
        reason=reason,
        dry_run=dry_run,
        request_id=request_id,
    )
    if as_json:
        show_json(found)
        return
    for key in found.example_keys:
        click.echo(key)
    left = f", {found.remaining} more match" if found.remaining else ""
    click.echo(f"{found.released} {'would be ' * dry_run}released{left}")


@quota.command()
@click.argument("slot_id")
@click.option("--date", "work_date", callback=parsed_day, help="Today or later; else today.")
@click.option(
    "--units", type=click.IntRange(0, 1_000_000), default=0, help="How many more; else as many as failed or blocked."
)
@act_options
@json_option
@connected
@repeatable
async def reopen(
    client: Client,
    slot_id: str,
    work_date: date | None,
    units: int,
    reason: str,
    dry_run: bool,
    request_id: str,
    as_json: bool,
) -> None:
    """Let a slot's day hand out more units."""
    found = await client.acts.reopen_quota(
        slot_id, work_date=work_date, units=units, reason=reason, dry_run=dry_run, request_id=request_id
    )
    if as_json:
        show_json(found)
        return
    verb = "would be" if dry_run else "is"
    click.echo(f"the quota {verb} {found.quota}, was {found.quota_before}; {found.room} unit(s) can be handed out")
