"""Who may ask: the API key, the host that was meant, the site a browser asks for.

All of it is decided from the head, before anything of a body is kept.

- **Host.** A page of a foreign site can make its own name point at 127.0.0.1 and then read what a
  local server answers (DNS rebinding). So a server bound to loopback answers to IP addresses, to
  ``localhost``, to names without a dot, which nobody can register, and to ``serve.allowed_hosts``.
- **Key.** See :mod:`plinth.pipelines.identity`.
- **Origin.** A page of a foreign site can send a request without reading the answer. Browsers say
  so in ``Sec-Fetch-Site`` and ``Origin``; what changes or computes anything is refused then.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from plinth.engine import PlinthError, Refused
from plinth.pipelines.http.errors import HttpError
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.wire.head import Fields, ParsedHead
from plinth.pipelines.identity import has_key

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
_WORK = (b"/v1/", b"/v2/models/")  # not while the server warms up
_SAFE = (b"GET", b"HEAD", b"OPTIONS")
_KNOWN = 64  # hosts remembered as ours
_SAME_SITE = (b"same-origin", b"none")


class Access:
    """Turns requests away by their heads.

    Args:
        key: the API key, or ``None``.
        host: the address the server is bound to.
        allowed_hosts: more names it goes by; ``*`` stands for all.
        health: a server that warms up takes no work.
    """

    def __init__(
        self, key: str | None, host: str, allowed_hosts: Collection[str], health: Health
    ) -> None:
        self._key = None if key is None else key.encode()
        names = {name.lower().encode() for name in (*allowed_hosts, host)}
        self._names = None if b"*" in names or not _is_loopback(host) else names
        self._health = health
        self._known: set[bytes] = set()

    def refusal(self, head: ParsedHead) -> PlinthError | None:
        """Why a request is turned away, or ``None``."""
        if head.path in OPEN_PATHS:
            return None
        fields = head.fields
        host = fields.get(b"host", b"")
        if self._names is not None and host not in self._known:
            if not _is_ours(host, self._names):
                return FOREIGN_HOST
            if len(self._known) < _KNOWN:
                self._known.add(host)
        if head.method not in _SAFE and _is_cross_site(fields):
            return CROSS_SITE
        if self._key is not None and not has_key(fields, self._key):
            return UNAUTHORISED
        if "warm_up" in self._health.reasons and head.decoded_path.startswith(_WORK):
            return Refused(self._health.reasons["warm_up"], retry_after=1.0)
        return None


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


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
