"""Every configuration in `deploy/` is loaded as the services would load it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from services.config import load

CONFIGS = sorted((Path(__file__).parents[2] / "deploy").rglob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
@pytest.mark.parametrize("service", ["allocator", "persona_store", "session_tracker", "archiver"])
def test_a_shipped_configuration_is_whole(service: str, file: Path) -> None:
    config = load(import_module(f"{service}.app").CONFIG, service, file, {})
    assert config.grpc.listen.startswith("0.0.0.0:74")
    assert config.postgres.dsn_file is not None
    assert config.postgres.pool_max * 4 <= 100
