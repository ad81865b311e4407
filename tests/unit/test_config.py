"""Configuration: the environment wins over the file, and whatever is not known or not right stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from services.config import Section, ServiceConfig, load
from services.errors import StartupError


class LeaseConfig(Section):
    """Stands for a service's own table."""

    duration_seconds: float = Field(default=300, ge=1)


class WorkConfig(ServiceConfig):
    """Stands for a service's configuration."""

    leases: LeaseConfig = LeaseConfig()


def config_file(folder: Path, text: str) -> Path:
    file = folder / "muster.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_are_usable() -> None:
    loaded = load(WorkConfig, "allocator", None, {})
    assert loaded.leases.duration_seconds == 300
    assert loaded.log.format == "json"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = config_file(
        tmp_path, '[allocator.leases]\nduration_seconds = 5\n[allocator.grpc]\nlisten = "0.0.0.0:1"\n[archiver]\n'
    )
    environ = {"MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": "7", "MUSTER_ARCHIVER__X": "not ours"}
    loaded = load(WorkConfig, "allocator", file, environ)
    assert loaded.leases.duration_seconds == 7
    assert loaded.grpc.listen == "0.0.0.0:1"


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        ("[allocator]\nspeed = 1\n", {}, "speed: unknown key"),
        ("[allocator.leases]\ndurations = 1\n", {}, "leases.durations: unknown key"),
        ("[allocatr]\n", {}, "unknown tables: allocatr"),
        ("allocator = 3\n", {}, "must be a table"),
        ("[allocator\n", {}, "not TOML"),
        ("[allocator.leases]\nduration_seconds = 0\n", {}, "leases.duration_seconds: Input should be greater"),
        ('[allocator.grpc]\nlisten = "7401"\n', {}, "must be host:port"),
        ('[allocator.grpc]\nlisten = "h:70000"\n', {}, "must be host:port"),
        ('[allocator.postgres]\ndsn = "a"\ndsn_file = "b"\n', {}, "not both"),
        ("", {"MUSTER_ALLOCATOR__LEESES__X": "1"}, "MUSTER_ALLOCATOR__LEESES__X"),
        ("", {"MUSTER_ALLOCATOR__LEASES__X": "1"}, "leases.x: unknown key"),
        ("", {"MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": "soon"}, "leases.duration_seconds"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(StartupError, match=r"(?s)" + said.replace(".", r"\.")) as caught:
        load(WorkConfig, "allocator", config_file(tmp_path, text), environ)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nothing\.toml"):
        load(WorkConfig, "allocator", tmp_path / "nothing.toml", {})


def test_secrets_come_from_files_and_are_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "dsn"
    secret.write_text("postgresql://u:hidden@h/d\n", encoding="utf-8")
    loaded = load(WorkConfig, "allocator", None, {"MUSTER_ALLOCATOR__POSTGRES__DSN_FILE": str(secret)})
    assert loaded.postgres.resolved_dsn() == "postgresql://u:hidden@h/d"
    shown = load(WorkConfig, "allocator", None, {"MUSTER_ALLOCATOR__POSTGRES__DSN": "postgresql://u:hidden@h/d"})
    assert "hidden" not in repr(shown)


def test_no_database_is_a_clear_error() -> None:
    with pytest.raises(StartupError, match=r"postgres\.dsn"):
        load(WorkConfig, "allocator", None, {}).postgres.resolved_dsn()
