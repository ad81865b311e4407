"""`muster serve` and `muster migrate`."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from services import chassis
from services.config import ServiceConfig, load
from services.errors import StartupError
from services.migrations import IDENTITY, SCHEMAS
from services.migrations import migrate as migrate_schema

SERVICES = ("allocator", "persona_store", "session_tracker", "archiver")

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MUSTER_CONFIG",
    help="TOML file with a table per service; the environment (MUSTER_<SERVICE>__…) wins over it.",
)


def service_name(_: click.Context, __: click.Parameter, value: str) -> str:
    """Takes session-tracker for session_tracker."""
    name = value.replace("-", "_")
    if name not in SERVICES:
        raise click.BadParameter(f"unknown service {value!r}; one of {', '.join(SERVICES)}")
    return name


def load_service(name: str, config_file: Path | None) -> tuple[ServiceConfig, Any]:
    """Returns the configuration of a service and its bind function."""
    app = import_module(f"{name}.app")
    return load(app.CONFIG, name, config_file), app.bind


@click.command()
@click.argument("service", callback=service_name)
@config_option
@click.option("--engine", help="Where the session tracker has its live sessions: memory or redis.")
@click.pass_context
def serve(context: click.Context, service: str, config_file: Path | None, engine: str | None) -> None:
    """Run one SERVICE until SIGTERM: allocator, persona-store, session-tracker or archiver."""
    if engine is not None:
        if service != "session_tracker":
            raise click.BadOptionUsage("engine", f"{service} has no engines to choose from")
        # As its variable, which wins over the file and is checked like any other setting.
        os.environ["MUSTER_SESSION_TRACKER__ENGINE__KIND"] = engine
    config, bind = load_service(service, config_file)
    try:
        code = chassis.run(service, config, bind)
    except StartupError as error:
        raise StartupError(f"{service}: {error}") from None
    context.exit(code)


@click.command()
@click.argument("services", nargs=-1)
@config_option
def migrate(services: tuple[str, ...], config_file: Path | None) -> None:
    """Bring the schemas of SERVICES (default: all) to this release. Safe to repeat and to run at once."""
    names = [service_name(click.get_current_context(), click.Argument(["services"]), name) for name in services]
    done: set[str] = set()
    for name in names or SERVICES:
        config, _ = load_service(name, config_file)
        identity = config.identity_database().resolved_dsn()
        if identity not in done:
            done.add(identity)
            _report(IDENTITY.name, migrate_schema(IDENTITY, identity))
        _report(name, migrate_schema(SCHEMAS[name], config.postgres.resolved_dsn()))


def _report(schema: str, applied: list[str]) -> None:
    click.echo(f"{schema}: {'applied ' + ', '.join(applied) if applied else 'up to date'}")
