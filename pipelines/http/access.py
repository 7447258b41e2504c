"""Who may ask: the API key, the host that was meant, the site a browser asks for.

All of it is decided from the head, before anything of a body is kept.

- **Host.** A page of a foreign site can make its own name point at 127.0.0.1 and then read what a
  local server answers (DNS rebinding). So a server bound to loopback answers to IP addresses, to
  ``localhost``, to names without a dot, which nobody can register, and to ``serve.allowed_hosts``.
  At any other address it answers to all names, unless ``serve.allowed_hosts`` says which.
- **Key.** See :mod:`plinth.pipelines.identity.callers`; :func:`need_of` says what each path needs.
- **Origin.** A page of a foreign site can send a request without reading the answer. Browsers say
  so in ``Sec-Fetch-Site`` and ``Origin``; what changes or computes anything is refused then, unless
  the site stands in ``serve.cors_origins``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Literal

from plinth.engine import PlinthError, Refused
from plinth.pipelines.config.settings import is_loopback
from plinth.pipelines.http.errors import HttpError
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.wire.connection import Exchange
from plinth.pipelines.http.wire.head import Fields
from plinth.pipelines.identity.callers import (
    EVERYTHING,
    AccessDenied,
    Identity,
    Need,
    RateLimited,
)

OPEN_PATHS = (b"/health/live", b"/health/ready", b"/v2/health/live", b"/v2/health/ready")
"""Paths that ask for no key and answer to every host: they tell nothing of the inside."""
UNAUTHORISED = HttpError(
    "this server needs an API key",
    reason="unauthorised",
    hint="send it as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'",
    headers={"www-authenticate": 'Bearer, Basic realm="plinth", charset="UTF-8"'},
)
FOREIGN_HOST = HttpError(
    "this server does not go by the name in the field host",
    reason="foreign_host",
    hint="ask for localhost or an address, or add the name to serve.allowed_hosts",
)
CROSS_SITE = HttpError(
    "a page of another site may not send this",
    reason="cross_site",
    hint="send it from a program, or from a page of this server",
)
NO_SUCH_PATH = HttpError("there is nothing at a path with control characters", reason="not_found")
ELSEWHERE = HttpError(
    "this is served at another address of the server",
    reason="not_found",
    hint="metrics, status, the engine's page, loading and unloading are at serve.admin, all else "
    "at serve.port",
)
PAGE_FILES = b"/ui/static/"
"""Scripts and styles of pages, which every address has."""
Part = Literal["all", "work", "admin"]
"""Which paths an address has: all, or without or with those of ``serve.admin`` alone."""
_ABOUT_ALL = (b"/metrics", b"/v1/status", b"/v2/models/stats", b"/v2/repository/index")
_WORK = (b"/v1/", b"/v2/models/")  # not while the server warms up
_SHORT = 128  # bytes of a path whose need is remembered
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_SAFE = (b"GET", b"HEAD", b"OPTIONS")
_ASKS = b"access-control-request-method"
_KNOWN = 64  # hosts remembered as ours
_SAME_SITE = (b"same-origin", b"none")


class Access:
    """Turns requests away by their heads.

    Args:
        identity: who has a key; false: nobody needs one.
        host: the address the server is bound to.
        allowed_hosts: more names it goes by; ``*`` stands for all.
        origins: of other sites whose pages may ask.
        health: a server that warms up takes no work.
        part: which paths there are at this address.
    """

    def __init__(
        self,
        identity: Identity,
        host: str,
        allowed_hosts: Collection[str],
        origins: Collection[str],
        health: Health,
        part: Part = "all",
    ) -> None:
        self._hidden = None if part == "all" else part == "work"
        self._identity = identity if identity else None
        names = {name.lower().encode() for name in (*allowed_hosts, host)}
        checked = is_loopback(host) or bool(allowed_hosts)
        self._names = names if checked and b"*" not in names else None
        self._origins = frozenset(origin.lower().encode() for origin in origins)
        self._health = health
        self._known: set[bytes] = set()

    def refusal(self, exchange: Exchange) -> PlinthError | None:
        """Why a request is turned away, or ``None``; the exchange then knows who sent it."""
        head = exchange.head
        if head.path in OPEN_PATHS:
            return None
        if _CONTROL.search(head.decoded_path):  # a route's pattern may end before a last newline
            return NO_SUCH_PATH
        fields = head.fields
        host = fields.get(b"host", b"")
        if self._names is not None and host not in self._known:
            if not _is_ours(host, self._names):
                return FOREIGN_HOST
            if len(self._known) < _KNOWN:
                self._known.add(host)
        if head.method not in _SAFE and _is_cross_site(fields) and not self.is_cors(fields):
            return CROSS_SITE
        if self._identity is not None:
            if head.method == b"OPTIONS" and _ASKS in fields and self.is_cors(fields):
                return None  # a browser asks whether it may ask, and sends no key
            if (refused := self._admit(self._identity, exchange)) is not None:
                return refused
        if self._is_elsewhere(head.decoded_path):
            return ELSEWHERE
        if "warm_up" in self._health.reasons and head.decoded_path.startswith(_WORK):
            return Refused(self._health.reasons["warm_up"], retry_after=1.0)
        return None

    def _is_elsewhere(self, path: bytes) -> bool:
        """Whether a path is at the other address of a server that has two."""
        if self._hidden is None or path.startswith(PAGE_FILES):
            return False
        return is_administrative(path) == self._hidden

    @staticmethod
    def _admit(identity: Identity, exchange: Exchange) -> PlinthError | None:
        """Why the caller may not ask for this, or ``None``."""
        head = exchange.head
        try:
            caller = identity.caller(head.fields)
            exchange.who, exchange.caller = caller.name, caller
            path = head.decoded_path
            need = _known_need if len(path) <= _SHORT else need_of
            caller.admit(need(head.method, path))
        except AccessDenied as error:
            return UNAUTHORISED if error.reason == UNAUTHORISED.reason else error
        except RateLimited as error:
            return error
        return None

    def is_cors(self, fields: Fields) -> bool:
        """Whether a page of another site asks that may."""
        return bool(self._origins) and fields.get(b"origin", b"").lower() in self._origins


def is_administrative(path: bytes) -> bool:
    """Whether a decoded path is at ``serve.admin``, where there is such an address."""
    beginnings = (b"/v2/repository/models/", b"/ui/engine")
    return path in _ABOUT_ALL[:2] or path.startswith(beginnings)


@lru_cache(maxsize=1024)
def _known_need(method: bytes, path: bytes) -> Need:
    return need_of(method, path)


def need_of(method: bytes, path: bytes) -> Need:
    """What a request needs.

    Args:
        method: in upper case.
        path: decoded.
    """
    safe = method in _SAFE
    parts = [part.decode("utf-8", "replace") for part in path.split(b"/")[1:6]]
    if parts[0] == "v1" and len(parts) > 2:  # results of a job are not for who only looks
        return Need("score", parts[1])
    if parts[:2] == ["v2", "models"] and len(parts) > 2 and path != b"/v2/models/stats":
        return Need("read" if safe else "score", parts[2])
    if parts[0] == "ui":
        return _need_of_page(parts, safe)
    if parts[:3] == ["v2", "repository", "models"] and len(parts) > 3:
        return Need("admin", parts[3])
    if path in _ABOUT_ALL:
        return Need("read", EVERYTHING)
    return Need("read" if safe else "admin")


def _need_of_page(parts: list[str], safe: bool) -> Need:
    area, name = (*parts[1:], "", "")[:2]
    if area == "engine":
        return Need("read" if safe else "admin", EVERYTHING)
    if area in ("verticals", "studies", "desk") and name:  # studies and alerts have results
        return Need("read" if area == "verticals" and safe else "score", name)
    return Need("read" if safe else "admin")


def _is_ours(host: bytes, names: Collection[bytes]) -> bool:
    name = host.lower()
    if not name.endswith(b"]"):
        name, colon, port = name.rpartition(b":")
        name = name if colon and port.isdigit() else host.lower()
    name = name.rstrip(b".")
    if b"." not in name and b":" not in name:
        return True
    return name in names or name.endswith(b".localhost") or _is_address(name)


def _is_cross_site(fields: Fields) -> bool:
    site = fields.get(b"sec-fetch-site")
    if site is not None:
        return site.lower() not in _SAME_SITE
    origin = fields.get(b"origin")
    if origin is None:
        return False
    return origin.lower().partition(b"://")[2] != fields.get(b"host", b"").lower()


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.decode("latin-1").strip("[]"))
    except ValueError:
        return False
    return True
