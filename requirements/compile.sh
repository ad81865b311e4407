#!/usr/bin/env bash
# Pins everything the checkout installs, by hash, for every Python from 3.11 on. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT
python3 - >"$wanted" <<'P'
import tomllib

suite, sdk = (tomllib.load(open(path, "rb")) for path in ("pyproject.toml", "sdk/python/pyproject.toml"))
lines = suite["project"]["dependencies"] + sdk["project"]["dependencies"]
for extra in suite["project"]["optional-dependencies"].values():
    lines += extra
for group in suite["dependency-groups"].values():
    lines += group
print("\n".join(line for line in lines if not line.startswith("muster-sdk")))
P
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links "$@" "$wanted" -o requirements/dev.txt
