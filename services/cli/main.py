"""The `muster` command: one entry, groups per noun."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import click

from services.errors import StartupError

_HOMES = {
    "up": "up.up",
    "serve": "run.serve",
    "migrate": "run.migrate",
    "key": "keys.key",
    "slot": "slots.slot",
    "exit": "exits.exit_",
    "target": "targets.target",
    "client": "clients.client",
    "lease": "leases.lease",
    "quota": "leases.quota",
    "quarantine": "quarantine.quarantine",
    "explain": "explain.explain",
    "what-if": "explain.what_if",
    "report": "report.report",
    "audit": "audit.audit",
    "session": "sessions.session",
    "persona": "personas.persona",
    "archive": "archive.archive",
}


class _Commands(click.Group):
    """Imports a command when it is used: to load what all of them stand on takes longer than most of them run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOMES:
            return None
        module, _, name = _HOMES[cmd_name].partition(".")
        command: click.Command = getattr(import_module(f"services.cli.{module}"), name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="muster-suite")
def cli() -> None:
    """Muster: the control plane for fleets of crawl and automation workers."""


def main() -> None:
    """Runs the command and ends the process: 0 done, 1 failed, 2 wrong usage or set-up."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except click.Abort:
        code = 130
    except click.UsageError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except StartupError as error:
        click.echo(f"muster: {error}", err=True)
        code = 2
    except Exception:
        # A fault of our own: shown whole, since there is nobody to hide it from, and ended like everything else.
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Native threads of storage libraries may abort the interpreter's own shutdown; see docs/decisions/0004-exit.md.
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
