"""`muster explain`: why there is no work."""

from __future__ import annotations

import click
from muster import Client

from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table


@click.command()
@click.option("--slot", "slot_id", default="", help="Only this slot; else the whole organization.")
@click.option("--target", default="", help="Only slots with this target.")
@click.option("--region", default="", help="Only exits of this region.")
@json_option
@connected
async def explain(client: Client, slot_id: str, target: str, region: str, as_json: bool) -> None:
    """Say why a slot, or the organization, gets no work: the nearest cause first, each with its remedy."""
    found = await client.insight.explain(slot_id=slot_id, target=target, region=region)
    if as_json:
        show_json(found)
        return
    if not found.blockers:
        click.echo(f"nothing is in the way: {found.available_units} unit(s) could be handed out now")
        return
    show_table(
        ("what", "holds back", "of", "why", "remedy", "such as"),
        [(one.kind, one.count, one.of, one.message, one.remedy, one.example_ids) for one in found.blockers],
    )
    click.echo(f"{found.available_units} unit(s) could be handed out now")
