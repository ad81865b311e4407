"""`muster archive`: partitions, cold storage and queries."""

from __future__ import annotations

import dataclasses
from datetime import date
from typing import Any

import click
from muster import Client, PartitionInterval, Policy
from muster.archives import ArchiveStep, QueryStatistics

from services.cli.connection import connected
from services.cli.output import json_option, parsed_day, show_json, show_json_line, show_table

_INTERVALS = [interval.name.lower() for interval in PartitionInterval if interval]


@click.group()
def archive() -> None:
    """Partitions, the cold archive, and queries over both."""


@archive.command()
@json_option
@connected
async def policies(client: Client, as_json: bool) -> None:
    """List the archive policies."""
    _show(Policy, await client.archive.policies(), as_json)


@archive.command("put-policy")
@click.argument("name")
@click.option("--source", required=True, help="The database, by its name in the archiver's configuration.")
@click.option("--table", required=True, help="With its schema, such as allocator.work_allocations.")
@click.option("--interval", required=True, type=click.Choice(_INTERVALS))
@click.option("--ahead", type=click.IntRange(0, 120), default=0, help="Partitions ahead; 0 means 3.")
@click.option("--hot-days", type=click.IntRange(0, 36_500), default=0, help="0 keeps rows hot for ever.")
@click.option("--cold-days", type=click.IntRange(0, 36_500), default=0, help="0 keeps cold files for ever.")
@click.option("--legal-hold", is_flag=True, help="Drop nothing while this is set.")
@click.option("--key-column", default="", help="For which a Bloom filter is written.")
@click.option("--organization-column", default="", help="Empty means organization_id.")
@click.option("--etag", default="", help="Refuse when the policy changed since.")
@json_option
@connected
async def put_policy(
    client: Client, /, as_json: bool, interval: str, hot_days: int, cold_days: int, **given: Any
) -> None:
    """Make or replace the policy NAME of a table. What is not named takes its default."""
    policy = Policy(
        interval=PartitionInterval[interval.upper()],
        hot_retention_days=hot_days,
        cold_retention_days=cold_days,
        **given,
    )
    _show(Policy, (await client.archive.put_policy(policy),), as_json)


@archive.command()
@click.argument("policy")
@json_option
@connected
async def partitions(client: Client, policy: str, as_json: bool) -> None:
    """List the hot partitions of a POLICY's table and its cold files."""
    found = await client.archive.partitions(policy)
    if as_json:
        show_json(found)
        return
    hot = [("hot", one.name, one.from_date, one.to_date, one.estimated_rows, one.size_bytes, "") for one in found.hot]
    cold = [
        ("cold", one.partition, one.from_date, one.to_date, one.rows, one.size_bytes, one.key) for one in found.cold
    ]
    show_table(("where", "partition", "from", "to", "rows", "bytes", "file"), hot + cold)


@archive.command("make-partitions")
@click.argument("policies", nargs=-1)
@json_option
@connected
async def make_partitions(client: Client, policies: tuple[str, ...], as_json: bool) -> None:
    """Make the partitions ahead that are missing, of POLICIES or of all."""
    created = await client.archive.make_partitions(policies)
    if as_json:
        show_json(created)
        return
    for name in created:
        click.echo(f"created {name}")
    click.echo(f"{len(created)} partition(s) made")


@archive.command()
@click.argument("policies", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
@connected
async def run(client: Client, policies: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Move partitions past their hot retention to cold storage, of POLICIES or of all; a line for each step."""
    failed = moved = 0
    async for event in client.archive.run(policies, dry_run=dry_run):
        failed += event.step is ArchiveStep.FAILED
        moved += event.step is ArchiveStep.DROPPED
        if as_json:
            show_json_line(event)
        else:
            why = f": {event.message}" if event.message else ""
            click.echo(f"{event.step.name.lower():<10} {event.partition} {event.rows} rows, {event.bytes} bytes{why}")
    if failed:
        raise click.ClickException(f"{failed} partition(s) failed; the next run goes on from there")
    if not as_json:
        click.echo("nothing was changed (dry run)" if dry_run else f"{moved} partition(s) moved")


@archive.command()
@click.option("--job", type=click.Choice(["archive", "partitions"]), default=None, help="Only this job.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@json_option
@connected
async def runs(client: Client, job: str | None, limit: int, as_json: bool) -> None:
    """List the run history, newest first."""
    found = []
    async for one in client.archive.runs(job=job or "", page_size=min(limit, 1000)):
        found.append(one)
        if len(found) == limit:
            break
    if as_json:
        show_json(found)
        return
    show_table(
        ("run", "job", "state", "started", "seconds", "partitions", "rows", "bytes", "key", "message"),
        [
            (
                one.run_id,
                one.job,
                one.state,
                one.started_at,
                f"{one.duration.total_seconds():.1f}" if one.duration is not None else "",
                one.partitions,
                one.rows,
                one.bytes,
                one.actor,
                one.message,
            )
            for one in found
        ],
    )


@archive.command()
@click.argument("sql")
@click.option("--from", "from_date", callback=parsed_day, help="Only rows from this day on; bounds what is read.")
@click.option("--to", "to_date", callback=parsed_day, help="Only rows before this day.")
@click.option("--max-rows", type=click.IntRange(0, 10_000_000), default=0, help="0 means 10,000.")
@click.option("--max-scan-bytes", type=click.IntRange(0, 2**40), default=0, help="0 means 1 GiB.")
@json_option
@connected
async def query(
    client: Client,
    sql: str,
    from_date: date | None,
    to_date: date | None,
    max_rows: int,
    max_scan_bytes: int,
    as_json: bool,
) -> None:
    """Run one SELECT over hot and cold rows; its tables are the names of policies."""
    # Imported here, since it takes a quarter of a second that no other command needs.
    import pyarrow as pa

    stream = bytearray()
    read: QueryStatistics | None = None
    async for piece in client.archive.query(
        sql, from_date=from_date, to_date=to_date, max_rows=max_rows, max_scan_bytes=max_scan_bytes
    ):
        stream += piece.arrow_ipc
        read = piece.statistics or read
    try:
        table = pa.ipc.open_stream(pa.py_buffer(bytes(stream))).read_all()
    except pa.ArrowInvalid as error:
        raise click.ClickException(f"the answer is not whole: {error}") from None
    if as_json:
        show_json({"rows": table.to_pylist(), "statistics": read})
        return
    show_table(table.column_names, [tuple(row.values()) for row in table.to_pylist()])
    if read is not None:
        cut = ", cut at --max-rows" if read.truncated else ""
        click.echo(
            f"{read.rows} row(s){cut}; read {read.scanned_bytes} bytes of {read.hot_partitions} hot partition(s) and "
            f"{read.cold_files} cold file(s), left out {read.cold_files_pruned}"
        )


def _show(kind: type[Policy], found: tuple[Policy, ...], as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    names = [field.name for field in dataclasses.fields(kind)]
    show_table([name.replace("_", " ") for name in names], [[getattr(one, name) for name in names] for one in found])
