"""The chunked transfer coding (RFC 9112, section 7.1), read within bounds."""

from __future__ import annotations

import re

from plinth.pipelines.http.wire.head import BadRequest

MAX_OVERHEAD = 64 << 10
"""Bytes of sizes, extensions and trailer fields beyond 8 for each byte of the body itself."""
_LINE = 4096  # bytes of one size line or trailer field
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(
    rb"(?!(?i:content-length|transfer-encoding|host):)"
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*"
)
"""A trailer field, but none that would frame a message (RFC 9110, section 6.5.1)."""


class ChunkedBody:
    """Undoes the coding piece by piece. Trailer fields are checked, counted and thrown away."""

    def __init__(self) -> None:
        self.done = False
        self._line = b""
        self._left = 0
        self._state = self._size
        self._read = self._body = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Read more of the connection.

        Returns:
            Bytes of the body, and what follows its end (empty until :attr:`done`).

        Raises:
            BadRequest: the coding is malformed, or costs more than its bound.
        """
        parts: list[bytes] = []
        rest = data
        while rest and not self.done:
            before = len(rest)
            rest = self._data(rest, parts) if self._left else self._next_line(rest)
            self._read += before - len(rest)
            if self._read > MAX_OVERHEAD + 9 * self._body:
                raise BadRequest("chunk extensions or trailer fields without end")
        return b"".join(parts), rest

    def _data(self, rest: bytes, parts: list[bytes]) -> bytes:
        part = rest[: self._left]
        parts.append(part)
        self._left -= len(part)
        self._body += len(part)
        return rest[len(part) :]

    def _next_line(self, rest: bytes) -> bytes:
        end = rest.find(b"\n")
        if end < 0:
            self._line += rest
            if len(self._line) > _LINE:
                raise BadRequest("a line of the chunked body is too long")
            return b""
        line = self._line + rest[: end + 1]
        self._line = b""
        if len(line) > _LINE or line[-2:] != b"\r\n":
            raise BadRequest("a line of the chunked body is malformed")
        self._state(line[:-2])
        return rest[end + 1 :]

    def _size(self, line: bytes) -> None:
        found = _SIZE.fullmatch(line)
        if found is None:
            raise BadRequest("the size of a chunk is malformed")
        self._left = int(found[1], 16)
        self._state = self._after_data if self._left else self._trailer

    def _after_data(self, line: bytes) -> None:
        if line:
            raise BadRequest("a chunk is longer than its size")
        self._state = self._size

    def _trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
        elif _TRAILER.fullmatch(line) is None:
            raise BadRequest("a trailer field is malformed")
