"""`muster slot import` and `muster slot export`: slots in files of any length."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
from muster import Client, Pacing, SlotSpec
from muster.errors import MusterError
from muster.slot_import import ImportedSlot

from services.cli.connection import connected, told
from services.cli.output import show_json_line

_JSON_SUFFIXES = {".jsonl", ".ndjson"}


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--format", "kind", type=click.Choice(["csv", "jsonl"]), help="Else by the name: .jsonl and .ndjson are JSON lines."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for every row; else only refused rows.")
@connected
async def import_file(client: Client, file: Path, kind: str | None, as_json: bool) -> None:
    r"""Make the slots of FILE; safe to repeat, since rows are known by their external_id.

    CSV has these columns, of which the first five are required: external_id, keyword, start_date, end_date,
    daily_quota, code, target, is_active, priority, weight, pacing (asap or even), without_exit, exit_region,
    exit_provider, persona (true or false), persona.tags (apart by spaces), persona.region, persona.min_aging_level,
    persona.cool_down_seconds, and one for each setting. A cell of `setting.<name>` is true, false, a number or a text
    in double quotes as JSON has them, and else a text; in `setting.<name>:int` (or :bool, :double, :text) always of
    that type. An empty cell says nothing.

    JSON lines are objects of the same fields, with `settings` and `persona` as objects.

    Every row stands for itself; a row is named by the line it begins on. The exit code is 1 when one was refused.
    """
    counts: Counter[str] = Counter()
    try:
        with file.open("rb") as lines:
            as_csv = kind == "csv" or (kind is None and file.suffix.lower() not in _JSON_SUFFIXES)
            try:
                answers = client.slots.import_csv(lines) if as_csv else client.slots.import_jsonl(lines)
            except ValueError as error:
                raise click.ClickException(f"{file}: {error}") from None
            await _report(answers, counts, as_json)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
    except MusterError as error:
        raise click.ClickException(
            f"{told(error)}; {counts.total()} row(s) have an answer: import the file again for the others"
        ) from None
    said = f"{counts['created']} created, {counts['stands']} stood already, {counts['refused']} refused"
    if counts["refused"]:
        raise click.ClickException(f"{said}, of {counts.total()} row(s)")
    if not as_json:
        click.echo(f"{said}, of {counts.total()} row(s)")


@click.command("export")
@click.option("--target", default="", help="Only this target.")
@click.option("--keyword", default="", help="Only keywords that begin so.")
@click.option("--code", default="", help="Only this code.")
@click.option("--active/--inactive", "is_active", default=None, help="Only active, or only inactive, ones.")
@connected
async def export_file(client: Client, /, keyword: str, **filters: Any) -> None:
    """Print slots as the JSON lines that `import` takes, which needs an external_id in each."""
    async for one in client.slots.list(keyword_prefix=keyword, page_size=1000, **filters):
        show_json_line(_fields(one.spec))


async def _report(answers: AsyncIterator[ImportedSlot], counts: Counter[str], as_json: bool) -> None:
    async for answer in answers:
        result = "refused" if answer.error is not None else "created" if answer.created else "stands"
        counts[result] += 1
        error = told(answer.error) if answer.error is not None else ""
        if as_json:
            line = {"row": answer.row, "external_id": answer.external_id, "slot_id": answer.slot_id, "result": result}
            show_json_line({**line, "error": error} if error else line)
        elif error:
            name = f" ({answer.external_id})" if answer.external_id else ""
            click.echo(f"row {answer.row}{name}: {error}", err=True)


def _fields(spec: SlotSpec) -> dict[str, Any]:
    # What says nothing is left out.
    fields: dict[str, Any] = {
        "external_id": spec.external_id,
        "keyword": spec.keyword,
        "code": spec.code,
        "target": spec.target,
        "start_date": spec.start_date,
        "end_date": spec.end_date,
        "daily_quota": spec.daily_quota,
        "settings": dict(spec.settings),
        "priority": spec.priority,
        "weight": spec.weight,
        "pacing": spec.pacing.name.lower() if spec.pacing is Pacing.EVEN else "",
        "without_exit": spec.without_exit,
        "exit_region": spec.exit_region,
        "exit_provider": spec.exit_provider,
    }
    named = {name: value for name, value in fields.items() if value}
    if not spec.is_active:
        named["is_active"] = False
    if spec.persona is not None:
        named["persona"] = {
            "tags": list(spec.persona.tags),
            "region": spec.persona.region,
            "min_aging_level": spec.persona.min_aging_level,
            "cool_down_seconds": spec.persona.cool_down_seconds,
        }
    return named
