"""Messages on their way: gRPC holds what has come of each, so that few may take long.

gRPC says nothing of a message before it is whole, neither how long it is nor how much has come. So
time bounds what is held: a message that is not whole after a moment holds one of few places until
it is, and is refused without one. What is held is at most the places times the largest message,
and what the network brings in that moment.

A caller holds no more places than are free (dynamic thresholds: Choudhury and Hahne, 1998): one
takes half of them, n take n of n + 1 parts, and there is always one for whoever comes next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from plinth.engine import InputError, QueueFull

GRACE = 0.1
"""Seconds in which a message needs no place."""


class Places:
    """Places of something that may take long.

    Args:
        most: of them.
        what: they are for, as it is told whoever gets none.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._taken = 0
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, who: str | None = None) -> Iterator[None]:
        """Hold a place.

        Args:
            who: holds it, and shares with others; ``None``: it is not shared by name.

        Raises:
            QueueFull: none is free, or this caller has its share.
        """
        free = self._most - self._taken
        if free < 1:
            raise QueueFull(f"all {self._most} places for {self._what} are taken", retry_after=1.0)
        if who is not None:
            if self._held[who] >= free:
                raise QueueFull(
                    f"this key holds {self._held[who]} of {self._most} places for {self._what}, "
                    "its share",
                    retry_after=1.0,
                )
            self._held[who] += 1
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
            if who is not None:
                self._held[who] -= 1
                self._held += Counter()  # forgets whoever holds none


class Arrivals:
    """The places of messages that are not whole yet.

    Args:
        places: messages that may take longer than ``grace``.
        seconds: longest time a message may take.
        grace: seconds in which a message needs no place.
        calls: messages that may be on their way together, with a place or without; ``None``: any
            number.
    """

    def __init__(
        self, places: int, seconds: float, *, grace: float = GRACE, calls: int | None = None
    ) -> None:
        what = f"streams and for messages that take longer than {grace:g} s"
        self.places = Places(places, what)
        self._seconds = seconds
        self._grace = grace
        self._calls = calls
        self._coming = 0

    async def only(self, requests: AsyncIterator[bytes], who: str | None = None) -> bytes:
        """The message of a call that has one.

        Args:
            requests: of the call.
            who: makes it; see :meth:`Places.hold`.

        Raises:
            QueueFull: it takes long, and no place is free for it.
            InputError: it did not come, or not in time.
        """
        if self._calls is not None and self._coming >= self._calls:
            raise QueueFull(f"{self._calls} such calls are arriving", retry_after=1.0)
        loop = asyncio.get_running_loop()
        held = contextlib.ExitStack()
        refusal: QueueFull | None = None

        def take_place() -> None:
            nonlocal refusal
            try:
                held.enter_context(self.places.hold(who))
                bound.reschedule(loop.time() + self._seconds)
            except QueueFull as error:
                refusal = error
                bound.reschedule(loop.time())

        bound = asyncio.timeout(None)
        timer = loop.call_later(self._grace, take_place)
        self._coming += 1
        try:
            async with bound:
                message = await anext(aiter(requests), None)
        except TimeoutError:
            raise refusal or InputError(
                f"the message was not whole within {self._seconds:g} s",
                hint="send it faster, or raise serve.request_timeout_seconds",
                reason="timeout",
            ) from None
        finally:
            self._coming -= 1
            timer.cancel()
            held.close()
        if message is None:
            raise InputError("no message came", hint="send one", reason="malformed_request")
        return message
