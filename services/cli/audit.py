"""`muster audit`: what operators did."""

from __future__ import annotations

import click
from muster import Client
from muster.acts import AuditEntry

from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table


@click.command()
@click.option("--action", default="", help="Only this action, such as RevokeLeases.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@json_option
@connected
async def audit(client: Client, action: str, limit: int, as_json: bool) -> None:
    """List what was done by hand, newest first. Needs a key of role admin."""
    found: list[AuditEntry] = []
    async for one in client.acts.audit(action=action, page_size=min(limit, 1000)):
        found.append(one)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("when", "key", "action", "to what", "reason", "digest"),
        [(one.at, one.actor, one.action, one.resource, one.reason, one.entry_sha256.hex()[:16]) for one in found],
    )
