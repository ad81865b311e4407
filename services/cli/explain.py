"""`muster explain` and `muster what-if`: why there is no work, and what a client would get."""

from __future__ import annotations

import click
from muster import Client, ClientIdentity

from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table

_target = click.option("--target", default="", help="Only slots with this target.")
_region = click.option("--region", default="", help="Only exits of this region.")


@click.command()
@click.option("--slot", "slot_id", default="", help="Only this slot; else the whole organization.")
@_target
@_region
@click.option("--client", "client_id", default="", help="As this client sees it.")
@json_option
@connected
async def explain(client: Client, slot_id: str, target: str, region: str, client_id: str, as_json: bool) -> None:
    """Say why a slot, or the organization, gets no work: the nearest cause first, each with its remedy."""
    found = await client.insight.explain(slot_id=slot_id, target=target, region=region, client_id=client_id)
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


@click.command("what-if")
@click.argument("client_id")
@click.option("--instance", type=click.IntRange(0, 65535), default=0, help="The process on the client.")
@click.option("--items", type=click.IntRange(1, 256), default=1, show_default=True, help="At most so many units.")
@_target
@_region
@json_option
@connected
async def what_if(
    client: Client, client_id: str, instance: int, items: int, target: str, region: str, as_json: bool
) -> None:
    """Say what a client would get now, without leasing anything."""
    asking = ClientIdentity(client_id, instance)
    found = await client.insight.simulate(asking, max_items=items, target=target, region=region)
    if as_json:
        show_json(found)
        return
    if found.no_work is not None:
        told = found.no_work
        click.echo(f"no work ({told.blocker.name.lower()}): {told.message}")
        return
    show_table(
        ("slot", "keyword", "target", "exit", "provider", "persona"),
        [
            (unit.slot_id, unit.keyword, unit.target, unit.exit_id, unit.exit_provider, unit.needs_persona)
            for unit in found.units
        ],
    )
