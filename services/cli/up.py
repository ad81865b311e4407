"""`muster up`: the whole suite on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from services.config import read_secret
from services.errors import StartupError
from services.launcher.suite import ORGANIZATION, Ports, Suite, describe
from services.launcher.supervisor import BAD_START_CODE, Event, Exited, Started

_EXAMPLE = """\
# worker.py, run with:  set -a; . {env}; set +a; {python} worker.py
import asyncio
import muster

async def main() -> None:
    async with muster.Client.from_environment() as client, muster.Worker(client, client_id="pc-1") as worker:
        async for job in worker.jobs():
            async with job:
                print(job.keyword, job.settings, job.exit and job.exit.endpoint)
                job.progress(page=1, total=1)
                await job.succeed()

asyncio.run(main())
"""


@click.command()
@click.option(
    "--data",
    # That it may be a file is found out where it is used, which says so in one line.
    type=click.Path(path_type=Path),
    default=Path(".muster"),
    envvar="MUSTER_HOME",
    show_default=True,
    help="The one folder that keeps everything.",
)
@click.option(
    "--port", type=click.IntRange(0, 65000), default=7401, show_default=True, help="First of four gRPC ports; 0: any."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65000),
    default=9401,
    show_default=True,
    help="First of four /metrics ports; 0: any.",
)
def up(data: Path, port: int, metrics_port: int) -> None:
    """Run the suite on its embedded parts until Ctrl-C. Comes back with its data."""
    asyncio.run(_up(data, Ports(port, metrics_port)))


async def _up(data: Path, ports: Ports) -> None:
    news = _News()
    suite = Suite(data, ports, on_event=news)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP, and that must stay so; else a terminal that closes asks for the same as Ctrl-C.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, asked.set)
    starting = asyncio.ensure_future(suite.start())
    stop = asyncio.ensure_future(asked.wait())
    try:
        await asyncio.wait((starting, stop), return_when=asyncio.FIRST_COMPLETED)
        if asked.is_set():
            news.stopping = True
            starting.cancel()
            # Ctrl-C also reaches initdb, whose end is no news then.
            with contextlib.suppress(asyncio.CancelledError, StartupError):
                await starting
            return
        await starting
        _introduce(suite)
        ended = asyncio.ensure_future(suite.wait())
        await asyncio.wait((ended, stop), return_when=asyncio.FIRST_COMPLETED)
        news.stopping = True
        if ended.done():
            await ended
        ended.cancel()
    finally:
        news.stopping = True
        if asked.is_set():
            _say("stopping")
        stop.cancel()
        await suite.stop()


class _News:
    """Tells what nobody asked for: the end of a part, and its next start.

    Not told are first starts, the ends of a stop, and what follows a refused start: its cause comes as the last line.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._starts: Counter[str] = Counter()

    def __call__(self, event: Event) -> None:
        match event:
            case Started(name):
                self._starts[name] += 1
                told = self._starts[name] > 1 or name == "postgres"
            case Exited(name, code):
                self.stopping |= code == BAD_START_CODE and self._starts[name] == 1
                told = True
            case _:
                told = True
        if told and not self.stopping:
            _say(describe(event))


def _say(line: str) -> None:
    # A terminal that is gone must not end the suite.
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def _introduce(suite: Suite) -> None:
    console = Console()

    def say(line: str) -> None:
        # Paths are not markup, and a line is for copying: never folded.
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    table = Table("service", "gRPC", "metrics", title="Muster is up", title_justify="left")
    for name, endpoint in suite.endpoints.items():
        table.add_row(name, endpoint.grpc, f"http://{endpoint.metrics}/metrics")
    console.print(table)
    say(f"data          {suite.folder}")
    say(f"operator key  {read_secret(suite.operator_key_file)}")
    config = shlex.quote(str(suite.config_file))
    say(f"more keys     muster key create --organization {ORGANIZATION} --role worker --config {config}")
    say("\nA worker, ready to paste:\n")
    env, python = shlex.quote(str(suite.folder / "client.env")), shlex.quote(sys.executable)
    example = _EXAMPLE.format(env=env, python=python)
    console.print(Syntax("", "python", background_color="default").highlight(example), soft_wrap=True)
    say("Ctrl-C stops the suite; its data stays.")
