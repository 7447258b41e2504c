"""Bearer tokens of an OpenID Connect issuer: signed claims, checked by ``joserfc``.

The issuer's keys are fetched by a thread of their own, within bounds, and kept; a request never
waits for them. Only algorithms with public keys are taken, so no key of the issuer's can be used
to sign (``alg: none`` and HMAC with a public key are refused by the list).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, KeySet

from plinth.pipelines.config.settings import OidcConfig, is_loopback
from plinth.pipelines.identity.callers import ROLES, Bucket, Caller, Role, digest_of

log = logging.getLogger("plinth.oidc")

MAX_TOKEN = 8 << 10
"""Bytes of a token."""
MAX_DOCUMENT = 1 << 20
"""Bytes of what an issuer tells of itself, and of its keys."""
MAX_KEYS = 100
"""Keys of an issuer."""
KNOWN = 1024
"""Tokens whose signature is remembered, and subjects whose rate is."""
AGAIN = 5.0
"""Seconds between two tries to fetch keys, at least."""
_SECONDS = 10.0  # of one fetch, from its connection to its last byte
_WRONG = (JoseError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class NotFetched(Exception):
    """The issuer's keys could not be had; the text says why."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Whoever answers for the issuer does so itself."""


class _Ended(threading.local):
    """Cuts the connection of this thread's fetch when its time is over.

    A timeout of a socket counts anew with each byte, so an answer that drips would never end.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self.over = False

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cut what is connected in here after so long."""
        self._sockets, self.over = [], False
        mine = self._sockets

        def cut() -> None:
            for one in mine:
                with contextlib.suppress(OSError):  # it has ended by itself
                    socket.socket.shutdown(one, socket.SHUT_RDWR)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        begun = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            self.over = time.monotonic() - begun >= seconds
            timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        """Cut this one, too."""
        self._sockets.append(connected)


_ended = _Ended()


class _Http(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _ended.watch(self.sock)


class _Https(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()  # OpenSSL bounds a handshake as a whole
        _ended.watch(self.sock)


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        context = ssl.create_default_context()
        return self.do_open(_Https, req, context=context)


_opener = urllib.request.build_opener(_NoRedirects, _HttpHandler, _HttpsHandler)


def fetched(url: str) -> dict[str, Any]:
    """A JSON object from an address.

    Raises:
        NotFetched: it is no object, too large, or was not there in time.
    """
    parts = urlsplit(url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not safe:
        raise NotFetched(f"{url} is no https address")
    try:
        with _ended.within(_SECONDS), _opener.open(url, timeout=_SECONDS) as answer:
            raw = answer.read(MAX_DOCUMENT + 1)
        if _ended.over:
            raise TimeoutError
        if len(raw) > MAX_DOCUMENT:
            raise NotFetched(f"{url} told more than {MAX_DOCUMENT >> 20} MiB")
        found = json.loads(raw)
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        if _ended.over:
            raise NotFetched(f"{url} was not whole within {_SECONDS:g} s") from None
        reason = error.reason if isinstance(error, urllib.error.URLError) else type(error).__name__
        raise NotFetched(f"{url}: {reason}") from None
    if not isinstance(found, dict):
        raise NotFetched(f"{url} told no JSON object")
    return found


def _imported(keys: list[Any]) -> tuple[KeySet, list[str]]:
    """The public keys that can be used, and why each of the others cannot.

    Issuers publish keys of kinds that are not known here beside those that are (RFC 7517,
    section 5): one of them takes no other along.

    Raises:
        NotFetched: none can be used.
    """
    found, wrong = [], []
    for number, key in enumerate(keys, 1):
        try:
            if not isinstance(key, dict) or key.get("kty") == "oct":
                raise TypeError
            one = JWKRegistry.import_key(key)
            one.ensure_kid()
        except _WRONG as error:
            wrong.append(f"key {number} of {len(keys)} ({_kind(key)}): {type(error).__name__}")
        else:
            found.append(one)
    if not found:
        raise NotFetched(f"none of the issuer's {len(keys)} keys can be used: {'; '.join(wrong)}")
    return KeySet(found), wrong


def _kind(key: object) -> str:
    """What a key says it is, as far as a log may tell."""
    if not isinstance(key, dict):
        return "no object"
    told = (f"{name} {str(key[name])[:64]!r}" for name in ("kty", "crv", "kid") if name in key)
    return ", ".join(told) or "without kty"


@dataclass(frozen=True, slots=True)
class _Issued:
    """Keys, and the tokens that they have signed; replaced as one, so that no token outlives
    them."""

    keys: KeySet
    callers: OrderedDict[bytes, Caller] = field(default_factory=OrderedDict)


class IssuerTokens:
    """Tokens of one issuer.

    Args:
        config: the issuer, and what its claims mean here.
        clock: seconds since 1970.
    """

    def __init__(self, config: OidcConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._issued: _Issued | None = None
        issuer, audience = config.issuer or "", config.audience or ""
        self._claims = jwt.JWTClaimsRegistry(
            now=lambda: int(clock()),
            leeway=round(config.leeway_seconds),
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._told: object = None
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._next = self._tried = 0.0
        self._unknown = False
        self._fetching: threading.Thread | None = None

    # -- keys ------------------------------------------------------------------------------------
    def look(self) -> None:
        """Fetch the issuer's keys where that is due, in another thread."""
        now = time.monotonic()
        due = self._issued is None or self._unknown or now >= self._next
        busy = self._fetching is not None and self._fetching.is_alive()
        if due and not busy and (now - self._tried >= AGAIN or not self._tried):
            self._tried, self._unknown = now, False
            self._fetching = threading.Thread(target=self.fetch, name="plinth-oidc", daemon=True)
            self._fetching.start()

    def fetch(self) -> None:
        """Fetch the issuer's keys; if they cannot be had, those in force stay."""
        try:
            told = fetched(self._config.keys_url or self._discovered())
            keys = told.get("keys")
            if not isinstance(keys, list) or len(keys) > MAX_KEYS:
                raise NotFetched(f"the issuer told no list of at most {MAX_KEYS} keys")
            if keys != self._told:
                usable, wrong = _imported(keys)
                for one in wrong:
                    log.warning("left out of the keys of %s: %s", self._config.issuer, one)
                self._issued = _Issued(usable)
                self._told = keys
                log.info("took over %d keys of %s", len(usable.keys), self._config.issuer)
        except (NotFetched, *_WRONG) as error:
            told_so = str(error) if isinstance(error, NotFetched) else type(error).__name__
            log.error("the keys of the issuer in force stay: %s", told_so)
            return
        self._next = time.monotonic() + self._config.refresh_seconds

    def _discovered(self) -> str:
        issuer = self._config.issuer or ""
        told = fetched(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if told.get("issuer") != issuer or not isinstance(told.get("jwks_uri"), str):
            raise NotFetched(f"{issuer} tells of another issuer, or of no jwks_uri")
        return str(told["jwks_uri"])

    # -- tokens ----------------------------------------------------------------------------------
    def of(self, token: bytes) -> Caller | None:
        """Who carries a token; ``None`` where it is not valid, or its key is not known yet."""
        issued = self._issued  # another thread may replace it meanwhile
        if len(token) > MAX_TOKEN or issued is None:
            return None
        digest = digest_of(token)
        known = issued.callers.get(digest)
        if known is not None:
            issued.callers.move_to_end(digest)
            return known
        try:
            found = jwt.decode(token, issued.keys, algorithms=list(self._config.algorithms))
            self._claims.validate(found.claims)
            caller = self._caller(found.claims)
        except _WRONG as error:
            self._unknown = self._unknown or getattr(error, "error", "") == "invalid_key_id"
            return None
        issued.callers[digest] = caller
        while len(issued.callers) > KNOWN:
            issued.callers.popitem(last=False)
        return caller

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        config = self._config
        given = _values(claims, config.role_claim)
        roles: list[Role] = [config.roles[value] for value in given if value in config.roles]
        if not roles:
            raise ValueError("no role")
        only = _values(claims, config.only_claim) if config.only_claim else ()
        if config.only_claim and not only:
            raise ValueError("it reaches nothing")
        name = "".join(c if c.isprintable() else "?" for c in f"oidc:{claims['sub']}"[:128])
        expires = float(claims["exp"]) + config.leeway_seconds
        return Caller(name, max(roles, key=ROLES.index), only, self._bucket(name), expires)

    def _bucket(self, name: str) -> Bucket | None:
        if name not in self._buckets:
            made = Bucket.of(self._config.per_second, self._config.burst)
            if made is None:
                return None
            self._buckets[name] = made
            while len(self._buckets) > KNOWN:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        return self._buckets[name]


def _values(claims: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The texts of a claim, which may lie in others: ``realm_access.roles``."""
    found: Any = claims
    if path in claims:
        found = claims[path]
    else:
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return tuple(found.split())  # as OAuth writes scopes
    return tuple(one for one in found if isinstance(one, str)) if isinstance(found, list) else ()
