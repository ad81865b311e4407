"""`muster slot`: work slots."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import click
from muster import Client, PersonaNeed, SlotSpec
from muster.errors import MusterError
from muster.slots import Slot
from muster.values import Setting, setting_values

from services.cli.connection import connected, told
from services.cli.output import json_option, parsed_day, show_json, show_table

COLUMNS = (
    "external_id",
    "keyword",
    "code",
    "target",
    "start_date",
    "end_date",
    "daily_quota",
    "priority",
    "needs_persona",
    "settings",
)
_REQUIRED = {"external_id", "keyword", "start_date", "end_date", "daily_quota"}
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


@click.group()
def slot() -> None:
    """Work slots: what is to be done, how often and when."""


def _settings(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Setting] | None:
    try:
        return None if value is None else _parsed_settings(value)
    except (ValueError, TypeError) as error:
        raise click.BadParameter(str(error)) from None


_FIELDS = (
    click.option("--keyword", help="1 to 200 characters."),
    click.option("--code", help="The site's own code, up to 64 characters."),
    click.option("--target", help="What politeness and health are kept by, up to 128 characters."),
    click.option("--start-date", callback=parsed_day, help="YYYY-MM-DD."),
    click.option("--end-date", callback=parsed_day, help="YYYY-MM-DD."),
    click.option("--daily-quota", type=click.IntRange(0, 2**32 - 1), help="The most units a day."),
    click.option("--priority", type=click.IntRange(-(2**31), 2**31 - 1), help="Higher goes first."),
    click.option("--settings", callback=_settings, help='A JSON object, such as {"max_pages": 4}.'),
)


def _with_fields(command: Any) -> Any:
    for option in reversed(_FIELDS):
        command = option(command)
    return command


@slot.command()
@_with_fields
@click.option("--external-id", default="", help="An external site's id, which makes creating safe to repeat.")
@click.option("--needs-persona", is_flag=True, help="Every unit gets a persona.")
@click.option("--without-exit", is_flag=True, help="Units need no exit.")
@json_option
@connected
async def create(
    client: Client, /, as_json: bool, external_id: str, needs_persona: bool, without_exit: bool, **given: Any
) -> None:
    """Make a slot."""
    missing = [name for name in ("keyword", "start_date", "end_date", "daily_quota") if given[name] is None]
    if missing:
        raise click.UsageError(f"missing {', '.join('--' + name.replace('_', '-') for name in missing)}")
    spec = SlotSpec(
        **{name: value for name, value in given.items() if value is not None},
        external_id=external_id,
        without_exit=without_exit,
        persona=PersonaNeed() if needs_persona else None,
    )
    _show(await client.slots.create(spec), as_json)


@slot.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@json_option
@connected
async def import_file(client: Client, file: Path, as_json: bool) -> None:
    """Make the slots of a CSV FILE; safe to repeat, since rows are known by their external_id.

    Columns: external_id, keyword, code, target, start_date, end_date, daily_quota, priority, needs_persona and settings
    (a JSON object). Every row stands for itself; the exit code is 1 when one was refused.
    """
    specs: list[tuple[int, SlotSpec]] = []
    report: list[dict[str, object]] = []
    for row, external_id, outcome in _rows(file):
        if isinstance(outcome, SlotSpec):
            specs.append((row, outcome))
        else:
            report.append({"row": row, "external_id": external_id, "slot_id": "", "result": f"refused: {outcome}"})
    names = {row: spec.external_id for row, spec in specs}
    broken = None
    try:
        async for answer in client.slots.import_rows(specs):
            result = "created" if answer.created else "stands"
            if answer.error is not None:
                result = f"refused: {told(answer.error)}"
            name = names.pop(answer.row, "")
            report.append({"row": answer.row, "external_id": name, "slot_id": answer.slot_id, "result": result})
    except MusterError as error:
        broken = error
    report.sort(key=lambda line: int(str(line["row"])))
    if as_json:
        show_json(report)
    elif report:
        show_table(("row", "external id", "slot", "result"), [tuple(line.values()) for line in report])
    if broken is not None:
        raise click.ClickException(f"{told(broken)}; {len(names)} row(s) have no answer: import the file again")
    if names:
        raise click.ClickException(f"{len(names)} row(s) have no answer: import the file again")
    refused = sum(str(line["result"]).startswith("refused") for line in report)
    if refused:
        raise click.ClickException(f"{refused} of {len(report)} rows were refused")


@slot.command("list")
@click.option("--target", default="", help="Only this target.")
@click.option("--keyword", default="", help="Only keywords that begin so.")
@click.option("--active/--inactive", "is_active", default=None, help="Only active, or only inactive, ones.")
@json_option
@connected
async def list_slots(client: Client, target: str, keyword: str, is_active: bool | None, as_json: bool) -> None:
    """List slots with today's counters."""
    found = [
        one
        async for one in client.slots.list(target=target, keyword_prefix=keyword, is_active=is_active, page_size=1000)
    ]
    if as_json:
        show_json(found)
        return
    show_table(
        ("slot", "keyword", "target", "from", "to", "quota", "active", "allocated", "done", "failed", "blocked"),
        [
            (
                one.slot_id,
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
async def update(client: Client, /, slot_id: str, etag: str, reason: str, as_json: bool, **given: Any) -> None:
    """Change what is named of a slot. Live leases keep what they were given."""
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("nothing to change: name at least one field, such as --daily-quota")
    _show(await _changed(client, slot_id, changes, etag, reason), as_json)


@slot.command()
@click.argument("slot_id")
@click.option("--reason", default="", help="For the history.")
@connected
async def pause(client: Client, slot_id: str, reason: str) -> None:
    """Hand out no more work of a slot; live leases go on."""
    await _changed(client, slot_id, {"is_active": False}, "", reason)
    click.echo("paused")


@slot.command()
@click.argument("slot_id")
@click.option("--reason", default="", help="For the history.")
@connected
async def resume(client: Client, slot_id: str, reason: str) -> None:
    """Hand out work of a slot again."""
    await _changed(client, slot_id, {"is_active": True}, "", reason)
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


async def _changed(client: Client, slot_id: str, changes: dict[str, Any], etag: str, reason: str) -> Slot:
    # The service takes only the named fields; the others are there because a spec cannot be without them.
    blank = SlotSpec("-", date(1970, 1, 1), date(1970, 1, 1), 1)
    spec = dataclasses.replace(blank, **changes)
    return await client.slots.update(slot_id, spec, sorted(changes), etag=etag, reason=reason)


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


def _rows(file: Path) -> Iterator[tuple[int, str, SlotSpec | str]]:
    """Yields each row's number in the file, its external id, and the slot or why it cannot be one."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            names = set(reader.fieldnames or ())
            strange, missing = sorted(names - set(COLUMNS)), sorted(_REQUIRED - names)
            if strange or missing:
                faults = [f"unknown columns {', '.join(strange)}"] * bool(strange)
                faults += [f"missing columns {', '.join(missing)}"] * bool(missing)
                raise click.ClickException(f"{file}: {'; '.join(faults)}; known: {', '.join(COLUMNS)}")
            for row in reader:
                yield reader.line_num, row.get("external_id") or "", _spec(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise click.ClickException(f"{file} cannot be read as CSV in UTF-8: {error}") from None


def _spec(row: dict[str, Any]) -> SlotSpec | str:
    if None in row or None in row.values():
        return "the row has another number of columns than the first line"
    faults = []
    values: dict[str, Any] = {"external_id": row["external_id"], "keyword": row["keyword"]}
    readers: dict[str, Any] = {
        "start_date": date.fromisoformat,
        "end_date": date.fromisoformat,
        "daily_quota": _number,
        "priority": _number,
        "settings": _parsed_settings,
        "needs_persona": _truth,
    }
    for name, read in readers.items():
        try:
            values[name] = read(row.get(name) or ("0" if name == "priority" else ""))
        except (ValueError, TypeError) as error:
            faults.append(f"{name}: {error}")
    if not values["external_id"]:
        faults.append("external_id: required")
    if faults:
        return "; ".join(faults)
    needs_persona = values.pop("needs_persona")
    code, target = row.get("code") or "", row.get("target") or ""
    return SlotSpec(**values, code=code, target=target, persona=PersonaNeed() if needs_persona else None)


def _number(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, is {text[:50]!r}") from None
    # What does not fit the message cannot even be refused by the service, which knows the real limits.
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"is out of range: {number}")
    return number


def _truth(text: str) -> bool:
    try:
        return _TRUTHS[text.strip().lower()]
    except KeyError:
        raise ValueError(f"must be true or false, is {text[:50]!r}") from None


def _parsed_settings(text: str) -> dict[str, Setting]:
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    setting_values(found)
    return found
