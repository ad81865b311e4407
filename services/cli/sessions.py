"""`muster session`: live sessions, what they are told, and final results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta
from heapq import nsmallest
from typing import Any

import click
from muster import Client, CommandKind, SessionFilter, SessionState
from muster.session_views import Session, SessionDetail, SessionView
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from services.cli.connection import connected
from services.cli.output import cell, console, json_option, parsed_day, show_json, show_json_line, show_table

_LIVE = [state.name.lower() for state in SessionState if SessionState.QUEUED <= state <= SessionState.LOST]
_ENDED = [state.name.lower() for state in SessionState if state >= SessionState.COMPLETED]
_BARS = " ▁▂▃▄▅▆▇█"
# Ids in one call of ControlSessions.
_MOST_IDS = 1000
# Rows of the live table when nobody says how many fit.
_WATCH_ROWS = 50


@click.group()
def session() -> None:
    """Live sessions, what they are told, and their final results."""


_slot = click.option("--slot", "slot_id", default="", help="Only of this slot.")
_client = click.option("--client", "client_id", default="", help="Only on this client.")
_reason = click.option("--reason", default="", help="Why, for the worker and other operators; up to 256 characters.")


def _filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a filter, which become one argument of that name."""

    def run(
        *args: Any, states: tuple[str, ...], slot_id: str, client_id: str, stage: str, tag: str, **kwargs: Any
    ) -> Any:
        chosen = SessionFilter([SessionState[name.upper()] for name in states], slot_id, client_id, stage, tag)
        return command(*args, filter=chosen, **kwargs)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    # Options that the command has already are carried over by click in this attribute.
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--tag", default="", help="Only with this tag."),
        click.option("--stage", default="", help="Only in this stage."),
        _client,
        _slot,
        click.option("--state", "states", type=click.Choice(_LIVE), multiple=True, help="Only this state; repeatable."),
    ):
        run = option(run)
    return run


def _telling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what all commands for sessions are given: which ones, by id or by filter, and why."""
    command = _filtered(_reason(json_option(connected(command))))
    return click.argument("session_ids", nargs=-1, metavar="[SESSION_ID]...")(command)


@session.command("list")
@_filtered
@json_option
@connected
async def list_sessions(client: Client, filter: SessionFilter, as_json: bool) -> None:
    """List the live sessions."""
    found = [one async for one in client.sessions.list(filter, page_size=1000)]
    if as_json:
        show_json(found)
    else:
        console().print(_table(found))


@session.command()
@click.argument("session_id")
@json_option
@connected
async def show(client: Client, session_id: str, as_json: bool) -> None:
    """Show a live session with its pace, its errors and its settings."""
    found = await client.sessions.detail(session_id)
    if as_json:
        show_json(found)
    else:
        _show_detail(found)


@session.command()
@_filtered
@click.option("--interval", type=click.FloatRange(0, 60), default=0.5, show_default=True, help="Seconds.")
@json_option
@connected
async def watch(client: Client, filter: SessionFilter, interval: float, as_json: bool) -> None:
    """Follow the live sessions until Ctrl-C; with --json, a line for each change."""
    pause = timedelta(seconds=interval)
    if as_json:
        async for change in client.sessions.watch(filter, interval=pause):
            show_json_line(change)
        return
    shown = console()
    rows = max(1, shown.height - 5) if sys.stdout.isatty() else _WATCH_ROWS
    with Live(_table(()), console=shown, auto_refresh=False) as live:
        async for held in client.watch_sessions(filter, interval=pause):
            live.update(_watched(held, rows), refresh=True)


@session.command()
@_telling
async def pause(client: Client, /, **given: Any) -> None:
    """Tell sessions, named or by filter, to do nothing until they are resumed or stopped."""
    await _tell(client, CommandKind.PAUSE, **given)


@session.command()
@_telling
async def resume(client: Client, /, **given: Any) -> None:
    """Tell paused sessions, named or by filter, to go on."""
    await _tell(client, CommandKind.RESUME, **given)


@session.command()
@_telling
async def stop(client: Client, /, **given: Any) -> None:
    """Tell sessions, named or by filter, to end in good order."""
    await _tell(client, CommandKind.STOP, **given)


@session.command()
@click.argument("pages_per_minute", type=click.FloatRange(0, 1_000_000))
@_telling
async def limit(client: Client, /, **given: Any) -> None:
    """Tell sessions, named or by filter, not to exceed PAGES_PER_MINUTE; 0 lifts the limit."""
    await _tell(client, CommandKind.SPEED_LIMIT, **given)


@session.command()
@click.option("--state", type=click.Choice(_ENDED), help="Only this state.")
@_slot
@_client
@click.option("--from", "from_date", callback=parsed_day, help="Only completed on this day (UTC) or later.")
@click.option("--to", "to_date", callback=parsed_day, help="Only completed before this day (UTC).")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@json_option
@connected
async def results(
    client: Client,
    state: str | None,
    slot_id: str,
    client_id: str,
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
        client_id=client_id,
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
@_slot
@json_option
@connected
async def totals(client: Client, slot_id: str, as_json: bool) -> None:
    """Show the live figures, of the organization or of a slot."""
    found = await client.sessions.totals(slot_id=slot_id)
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


async def _tell(
    client: Client,
    kind: CommandKind,
    *,
    session_ids: tuple[str, ...],
    filter: SessionFilter,
    reason: str,
    as_json: bool,
    pages_per_minute: float = 0.0,
) -> None:
    chosen = any(getattr(filter, field.name) for field in dataclasses.fields(filter))
    if bool(session_ids) == chosen:
        raise click.UsageError("name sessions, or choose them by options such as --slot; not both")
    told = 0
    unknown: list[str] = []
    for begin in range(0, max(1, len(session_ids)), _MOST_IDS):
        answer = await client.sessions.control(
            kind,
            session_ids[begin : begin + _MOST_IDS],
            filter=filter if chosen else None,
            pages_per_minute=pages_per_minute,
            reason=reason,
        )
        told += answer.told
        unknown += answer.unknown_sessions
    if as_json:
        show_json({"told": told, "unknown_sessions": unknown})
    else:
        click.echo(f"{told} {'session' if told == 1 else 'sessions'} will be told")
        for name in unknown:
            click.echo(f"{name} is not live", err=True)
    if unknown:
        sys.exit(1)


def _show_detail(found: SessionDetail) -> None:
    rows = [
        (field.name.replace("_", " "), value)
        for field in dataclasses.fields(found.session)
        if field.name not in ("number", "errors_by_class") and (value := getattr(found.session, field.name)) != ""
    ]
    spans = found.pages_per_span
    if any(spans):
        rows.append((f"pages, last {len(spans) * 10} s", f"{_drawn(spans)} (most {max(spans)} in 10 s)"))
    if found.config_snapshot_json:
        rows.append(("settings", found.config_snapshot_json))
    show_table(("field", "value"), rows)
    if found.session.errors_by_class:
        show_table(("error", "count"), found.session.errors_by_class.items())
    if found.last_errors:
        show_table(
            ("at", "error", "page", "message"),
            [(one.at, one.error_class, one.page or "", one.message) for one in reversed(found.last_errors)],
        )


def _drawn(spans: tuple[int, ...]) -> str:
    most = max(spans)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in spans)


def _watched(held: SessionView, rows: int) -> Group:
    shown: list[Table | str] = [_table(held[name] for name in nsmallest(rows, held))]
    if len(held) > rows:
        shown.append(f"and {len(held) - rows} more: narrow them down, such as by --state")
    if held.rebuilding:
        shown.append("rebuilding: sessions may be missing that their workers have yet to report again")
    return Group(*shown)


def _table(sessions: Iterable[Session]) -> Table:
    table = Table(
        "session", "client", "state", "stage", "pages", "progress", "products", "errors", "updated", "done by"
    )
    for one in sessions:
        bar = ProgressBar(total=max(one.total_pages, 1), completed=one.current_page, width=20)
        table.add_row(
            escape(one.session_id),
            escape(one.client_id),
            f"{cell(one.state)} ({escape(one.reason)})" if one.reason else cell(one.state),
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
