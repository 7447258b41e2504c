"""Who asks: the key of a request, wherever its protocol carries it.

Programs send it as a bearer token or in ``X-API-Key``; browsers, which are asked for it before
they can show a page, as the password of the Basic scheme (RFC 7617), of any user.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping

Fields = Mapping[bytes, bytes]
"""Header fields, or metadata, by lower-case name."""


def has_key(fields: Fields, key: bytes) -> bool:
    """Whether a request carries the key; told in constant time."""
    return hmac.compare_digest(given_key(fields), key)


def given_key(fields: Fields) -> bytes:
    """The key that a request carries, empty without one."""
    scheme, _, given = fields.get(b"authorization", b"").partition(b" ")
    scheme = scheme.lower()
    if scheme == b"basic":
        given = _password(given)
    elif scheme != b"bearer":
        given = b""
    return fields.get(b"x-api-key", given).strip()


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
