"""Generates the gRPC stubs and their type information from the .proto files.

Runs as the build hook of this package (`pip install`, `python -m build`) and as a script (`make proto`).
In a checkout the contracts lie in ``../../protos``; an sdist carries its own copy in ``protos``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent


def contracts() -> Path:
    """Returns the folder that holds the .proto files.

    Raises:
        FileNotFoundError: neither a checkout nor an sdist surrounds this file.
    """
    for candidate in (HERE.parent.parent / "protos", HERE / "protos"):
        if (candidate / "muster").is_dir():
            return candidate
    raise FileNotFoundError("no .proto files beside the package: build from a checkout or an sdist")


def generate(into: Path) -> list[Path]:
    """Writes the stubs of every contract below `into` and returns the files written, sorted."""
    root = contracts()
    protos = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{root}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            f"--mypy_grpc_out=quiet:{scratch}",
            *protos,
        ]
        # protoc finds the mypy plugins on PATH; in a virtual environment they lie beside the interpreter.
        path = f"{Path(sys.executable).parent}:{_path()}"
        subprocess.run(command, check=True, cwd=root, env={"PATH": path, **_python_path()})
        made = sorted(Path(scratch).rglob("*.py*"))
        for package in {file.parent for file in made}:
            (package / "__init__.py").touch()
        written = []
        for folder in sorted({file.parent.relative_to(scratch) for file in made}):
            target = into / folder
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(scratch) / folder, target)
            written += sorted(target.iterdir())
    return written


def _path() -> str:
    import os

    return os.environ.get("PATH", "")


def _python_path() -> dict[str, str]:
    import os

    # An isolated build puts its requirements on PYTHONPATH, and the plugins are Python programs.
    return {key: os.environ[key] for key in ("PYTHONPATH", "HOME") if key in os.environ}


class StubHook(BuildHookInterface[Any]):
    """Generates the stubs before hatchling collects files, for wheels, sdists and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(HERE)


if __name__ == "__main__":
    for file in generate(HERE):
        print(file.relative_to(HERE))
