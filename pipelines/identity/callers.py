"""Who asks: the key or token of a request, wherever its protocol carries it, and what it may do.

Programs send a key as a bearer token or in ``X-API-Key``; browsers, which are asked for it before
they can show a page, as the password of the Basic scheme (RFC 7617), of any user.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from plinth.engine import InputError, Refused

Fields = Mapping[bytes, bytes]
"""Header fields, or metadata, by lower-case name."""

Role = Literal["read", "score", "admin"]
ROLES: tuple[Role, ...] = ("read", "score", "admin")
"""``read`` looks at the state of the server; ``score`` also has work done and takes its results;
``admin`` also loads and unloads models."""

EVERYTHING = "*"
"""The subject of what is about all verticals and models together, such as the metrics."""
MAX_KEY = 16 << 10
"""Bytes of a key or token that are looked at."""


class AccessDenied(InputError):
    """No key, or one that may not do this."""


class RateLimited(Refused):
    """More than the key's rate."""

    reason = "rate_limited"


@dataclass(frozen=True, slots=True)
class Need:
    """What a request needs.

    Args:
        role: the least that may ask it.
        subject: the vertical or model it is about; :data:`EVERYTHING`: all of them; ``None``: none.
    """

    role: Role
    subject: str | None = None


class Bucket:
    """A token bucket: ``burst`` requests at once, ``per_second`` on average.

    Args:
        per_second: requests that come back each second.
        burst: requests that may come at once.
        clock: seconds, monotonic.
    """

    __slots__ = ("_at", "_clock", "_left", "burst", "per_second")

    def __init__(
        self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_second = per_second
        self.burst = burst
        self._clock = clock
        self._left = float(burst)
        self._at = clock()

    @classmethod
    def of(cls, per_second: float | None, burst: int | None) -> Bucket | None:
        """For a rate that is told; without a burst, of one second's requests.

        Args:
            per_second: ``None``: any number, for which no bucket is needed.
            burst: requests at once.
        """
        if per_second is None:
            return None
        return cls(per_second, burst or max(1, round(per_second)))

    def take(self) -> None:
        """Take a request.

        Raises:
            RateLimited: there is none; says when there is.
        """
        now = self._clock()
        self._left = min(self.burst, self._left + (now - self._at) * self.per_second)
        self._at = now
        if self._left < 1.0:
            raise RateLimited(
                f"this key may ask {self.per_second:g} times a second, {self.burst} at once",
                retry_after=(1.0 - self._left) / self.per_second,
            )
        self._left -= 1.0


class Caller:
    """Somebody who is known.

    Args:
        name: for the log of requests.
        role: what they may do.
        only: verticals and models they reach; none: all.
        bucket: their rate; ``None``: any.
        expires: seconds since 1970 from which they are not known any more.
    """

    __slots__ = ("_only", "_rank", "bucket", "expires", "name")

    @property
    def role(self) -> Role:
        """What they may do."""
        return ROLES[self._rank]

    def reaches(self, subject: str) -> bool:
        """Whether they reach a vertical or model; :data:`EVERYTHING`: all of them."""
        return not self._only or subject in self._only

    def __init__(
        self,
        name: str,
        role: Role,
        only: Collection[str] = (),
        bucket: Bucket | None = None,
        expires: float | None = None,
    ) -> None:
        self.name = name
        self._rank = ROLES.index(role)
        self._only = frozenset(only)
        self.bucket = bucket
        self.expires = expires

    def check(self, need: Need) -> None:
        """See whether they may.

        Raises:
            AccessDenied: they may not; says what they would need.
        """
        if ROLES.index(need.role) > self._rank:
            raise AccessDenied(
                f"the key of {self.name} has the role {ROLES[self._rank]}, this needs {need.role}",
                hint="ask for a key with that role",
                reason="forbidden",
            )
        if need.subject is not None and not self.reaches(need.subject):
            raise AccessDenied(
                f"the key of {self.name} reaches {', '.join(sorted(self._only))} only",
                hint="ask for a key that reaches this",
                reason="forbidden",
            )

    def admit(self, need: Need) -> None:
        """As :meth:`check`, and count a request.

        Raises:
            AccessDenied: they may not.
            RateLimited: not so often.
        """
        self.check(need)
        if self.bucket is not None:
            self.bucket.take()


class Keys(Protocol):
    """Keys that may change while the server runs."""

    def of(self, digest: bytes) -> Caller | None:
        """Whose key has this SHA-256."""
        ...

    def look(self) -> None:
        """Take over what has changed."""
        ...


class Tokens(Protocol):
    """Signed tokens of an issuer."""

    def of(self, token: bytes) -> Caller | None:
        """Who carries the token, ``None`` where it is not valid."""
        ...

    def look(self) -> None:
        """Fetch the issuer's keys where that is due; does not wait."""
        ...


class OneKey:
    """The key of ``serve.api_key_env``, which may do everything."""

    def __init__(self, key: str) -> None:
        self._digest = digest_of(key.encode())
        self._caller = Caller("api_key_env", "admin")

    def of(self, digest: bytes) -> Caller | None:
        """See :class:`Keys`; told in constant time."""
        return self._caller if hmac.compare_digest(digest, self._digest) else None

    def look(self) -> None:
        """See :class:`Keys`."""


class Identity:
    """Knows callers by what their requests carry.

    Args:
        keys: where keys are found.
        tokens: where tokens are checked, if they are taken.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        keys: Collection[Keys],
        tokens: Tokens | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = tuple(keys)
        self._tokens = tokens
        self._clock = clock

    def __bool__(self) -> bool:
        """Whether requests need a key or token."""
        return bool(self._keys) or self._tokens is not None

    def caller(self, fields: Fields) -> Caller:
        """Who sent a request with these fields.

        Raises:
            AccessDenied: nobody who is known.
        """
        given = given_key(fields)
        found = self._known(given) if 0 < len(given) <= MAX_KEY else None
        if found is None or (found.expires is not None and self._clock() >= found.expires):
            raise AccessDenied(
                "this server needs an API key",
                hint="send it as 'authorization: Bearer <key>' or 'x-api-key: <key>'; "
                "one that was sent is not valid, or not any more",
                reason="unauthorised",
            )
        return found

    def _known(self, given: bytes) -> Caller | None:
        digest = digest_of(given)
        for keys in self._keys:
            if (found := keys.of(digest)) is not None:
                return found
        if self._tokens is not None and given.count(b".") == 2:
            return self._tokens.of(given)
        return None

    def look(self) -> None:
        """Take over what has changed; call it about once a second."""
        for keys in self._keys:
            keys.look()
        if self._tokens is not None:
            self._tokens.look()


def digest_of(key: bytes) -> bytes:
    """SHA-256 of a key; enough for keys of 256 random bits, which nobody guesses."""
    return hashlib.sha256(key).digest()


def given_key(fields: Fields) -> bytes:
    """The key or token that a request carries, empty without one."""
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
