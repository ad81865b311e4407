"""The `muster` command: one entry, groups per noun."""

from __future__ import annotations

import os
import sys

import click

from services.cli import archive, exits, explain, keys, personas, run, sessions, slots, up
from services.errors import StartupError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="muster-suite")
def cli() -> None:
    """Muster: the control plane for fleets of crawl and automation workers."""


for command in (
    up.up,
    run.serve,
    run.migrate,
    keys.key,
    slots.slot,
    exits.exit_,
    explain.explain,
    sessions.session,
    personas.persona,
    archive.archive,
):
    cli.add_command(command)


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
    sys.stdout.flush()
    sys.stderr.flush()
    # Native threads of storage libraries may abort the interpreter's own shutdown; see docs/decisions/0004-exit.md.
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
