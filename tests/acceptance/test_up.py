"""`muster up` from outside: it serves, ends at once and whole, mends what is killed, and refuses in one line."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import grpc
import pytest

from tests.acceptance.conftest import LISTINGS, MUSTER, SERVICES, StartUp, Up, answer_to, environment, serves, until

METRICS = (
    "muster_build_info",
    "muster_event_loop_lag_seconds_bucket",
    "muster_postgres_connections",
    "muster_rpc_total",
    "muster_rpc_seconds_bucket",
    "muster_rpc_in_flight",
)


def answers(up: Up, service: str) -> bool:
    return answer_to(up.endpoint(service), LISTINGS[service], up.key()) is grpc.StatusCode.OK


@contextlib.contextmanager
def port_in_use(place: int) -> Iterator[tuple[int, int]]:
    """Occupies a port, and gives it with the first of the row in which it has this place."""
    while True:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            if port <= 65000:
                yield port, port - place
                return


def refusal(up: Up) -> str:
    """Returns the one line with which it refused to start."""
    assert up.end() == 2, up.stderr
    assert up.left() == []
    [line] = up.stderr.splitlines()
    assert line.startswith("muster: ")
    assert up.stdout == ""
    return line


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_serves_and_is_measured(suite: Up, service: str) -> None:
    assert serves(suite.endpoint(service))
    assert answers(suite, service)
    assert answer_to(suite.endpoint(service), LISTINGS[service], "muster_" + "A" * 43) is (
        grpc.StatusCode.UNAUTHENTICATED
    )
    text = suite.metrics(service)
    for name in METRICS:
        assert re.search(rf"^{name}\{{?", text, re.MULTILINE), name
    assert re.search(rf'^muster_build_info{{service="{service}",version="[^"]+"}} 1\.0$', text, re.MULTILINE)
    assert re.search(r'^muster_rpc_total{code="UNAUTHENTICATED",.*} [1-9]', text, re.MULTILINE)


def test_what_it_prints_can_be_pasted(suite: Up) -> None:
    key_file = suite.client_environment()["MUSTER_API_KEY_FILE"]
    [source] = re.findall(r"set -a; (\. .*); set \+a;", suite.stdout)
    shell = subprocess.run(
        ["sh", "-c", f'{source}; printf %s "$MUSTER_API_KEY_FILE"'], capture_output=True, text=True, check=True
    )
    assert shell.stdout == key_file == str(suite.data / "keys" / "operator.key")
    example = suite.stdout.partition("ready to paste:")[2].partition("Ctrl-C stops")[0]
    ast.parse(example)
    assert f"operator key  {suite.key()}\n" in suite.stdout
    [more] = re.findall(r"more keys     (.*)", suite.stdout)
    made = subprocess.run(
        ["sh", "-c", more],
        capture_output=True,
        text=True,
        env=environment(PATH=f"{MUSTER.parent}:{os.environ['PATH']}"),
    )
    assert made.returncode == 0, made.stderr
    assert answer_to(suite.endpoint("persona_store"), LISTINGS["persona_store"], made.stdout.strip()) is (
        grpc.StatusCode.OK
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(suite: Up, service: str) -> None:
    others = {name: suite.service(name) for name in SERVICES if name != service}
    killed = suite.service(service)
    assert killed is not None
    killed.kill()
    killed.wait(10)
    until(lambda: serves(suite.endpoint(service)) and answers(suite, service), f"{service} serves again")
    assert {name: suite.service(name) for name in others} == others
    again = suite.service(service)
    assert again is not None
    assert again.pid != killed.pid
    assert f"{service} ended (signal 9)\n{service} starts again in " in suite.stderr


def test_a_service_that_cannot_start_again_yet_does_so_later(suite: Up) -> None:
    address = suite.endpoint("archiver")
    killed = suite.service("archiver")
    assert killed is not None
    killed.kill()
    killed.wait(10)
    before = suite.stderr.count("archiver ended (code 2)")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        until(lambda: suite.alive() and suite.stderr.count("archiver ended (code 2)") > before, "a refused start")
    until(lambda: suite.alive() and serves(address) and answers(suite, "archiver"), "the archiver serves again")


def test_a_killed_database_comes_back_under_the_services(suite: Up) -> None:
    killed = suite.database()
    assert killed is not None
    killed.kill()
    killed.wait(10)
    until(lambda: (again := suite.database()) is not None and again.pid != killed.pid, "another database")
    for service in SERVICES:
        until(lambda service=service: serves(suite.endpoint(service)) and answers(suite, service), f"{service} answers")  # type: ignore[misc]
    assert "postgres ended (signal 9)" in suite.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_it_ends_whole_when_asked_and_comes_back_with_its_data(start_up: StartUp, number: signal.Signals) -> None:
    up = start_up.ready()
    key = up.key()
    if number == signal.SIGINT:
        up.press_ctrl_c()
    else:
        up.process.send_signal(number)
    assert up.end() == 0
    assert up.left(0) == []
    assert up.stderr == "stopping\n"
    again = start_up.ready()
    assert again.key() == key
    assert all(answers(again, service) for service in SERVICES)


@pytest.mark.parametrize("file", ["postgres/launcher.lock", "postgres/cluster.new", "keys/operator.key", "client.env"])
def test_ctrl_c_while_it_starts_is_an_ordinary_end(start_up: StartUp, file: str) -> None:
    up = start_up()
    until(lambda: (up.data / file).exists() or up.process.poll() is not None, file)
    up.family()
    up.press_ctrl_c()
    assert up.end() == 0, up.stderr
    assert up.left(0) == []
    assert up.stderr == "stopping\n"
    start_up.ready()


def test_a_killed_launcher_takes_all_along_and_the_next_one_works(start_up: StartUp) -> None:
    up = start_up.ready()
    key = up.key()
    assert len(up.family()) > len(SERVICES)
    up.process.kill()
    up.end()
    # At once, while the database may still be writing its last checkpoint.
    again = start_up.ready()
    assert up.left() == []
    assert again.key() == key
    assert all(answers(again, service) for service in SERVICES)


@pytest.mark.parametrize(("place", "service"), list(enumerate(SERVICES)))
def test_a_port_in_use_is_named(start_up: StartUp, place: int, service: str) -> None:
    with port_in_use(place) as (port, first):
        line = refusal(start_up("--port", str(first)))
        # Another of the row may be in use as well, by something else, and be met first.
        assert re.search(
            r"the port 127\.0\.0\.1:\d+ of \w+ cannot be used: Address already in use; .* with --port$", line
        )
        if place == 0:
            assert f"127.0.0.1:{port} of {service} " in line
        line = refusal(start_up("--metrics-port", str(first)))
        assert line.endswith("with --metrics-port")


def test_an_unknown_setting_is_named(start_up: StartUp) -> None:
    line = refusal(start_up(MUSTER_ALLOCATOR__NOPE="1"))
    assert "allocator cannot start: unknown settings in the environment: MUSTER_ALLOCATOR__NOPE: remove" in line
    line = refusal(start_up(MUSTER_ARCHIVER__GRPC__NOPE="1"))
    assert "archiver cannot start: configuration (" in line
    assert "grpc.NOPE".lower() in line.lower()
    start_up.ready()


def test_an_address_of_a_services_own_is_refused(start_up: StartUp) -> None:
    line = refusal(start_up(MUSTER_ALLOCATOR__GRPC__LISTEN="127.0.0.1:7401"))
    assert "MUSTER_ALLOCATOR__GRPC__LISTEN is set" in line


def test_a_second_suite_in_the_folder_is_refused_and_touches_nothing(suite: Up, start_up: StartUp) -> None:
    files = ("client.env", "muster.toml", "keys/operator.key")
    before = [(suite.data / name).read_bytes() for name in files]
    second = Up(start_up.folder / "second", suite.data)
    line = refusal(second)
    assert f"is in use by a running Muster (process {suite.process.pid}); stop that one" in line
    assert [(suite.data / name).read_bytes() for name in files] == before
    assert all(answers(suite, service) for service in SERVICES)


@pytest.mark.parametrize("place", ["", "logs", "keys/operator.key.new", "muster.toml", "postgres"])
def test_a_folder_that_cannot_be_used_is_named(start_up: StartUp, place: str) -> None:
    """Even root cannot write where a file stands in a folder's place, or a folder in a file's."""
    data = start_up.folder / "data"
    path = data / place if place else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.mkdir()
    else:
        path.touch()
    line = refusal(start_up())
    assert line.startswith(f"muster: cannot use {path}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_elses_is_named(start_up: StartUp) -> None:
    data = start_up.folder / "data"
    data.mkdir(mode=0o500)
    line = refusal(start_up())
    assert "Permission denied" in line
