"""Packed updates as they stand on the wire: compared and kept without making a number of each.

An array is a run of bytes there. A number takes one byte for every seven bits, lowest first, and each of its bytes but
the last has its highest bit set. So equal runs are equal arrays, and the last bytes tell how many numbers there are.
What is read here is what every implementation writes: each field once, in order, arrays packed. Anything else is left
to the message's own parser.
"""

from __future__ import annotations

from typing import NamedTuple

from muster.session_tracker.v1 import session_pb2

from services.varints import delimited

# Fields of the request and of its packed updates, with how they are written: a number, or so many bytes.
_BATCH, _PACKED = 1 << 3, 4 << 3 | 2
_LENGTH_DELIMITED = 2
_FIELDS = 7
_NUMBER_BYTES = 10

# Makes of each byte whether it is the last of a number, as the highest bit.
_ENDS = bytes(0x80 if byte < 0x80 else 0 for byte in range(256))
_END = b"\x80"
# Within a number of ten bytes or more, which the parser refuses, or of which it drops the highest bits.
_TOO_LONG = bytes(_NUMBER_BYTES - 1)


class PackedBytes(NamedTuple):
    """The arrays of a request that has nothing but packed updates, each as the bytes that it came as."""

    batch: int
    handle: bytes
    sequence: bytes
    current_page: bytes
    total_pages: bytes
    products_found: bytes
    errors_count: bytes
    state: bytes


def cut(request: bytes) -> PackedBytes | None:
    """Cuts a request into the arrays of its packed updates; None when it has anything else, or is written unusually."""
    try:
        if request[0] != _BATCH:
            return None
        batch, at = _number(request, 1)
        if request[at] != _PACKED:
            return None
        size, at = _number(request, at + 1)
        end = len(request)
        if at + size != end or not batch:
            return None
        arrays = [b""] * (_FIELDS + 1)
        last = 0
        while at < end:
            tag = request[at]
            field = tag >> 3
            if tag & 7 != _LENGTH_DELIMITED or not last < field <= _FIELDS:
                return None
            size, at = _number(request, at + 1)
            arrays[field] = request[at : at + size]
            at += size
            last = field
    except (IndexError, ValueError):
        return None
    return PackedBytes(batch, *arrays[1:]) if at == end else None


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number at a place and the place after it. Raises: IndexError, ValueError: there is none."""
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for place in range(1, _NUMBER_BYTES - 1):
        byte = data[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("longer than any number that is of use here")


def count(array: bytes) -> int:
    """Returns how many numbers an array has; -1 when one is unusually long, or cut off."""
    ends = array.translate(_ENDS)
    return ends.count(_END) if ends.endswith(_END) and _TOO_LONG not in ends else -1


class Sequences:
    """The sequences of a batch, of which it can be told whether those of another are all greater.

    All numbers are compared at once, as digits of one great number each: where both arrays have numbers of the same
    lengths, `(other | tops) - (these + ones)` borrows for no digit from the next, since the highest bit of each digit
    is free, and keeps it exactly where the other's is greater.

    Raises:
        ValueError: one is so great that its bytes do not tell it apart.
    """

    __slots__ = ("_ends", "_least", "_ones", "_tops")

    def __init__(self, array: bytes) -> None:
        ends = array.translate(_ENDS)
        if not ends.endswith(_END) or _TOO_LONG in ends:
            raise ValueError("sequences that cannot be compared as bytes")
        self._ends = ends
        self._tops = int.from_bytes(ends, "little")
        # The lowest bit of each digit: of the first, and above every last byte but the array's own.
        self._ones = (self._tops << 1 | 1) ^ (1 << 8 * len(ends))
        self._least = int.from_bytes(array, "little") + self._ones

    def advance(self, array: bytes) -> bool:
        """Takes others in the place of these if each is greater; returns whether it did so."""
        if array.translate(_ENDS) != self._ends:
            return False
        value = int.from_bytes(array, "little")
        tops = self._tops
        if ((value | tops) - self._least) & tops != tops:
            return False
        self._least = value + self._ones
        return True


def read(sequence: bytes, current_page: bytes, products_found: bytes, errors_count: bytes) -> tuple[list[int], ...]:
    """Returns the numbers of these arrays."""
    data = bytearray()
    for field, array in ((2, sequence), (3, current_page), (5, products_found), (6, errors_count)):
        data += delimited(field, array)
    packed = session_pb2.PackedUpdates.FromString(bytes(data))
    return packed.sequence[:], packed.current_page[:], packed.products_found[:], packed.errors_count[:]
