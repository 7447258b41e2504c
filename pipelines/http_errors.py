"""Errors as HTTP: one shape, ``{"error": {"reason", "message", "field", "hint", ...}}``."""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine import ConfigError, InputError, PlinthError, Refused
from engine.errors import Cancelled, Closed, DeadlineRefused, DeviceError, ModelError, QueueFull

log = logging.getLogger("plinth.serve")

STATUS: dict[type[PlinthError], int] = {
    QueueFull: 429,
    DeadlineRefused: 503,
    Closed: 503,
    Cancelled: 499,
    Refused: 503,
    InputError: 422,
    ModelError: 503,
    DeviceError: 503,
    ConfigError: 500,
}

REASON_STATUS = {
    "malformed_json": 400,
    "malformed_upload": 400,
    "bad_header": 400,
    "unauthorised": 401,
    "not_found": 404,
    "not_allowed": 405,
    "body_too_slow": 408,
    "body_too_large": 413,
    "too_many_items": 413,
    "unsupported_media_type": 415,
    "too_many_jobs": 429,
    "timeout": 504,
}
"""Status by an InputError's reason; every other reason is 422."""


class Stop(PlinthError):
    """A request that ends here, for a reason of the door itself.

    Args:
        message: what is wrong.
        reason: a key of :data:`REASON_STATUS`.
        hint: what to do.
        headers: extra response headers.
        extra: more JSON fields of the error.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.headers = headers or {}
        self.extra = extra or {}

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), **self.extra}


def status_of(error: PlinthError) -> int:
    """The HTTP status that means what the error means."""
    if isinstance(error, InputError | Stop):
        return REASON_STATUS.get(error.reason, 422)
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def body_of(error: PlinthError) -> dict[str, Any]:
    """The error as the JSON body's ``error`` object."""
    return {"field": None, **error.as_dict()}


def error_response(error: PlinthError) -> Response:
    """The error as a response, with ``Retry-After`` (whole seconds, at least 1) where it helps."""
    status = status_of(error)
    headers = dict(error.headers) if isinstance(error, Stop) else {}
    if status in (429, 503):
        wait = getattr(error, "retry_after", None)
        headers.setdefault("retry-after", str(max(1, math.ceil(wait or 0))))
    return Response(
        orjson.dumps({"error": body_of(error)}),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def internal_error(error: BaseException) -> Response:
    """A 500 that tells nothing of the inside; the log gets the frames, never the values."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected %s\n%s", type(error).__name__, frames)
    body = {
        "reason": "internal",
        "message": "something went wrong here; the request was not answered",
        "field": None,
        "hint": "try again; if it stays, look into the server's log",
    }
    return Response(orjson.dumps({"error": body}), 500, media_type="application/json")


async def bounded(request: Request, limit: int, patience: float) -> AsyncIterator[bytes]:
    """The body in chunks, never more than ``limit`` bytes, whatever Content-Length says.

    Args:
        request: its body has not been read.
        limit: bytes.
        patience: seconds a chunk may keep us waiting.

    Raises:
        Stop: ``body_too_large`` as soon as the bound is crossed, ``body_too_slow``.
        Cancelled: the client went away in the middle.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(limit)
    seen = 0
    stream = request.stream()
    try:
        while True:
            async with asyncio.timeout(patience):
                chunk = await anext(stream, None)
            if chunk is None:
                return
            seen += len(chunk)
            if seen > limit:
                raise too_large(limit)
            if chunk:
                yield chunk
    except TimeoutError:
        raise Stop(
            f"no more of the body came for {patience:g} s",
            reason="body_too_slow",
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise Cancelled("the client went away before the body was complete") from None


async def read_body(request: Request, limit: int, patience: float) -> bytes:
    """The whole body as bytes; see :func:`bounded`."""
    chunks = [chunk async for chunk in bounded(request, limit, patience)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def too_large(limit: int) -> Stop:
    """413; the connection closes, for the rest of the body is not read."""
    return Stop(
        f"the body is larger than {limit:,} bytes",
        reason="body_too_large",
        hint="send less at once, or raise the limit in the [serve] table",
        headers={"connection": "close"},
    )


def media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The request's media type without parameters; an absent one is the first allowed.

    Raises:
        Stop: ``unsupported_media_type``.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not given:
        return allowed[0]
    if given not in allowed:
        raise Stop(
            f"content-type {given[:80]!r} is not understood here",
            reason="unsupported_media_type",
            hint=f"send {' or '.join(allowed)}",
            headers={"accept-post": ", ".join(allowed)},
        )
    return given
