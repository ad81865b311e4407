"""Every configuration in `deploy/` is loaded as the services would load it, with and without what is marked out."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

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
    assert config.postgres.idle_timeout_seconds == 60


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
@pytest.mark.parametrize("service", ["allocator", "session_tracker"])
def test_what_is_marked_out_are_settings_too_and_says_the_defaults(service: str, file: Path, tmp_path: Path) -> None:
    text, marks = re.subn(r"^#(?=[a-z_]+(\.\S+)? = )", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert marks
    whole = tmp_path / file.name
    whole.write_text(text, encoding="utf-8")
    settings = import_module(f"{service}.app").CONFIG
    plain, full = (load(settings, service, one, {}) for one in (file, whole))
    assert without_examples(service, full) == without_examples(service, plain)
    # Every setting of the service's own is shown.
    shown = tomllib.loads(text)[service]
    for name in settings.__annotations__:
        if name not in ("grpc", "metrics", "exit_providers"):
            assert set(type(getattr(full, name)).model_fields) <= set(shown[name]), name


def without_examples(service: str, config: Any) -> dict[str, Any]:
    """Returns all settings but those of which the file shows examples, since they have no defaults."""
    settings: dict[str, Any] = config.model_dump()
    if service == "allocator":
        assert list(settings.pop("exit_providers")) in ([], ["vpn"])
        assert list(settings["share"].pop("weights").values()) in ([], [2.0])
    else:
        assert str(settings["engine"].pop("url_file")) in ("None", "/run/secrets/redis-url")
    return settings
