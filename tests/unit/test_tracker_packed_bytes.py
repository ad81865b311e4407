"""Packed updates as bytes: what is cut, counted and compared there is what the message's own parser reads."""

from __future__ import annotations

from operator import gt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from muster.session_tracker.v1 import session_pb2 as pb

from session_tracker.packed_bytes import PackedBytes, Sequences, count, cut, read

NAMES = (
    "handle", "sequence", "current_page", "total_pages", "products_found", "errors_count", "state",
)  # fmt: skip
# Of every length that a number may have.
NUMBERS = st.integers(0, 35).flatmap(lambda bits: st.integers(0, 2**bits - 1)).map(lambda number: number % 2**32)
LONG_NUMBERS = st.integers(1, 62).flatmap(lambda bits: st.integers(1, 2**bits))


def request(batch: int = 1, **arrays: list[int]) -> bytes:
    given: Any = arrays
    return pb.ReportStreamRequest(batch=batch, packed=pb.PackedUpdates(**given)).SerializeToString()


def sequences(numbers: list[int]) -> bytes:
    packed = cut(request(handle=[0], sequence=numbers))
    assert packed is not None
    return packed.sequence


@given(
    batch=st.integers(1, 2**62),
    arrays=st.fixed_dictionaries({name: st.lists(NUMBERS, max_size=200) for name in NAMES[:-1]}),
    states=st.lists(st.integers(0, 9), max_size=200),
)
def test_what_is_cut_is_what_the_parser_reads(batch: int, arrays: dict[str, list[int]], states: list[int]) -> None:
    packed = cut(request(batch, **arrays, state=states))
    assert packed is not None
    assert packed.batch == batch
    for name, numbers in {**arrays, "state": states}.items():
        array = getattr(packed, name)
        assert count(array) == (len(numbers) or -1)
        assert (array == b"") == (not numbers)
    names = "sequence", "current_page", "products_found", "errors_count"
    assert list(read(*(getattr(packed, name) for name in names))) == [arrays[name] for name in names]


PLAIN = request(7, handle=[0, 1], sequence=[300, 2], current_page=[5, 6])
HEAD = b"\x08\x07"


def with_packed(*fields: bytes) -> bytes:
    inner = b"".join(fields)
    return HEAD + b"\x22" + bytes((len(inner),)) + inner


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        HEAD,
        PLAIN[:-1],
        PLAIN + b"\x22\x00",
        PLAIN + b"\xa0\x06\x01",
        PLAIN[2:],
        PLAIN[2:] + HEAD,
        b"\x08\x00" + PLAIN[2:],
        b"\x08" + b"\xff" * 5000,
        request(1, handle=[0], sequence=[1]) + b"\x1a\x01a",
        HEAD + b"\x1a\x01a" + PLAIN[2:],
        pb.ReportStreamRequest(batch=1, updates=[pb.ProgressUpdate(session_id="a")]).SerializeToString(),
        with_packed(b"\x12\x01\x01", b"\x0a\x01\x00"),
        with_packed(b"\x0a\x01\x00", b"\x0a\x01\x01", b"\x12\x02\x01\x01"),
        with_packed(b"\x08\x00", b"\x10\x01"),
        with_packed(b"\x0a\x01\x00", b"\x12\x01\x01", b"\x42\x01\x01"),
        with_packed(b"\x0a\x01\x00", b"\x12\x09\x01"),
        with_packed(b"\x0a\x01\x00", b"\x12"),
        HEAD + b"\x22\x7f\x0a\x01\x00\x12\x01\x01",
    ],
    ids=lambda data: data[:12].hex() or "nothing",
)  # fmt: skip
def test_what_is_written_unusually_is_left_to_the_parser(data: bytes) -> None:
    assert cut(data) is None


def test_nothing_else_can_stand_between_the_arrays() -> None:
    packed = cut(PLAIN)
    assert packed == PackedBytes(7, b"\x00\x01", b"\xac\x02\x02", b"\x05\x06", b"", b"", b"", b"")


@given(st.lists(st.tuples(LONG_NUMBERS, st.integers(-2, 300)), min_size=1, max_size=60))
def test_sequences_advance_only_when_each_is_greater(pairs: list[tuple[int, int]]) -> None:
    old = [number for number, _ in pairs]
    new = [max(1, number + step) for number, step in pairs]
    held = Sequences(sequences(old))
    advanced = held.advance(sequences(new))
    if advanced:
        assert all(map(gt, new, old))
    # What was taken is what the next are held against; what was not changed nothing.
    for other in (old, new):
        again = Sequences(sequences(new if advanced else old))
        assert held.advance(sequences(other)) == again.advance(sequences(other))


@given(st.data())
def test_sequences_of_the_same_lengths_are_always_compared(data: st.DataObject) -> None:
    bounds = [(1, 2**7 - 1), (2**7, 2**14 - 1), (2**14, 2**21 - 1), (2**56, 2**63 - 1)]
    chosen = data.draw(st.lists(st.sampled_from(bounds), min_size=1, max_size=40))
    old = [data.draw(st.integers(*bound) | st.sampled_from(bound)) for bound in chosen]
    if data.draw(st.booleans()):
        new = [data.draw(st.integers(*bound) | st.sampled_from(bound)) for bound in chosen]
    else:
        new = [
            data.draw(st.integers(min(number + 1, bound[1]), bound[1]))
            for number, bound in zip(old, chosen, strict=True)
        ]
    assert Sequences(sequences(old)).advance(sequences(new)) == all(map(gt, new, old))


def test_sequences_that_bytes_cannot_tell_apart_are_refused() -> None:
    for array in (b"", b"\x80", sequences([1, 2**63]), b"\xff" * 9 + b"\x7f"):
        with pytest.raises(ValueError, match="as bytes"):
            Sequences(array)
    assert not Sequences(sequences([5])).advance(b"")
    assert not Sequences(sequences([5, 5])).advance(sequences([6]))
    assert not Sequences(sequences([5])).advance(sequences([6, 6]))
    assert not Sequences(sequences([127])).advance(sequences([128])), "of another length: left to the parser"


@pytest.mark.parametrize("array", [b"\x80", b"\x01\xff", b"\x80" * 10 + b"\x01", b"\xff" * 9 + b"\x01"])
def test_numbers_that_are_cut_off_or_too_long_are_not_counted(array: bytes) -> None:
    assert count(array) == -1
