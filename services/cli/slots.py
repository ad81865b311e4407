"""`muster slot`: work slots."""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from typing import Any

import click
from muster import Client, Pacing, PersonaNeed, SlotSpec
from muster.slots import Slot
from muster.values import Setting, setting_values

from services.cli.acting import repeatable
from services.cli.connection import connected
from services.cli.output import json_option, parsed_day, show_json, show_table
from services.cli.slot_files import export_file, import_file

_CRITERIA = ("tags", "region", "min_aging_level", "cool_down_seconds")


@click.group()
def slot() -> None:
    """Work slots: what is to be done, how often and when."""


slot.add_command(import_file)
slot.add_command(export_file)


def _settings(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Setting] | None:
    if value is None:
        return None
    try:
        found = json.loads(value or "{}")
        if not isinstance(found, dict):
            raise ValueError("must be a JSON object")
        setting_values(found)
    except (ValueError, TypeError) as error:
        raise click.BadParameter(f"must be a JSON object of truth values, numbers and texts: {error}") from None
    return found


def _pacing(_: click.Context, __: click.Parameter, value: str | None) -> Pacing | None:
    return Pacing[value.upper()] if value else None


def _tags(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return tuple(tag for tag in value if tag) if value else None


_UINT32 = click.IntRange(0, 2**32 - 1)
_FIELDS = (
    click.option("--keyword", help="1 to 200 characters."),
    click.option("--code", help="The site's own code, up to 64 characters."),
    click.option("--target", help="What politeness and health are kept by, up to 128 characters."),
    click.option("--start-date", callback=parsed_day, help="YYYY-MM-DD."),
    click.option("--end-date", callback=parsed_day, help="YYYY-MM-DD."),
    click.option("--daily-quota", type=_UINT32, help="The most units a day."),
    click.option("--priority", type=click.IntRange(-(2**31), 2**31 - 1), help="Higher goes first."),
    click.option("--weight", type=_UINT32, help="The share among slots of equal priority, 1 to 1000."),
    click.option(
        "--pacing", type=click.Choice(["asap", "even"]), callback=_pacing, help="How a quota is spread over its day."
    ),
    click.option("--settings", callback=_settings, help='A JSON object, such as {"max_pages": 4}.'),
    click.option("--without-exit/--with-exit", default=None, help="Whether units need no exit."),
    click.option("--exit-region", help="Only exits of this region; empty for any."),
    click.option("--exit-provider", help="The external provider of its exits; empty for the pool."),
    click.option("--needs-persona/--needs-no-persona", default=None, help="Whether every unit gets a persona."),
    click.option(
        "--persona-tag",
        "tags",
        multiple=True,
        callback=_tags,
        help="Its persona has this tag; repeatable; empty for any.",
    ),
    click.option("--persona-region", "region", help="Its persona is of this region; empty for any."),
    click.option("--persona-aging", "min_aging_level", type=_UINT32, help="Its persona's least aging level."),
    click.option("--persona-rest", "cool_down_seconds", type=_UINT32, help="How long it has rested, in seconds."),
)


def _with_fields(command: Any) -> Any:
    for option in reversed(_FIELDS):
        command = option(command)
    return command


def _given(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Returns the fields of a slot that are named, and those criteria of its persona that are.

    The criteria are None when nothing is said of a persona, and when none is to be needed any more.
    """
    named = {name: value for name, value in options.items() if value is not None}
    needs = named.pop("needs_persona", None)
    criteria = {name: named.pop(name) for name in _CRITERIA if name in named}
    if criteria and needs is False:
        raise click.UsageError("--needs-no-persona goes with no criteria of a persona")
    if needs is False:
        named["persona"] = None
    return named, criteria if criteria or needs else None


@slot.command()
@_with_fields
@click.option("--external-id", default="", help="An external site's id, which makes creating safe to repeat.")
@json_option
@connected
@repeatable
async def create(client: Client, /, as_json: bool, external_id: str, request_id: str, **options: Any) -> None:
    """Make a slot."""
    given, criteria = _given(options)
    if criteria is not None:
        given["persona"] = PersonaNeed(**criteria)
    missing = [name for name in ("keyword", "start_date", "end_date", "daily_quota") if name not in given]
    if missing:
        raise click.UsageError(f"missing {', '.join('--' + name.replace('_', '-') for name in missing)}")
    spec = SlotSpec(**given, external_id=external_id)
    _show(await client.slots.create(spec, request_id=request_id), as_json)


@slot.command("list")
@click.option("--target", default="", help="Only this target.")
@click.option("--keyword", default="", help="Only keywords that begin so.")
@click.option("--code", default="", help="Only this code.")
@click.option("--external-id", default="", help="Only this external id.")
@click.option("--active/--inactive", "is_active", default=None, help="Only active, or only inactive, ones.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="At most so many.")
@json_option
@connected
async def list_slots(client: Client, /, keyword: str, limit: int, as_json: bool, **filters: Any) -> None:
    """List slots with today's counters."""
    found: list[Slot] = []
    async for one in client.slots.list(keyword_prefix=keyword, page_size=min(limit, 1000), **filters):
        found.append(one)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        (
            "slot",
            "external id",
            "keyword",
            "target",
            "from",
            "to",
            "quota",
            "active",
            "got",
            "done",
            "failed",
            "blocked",
        ),
        [
            (
                one.slot_id,
                one.spec.external_id,
                one.spec.keyword,
                one.spec.target,
                one.spec.start_date,
                one.spec.end_date,
                one.spec.daily_quota,
                one.spec.is_active,
                *(
                    (one.today.allocated, one.today.succeeded, one.today.failed, one.today.blocked)
                    if one.today
                    else (0, 0, 0, 0)
                ),
            )
            for one in found
        ],
    )


@slot.command()
@click.argument("slot_id")
@json_option
@connected
async def get(client: Client, slot_id: str, as_json: bool) -> None:
    """Show one slot."""
    _show(await client.slots.get(slot_id), as_json)


@slot.command()
@click.argument("slot_id")
@_with_fields
@click.option("--etag", default="", help="Refuse when the slot changed since.")
@click.option("--reason", default="", help="For the history.")
@json_option
@connected
async def update(client: Client, /, slot_id: str, etag: str, reason: str, as_json: bool, **options: Any) -> None:
    """Change what is named of a slot. Live leases keep what they were given."""
    changes, criteria = _given(options)
    if criteria is not None:
        # The need is one field to the service: what is not named comes from the slot, as long as it stands so.
        stands = await client.slots.get(slot_id)
        changes["persona"] = dataclasses.replace(stands.spec.persona or PersonaNeed(), **criteria)
        etag = etag or stands.etag
    if not changes:
        raise click.UsageError("nothing to change: name at least one field, such as --daily-quota")
    # The service takes only the named fields; the others are there because a spec cannot be without them.
    blank = SlotSpec("-", date(1970, 1, 1), date(1970, 1, 1), 1)
    spec = dataclasses.replace(blank, **changes)
    _show(await client.slots.update(slot_id, spec, sorted(changes), etag=etag, reason=reason), as_json)


@slot.command()
@click.argument("slot_id")
@click.option("--reason", default="", help="For the history.")
@connected
async def pause(client: Client, slot_id: str, reason: str) -> None:
    """Hand out no more work of a slot; live leases go on."""
    await client.slots.pause(slot_id, reason=reason)
    click.echo("paused")


@slot.command()
@click.argument("slot_id")
@click.option("--reason", default="", help="For the history.")
@connected
async def resume(client: Client, slot_id: str, reason: str) -> None:
    """Hand out work of a slot again."""
    await client.slots.resume(slot_id, reason=reason)
    click.echo("resumed")


@slot.command()
@click.argument("slot_id")
@json_option
@connected
async def history(client: Client, slot_id: str, as_json: bool) -> None:
    """List the changes of a slot, newest first."""
    changes = [change async for change in client.slots.history(slot_id)]
    if as_json:
        show_json(changes)
        return
    show_table(
        ("when", "key", "reason", "difference"),
        [(one.changed_at, one.actor, one.reason, json.dumps(one.difference, ensure_ascii=False)) for one in changes],
    )


def _show(one: Slot, as_json: bool) -> None:
    if as_json:
        show_json(one)
        return
    rows: list[tuple[str, object]] = [("slot", one.slot_id)]
    rows += [(field.name, getattr(one.spec, field.name)) for field in dataclasses.fields(one.spec)]
    rows += [("etag", one.etag), ("created", one.created_at), ("updated", one.updated_at)]
    if one.today:
        rows += [(f"today {field.name}", getattr(one.today, field.name)) for field in dataclasses.fields(one.today)]
    show_table(("field", "value"), rows)
