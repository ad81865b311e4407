"""`muster client`: the machines of the fleet."""

from __future__ import annotations

from collections.abc import Sequence

import click
from muster import Client
from muster.machines import Machine

from services.cli.acting import act_options, repeatable
from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table


@click.group()
def client() -> None:
    """Clients: the machines that work, and the processes on them."""


@client.command("list")
@click.option("--online/--offline", "online", default=None, help="Only those that spoke within 10 minutes, or not.")
@click.option("--instances", is_flag=True, help="A line for each process.")
@json_option
@connected
async def list_clients(client: Client, online: bool | None, instances: bool, as_json: bool) -> None:
    """List clients with their leases."""
    found = [one async for one in client.machines.list(online=online, page_size=1000)]
    if as_json or not instances:
        _show(found, as_json)
        return
    show_table(
        ("client", "instance", "folder", "online", "last seen", "leases"),
        [
            (one.client_id, each.instance_number, each.user_folder_number, each.online, each.last_seen_at, each.leases)
            for one in found
            for each in one.instances
        ],
    )


@client.command()
@click.argument("client_id")
@json_option
@connected
async def drain(client: Client, client_id: str, as_json: bool) -> None:
    """Tell a client to finish what it holds and take nothing new.

    It may still get work for a moment: it has drained when this, said again 5 seconds later, shows no leases.
    """
    _show([await client.machines.set_draining(client_id, True)], as_json)


@client.command()
@click.argument("client_id")
@json_option
@connected
async def undrain(client: Client, client_id: str, as_json: bool) -> None:
    """Let a client work again."""
    _show([await client.machines.set_draining(client_id, False)], as_json)


@client.command()
@click.argument("client_id")
@click.argument("instance", type=click.IntRange(0, 65535))
@act_options
@connected
@repeatable
async def dead(client: Client, client_id: str, instance: int, reason: str, dry_run: bool, request_id: str) -> None:
    """Free the leases of an instance at once; if it lives after all, its results are late."""
    freed = await client.machines.declare_dead(
        client_id, instance, reason=reason, dry_run=dry_run, request_id=request_id
    )
    click.echo(f"{freed} lease(s) {'would be ' * dry_run}freed")


def _show(found: Sequence[Machine], as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show_table(
        ("client", "name", "address", "online", "draining", "last seen", "instances", "leases"),
        [
            (
                one.client_id,
                one.client_name,
                one.client_ip,
                one.online,
                one.draining,
                one.last_seen_at,
                len(one.instances),
                one.leases,
            )
            for one in found
        ],
    )
