"""What a request brings, read within bounds: its media type and its body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive, Scope

from plinth.engine import Cancelled
from plinth.pipelines.http.errors import HttpError

Headers = Mapping[bytes, bytes]
"""Header value by lower-case name."""


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers of an ASGI request; of a repeated one the last."""
    return dict(scope["headers"])


def media_type(headers: Headers, allowed: tuple[str, ...]) -> str:
    """The request's media type without parameters.

    An absent one is not guessed: pages of foreign sites can send requests without one.

    Raises:
        HttpError: ``unsupported_media_type``.
    """
    given = headers.get(b"content-type", b"").decode("latin-1")
    if given in allowed:
        return given
    given = given.partition(";")[0].strip().lower()
    if given not in allowed:
        raise HttpError(
            "this content-type is not understood here" if given else "no content-type",
            reason="unsupported_media_type",
            hint=f"send {' or '.join(allowed)}",
            headers={"accept-post": ", ".join(allowed)},
        )
    return given


def refuse_packed(headers: Headers) -> None:
    """Refuse a packed body, by gzip say; it would be read as what it is not.

    Raises:
        HttpError: ``unsupported_media_type``.
    """
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HttpError(
            "packed bodies are not read here",
            reason="unsupported_media_type",
            hint="send the body as it is",
        )


async def chunks(
    receive: Receive, headers: Headers, limit: int, patience: float
) -> AsyncIterator[bytes]:
    """The body in chunks, never more than ``limit`` bytes, whatever Content-Length says.

    Args:
        receive: nothing of the body has been read.
        headers: of the request.
        limit: bytes.
        patience: seconds a chunk may keep us waiting.

    Raises:
        HttpError: ``body_too_large`` as soon as the bound is crossed, ``body_too_slow``.
        Cancelled: the client went away in the middle.
    """
    _check_declared(headers, limit)
    seen, more = 0, True
    while more:
        chunk, more = await _next(receive, patience)
        seen += len(chunk)
        if seen > limit:
            raise _too_large(limit)
        if chunk:
            yield chunk


async def whole(receive: Receive, headers: Headers, limit: int, patience: float) -> bytes:
    """The whole body as bytes; see :func:`chunks`."""
    _check_declared(headers, limit)
    chunk, more = await _next(receive, patience)
    body = bytearray(chunk) if more else chunk
    while more and len(body) <= limit:
        chunk, more = await _next(receive, patience)
        body += chunk
    if len(body) > limit:
        raise _too_large(limit)
    return bytes(body)


def _check_declared(headers: Headers, limit: int) -> None:
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)


async def _next(receive: Receive, patience: float) -> tuple[bytes, bool]:
    """One chunk of the body, and whether there are more."""
    try:
        async with asyncio.timeout(patience):
            message = await receive()
    except TimeoutError:
        raise too_slow(patience) from None
    if message["type"] == "http.disconnect":
        raise Cancelled("the client went away before the body was complete")
    return message.get("body", b""), message.get("more_body", False)


def _too_large(limit: int) -> HttpError:
    """The connection closes, for the rest of the body is not read."""
    return HttpError(
        f"the body is larger than {limit:,} bytes",
        reason="body_too_large",
        hint="send less at once, or raise the limit in the [serve] table",
        headers={"connection": "close"},
    )


def too_slow(patience: float) -> HttpError:
    """The error of a body that keeps the server waiting."""
    return HttpError(
        f"no more of the body came for {patience:g} s",
        reason="body_too_slow",
        hint="send it faster, or raise serve.request_timeout_seconds",
        headers={"connection": "close"},
    )
