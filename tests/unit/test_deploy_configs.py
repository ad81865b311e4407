"""Every configuration in `deploy/` is loaded as the services would load it, with and without what is marked out."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_what_is_marked_out_are_settings_too_and_says_the_defaults(file: Path, tmp_path: Path) -> None:
    text, marks = re.subn(r"^#(?=[a-z_]+\.\S+ = )", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert marks
    whole = tmp_path / file.name
    whole.write_text(text, encoding="utf-8")
    settings = import_module("allocator.app").CONFIG
    plain, full = (load(settings, "allocator", one, {}) for one in (file, whole))
    assert list(full.exit_providers) == ["vpn"]
    assert list(full.share.weights.values()) == [2.0]
    shown, default = full.model_dump(), plain.model_dump()
    shown["exit_providers"], shown["share"]["weights"] = {}, {}
    assert shown == default
    # Every setting of the service's own is shown.
    for name in settings.__annotations__:
        if name not in ("grpc", "metrics", "exit_providers"):
            for key in type(getattr(full, name)).model_fields:
                assert re.search(rf"^{name}\.{key}\b", text, re.MULTILINE), f"{name}.{key}"
