"""`make demo`: the main job on real input, with mishaps, ending in a verdict.

    site (pydoc behind a front)   three forward proxies   the suite on its embedded parts   eight worker processes

Exits 0 only if every invariant held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import muster
import psycopg
import pyarrow as pa
from aiohttp import ClientSession
from rich.console import Console
from rich.table import Table

from demo import history, mishaps, verdict
from demo.fleet import SIZE, Fleet
from demo.observer import Observer
from demo.proxies import RunningProxy, running_proxies
from demo.screen import PlainScreen, RichScreen, Scene, Screen
from demo.site import RunningSite, running_site
from services.config import read_secret
from services.launcher.suite import Ports, Suite

PERSONAS = 16
CAP = 20
# A lease of minutes would make the demo wait for minutes until a killed worker's unit is free again.
SETTINGS = {
    "MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": "8",
    "MUSTER_SESSION_TRACKER__RENEWAL__INTERVAL_SECONDS": "2",
}
_IDLE_SECONDS = 10.0
_POLICY = "work_allocations"
_DATES = "SELECT work_date, status, count(*) AS rows FROM work_allocations GROUP BY work_date, status"


async def main(given: argparse.Namespace, folder: Path) -> int:
    """Runs the demo in a folder and returns the exit code."""
    scene = Scene()
    interactive = not given.plain and sys.stdout.isatty()
    screen: Screen = RichScreen(scene, given.svg) if interactive or given.svg else PlainScreen(scene)
    suite = Suite(folder / "suite", Ports(0, 0), environ=SETTINGS, on_event=lambda _: None)
    with screen:
        async with contextlib.AsyncExitStack() as stack:
            screen.event("starting the site, three proxies and the suite")
            site = await stack.enter_async_context(running_site(folder / "site"))
            proxies = await stack.enter_async_context(running_proxies(3, folder / "proxies"))
            stack.push_async_callback(suite.stop)
            await suite.start()
            screen.event("the suite serves: " + ", ".join(f"{n} {e.grpc}" for n, e in suite.endpoints.items()), "green")
            key = read_secret(suite.operator_key_file)
            client = await stack.enter_async_context(_client(suite, key))
            checks = await _perform(suite, client, site, proxies, folder, scene, screen)
        screen.event("everything is stopped", "green")
    return _report(checks, scene, given.json)


async def _perform(
    suite: Suite,
    client: muster.Client,
    site: RunningSite,
    proxies: list[RunningProxy],
    folder: Path,
    scene: Scene,
    screen: Screen,
) -> list[verdict.Check]:
    scene.stage = "preparing"
    organization_id = await asyncio.to_thread(_organization, suite.dsn("muster_identity"))
    past = await history.generate(suite.dsn("muster_allocator"), organization_id)
    screen.event(f"{past.total:,} rows of history in {len(past.partitions)} old partitions")
    await _furnish(suite, client, proxies, screen)

    scene.stage = "fleet at work"
    fleet = Fleet(site.url, folder / "fleet", suite.client_environment(), _IDLE_SECONDS)
    happened = mishaps.Mishaps()
    observer = asyncio.create_task(
        Observer(client, scene, screen, {proxy.endpoint: proxy.name for proxy in proxies}).run()
    )
    try:
        await fleet.start_all()
        screen.event(f"{SIZE} workers started", "green")
        await mishaps.happen(happened, suite, fleet, client, screen)
        failed = await fleet.wait()
        screen.event("no work is left, and the workers have ended", "green")
        await _settled(client)
    finally:
        observer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await observer
        await fleet.stop()

    scene.stage = "archiving"
    scene.sessions = []
    archive = await _archive(suite, client, past, screen)
    evidence = verdict.Evidence.gather(fleet.journals)
    scene.pages = sum(entry.pages for entry in evidence.crawled)
    scene.products = sum(entry.products for entry in evidence.submitted.values())
    async with ClientSession() as http, http.get(f"{site.url.rstrip('/')}/__visits") as answer:
        visits = await answer.json()
    return [
        verdict.Check("every worker ended well", not failed, "; ".join(failed) or f"{SIZE} workers and a replacement"),
        *await verdict.judge_work(suite.dsn(), evidence, happened),
        *await verdict.judge_personas(client, evidence, suite.dsn()),
        *await verdict.judge_sessions(client, suite.dsn(), evidence),
        *verdict.judge_traffic(evidence, sum(proxy.requests() for proxy in proxies), visits),
        *archive,
    ]


async def _furnish(suite: Suite, client: muster.Client, proxies: list[RunningProxy], screen: Screen) -> None:
    """Imports slots by the operators' own command, registers the exits and makes the personas."""
    command = [sys.executable, "-m", "services.cli.main", "slot", "import", str(Path(__file__).with_name("slots.csv"))]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **suite.client_environment()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"muster slot import failed: {said.decode()}")
    screen.event(f"muster slot import slots.csv: {said.decode().strip().splitlines()[-1].strip()}")
    await client.exits.add([muster.ExitSpec(endpoint=proxy.endpoint, cap=CAP) for proxy in proxies])
    for number in range(PERSONAS):
        fingerprint = {"screen": [1280 + 16 * number, 720], "languages": ["en", "ko"], "number": number}
        await client.personas.create(json.dumps(fingerprint).encode(), base_profile="demo", tags=["demo"])
    screen.event(f"{len(proxies)} exits registered with a cap of {CAP}, {PERSONAS} personas made")


async def _settled(client: muster.Client) -> None:
    """Waits until what the services do in the background (check-ins, expiries) is done."""
    async with asyncio.timeout(30):
        while True:
            totals = await client.insight.totals()
            if totals.check_ins_pending == 0 and totals.leased == 0:
                return
            await asyncio.sleep(0.2)


async def _archive(suite: Suite, client: muster.Client, past: history.History, screen: Screen) -> list[verdict.Check]:
    """Archives the old partitions and asks the archive what it holds."""
    moved = dropped = written = 0
    started = time.monotonic()
    async for event in client.archive.run([_POLICY]):
        if event.step is muster.ArchiveStep.DROPPED:
            dropped += 1
            moved += event.rows
            written += event.bytes
            screen.event(f"{event.partition}: {event.rows:,} rows verified, archived and dropped", "cyan")
        elif event.step in (muster.ArchiveStep.FAILED, muster.ArchiveStep.SKIPPED):
            screen.event(f"{event.partition}: {event.step.name.lower()}: {event.message}", "red")
        screen.refresh()
    seconds = time.monotonic() - started
    screen.event(f"{moved:,} rows in {written / 2**20:.1f} MiB of Parquet, {moved / seconds:,.0f} rows/s", "green")
    cold = await _query(client, past.first_day, past.end_day)
    left = await asyncio.to_thread(_rows_left, suite.dsn(), past.end_day)
    return verdict.judge_archive(past, moved, dropped, left, cold)


async def _query(client: muster.Client, first: date, end: date) -> dict[tuple[date, int], int]:
    pieces = [piece async for piece in client.archive.query(_DATES, from_date=first, to_date=end)]
    with pa.ipc.open_stream(b"".join(piece.arrow_ipc for piece in pieces)) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return {(row["work_date"], row["status"]): row["rows"] for row in rows}


def _organization(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT organization_id::text FROM organizations").fetchone()
    assert row is not None
    return str(row[0])


def _rows_left(dsn: str, end: date) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            "SELECT count(*) FROM allocator.work_allocations WHERE work_date < %s", [end]
        ).fetchone()
    assert row is not None
    return int(row[0])


def _client(suite: Suite, key: str) -> muster.Client:
    return muster.Client(
        api_key=key,
        allocator=suite.endpoints["allocator"].grpc,
        persona_store=suite.endpoints["persona_store"].grpc,
        session_tracker=suite.endpoints["session_tracker"].grpc,
        archiver=suite.endpoints["archiver"].grpc,
    )


def _report(checks: list[verdict.Check], scene: Scene, file: Path | None) -> int:
    table = Table(
        "", "invariant", "figures", title="What the workers did, against what is stored", title_justify="left"
    )
    for check in checks:
        table.add_row("[green]held[/]" if check.held else "[red]BROKEN[/]", check.name, check.figures)
    console = Console()
    console.print(table)
    broken = [check for check in checks if not check.held]
    console.print(
        f"{len(checks) - len(broken)} of {len(checks)} invariants held in {scene.elapsed_seconds():.0f} s; "
        f"{scene.pages} pages, {scene.products} products"
    )
    if file is not None:
        summary = {
            "held": not broken,
            "seconds": round(scene.elapsed_seconds(), 1),
            "pages": scene.pages,
            "products": scene.products,
            "invariants": [{"name": check.name, "held": check.held, "figures": check.figures} for check in checks],
            "events": [{"at_seconds": round(at, 1), "text": text} for at, text, _ in scene.events],
        }
        file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


def run() -> int:
    """Reads the command line and runs the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="a line per event instead of the live screen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="keep a picture of the busiest screen there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and keep it")
    given = parser.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        return asyncio.run(main(given, given.keep))
    with tempfile.TemporaryDirectory(prefix="muster-demo-", ignore_cleanup_errors=True) as folder:
        return asyncio.run(main(given, Path(folder)))


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    # As the `muster` command does, and for the same reason: docs/decisions/0004-exit.md.
    os._exit(code)
