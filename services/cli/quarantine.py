"""`muster quarantine`: results that came after their unit was handed out again."""

from __future__ import annotations

import click
from muster import Client

from services.cli.acting import act_options, repeatable, show_items
from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table


@click.group()
def quarantine() -> None:
    """Late results that wait for a decision. Needs a key of role admin."""


@quarantine.command("list")
@click.option("--slot", "slot_id", default="", help="Only of this slot.")
@json_option
@connected
async def list_results(client: Client, slot_id: str, as_json: bool) -> None:
    """List the results that wait, the oldest first."""
    found = [one async for one in client.acts.quarantined_results(slot_id=slot_id, page_size=1000)]
    if as_json:
        show_json(found)
        return
    show_table(
        ("allocation", "slot", "day", "client", "came", "outcome", "products"),
        [
            (
                one.allocation_key,
                one.slot_id,
                one.work_date,
                one.client_id,
                one.quarantined_at,
                one.outcome,
                one.product_count,
            )
            for one in found
        ],
    )


@quarantine.command()
@click.argument("allocation_keys", nargs=-1, required=True, metavar="ALLOCATION_KEY...")
@act_options
@json_option
@connected
@repeatable
async def accept(
    client: Client, allocation_keys: tuple[str, ...], reason: str, dry_run: bool, as_json: bool, request_id: str
) -> None:
    """Record results after all, as late."""
    items = await client.acts.accept_quarantined(allocation_keys, reason=reason, dry_run=dry_run, request_id=request_id)
    show_items(items, "accepted", dry_run=dry_run, as_json=as_json)


@quarantine.command()
@click.argument("allocation_keys", nargs=-1, required=True, metavar="ALLOCATION_KEY...")
@act_options
@json_option
@connected
@repeatable
async def discard(
    client: Client, allocation_keys: tuple[str, ...], reason: str, dry_run: bool, as_json: bool, request_id: str
) -> None:
    """Give results up; their allocations stay expired."""
    items = await client.acts.discard_quarantined(
        allocation_keys, reason=reason, dry_run=dry_run, request_id=request_id
    )
    show_items(items, "discarded", dry_run=dry_run, as_json=as_json)
