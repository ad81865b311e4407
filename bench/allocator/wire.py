"""Messages of WorkStream as bytes, in which only ids are exchanged.

A client shares the machine with what it measures. Read and built field by field in Python, a unit would cost it as much
as a third of what it costs the service.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence

from muster.allocator.v1 import work_pb2

from services.varints import delimited, varint

# Of a unit: the tags, lengths and values of its key and token, which stand first. They are a whole Lease.
_KEY = b"\x0a\x24"
_LEASE_BYTES = 2 + 36 + 2 + 16
_RECORDED = bytes((2 << 3, work_pb2.RESULT_DISPOSITION_RECORDED))
# The calls of WorkStream, and their answers.
ALLOCATE, SUBMIT = 2, 5


class Wire:
    """What one connection says, and how it reads the answers.

    Args:
        client_id: Who it is.
        instance: Its instance's number.
        items: Units that a request asks for.
    """

    def __init__(self, client_id: str, instance: int, items: int) -> None:
        client = work_pb2.ClientIdentity(client_id=client_id, instance_number=instance)
        self._after_id = work_pb2.AllocateWorkRequest(client=client, max_items=items).SerializeToString()
        self._client = work_pb2.SubmitResultsRequest(client=client).SerializeToString()
        done = work_pb2.WorkResult(outcome=work_pb2.WORK_OUTCOME_SUCCEEDED)
        done.execution_time.seconds = 2
        rest = done.SerializeToString()
        self._before_lease = delimited(2, bytes(2 + _LEASE_BYTES) + rest)[: -_LEASE_BYTES - len(rest) - 2]
        self._before_lease += delimited(1, bytes(_LEASE_BYTES))[:2]
        self._after_lease = rest
        # Ids of requests: a UUID of which the last part is a number.
        self._ids = str(uuid.uuid4())[:24]
        self._numbers = itertools.count(1)

    def demand(self) -> bytes:
        """Returns a request for units, as of the unary call."""
        return _KEY + f"{self._ids}{next(self._numbers):012x}".encode() + self._after_id

    def allocate(self, sequence: int) -> bytes:
        """Returns the same as of the stream."""
        return _request(sequence, ALLOCATE, self.demand())

    def submit(self, sequence: int, leases: Sequence[bytes]) -> bytes:
        """Returns a request that says of units that they are done."""
        between = self._after_lease + self._before_lease
        results = self._before_lease + between.join(leases) + self._after_lease
        return _request(sequence, SUBMIT, self._client + results)

    @staticmethod
    def read(answer: bytes) -> tuple[int, int, int]:
        """Returns the sequence of an answer, the field of its call, and where what it carries begins."""
        sequence, at = _varint_at(answer, 1)
        _, begin = _varint_at(answer, at + 1)
        return sequence, answer[at] >> 3, begin

    @staticmethod
    def leases(answer: bytes, at: int) -> list[bytes]:
        """Returns the leases of the units of an answer; none when there was no work."""
        found = []
        while at < len(answer) and answer[at] == 1 << 3 | 2:
            size, at = _varint_at(answer, at + 1)
            found.append(answer[at : at + _LEASE_BYTES])
            at += size
        return found

    @staticmethod
    def recorded(answer: bytes, at: int) -> tuple[int, int]:
        """Returns how many results an answer names, and how many of them were recorded in time."""
        count = done = 0
        while at < len(answer):
            size, at = _varint_at(answer, at + 1)
            # After the key.
            done += answer[at + 38 : at + 40] == _RECORDED
            count += 1
            at += size
        return count, done


def _request(sequence: int, field: int, message: bytes) -> bytes:
    return b"\x08" + varint(sequence) + delimited(field, message)


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    shift = 7
    while data[at] > 0x7F:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1
