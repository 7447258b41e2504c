"""A gRPC client that sends the beginning of a message, in frames of HTTP/2 (RFC 9113)."""

from __future__ import annotations

import socket
import struct

_DATA, _HEADERS, _RESET, _SETTINGS = 0, 1, 3, 4
_END_HEADERS, _END_STREAM, _ACK = 4, 1, 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _field(name: str, value: str) -> bytes:
    """A literal field without indexing (RFC 7541, section 6.2.2), of less than 127 bytes."""
    return b"".join(
        (b"\x00", bytes((len(name),)), name.encode(), bytes((len(value),)), value.encode())
    )


class HalfSent:
    """Calls whose messages never become whole, on one connection.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, b""))
        self._file = self._socket.makefile("rb")
        self._next = 1
        self._over: set[int] = set()

    def __enter__(self) -> HalfSent:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def begin(self, method: str, size: int, **metadata: str) -> int:
        """Begin a message of ``size`` bytes, of which ten come; returns the number of the call."""
        stream, self._next = self._next, self._next + 2
        fields = (
            *((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x")),
            *(("content-type", "application/grpc"), ("te", "trailers")),
            *((name.replace("_", "-"), value) for name, value in metadata.items()),
        )
        head = b"".join(_field(*field) for field in fields)
        message = b"\x00" + struct.pack(">I", size) + bytes(10)
        self._socket.sendall(
            _frame(_HEADERS, _END_HEADERS, stream, head) + _frame(_DATA, 0, stream, message)
        )
        return stream

    def ended(self) -> int:
        """Wait until the server ends another call, and say which."""
        while True:
            head = self._file.read(9)
            size = int.from_bytes(head[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            self._file.read(size)
            if kind == _SETTINGS and not flags & _ACK:
                self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            over = kind == _RESET or (kind == _HEADERS and flags & _END_STREAM)
            if over and stream not in self._over:
                self._over.add(stream)
                return int(stream)
