"""`muster session`: live sessions and final results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta

import click
from muster import Client, SessionFilter, SessionState
from muster.sessions import Session, SessionChanges
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from services.cli.connection import connected
from services.cli.output import cell, console, json_option, parsed_day, show_json, show_json_line, show_table

_LIVE = [state.name.lower() for state in SessionState if SessionState.QUEUED <= state <= SessionState.LOST]
_ENDED = [state.name.lower() for state in SessionState if state >= SessionState.COMPLETED]


@click.group()
def session() -> None:
    """Live sessions and their final results."""


_state = click.option("--state", "states", type=click.Choice(_LIVE), multiple=True, help="Only this state; repeatable.")
_slot = click.option("--slot", "slot_id", default="", help="Only of this slot.")
_client = click.option("--client", "client_id", default="", help="Only on this client.")


def _filter(states: tuple[str, ...], slot_id: str, client_id: str) -> SessionFilter:
    return SessionFilter([SessionState[name.upper()] for name in states], slot_id, client_id)


@session.command("list")
@_state
@_slot
@_client
@json_option
@connected
async def list_sessions(client: Client, states: tuple[str, ...], slot_id: str, client_id: str, as_json: bool) -> None:
    """List the live sessions."""
    chosen = _filter(states, slot_id, client_id)
    found = [one async for one in client.sessions.list(chosen, page_size=1000)]
    if as_json:
        show_json(found)
    else:
        console().print(_table(found))


@session.command()
@_state
@_slot
@_client
@click.option("--interval", type=click.FloatRange(0, 60), default=0.5, show_default=True, help="Seconds.")
@json_option
@connected
async def watch(
    client: Client, states: tuple[str, ...], slot_id: str, client_id: str, interval: float, as_json: bool
) -> None:
    """Follow the live sessions until Ctrl-C; with --json, a line for each change."""
    changes = client.sessions.watch(_filter(states, slot_id, client_id), interval=timedelta(seconds=interval))
    if as_json:
        async for change in changes:
            show_json_line(change)
        return
    held: dict[str, Session] = {}
    with Live(_table(()), console=console(), auto_refresh=False) as live:
        async for change in changes:
            _apply(held, change)
            live.update(_table(held[name] for name in sorted(held)), refresh=True)


@session.command()
@click.option("--state", type=click.Choice(_ENDED), help="Only this state.")
@_slot
@click.option("--from", "from_date", callback=parsed_day, help="Only completed on this day (UTC) or later.")
@click.option("--to", "to_date", callback=parsed_day, help="Only completed before this day (UTC).")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@json_option
@connected
async def results(
    client: Client,
    state: str | None,
    slot_id: str,
    from_date: date | None,
    to_date: date | None,
    limit: int,
    as_json: bool,
) -> None:
    """List final results, newest first."""
    found = []
    async for one in client.sessions.results(
        state=SessionState[state.upper()] if state else SessionState.UNSPECIFIED,
        slot_id=slot_id,
        completed_after=_midnight(from_date),
        completed_before=_midnight(to_date),
        page_size=min(limit, 1000),
    ):
        found.append(one)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("session", "state", "pages", "products", "errors", "seconds", "completed", "client", "message"),
        [
            (
                one.session_id,
                one.state,
                one.total_pages,
                one.products_found,
                one.errors_count,
                f"{one.execution_time.total_seconds():.1f}",
                one.completed_at,
                one.client_id,
                one.message,
            )
            for one in found
        ],
    )


@session.command()
@json_option
@connected
async def totals(client: Client, as_json: bool) -> None:
    """Show the live figures."""
    found = await client.sessions.totals()
    if as_json:
        show_json(found)
        return
    rows: list[tuple[str, object]] = []
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name == "by_state":
            rows += [(f"live, {name.lower()}", count) for name, count in sorted(found.by_state.items())]
        else:
            rows.append((field.name.replace("_", " "), f"{value:.1f}" if isinstance(value, float) else value))
    show_table(("figure", "value"), rows)


def _apply(held: dict[str, Session], change: SessionChanges) -> None:
    if change.snapshot:
        held.clear()
    held.update({one.session_id: one for one in change.sessions})
    for name in change.removed:
        held.pop(name, None)


def _table(sessions: Iterable[Session]) -> Table:
    table = Table(
        "session", "client", "state", "stage", "pages", "progress", "products", "errors", "updated", "done by"
    )
    for one in sessions:
        bar = ProgressBar(total=max(one.total_pages, 1), completed=one.current_page, width=20)
        table.add_row(
            escape(one.session_id),
            escape(one.client_id),
            cell(one.state),
            escape(one.stage),
            f"{one.current_page}/{one.total_pages or '?'}",
            bar if one.total_pages else "",
            cell(one.products_found),
            cell(one.errors_count),
            cell(one.updated_at),
            cell(one.estimated_completion),
        )
    return table


def _midnight(day: date | None) -> datetime | None:
    return datetime.combine(day, time.min, UTC) if day else None
