"""The head of a request: request line and fields, and what they say of the body (RFC 9112).

The grammar is the canonical one and nothing beside it: lines end with CRLF, no field is folded
over several lines, a length is plain digits and stands once, the only transfer coding is
``chunked``. What is outside the grammar is answered with 400 and ends the connection, so that no
proxy in front can see other requests in the same bytes. ``Upgrade`` is ignored, as RFC 9110
(section 7.8) lets a server do: its body is a body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

END = b"\r\n\r\n"
MAX_HEAD = 64 << 10
"""Bytes of request line and fields together."""
_SHORT = 1024
"""Bytes of a head that is remembered; 128 of them are."""
MAX_FIELDS = 256
"""Fields of one head: each costs some 200 bytes of memory here."""

Fields = dict[bytes, bytes]
"""Value by lower-case name; of a repeated field the last."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21\x24-\x7e]+) HTTP/1\.([01])\r\n")
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+")
_FIELD = re.compile(rb"([^:\r\n]+):[\t ]*([^\r\n]*)\r\n")
_BEGINNING = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}(?: [\x21\x24-\x7e]*(?: .*)?)?\Z", re.S)
_EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
_EARLY = 2048  # bytes of a head in which what is no request line is refused before its end
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]*")
_ORIGIN_FORM = re.compile(rb"https?://([^/?#]+)", re.I)
_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
_ONCE = frozenset(
    (
        *(b"host", b"content-length", b"transfer-encoding", b"content-type", b"authorization"),
        *(b"x-api-key", b"x-slo-deadline-ms", b"origin", b"sec-fetch-site", b"expect"),
    )
)
"""Fields whose meaning would depend on which of two is read."""


_OTHER = (
    rb"(?:(?!(?:transfer-encoding|content-length|connection|expect|x-slo-deadline-ms):)"
    + _TOKEN
    + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+"
)
_PLAIN_POST = re.compile(
    rb"POST (/[\x21\x24-\x3e\x40-\x7e]*+) HTTP/1\.1\r\n"
    + _OTHER
    + rb"content-length:[\t ]*([0-9]{1,7})\r\n"
    + _OTHER
    + rb"\r\n",
    re.I,
)
"""A head with one length and no field that could change what becomes of the connection."""


class BadRequest(Exception):
    """The bytes are no request that is understood here; the connection ends after the answer.

    Args:
        message: what is wrong, without the bytes themselves.
        reason: ``malformed_http``, ``head_too_large`` or ``not_allowed``.
    """

    def __init__(self, message: str, reason: str = "malformed_http") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


@dataclass(slots=True)
class ParsedHead:
    """What the head of a request says.

    Args:
        method: upper case.
        path: as sent, without the query, still percent-encoded.
        query: after the question mark, empty without one.
        fields: value by lower-case name.
        pairs: all fields in order, names in lower case; of a request without repeated fields
            the same as ``fields``.
        length: bytes of the body; ``None`` for a chunked body.
        keep_alive: whether the connection may carry another request; HTTP/1.0 may not.
        minor: 1 for HTTP/1.1, 0 for HTTP/1.0.
    """

    method: bytes
    path: bytes
    query: bytes
    fields: Fields
    pairs: list[tuple[bytes, bytes]]
    length: int | None
    keep_alive: bool
    minor: int

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for ``100 Continue`` before it sends the body."""
        expected = self.fields.get(b"expect", b"").lower()
        return self.minor == 1 and expected == b"100-continue"

    @property
    def decoded_path(self) -> bytes:
        """The path with its percent-encoding undone."""
        return unquote_to_bytes(self.path) if b"%" in self.path else self.path


def parse_head(data: bytes) -> ParsedHead:
    """Read a head, from its first byte to the end of the line before the empty one.

    Args:
        data: request line and fields, each with its CRLF; without the empty line.

    Raises:
        BadRequest: it is outside the grammar.
    """
    line = _REQUEST_LINE.match(data)
    if line is None:
        raise BadRequest("the request line is not that of HTTP/1.1")
    method, target = line[1], line[2]
    if _FIELDS.fullmatch(data, line.end()) is None:
        raise BadRequest("a header field is malformed")
    found = _FIELD.findall(data, line.end())
    if len(found) > MAX_FIELDS:
        raise BadRequest(f"the head has more than {MAX_FIELDS} fields", "head_too_large")
    pairs = [(name.lower(), value.rstrip(b"\t ")) for name, value in found]
    fields = dict(pairs)
    if len(fields) != len(pairs):
        _check_repeated(pairs)
    minor = 1 if line[3] == b"1" else 0
    if method not in _METHODS:
        raise BadRequest("the method is not served here", "not_allowed")
    path, _, query = _origin_form(target, pairs, fields).partition(b"?")
    _check_host(fields, minor)
    length = _length(fields, minor)
    keeps = minor == 1 and not _closes(fields)
    return ParsedHead(method, path, query, fields, pairs, length, keeps, minor)


_remembered = lru_cache(maxsize=128)(parse_head)


def known_head(data: bytes) -> ParsedHead:
    """As :func:`parse_head`; a short head that came before is not read again. Change nothing of it.

    Clients that send no id of their own repeat their heads byte by byte, and reading one takes a
    sixth of an answer.
    """
    return _remembered(data) if len(data) <= _SHORT else parse_head(data)


def plain_post(data: bytes) -> bytes | None:
    """The path of a POST that makes up ``data`` to its last byte and has nothing special.

    Enough to refuse a request, for a tenth of what reading it costs; whatever is special is
    ``None`` and must be read.
    """
    found = _PLAIN_POST.match(data)
    if found is None or data[:5] != b"POST " or len(data) != found.end() + int(found[2]):
        return None
    return found[1]


def empty_lines(data: bytes) -> int:
    """Bytes of the empty lines that ``data`` begins with."""
    return len(_EMPTY_LINES.match(data)[0])  # type: ignore[index]


def check_beginning(data: bytes, known: int) -> None:
    """Refuse a head that has not come whole but is wrong already.

    Args:
        data: all of it that has come.
        known: bytes of it that were checked before; a head that comes byte by byte would
            otherwise cost the square of its length.

    Raises:
        BadRequest: it can no longer become a request.
    """
    if len(data) > MAX_HEAD:
        raise BadRequest(
            f"the head of the request is larger than {MAX_HEAD:,} bytes", "head_too_large"
        )
    wrong = _BARE_LINE_FEED.search(data, known) is not None
    if not wrong and known < _EARLY:
        line, ended, _ = data.partition(b"\r\n")
        wrong = (
            _REQUEST_LINE.match(data) if ended else _BEGINNING.match(line.rstrip(b"\r"))
        ) is None
    if wrong:
        raise BadRequest("this is not HTTP/1.1")


def _check_repeated(pairs: list[tuple[bytes, bytes]]) -> None:
    seen: set[bytes] = set()
    for name, _ in pairs:
        if name in seen and name in _ONCE:
            raise BadRequest(f"the field {name.decode()} stands more than once")
        seen.add(name)


def _origin_form(target: bytes, pairs: list[tuple[bytes, bytes]], fields: Fields) -> bytes:
    """The target from its path on; the authority of an absolute one takes the place of Host."""
    if target[:1] == b"/":
        return target
    absolute = _ORIGIN_FORM.match(target)
    if absolute is None:
        raise BadRequest("the target of the request is no path")
    fields[b"host"] = absolute[1]
    pairs[:] = [(n, absolute[1] if n == b"host" else v) for n, v in pairs]
    rest = target[absolute.end() :]
    return rest if rest[:1] == b"/" else b"/" + rest


def _check_host(fields: Fields, minor: int) -> None:
    host = fields.get(b"host")
    if host is None:
        if minor == 1:
            raise BadRequest("the field host is missing")
    elif _HOST.fullmatch(host) is None:
        raise BadRequest("the field host is malformed")


def _length(fields: Fields, minor: int) -> int | None:
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if minor == 0 or length is not None or coding.lower() != b"chunked":
            raise BadRequest("the only transfer coding is chunked, in HTTP/1.1, without a length")
        return None
    if length is None:
        return 0
    if _LENGTH.fullmatch(length) is None:
        raise BadRequest("content-length is no number of bytes")
    return int(length)


def _closes(fields: Fields) -> bool:
    options = fields.get(b"connection")
    return options is not None and b"close" in (
        word.strip() for word in options.lower().split(b",")
    )
