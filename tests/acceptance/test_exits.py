"""Every kind of command ends with code 0, time after time: native threads must not abort a process at its end.

`MUSTER_EXIT_RUNS` says how many times each is run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from services.migrations import SCHEMAS, migrate
from tests.acceptance.conftest import (
    LISTINGS,
    MUSTER,
    SECONDS,
    SERVICES,
    Command,
    StartUp,
    Up,
    answer_to,
    environment,
    until,
)
from tests.support.postgres import PostgresServer, TemplateDatabases

RUNS = int(os.environ.get("MUSTER_EXIT_RUNS", "5"))
# What glibc, C++, Rust, Python and gRPC print when a process ends as it should not.
ABORT = re.compile(
    r"Fatal Python error|Traceback|terminate called|panicked|[Aa]borted|[Ss]egmentation|core dumped|Check failed"
    r"|was never awaited|never retrieved|Exception ignored"
)


@pytest.fixture(scope="module")
def config_file(
    postgres_server: PostgresServer, template_databases: TemplateDatabases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The configuration of all services, on one migrated database."""

    def prepare(database: str) -> None:
        postgres_server.ensure_database(database, {f"muster_{schema}": schema for schema in SCHEMAS})
        for name, schema in SCHEMAS.items():
            migrate(schema, postgres_server.dsn(database, f"muster_{name}"))

    folder = tmp_path_factory.mktemp("exits")
    with template_databases.fresh("exits", prepare) as database:
        lines: list[str] = []
        for name in SERVICES:
            lines += [
                f"[{name}]",
                f"postgres.dsn = {json.dumps(postgres_server.dsn(database, f'muster_{name}'))}",
                f"identity.dsn = {json.dumps(postgres_server.dsn(database, 'muster_identity'))}",
                'grpc.listen = "127.0.0.1:0"',
                'metrics.listen = "127.0.0.1:0"',
            ]
            if name in ("persona_store", "archiver"):
                lines += [f"objects.folder = {json.dumps(str(folder / 'objects' / name))}"]
        file = folder / "muster.toml"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        yield file


def ended_well(code: int, stderr: str) -> None:
    assert code == 0, stderr
    assert not ABORT.search(stderr), stderr


def run_many(run: Callable[[int], None]) -> None:
    """Runs it `RUNS` times, as many at once as there are cores: crowding is what brings such aborts out."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(run, range(RUNS)):
            pass


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["migrate"],
        ["key", "create", "--organization", "exits"],
        ["key", "list"],
    ],
    ids=" ".join,
)
def test_a_short_command_ends_cleanly(config_file: Path, arguments: list[str]) -> None:
    def run(_: int) -> None:
        done = subprocess.run(
            [MUSTER, *arguments],
            env=environment(MUSTER_CONFIG=str(config_file)),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        ended_well(done.returncode, done.stderr)
        assert done.stderr == ""
        assert done.stdout

    run_many(run)


@pytest.fixture(scope="module")
def operator_key(config_file: Path) -> str:
    made = subprocess.run(
        [MUSTER, "key", "create", "--organization", "exits", "--role", "admin", "--config", config_file],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.strip()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_served_ends_cleanly(config_file: Path, operator_key: str, tmp_path: Path, service: str) -> None:
    def run(place: int) -> None:
        serve = Command(tmp_path / str(place), ["serve", service, "--config", str(config_file)], environment())
        try:
            ready = until(lambda: serve.logged("ready"), f"{service} is ready")
            assert answer_to(ready["grpc"], LISTINGS[service], operator_key) is grpc.StatusCode.OK
            serve.process.send_signal(signal.SIGTERM)
            ended_well(serve.end(), serve.stderr)
            # Nothing but log lines, and none of a fault.
            for line in serve.stderr.splitlines():
                assert json.loads(line)["level"] in ("info", "warning"), line
        finally:
            serve.dispose()

    run_many(run)


@pytest.mark.parametrize(
    "arguments",
    [
        ["slot", "list"],
        ["exit", "list"],
        ["explain"],
        ["session", "totals"],
        ["persona", "list"],
        ["archive", "policies"],
        ["archive", "run", "--dry-run"],
        ["archive", "query", "SELECT count(*) AS n FROM work_allocations"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_operators_command_ends_cleanly(suite: Up, arguments: list[str]) -> None:
    environ = environment(**suite.client_environment())

    def run(_: int) -> None:
        done = subprocess.run([MUSTER, *arguments], env=environ, capture_output=True, text=True, timeout=SECONDS)
        ended_well(done.returncode, done.stderr)

    run_many(run)


def test_the_suite_ends_cleanly(start_up: StartUp) -> None:
    for _ in range(RUNS):
        up = start_up.ready()
        up.process.send_signal(signal.SIGTERM)
        ended_well(up.end(), up.stderr)
        assert up.left(0) == []
        for log in (up.data / "logs").iterdir():
            text = log.read_text(encoding="utf-8")
            assert not ABORT.search(text), text
            # Each service's own end, as the launcher saw it.
            assert re.findall(r"^# .* ended \((.*)\)$", text, re.MULTILINE)[-1] == "code 0", text
