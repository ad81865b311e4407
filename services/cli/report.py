"""`muster report`: the day, the clients, the weeks, the settings and the blocks."""

from __future__ import annotations

from datetime import date

import click
from muster import Client
from muster.insight import DashboardRow, WeekOfClient

from services.cli.connection import connected
from services.cli.output import json_option, parsed_day, show_json, show_table

_date = click.option("--date", "work_date", callback=parsed_day, help="YYYY-MM-DD; else today.")


@click.group()
def report() -> None:
    """What was done, by slot, client, week, setting and block."""


@report.command()
@json_option
@connected
async def totals(client: Client, as_json: bool) -> None:
    """Show the live figures."""
    found = await client.insight.totals()
    if as_json:
        show_json(found)
        return
    rows: list[tuple[str, object]] = [
        ("active slots", found.active_slots),
        ("units that could be handed out", found.available_units),
        ("live leases", found.leased),
        ("clients online", f"{found.clients_online} of {found.clients}"),
        ("exits", found.exits),
        ("exit uses", f"{found.exit_uses} of {found.exit_capacity}"),
        ("today handed out", f"{found.today.allocated} of {found.today.quota}"),
        ("today succeeded", found.today.succeeded),
        ("today failed", found.today.failed),
        ("today blocked", found.today.blocked),
        ("today expired", found.today.expired),
        ("today released", found.today.released),
        ("check-ins pending", found.check_ins_pending),
        ("results in quarantine", found.quarantined),
    ]
    show_table(("what", "count"), rows)


@report.command()
@_date
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@json_option
@connected
async def dashboard(client: Client, work_date: date | None, limit: int, as_json: bool) -> None:
    """Show the slots of a day by completion rate, highest first."""
    found: list[DashboardRow] = []
    async for row in client.insight.dashboard(work_date, page_size=min(limit, 1000)):
        found.append(row)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("slot", "keyword", "complete", "quota", "out", "ok", "failed", "blocked", "expired", "released"),
        [
            (
                row.slot_id,
                row.keyword,
                f"{row.completion_rate:.1%}",
                row.tracking.quota,
                row.tracking.allocated,
                row.tracking.succeeded,
                row.tracking.failed,
                row.tracking.blocked,
                row.tracking.expired,
                row.tracking.released,
            )
            for row in found
        ],
    )


@report.command()
@_date
@json_option
@connected
async def clients(client: Client, work_date: date | None, as_json: bool) -> None:
    """Show a day's results by client."""
    found = await client.insight.client_performance(work_date)
    if as_json:
        show_json(found)
        return
    show_table(
        ("client", "name", "address", "instances", "results", "succeeded", "mean seconds"),
        [
            (
                one.client_id,
                one.client_name,
                one.client_ip,
                one.active_instances,
                one.tasks,
                one.succeeded,
                one.mean_execution.total_seconds(),
            )
            for one in found
        ],
    )


@report.command()
@click.option("--week", "day", callback=parsed_day, help="Only the week of this day, YYYY-MM-DD.")
@click.option("--client", "client_id", default="", help="Only this client.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many rows.")
@json_option
@connected
async def weekly(client: Client, day: date | None, client_id: str, limit: int, as_json: bool) -> None:
    """Show what came of the weeks that are over, newest first: of the organization, then of each client."""
    found: list[WeekOfClient] = []
    async for row in client.insight.weekly(day, client_id=client_id, page_size=min(limit, 1000)):
        found.append(row)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("week", "client", "results", "succeeded", "failed", "blocked", "mean seconds"),
        [
            (
                row.week,
                row.client_id or "(all)",
                row.results,
                row.succeeded,
                row.failed,
                row.blocked,
                round(row.execution.total_seconds() / row.results, 3),
            )
            for row in found
        ],
    )


@report.command()
@click.option("--setting", "names", multiple=True, help="Only this setting tells groups apart; repeatable.")
@click.option("--target", default="", help="Only slots with this target.")
@json_option
@connected
async def settings(client: Client, names: tuple[str, ...], target: str, as_json: bool) -> None:
    """Show what came of the settings that were applied in the last 7 days, with 95 % intervals."""
    found = await client.insight.settings_effect(names, target=target)
    if as_json:
        show_json(found)
        return
    show_table(
        ("settings", "results", "succeeded", "rate", "between", "mean seconds"),
        [
            (
                " ".join(f"{name}={value}" for name, value in sorted(one.settings.items())),
                one.results,
                one.succeeded,
                f"{one.success_rate:.1%}",
                f"{one.rate_low:.1%} and {one.rate_high:.1%}",
                one.mean_execution.total_seconds(),
            )
            for one in found
        ],
    )


@report.command()
@json_option
@connected
async def blocks(client: Client, as_json: bool) -> None:
    """Show the blocked results of the last hour by type."""
    found = await client.insight.blocks()
    if as_json:
        show_json(found)
    else:
        show_table(
            ("block", "results", "clients"), [(one.block_type, one.count, one.affected_clients) for one in found]
        )


@report.command()
@click.argument("client_id", default="")
@click.option("--address", "client_ip", default="", help="The clients behind this address instead.")
@json_option
@connected
async def activity(client: Client, client_id: str, client_ip: str, as_json: bool) -> None:
    """Show what one client did in the last hour."""
    if bool(client_id) == bool(client_ip):
        raise click.UsageError("name a client or an --address")
    found = await client.insight.client_activity(client_id, client_ip=client_ip)
    if as_json:
        show_json(found)
        return
    show_table(
        ("client", "last report", "instances", "folders", "reports"),
        [(one.client_id, one.last_activity, one.instances_used, one.folders_used, one.reports) for one in found],
    )
