"""Errors as HTTP: one shape, ``{"error": {"reason", "message", "field", "hint", ...}}``."""

from __future__ import annotations

import logging
import math
import traceback
from typing import Any

import orjson
from starlette.responses import Response

from plinth.engine import (
    Cancelled,
    Closed,
    ConfigError,
    DeadlineRefused,
    DeviceError,
    InputError,
    ModelError,
    PlinthError,
    QueueFull,
    Refused,
)

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
    "malformed_http": 400,
    "bad_header": 400,
    "unauthorised": 401,
    "not_found": 404,
    "not_allowed": 405,
    "body_too_slow": 408,
    "body_too_large": 413,
    "too_many_items": 413,
    "unsupported_media_type": 415,
    "too_many_jobs": 429,
    "head_too_large": 431,
    "too_many_connections": 503,
    "storage": 503,
    "storage_full": 507,
    "timeout": 504,
}
"""Status by an error's reason; any other goes by its type, and an InputError is 422."""


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
    if error.reason in REASON_STATUS:
        return REASON_STATUS[error.reason]
    if isinstance(error, Stop):
        return 422
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
