"""Answers as bytes: status line, fields, body."""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

Pairs = Iterable[tuple[bytes, bytes]]


def _line(status: HTTPStatus) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode())


_LINES = {int(status): _line(status) for status in HTTPStatus}


class _Date:
    """The field ``date``, made anew each second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._line = b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
        return self._line


_date = _Date()


def head(status: int, fields: Pairs) -> bytes:
    """Status line, date and fields, without the empty line that ends them."""
    parts = [_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, _date.line()]
    for name, value in fields:
        parts += (name, b": ", value, b"\r\n")
    return b"".join(parts)


def whole(status: int, fields: Pairs, body: bytes) -> bytes:
    """A whole answer whose fields give the length of its body."""
    return b"%b\r\n%b" % (head(status, fields), body)
