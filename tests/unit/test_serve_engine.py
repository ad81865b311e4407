"""`muster serve --engine`: whom it is for, and what it may say."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from services.cli.run import serve
from services.errors import StartupError
from session_tracker.config import EngineConfig

VARIABLE = "MUSTER_SESSION_TRACKER__ENGINE__KIND"


def test_only_the_session_tracker_has_engines() -> None:
    result = CliRunner().invoke(serve, ["allocator", "--engine", "redis"])
    assert result.exit_code == 2
    assert "allocator has no engines" in result.output


def test_an_unknown_engine_is_refused() -> None:
    result = CliRunner(env={VARIABLE: None}).invoke(serve, ["session-tracker", "--engine", "etcd"])
    assert isinstance(result.exception, StartupError)
    assert "engine.kind" in str(result.exception)


def test_signs_of_life_must_fit_into_a_life() -> None:
    with pytest.raises(ValueError, match="at least twice"):
        EngineConfig(beat_seconds=3, replica_life_seconds=5)
    with pytest.raises(ValueError, match="prefix"):
        EngineConfig(prefix="a*")
