"""The session tracker's alert rules: they fire and resolve as their tests say, and ask for metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from prometheus_client import REGISTRY

import session_tracker.metrics  # noqa: F401  (registers them)
from services.cli.main import cli

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "session-tracker-rules.yaml"
TESTS = ROOT / "deploy" / "prometheus" / "tests" / "session-tracker-rules.test.yaml"
CACHE = ROOT / ".cache" / "promtool"

_SECONDS = 120


def found_promtool() -> str | None:
    """Returns promtool: from PATH, or from the distribution's package unpacked into the cache, which needs no root."""
    if installed := shutil.which("promtool"):
        return installed
    unpacked = CACHE / "usr" / "bin" / "promtool"
    if not unpacked.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "prometheus"], cwd=CACHE, check=True, timeout=_SECONDS)
            (package,) = CACHE.glob("prometheus_*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=CACHE, check=True, timeout=_SECONDS)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return str(unpacked) if unpacked.exists() else None


@pytest.mark.parametrize("arguments", [("check", "rules", str(RULES)), ("test", "rules", str(TESTS))], ids=" ".join)
def test_the_rules_do_as_their_tests_say(arguments: tuple[str, ...]) -> None:
    if (promtool := found_promtool()) is None:
        pytest.skip("promtool is not on PATH, and the distribution's package prometheus cannot be fetched")
    ended = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_is_tested_both_ways() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert len(alerts) == len(set(alerts))
    tests = TESTS.read_text()
    for alert in alerts:
        expectations = re.findall(rf"alertname: {alert}\n\s+exp_alerts:( \[\])?", tests)
        assert "" in expectations, f"{alert} never fires in its tests"
        # After it fired: it resolves.
        assert expectations.index("") < len(expectations) - 1 or expectations.count("") > 1, alert
        assert " []" in expectations, f"{alert} always fires in its tests"


def test_the_commands_that_the_alerts_name_are_there() -> None:
    named = re.findall(r"`muster ([^`]+)`", RULES.read_text())
    assert named
    for words in map(str.split, named):
        group = cli.get_command(click.Context(cli), words[0])
        assert isinstance(group, click.Group)
        options = {option for parameter in group.commands[words[1]].params for option in parameter.opts}
        assert set(words[2:]) <= options, words


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    exported = {
        f"{metric.name}{suffix}" for metric in REGISTRY.collect() for suffix in suffixes.get(metric.type, ("",))
    }
    asked = set(re.findall(r"\bmuster_\w+", re.sub(r"(?m)^\s*#.*$|summary:.*$", "", RULES.read_text())))
    assert asked
    assert asked <= exported, asked - exported
