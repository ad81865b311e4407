"""`muster key`: API keys, straight in the identity database, so that the first one can be made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import click
from rich.console import Console
from rich.table import Table

from services.call import Role
from services.cli.run import config_option, load_service
from services.errors import DomainError
from services.identity.keys import KeyStore
from services.postgres import Database

Result = TypeVar("Result")


@click.group()
def key() -> None:
    """API keys and the organizations they name. Works on the database itself; needs no running service."""


@key.command()
@click.option("--organization", required=True, help="The organization's name; made when there is none.")
@click.option("--role", type=click.Choice([role.name.lower() for role in Role]), default="worker", show_default=True)
@click.option("--name", default="", help="For people.")
@click.option("--time-zone", help="IANA name for the organization's days, such as Asia/Seoul; a new one has UTC.")
@click.option("--expires-days", type=click.IntRange(1, 3650), help="After how many days the key is refused.")
@config_option
def create(
    organization: str, role: str, name: str, time_zone: str | None, expires_days: int | None, config_file: Path | None
) -> None:
    """Make a key and print it. It is shown only here; the database holds its hash."""
    expires_at = datetime.now(UTC) + timedelta(days=expires_days) if expires_days else None

    async def work(store: KeyStore) -> tuple[UUID, str]:
        least = Role[role.upper()]
        return await store.create(organization, least, name=name, time_zone=time_zone, expires_at=expires_at)

    _, secret = _with_store(config_file, work)
    click.echo(secret)


@key.command("list")
@config_option
def list_keys(config_file: Path | None) -> None:
    """List the keys on record."""
    table = Table("key id", "organization", "role", "name", "created", "expires", "revoked")
    for entry in _with_store(config_file, lambda store: store.list()):
        moments = [
            f"{moment:%Y-%m-%d %H:%M}" if moment else ""
            for moment in (entry.created_at, entry.expires_at, entry.revoked_at)
        ]
        table.add_row(str(entry.key_id), entry.organization, entry.role.name.lower(), entry.name, *moments)
    Console().print(table)


@key.command()
@click.argument("key_id", type=click.UUID)
@config_option
def revoke(key_id: UUID, config_file: Path | None) -> None:
    """Refuse a key from now on (services notice within 30 s)."""
    if not _with_store(config_file, lambda store: store.revoke(key_id)):
        raise click.ClickException(f"there is no key {key_id}")
    click.echo("revoked")


def _with_store(config_file: Path | None, work: Callable[[KeyStore], Awaitable[Result]]) -> Result:
    config, _ = load_service("allocator", config_file)

    async def run() -> Result:
        database = await Database.connect(config.identity_database(), "muster key")
        try:
            return await work(KeyStore(database))
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except DomainError as error:
        raise click.ClickException(error.message) from None
