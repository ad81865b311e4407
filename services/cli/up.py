"""`muster up`: the whole suite on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from services.config import read_secret
from services.launcher.suite import Ports, Suite, describe
from services.launcher.supervisor import Event

_EXAMPLE = """\
# worker.py, run with:  set -a; . {env}; set +a; {python} worker.py
import asyncio
import muster

async def main() -> None:
    async with muster.Client.from_environment() as client, muster.Worker(client, client_id="pc-1") as worker:
        async for job in worker.jobs():
            async with job:
                print(job.keyword, job.settings, job.exit and job.exit.endpoint)
                await job.progress(page=1, total=1)
                await job.succeed()

asyncio.run(main())
"""


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".muster"),
    envvar="MUSTER_HOME",
    show_default=True,
    help="The one folder that keeps everything.",
)
@click.option(
    "--port", type=click.IntRange(0, 65000), default=7401, show_default=True, help="First of four gRPC ports."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65000),
    default=9401,
    show_default=True,
    help="First of four /metrics ports.",
)
def up(data: Path, port: int, metrics_port: int) -> None:
    """Run the suite on its embedded parts until Ctrl-C. Comes back with its data."""
    asyncio.run(_up(Suite(data, Ports(port, metrics_port), on_event=_tell)))


async def _up(suite: Suite) -> None:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    starting = asyncio.ensure_future(suite.start())
    stop = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        await starting
        _introduce(suite)
        ended = asyncio.ensure_future(suite.supervisor.wait())
        await asyncio.wait((ended, stop), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await ended
        ended.cancel()
    finally:
        stop.cancel()
        click.echo("stopping", err=True)
        await suite.stop()


def _tell(event: Event) -> None:
    click.echo(describe(event), err=True)


def _introduce(suite: Suite) -> None:
    console = Console()
    table = Table("service", "gRPC", "metrics", title="Muster is up", title_justify="left")
    for name, endpoint in suite.endpoints.items():
        table.add_row(name, endpoint.grpc, f"http://{endpoint.metrics}/metrics")
    console.print(table)
    console.print(f"data          {suite.folder}", soft_wrap=True)
    console.print(f"operator key  {read_secret(suite.operator_key_file)}", soft_wrap=True)
    console.print("more keys     muster key create --organization default --role worker")
    console.print("\nA worker, ready to paste:\n")
    example = _EXAMPLE.format(env=suite.folder / "client.env", python=sys.executable)
    console.print(Syntax(example, "python", background_color="default"))
    console.print("Ctrl-C stops the suite; its data stays.")
