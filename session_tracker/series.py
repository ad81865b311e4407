"""A session's throughput: pages in spans of ten seconds, as bytes.

A list of numbers would cost a session more memory than all its counters. So a series is the number of its newest span
on the monotonic clock (4 bytes), the width of a count in bytes (1, 2 or 4), and the counts of the last spans up to that
one, oldest first; one that began lately is short.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SPAN_SECONDS = 10
SPANS = 30

_HEAD = struct.Struct("<IB")
_MOST = 2**32 - 1
_FORMATS = {1: "B", 2: "H", 4: "I"}


def add(series: bytes, pages: int, now: float) -> bytes:
    """Returns a series, which may be empty, with pages done at `now`."""
    span = int(now // SPAN_SECONDS)
    if series:
        newest, width = _HEAD.unpack_from(series)
        if span <= newest:
            count = int.from_bytes(series[-width:], "little") + pages
            if count < 1 << (8 * width):
                return series[:-width] + count.to_bytes(width, "little")
    counts = _counts(series, span) if series else [0]
    counts[-1] = min(counts[-1] + pages, _MOST)
    return _packed(max(span, newest) if series else span, counts)


def read(series: bytes, now: float) -> list[int]:
    """Returns the pages of each of the last spans, oldest first; the last one is not over yet."""
    counts = _counts(series, int(now // SPAN_SECONDS)) if series else []
    return [0] * (SPANS - len(counts)) + counts


def _counts(series: bytes, span: int) -> list[int]:
    """Returns the counts up to a span, or to the newest where that is later; 30 at most."""
    newest, width = _HEAD.unpack_from(series)
    held = (len(series) - _HEAD.size) // width
    counts = list(struct.unpack_from(f"<{held}{_FORMATS[width]}", series, _HEAD.size))
    return (counts + [0] * min(max(0, span - newest), SPANS))[-SPANS:]


def _packed(span: int, counts: Sequence[int]) -> bytes:
    most = max(counts)
    width = 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4
    return _HEAD.pack(span, width) + struct.pack(f"<{len(counts)}{_FORMATS[width]}", *counts)
