"""Errors as HTTP: one shape, ``{"error": {"reason", "message", "field", "hint", ...}}``."""

from __future__ import annotations

import math
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
from plinth.pipelines.http.wire import answer
from plinth.pipelines.records import InternalError
from plinth.verticals.contract import StateError

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
    InternalError: 500,
    StateError: 503,
}

REASON_STATUS = {
    "malformed_json": 400,
    "malformed_upload": 400,
    "malformed_http": 400,
    "bad_header": 400,
    "unauthorised": 401,
    "forbidden": 403,
    "foreign_host": 403,
    "cross_site": 403,
    "not_found": 404,
    "model_not_found": 404,
    "not_allowed": 405,
    "body_too_slow": 408,
    "model_in_use": 409,
    "body_too_large": 413,
    "tensor_too_large": 413,
    "too_many_items": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
    "too_many_jobs": 429,
    "head_too_large": 431,
    "too_many_connections": 503,
    "storage": 503,
    "storage_full": 507,
    "timeout": 504,
}
"""Status by an error's reason; any other goes by its type, and an InputError is 422."""


class HttpError(PlinthError):
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
    if isinstance(error, HttpError):
        return 422
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def body_of(error: PlinthError) -> dict[str, Any]:
    """The error as the JSON body's ``error`` object."""
    return {"field": None, **error.as_dict()}


def answer_of(
    error: PlinthError, *, flat: bool = False
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, fields and body of the answer to an error; the one place that maps them.

    ``Retry-After`` (whole seconds, at least 1) stands where trying again helps.

    Args:
        error: what is wrong.
        flat: one sentence in the place of an object, and 400 in the place of 422, as the Open
            Inference Protocol has it.
    """
    status = status_of(error)
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if status in (429, 503):
        wait = getattr(error, "retry_after", None)
        headers.setdefault("retry-after", str(max(1, math.ceil(wait or 0))))
    told: object = body_of(error)
    if flat:
        status, told = 400 if status == 422 else status, str(error)
    body = orjson.dumps({"error": told})
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return status, [(b"content-type", b"application/json"), *fields], body


def is_flat(path: bytes) -> bool:
    """Whether errors of a path are those of the Open Inference Protocol."""
    return path == b"/v2" or path.startswith(b"/v2/")


def error_bytes(error: PlinthError, *, flat: bool = False) -> tuple[int, bytes]:
    """The error as it goes to a socket, and its status; see :func:`answer_of`."""
    status, fields, body = answer_of(error, flat=flat)
    return status, answer.whole(status, [*fields, (b"content-length", b"%d" % len(body))], body)


def error_response(error: PlinthError, *, flat: bool = False) -> Response:
    """The error as a response of an ASGI application; see :func:`answer_of`."""
    status, fields, body = answer_of(error, flat=flat)
    response = Response(body, status_code=status)
    response.raw_headers = [*response.raw_headers, *fields]
    return response
