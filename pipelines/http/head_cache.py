"""Request heads that were seen before.

A client that keeps its connection sends the same head with every request of the same length.
What it means is worked out once and found again by its very bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from plinth.engine import PlinthError, Sla

END = b"\r\n\r\n"
_LONGEST = 2048  # bytes of a head worth keeping
_MOST = 1024


class Lane(Protocol):
    """Where requests go whose heads are kept here."""

    def take(self, exchange: Any) -> None:
        """Take a whole request."""
        ...


@dataclass(frozen=True, slots=True)
class Head:
    """What the head of a request to an express lane means.

    Args:
        lane: where the request goes.
        headers: value by lower-case name.
        length: bytes of the body.
        keep_alive: whether the connection stays open.
        sla: the promise.
        error: why the request is turned away without a look at its body.
    """

    lane: Lane
    headers: dict[bytes, bytes]
    length: int
    keep_alive: bool
    sla: Sla
    error: PlinthError | None = None


class Heads:
    """A bounded memory of heads, shared by all connections of a server."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self.find = self._known.get

    def learn(self, data: bytes, head: Head) -> None:
        """Remember the head of a request that came whole and alone in ``data``."""
        cut = data.find(END) + len(END)
        # Equal lengths prove that the parser saw the head end where we see it.
        if data[:5] != b"POST " or cut > _LONGEST or len(data) != cut + head.length:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[data[:cut]] = head
