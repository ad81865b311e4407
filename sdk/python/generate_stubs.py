"""Generates the gRPC stubs and their type information from the .proto files.

Runs as the build hook of this package (`pip install`, `python -m build`) and as a script (`make proto`).
In a checkout the contracts lie in ``../../protos``; an sdist carries its own copy in ``protos``.
"""

from __future__ import annotations

import filecmp
import os
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
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run(command, check=True, cwd=root, env={**os.environ, "PATH": path})
        packages = sorted({file.parent.relative_to(scratch) for file in Path(scratch).rglob("*.py*")})
        written = []
        for package in packages:
            (scratch / package / "__init__.py").touch()
            target = into / package
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(scratch / package, target)
            written += sorted(target.iterdir())
    return written


def stale() -> list[Path]:
    """Returns the generated files in this checkout that differ from what their contracts give now."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        names = {file.relative_to(scratch) for file in fresh}
        present = {
            file.relative_to(HERE)
            for file in HERE.glob("muster/*/v1/*")
            if file.is_file() and file.suffix in (".py", ".pyi")
        }
        return sorted(
            name
            for name in names | present
            if name not in names
            or name not in present
            or not filecmp.cmp(Path(scratch) / name, HERE / name, shallow=False)
        )


class StubHook(BuildHookInterface[Any]):
    """Generates the stubs before hatchling collects files, for wheels, sdists and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling."""
        generate(HERE)


def main(arguments: list[str]) -> int:
    """Generates the stubs, or with ``--check`` says which are stale; returns the exit code."""
    if arguments == ["--check"]:
        different = stale()
        for file in different:
            print(f"stale: {file} (run `make proto`)")
        return 1 if different else 0
    for file in generate(HERE):
        print(file.relative_to(HERE))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
