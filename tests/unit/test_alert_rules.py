"""The alert rules: they parse, they fire and resolve as their tests say, and they ask for metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
import pytest
from prometheus_client import REGISTRY

import allocator.app  # noqa: F401  (registers the allocator's metrics)
import session_tracker.metrics  # noqa: F401
from allocator.invariants import AUDIT_SECONDS, ROUND_SECONDS
from services.cli.main import cli

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy" / "prometheus").glob("*-rules.yaml"))
TESTS = sorted((ROOT / "deploy" / "prometheus" / "tests").glob("*.test.yaml"))
CACHE = ROOT / ".cache" / "promtool"

_SECONDS = 120
# Of each step of fetching it.
_FETCH_SECONDS = 60


def found_promtool() -> str | None:
    """Returns promtool: from PATH, or from the distribution's package, kept in the cache; None if there is neither."""
    if installed := shutil.which("promtool"):
        return installed
    kept = CACHE / "promtool"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            # What an interrupted attempt leaves is never taken for the program.
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                fetch_package("prometheus", Path(folder)).joinpath("usr/bin/promtool").replace(kept)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return str(kept)


def fetch_package(name: str, folder: Path) -> Path:
    """Returns where a package of the distribution is unpacked below `folder`, which needs no root.

    Raises:
        OSError: apt or dpkg is not installed.
        subprocess.SubprocessError: the package cannot be had, or not in time.
        ValueError: apt fetched something else.
    """

    def step(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, timeout=_FETCH_SECONDS)

    try:
        step("apt-get", "--quiet", "download", name)
    except subprocess.CalledProcessError:
        # A fresh machine may have no lists of packages, and only root may fetch them for the whole of it.
        own = (f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}/cache", "-oAPT::Sandbox::User=")
        for made in ("lists/partial", "cache/archives/partial"):
            (folder / made).mkdir(parents=True)
        step("apt-get", "--quiet", *own, "update")
        step("apt-get", "--quiet", *own, "download", name)
    (package,) = folder.glob(f"{name}_*.deb")
    step("dpkg", "-x", package.name, "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="session")
def promtool() -> str:
    if (found := found_promtool()) is None:
        pytest.skip("promtool is not on PATH, and the distribution's package prometheus cannot be fetched")
    return found


def run(promtool: str, *arguments: str) -> None:
    ended = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.name)
def test_the_rules_are_well_formed(promtool: str, file: Path) -> None:
    run(promtool, "check", "rules", str(file))


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_the_rules_do_as_their_tests_say(promtool: str, file: Path) -> None:
    run(promtool, "test", "rules", str(file))


def test_a_check_that_is_made_as_seldom_as_can_be_raises_no_alert() -> None:
    (rules,) = (file for file in RULES if file.name == "allocator-rules.yaml")
    rule = rules.read_text().partition("- alert: MusterInvariantUnchecked")[2].partition("- alert:")[0]
    for_seconds = 60 * int(re.findall(r"for: (\d+)m", rule)[0])
    most, audit = (int(seconds) + for_seconds for seconds in re.findall(r"> (\d+)", rule))
    # Checks come one after another: there is time for this one, and for the others before it.
    assert most >= 2 * ROUND_SECONDS[1]
    assert audit >= 1.5 * AUDIT_SECONDS[1]


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.name)
def test_every_alert_is_tested_both_ways(file: Path) -> None:
    alerts = re.findall(r"- alert: (\w+)", file.read_text())
    assert len(alerts) == len(set(alerts))
    tests = (file.parent / "tests" / file.name.replace(".yaml", ".test.yaml")).read_text()
    for alert in alerts:
        expectations = re.findall(rf"alertname: {alert}\n\s+exp_alerts:( \[\])?", tests)
        assert "" in expectations, f"{alert} never fires in its tests"
        assert " []" in expectations, f"{alert} always fires in its tests"


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.name)
def test_the_commands_that_the_alerts_name_are_there(file: Path) -> None:
    named = re.findall(r"`muster ([^`]+)`", file.read_text())
    assert named
    for words in map(str.split, named):
        group = cli.get_command(click.Context(cli), words[0])
        assert isinstance(group, click.Group)
        options = {option for parameter in group.commands[words[1]].params for option in _spellings(parameter)}
        assert set(words[2:]) <= options, words


def _spellings(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    exported = {
        f"{metric.name}{suffix}" for metric in REGISTRY.collect() for suffix in suffixes.get(metric.type, ("",))
    }
    for file in RULES:
        expressions = re.sub(r"(?m)^\s*#.*$|summary:.*$", "", file.read_text())
        asked = set(re.findall(r"\bmuster_\w+", expressions))
        assert asked
        assert asked <= exported, asked - exported
