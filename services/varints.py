"""Numbers as protobuf writes them, for what is put together from ready bytes."""

from __future__ import annotations


def varint(value: int) -> bytes:
    """Returns a number from 0 on, in 7 bits a byte, the least first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def delimited(field: int, data: bytes) -> bytes:
    """Returns a field that holds bytes: a text, a message, or an array of packed numbers."""
    return varint(field << 3 | 2) + varint(len(data)) + data
