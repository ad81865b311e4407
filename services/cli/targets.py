"""`muster target`: politeness and back-off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta

import click
from muster import Client, TargetPolicy
from muster.targets import TargetState

from services.cli.connection import connected
from services.cli.output import json_option, parsed_duration, show_json, show_table


@click.group()
def target() -> None:
    """Targets: how politely they are treated, and how the fleet stands with them."""


@target.command("list")
@click.option("--stopped", is_flag=True, help="Only those that get nothing, or only a probe, now.")
@json_option
@connected
async def list_targets(client: Client, stopped: bool, as_json: bool) -> None:
    """List the targets that have a policy, asked for a delay, or are or lately were held or paused."""
    _show([one async for one in client.targets.list(only_stopped=stopped, page_size=1000)], as_json)


@target.command()
@click.argument("name")
@click.option("--max-in-flight", type=click.IntRange(0, 2**32 - 1), help="The most units under lease; 0 for no limit.")
@click.option("--min-delay", callback=parsed_duration, help="The least time between two units, such as 2s.")
@click.option(
    "--auto-pause/--no-auto-pause",
    default=None,
    help="Whether it is paused when it blocks or asks to be left alone, and resumes by a probe.",
)
@json_option
@connected
async def policy(client: Client, /, name: str, as_json: bool, **given: int | timedelta | bool | None) -> None:
    """Say how politely a target is treated from now on; what is not named stays as it is.

    The policy is read, changed and set as a whole: of two operators at once the last one wins.
    """
    changes = {field: value for field, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("nothing to change: name --max-in-flight, --min-delay or --auto-pause")
    stands = TargetPolicy()
    async for one in client.targets.list(target=name):
        stands = one.policy
    changed = dataclasses.replace(stands, **changes)  # type: ignore[arg-type]
    _show([await client.targets.set_policy(name, changed)], as_json)


@target.command()
@click.argument("name")
@click.option("--for", "duration", callback=parsed_duration, required=True, help="For how long, such as 30m or 2d.")
@click.option("--reason", default="", help="For people.")
@json_option
@connected
async def hold(client: Client, name: str, duration: timedelta, reason: str, as_json: bool) -> None:
    """Hand out nothing of a target, or of slot:<id>, for a while; live leases go on."""
    _show([await client.targets.hold(name, duration, reason=reason)], as_json)


@target.command()
@click.argument("name")
@json_option
@connected
async def resume(client: Client, name: str, as_json: bool) -> None:
    """End a hold, a Retry-After, a pause and a delay in force at once, and forget the target's own crawl delay."""
    _show([await client.targets.resume(name)], as_json)


def _show(found: Sequence[TargetState], as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show_table(
        (
            "target",
            "most in flight",
            "in flight",
            "delay",
            "crawl delay",
            "held until",
            "paused",
            "probe",
            "pauses",
            "why",
        ),
        [
            (
                one.target,
                one.policy.max_in_flight or "",
                one.in_flight,
                one.policy.min_delay or "",
                one.crawl_delay,
                one.held_until,
                one.paused_at,
                one.probe_at,
                one.pauses,
                one.reason,
            )
            for one in found
        ],
    )
