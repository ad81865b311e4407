"""`docs/acceptance.md` is whole: every ID of the source documents once, and nothing named that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<id>[A-Z][A-Z0-9]?-\d\d) \| (?P<item>.+?) \| (?P<proof>.+?) \|$")

# What the documents name, counted section by section; the numbers between were never used.
NUMBERS = {
    "AL": [*range(1, 18), *range(20, 29), *range(30, 36), *range(40, 52)],
    # The allocator beside the best of its peers.
    "B1": range(1, 36),
    "PS": range(1, 16),
    "ST": range(1, 16),
    # Likewise the session tracker.
    "B3": range(1, 27),
    "AR": range(1, 23),
    "SU": range(1, 22),
    "X": range(1, 45),
}


def rows() -> list[re.Match[str]]:
    lines = (ROOT / "docs" / "acceptance.md").read_text(encoding="utf-8").splitlines()
    return [match for line in lines if (match := ROW.match(line))]


def test_every_id_stands_once() -> None:
    wanted = [f"{part}-{number:02}" for part, numbers in NUMBERS.items() for number in numbers]
    assert [match["id"] for match in rows()] == wanted


def test_every_proof_exists() -> None:
    missing = []
    for match in rows():
        if match["proof"] == "open":
            continue
        named = re.findall(r"`([^`]+)`", match["proof"])
        assert named, f"{match['id']} says neither a test nor open: {match['proof']}"
        for proof in named:
            path, _, function = proof.partition("::")
            file = ROOT / path
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            # A class between file and function, as pytest writes it, is searched for by its last part.
            name = function.rpartition("::")[2]
            if not text or (
                name and not re.search(rf"(def|class) {re.escape(name)}\b|^{re.escape(name)} = ", text, re.M)
            ):
                missing.append(f"{match['id']}: {proof}")
    assert missing == []
