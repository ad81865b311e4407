"""A gRPC client that costs next to nothing: HTTP/2 in clear text, messages as bytes.

Load comes from the machine that is measured. An ordinary client spends on each message about as much as the service
does, so that half of what is measured would be the client. This one knows one kind of server and its own requests:
headers are sent as literals, and those that come back are not read. A call that ends without an answer has failed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACKNOWLEDGED, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4
_FRAME = 9
_LARGEST_FRAME = 16_384
_DEFAULT_WINDOW = 65_535
_LARGEST_WINDOW = 2**31 - 1
# So much is received before the server is told that there is room again.
_REPLENISH = 2**28

Metadata = Sequence[tuple[str, str]]


class Stream:
    """One call on a connection."""

    __slots__ = ("_buffer", "_connection", "_ended", "_messages", "_waiter", "number", "received", "window")

    def __init__(self, connection: Connection, number: int, window: int) -> None:
        self._connection = connection
        self.number = number
        self.window = window
        self.received = 0
        self._buffer = b""
        self._messages: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def write(self, message: bytes, *, last: bool = False) -> None:
        """Sends a message, as soon as the server has room for it; `last` ends this side of the call."""
        self._connection.send(self, b"\x00" + len(message).to_bytes(4, "big") + message, last=last)

    def done_writing(self) -> None:
        """Ends this side of the call."""
        self._connection.send(self, b"", last=True)

    async def read(self) -> bytes | None:
        """Returns the next message; None when the server has ended the call."""
        while not self._messages:
            if self._ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._messages.popleft()

    def take(self, data: bytes) -> None:
        """Adds what was received."""
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while len(buffer) - at >= 5:
            end = at + 5 + int.from_bytes(buffer[at + 1 : at + 5], "big")
            if end > len(buffer):
                break
            self._messages.append(buffer[at + 5 : end])
            at = end
        self._buffer = buffer[at:]
        self._wake()

    def end(self) -> None:
        """Notes that nothing more comes."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One connection to a server, for any number of calls."""

    def __init__(self, authority: str, metadata: Metadata) -> None:
        fixed = [(":method", "POST"), (":scheme", "http"), (":authority", authority)]
        rest = [("te", "trailers"), ("content-type", "application/grpc"), *metadata]
        self._headers = b"".join(_literal(name, value) for name, value in (*fixed, *rest))
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._window = _DEFAULT_WINDOW
        self._stream_window = _DEFAULT_WINDOW
        self._received = 0
        self._waiting: deque[tuple[Stream, bytes, bool]] = deque()

    @classmethod
    async def open(cls, address: str, metadata: Metadata = ()) -> Connection:
        """Connects to `host:port`; every call carries the metadata."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(address, metadata), host, int(port))
        return connection

    def call(self, path: str) -> Stream:
        """Begins a call of a method, such as `/package.Service/Method`."""
        stream = self._streams[self._next] = Stream(self, self._next, self._stream_window)
        self._next += 2
        # Pseudo-headers come first.
        self._write(_HEADERS, _END_HEADERS, stream.number, _literal(":path", path) + self._headers)
        return stream

    async def unary(self, path: str, message: bytes) -> bytes | None:
        """Returns the answer to one call; None when it was refused."""
        stream = self.call(path)
        stream.write(message, last=True)
        answer = await stream.read()
        if answer is not None:
            await stream.read()
        return answer

    def close(self) -> None:
        """Closes the connection; calls in flight end without an answer."""
        assert self._transport is not None
        self._transport.close()

    def send(self, stream: Stream, data: bytes, *, last: bool) -> None:
        """Sends data of a call, in order, as far as the windows allow; the rest follows when they open."""
        self._waiting.append((stream, data, last))
        self._flush()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins the connection."""
        # The one of uvloop is none by its class.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(_PREFACE)
        window = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + _LARGEST_WINDOW.to_bytes(4, "big")
        self._write(_SETTINGS, 0, 0, window)
        self._write(_WINDOW_UPDATE, 0, 0, (_LARGEST_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends every call."""
        for stream in list(self._streams.values()):
            stream.end()

    def data_received(self, data: bytes) -> None:
        """Takes frames apart."""
        buffer = self._rest + data if self._rest else data
        at = 0
        while len(buffer) - at >= _FRAME:
            begin = at + _FRAME
            end = begin + int.from_bytes(buffer[at : at + 3], "big")
            if end > len(buffer):
                break
            number = int.from_bytes(buffer[at + 5 : begin], "big") & _LARGEST_WINDOW
            self._take(buffer[at + 3], buffer[at + 4], number, buffer[begin:end])
            at = end
        self._rest = buffer[at:]

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if kind == _DATA and stream is not None:
            stream.take(payload)
            self._note_received(stream, len(payload))
        elif kind == _SETTINGS and not flags & _ACKNOWLEDGED:
            for at in range(0, len(payload), 6):
                if int.from_bytes(payload[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                    self._resize(int.from_bytes(payload[at + 2 : at + 6], "big"))
            self._write(_SETTINGS, _ACKNOWLEDGED, 0, b"")
        elif kind == _WINDOW_UPDATE:
            room = int.from_bytes(payload, "big")
            if number == 0:
                self._window += room
            elif stream is not None:
                stream.window += room
            self._flush()
        elif kind == _PING and not flags & _ACKNOWLEDGED:
            self._write(_PING, _ACKNOWLEDGED, 0, payload)
        elif kind == _GOAWAY:
            self.connection_lost(None)
        if stream is not None and (kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)):
            del self._streams[number]
            stream.end()

    def _resize(self, window: int) -> None:
        for stream in self._streams.values():
            stream.window += window - self._stream_window
        self._stream_window = window
        self._flush()

    def _note_received(self, stream: Stream, size: int) -> None:
        self._received += size
        stream.received += size
        if self._received >= _REPLENISH:
            self._write(_WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big"))
            self._received = 0
        if stream.received >= _REPLENISH:
            self._write(_WINDOW_UPDATE, 0, stream.number, stream.received.to_bytes(4, "big"))
            stream.received = 0

    def _flush(self) -> None:
        # One that finds no room holds up those of other calls behind it: they are of one client.
        while self._waiting:
            stream, data, last = self._waiting[0]
            room = min(self._window, stream.window, _LARGEST_FRAME)
            if data and room <= 0:
                return
            piece, rest = data[:room], data[room:]
            self._window -= len(piece)
            stream.window -= len(piece)
            self._write(_DATA, _END_STREAM if last and not rest else 0, stream.number, piece)
            if rest:
                self._waiting[0] = (stream, rest, last)
            else:
                self._waiting.popleft()

    def _write(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        assert self._transport is not None
        head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big")
        self._transport.write(head + payload)


def _literal(name: str, value: str) -> bytes:
    """Returns a header that is neither indexed nor compressed (RFC 7541, section 6.2.2)."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes((len(data),)) + data
    more = len(data) - 127
    length = bytearray((127,))
    while more > 127:
        length.append(more & 127 | 128)
        more >>= 7
    return bytes((*length, more)) + data
