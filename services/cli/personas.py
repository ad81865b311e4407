"""`muster persona`: personas and their bundles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from muster import Client, PersonaStatus
from muster.personas import Generation, Persona

from services.cli.acting import repeatable
from services.cli.connection import connected
from services.cli.output import json_option, show_json, show_table

_STATUSES = [status.name.lower() for status in PersonaStatus if status]
# The contract's bound; a larger file is not even read.
_FINGERPRINT_BYTES = 256 * 2**10


@click.group()
def persona() -> None:
    """Personas: identities to work as, and their bundles."""


@persona.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--base-profile", default="", help="The profile it was derived from, up to 20 characters.")
@click.option("--aging-level", type=click.IntRange(0, 100), default=0, show_default=True)
@click.option("--status", type=click.Choice(["aging", "active"]), default="active", show_default=True)
@click.option("--region", default="", help="Up to 64 characters.")
@click.option("--tag", "tags", multiple=True, help="Repeatable, up to 16.")
@json_option
@connected
@repeatable
async def create(
    client: Client,
    file: Path,
    base_profile: str,
    aging_level: int,
    status: str,
    region: str,
    tags: tuple[str, ...],
    request_id: str,
    as_json: bool,
) -> None:
    """Make a persona of a fingerprint: a FILE with a JSON object of at most 256 KiB."""
    made = await client.personas.create(
        _fingerprint(file),
        base_profile=base_profile,
        aging_level=aging_level,
        status=PersonaStatus[status.upper()],
        region=region,
        tags=tags,
        request_id=request_id,
    )
    _show_one(made, as_json)


@persona.command("list")
@click.option("--status", type=click.Choice(_STATUSES), help="Only this status.")
@click.option("--tag", default="", help="Only with this tag.")
@click.option("--region", default="", help="Only of this region.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="At most so many.")
@json_option
@connected
async def list_personas(client: Client, status: str | None, tag: str, region: str, limit: int, as_json: bool) -> None:
    """List personas."""
    chosen = PersonaStatus[status.upper()] if status else PersonaStatus.UNSPECIFIED
    found = []
    async for one in client.personas.list(status=chosen, tag=tag, region=region, page_size=min(limit, 1000)):
        found.append(one)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("persona", "status", "aging", "region", "tags", "generation", "uses", "ok", "blocked", "last used", "held by"),
        [
            (
                one.persona_id,
                one.status,
                one.aging_level,
                one.region,
                one.tags,
                one.generation,
                one.total_uses,
                one.success_count,
                one.blocked_count,
                one.last_used_at,
                one.held_by,
            )
            for one in found
        ],
    )


@persona.command()
@click.argument("persona_id")
@json_option
@connected
async def get(client: Client, persona_id: str, as_json: bool) -> None:
    """Show one persona."""
    _show_one(await client.personas.get(persona_id), as_json)


@persona.command()
@click.argument("persona_id")
@click.argument("status", type=click.Choice(_STATUSES))
@click.option("--reason", required=True, help="For the log.")
@json_option
@connected
async def status(client: Client, persona_id: str, status: str, reason: str, as_json: bool) -> None:
    """Move a persona through its life; discarded is final."""
    _show_one(await client.personas.set_status(persona_id, PersonaStatus[status.upper()], reason=reason), as_json)


@persona.command()
@click.argument("persona_id")
@click.option("--reason", required=True, help="For the log.")
@connected
async def release(client: Client, persona_id: str, reason: str) -> None:
    """End every check-out of a persona; its holders' saves are refused from then on."""
    click.echo(f"released: {await client.personas.force_release(persona_id, reason=reason)} check-out(s)")


@persona.command()
@click.argument("persona_id")
@json_option
@connected
async def generations(client: Client, persona_id: str, as_json: bool) -> None:
    """List the bundles that are kept, newest first."""
    _show_generations(await client.personas.generations(persona_id), as_json)


@persona.command()
@click.argument("persona_id")
@click.argument("generation", type=click.IntRange(1))
@json_option
@connected
@repeatable
async def rollback(client: Client, persona_id: str, generation: int, request_id: str, as_json: bool) -> None:
    """Commit a new generation with the parts of an older one."""
    _show_generations((await client.personas.rollback(persona_id, generation, request_id=request_id),), as_json)


def _show_one(one: Persona, as_json: bool) -> None:
    if as_json:
        show_json(one)
    else:
        show_table(("field", "value"), [(field.name, getattr(one, field.name)) for field in dataclasses.fields(one)])


def _show_generations(found: tuple[Generation, ...], as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show_table(
        ("generation", "committed", "part", "bytes", "sha256"),
        [
            (one.generation, one.committed_at, part.name, part.size_bytes, part.sha256)
            for one in found
            for part in one.parts
        ],
    )


def _fingerprint(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > _FINGERPRINT_BYTES:
            raise click.ClickException(f"{file} has {size} bytes; a fingerprint has at most {_FINGERPRINT_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
