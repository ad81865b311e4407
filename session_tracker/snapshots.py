"""Config snapshots: checked, and rid of secrets, before they are kept anywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

REDACTED = "[redacted]"
_SECRET_NAME = re.compile(r"secret|token|password|passwd|api_?key|cookie|authorization|credential", re.IGNORECASE)
# What Python and PostgreSQL both take without running out of stack; real configurations stay below ten.
_DEEPEST = 64


def redact(snapshot: dict[str, Any]) -> str:
    """Returns a snapshot as compact JSON, with every value whose name looks like a secret's replaced.

    Args:
        snapshot: Parsed JSON. It is changed in place.

    Raises:
        ValueError: it is nested too deeply, or holds what PostgreSQL's jsonb cannot; the message says what.
    """
    waiting: list[tuple[dict[str, Any] | list[Any], int]] = [(snapshot, 1)]
    while waiting:
        container, depth = waiting.pop()
        if depth > _DEEPEST:
            raise ValueError(f"must be nested at most {_DEEPEST} levels deep")
        if isinstance(container, dict):
            for name in container:
                _refuse_unstorable(name)
                if _SECRET_NAME.search(name):
                    container[name] = REDACTED
            values: Iterable[Any] = container.values()
        else:
            values = container
        for value in values:
            if isinstance(value, dict | list):
                waiting.append((value, depth + 1))
            elif isinstance(value, str):
                _refuse_unstorable(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("must hold finite numbers only")
    return json.dumps(snapshot, ensure_ascii=False, separators=(",", ":"))


def _refuse_unstorable(text: str) -> None:
    if "\0" in text:
        raise ValueError("must not contain the character U+0000")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain half of a surrogate pair")
