"""The canonical form of a fingerprint (RFC 8785), by which duplicates are found.

Names are sorted by their UTF-16 code units, there is no white space, strings carry only the escapes that JSON demands,
and every number, whole ones too, is taken as an IEEE 754 double and written as ECMAScript writes it: 1.0 and 1 are the
same, and so are whole numbers above 2^53 that round to the same double. What I-JSON (RFC 7493) excludes is refused: a
name that stands twice, lone surrogates, numbers beyond the range of doubles, NaN and Infinity.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

# Real fingerprints have a handful of levels; a fixed limit answers alike whatever the interpreter's stack holds.
_DEEPEST = 64
_TOO_DEEP = f"must not be nested deeper than {_DEEPEST} levels"


def fingerprint_sha256(data: bytes) -> bytes:
    """Returns the SHA-256 of the canonical form of a JSON object.

    Args:
        data: The object in UTF-8.

    Raises:
        ValueError: it is not a JSON object in UTF-8, or not I-JSON; the message says what it must be.
    """
    return hashlib.sha256(canonical(data)).digest()


def canonical(data: bytes) -> bytes:
    """Returns the canonical form. Arguments and errors as in `fingerprint_sha256`."""
    try:
        parsed = json.loads(
            data.decode("utf-8"), parse_int=float, parse_constant=_refuse_constant, object_pairs_hook=_refuse_twins
        )
        if not isinstance(parsed, dict):
            raise ValueError("must be a JSON object")
        return _written(parsed, 1).encode("utf-8")
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeError:
        raise ValueError("must be UTF-8 without lone surrogates") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error.msg} at character {error.pos}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"must not contain {name}")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("must not contain a name twice in one object")
    return found


def _written(value: Any, depth: int) -> str:
    if depth > _DEEPEST and isinstance(value, dict | list):
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{_string(name)}:{_written(value[name], depth + 1)}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(element, depth + 1) for element in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float):
        return _number(value)
    return {None: "null", True: "true", False: "false"}[value]


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Writes a double as ECMA-262 6.1.6.1.20 does; Python's repr has the same shortest digits in another dress."""
    if not math.isfinite(value):
        raise ValueError("must not contain numbers beyond the range of doubles")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    # `digits` times ten to the power of `point - len(digits)`, without zeros at either end.
    digits = whole + fraction
    point = len(whole) + int(exponent or 0)
    stripped = digits.lstrip("0")
    point -= len(digits) - len(stripped)
    digits = stripped.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    power = f"e{'+' if point > 0 else '-'}{abs(point - 1)}"
    return sign + digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "") + power
