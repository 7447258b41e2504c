"""Waiting for an answer on behalf of a client that may leave."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive

from plinth.engine import Cancelled, PlinthError
from plinth.pipelines.http.errors import HttpError

WATCH_AFTER = 0.02
"""Seconds an answer may take before anybody looks whether its client is still there."""


class cancel_on_disconnect:
    """A block that ends when its client leaves or when it takes too long.

    Most answers come before the watching begins, and pay for one timer only.

    Args:
        receive: of the request, whose body has been read.
        patience: seconds the block may take.

    Raises:
        Cancelled: the client is gone; what the block waited for was cancelled.
        HttpError: ``timeout``.
    """

    def __init__(self, receive: Receive, patience: float) -> None:
        self._receive = receive
        self._patience = patience
        self._watcher: asyncio.Task[None] | None = None
        self._verdict: PlinthError | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(WATCH_AFTER, self._begin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._verdict is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            raise self._verdict from None

    def _begin(self) -> None:
        self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        try:
            async with asyncio.timeout(self._patience):
                while (await self._receive())["type"] != "http.disconnect":
                    pass
            self._verdict = Cancelled("the client went away")
        except TimeoutError:
            self._verdict = timed_out(self._patience)
        assert self._task is not None
        self._task.cancel()


def timed_out(seconds: float) -> HttpError:
    """The error of a request that took longer than the bound."""
    return HttpError(
        f"no answer within {seconds:g} s",
        reason="timeout",
        hint="send fewer records at once, or raise serve.request_timeout_seconds",
    )
