"""DICOMweb (PS3.18): QIDO to ask, WADO to fetch, STOW to store; each answer is bounded."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx
import orjson
from pydicom.datadict import keyword_for_tag

from plinth.engine import PlinthError
from plinth.pipelines.archive.settings import Web, secret

PAGE = 500
"""Answers asked for at once."""
MAX_ANSWERS = 20_000
"""Answers to one question, all pages together."""
MAX_JSON = 32 << 20
"""Bytes of one page."""
PACE = 16 << 10
"""Bytes a second that an answer comes with at least."""
LATER = {401, 403, 408, 413, 425, 429}
"""Below 500: not the file's fault; who runs the archive can mend it."""
TAG = re.compile("[0-9A-Fa-f]{8}")
BUSY = {*range(0xA700, 0xA800), 0x0110, 0x0124}
"""Failure Reason (0008,1197): out of resources, processing failure, not authorised."""


class Unreachable(PlinthError):
    """The archive cannot answer now; it may later."""

    reason = "unreachable"


class NotWanted(PlinthError):
    """The archive will not have this, now or later."""

    reason = "not_wanted"


class DicomWeb:
    """A client of one service.

    Args:
        settings: its address, and what it asks for.

    Raises:
        ConfigError: a secret is not set.
    """

    def __init__(self, settings: Web) -> None:
        auth = None
        headers = {}
        if settings.user_env is not None:
            user, _, password = settings.user_env.partition(":")
            auth = httpx.BasicAuth(secret(user), secret(password))
        if settings.token_env is not None:
            headers["Authorization"] = f"Bearer {secret(settings.token_env)}"
        self._url = settings.url.rstrip("/")
        self._patience = settings.timeout_seconds
        self._http = httpx.Client(
            auth=auth,
            headers=headers,
            timeout=settings.timeout_seconds,
            verify=True if settings.ca is None else str(settings.ca),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._http.close()

    # -- QIDO ----------------------------------------------------------------------------------
    def ask(self, what: str, **wanted: str) -> Iterator[dict[str, str]]:
        """Search (PS3.18 10.6): attributes by keyword, as texts, one answer after the other.

        Args:
            what: ``"series"``, or ``"studies/<uid>/series/<uid>/instances"``.
            wanted: keyword to value to match; ``includefield`` with commas.

        Raises:
            Unreachable: the service cannot answer.
            NotWanted: it does not take this question.
        """
        for offset in range(0, MAX_ANSWERS, PAGE):
            page = self._page(what, {**wanted, "limit": str(PAGE), "offset": str(offset)})
            yield from page
            if len(page) < PAGE:
                return

    def _page(self, what: str, wanted: Mapping[str, str]) -> list[dict[str, str]]:
        headers = {"Accept": "application/dicom+json"}
        with self._request("GET", what, params=wanted, headers=headers) as answer:
            if answer.status_code == 204:
                return []
            found = orjson.loads(self._bounded(answer, MAX_JSON) or b"[]")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise Unreachable("the archive's answer is no list of DICOM JSON")
        return [dict(_texts(one)) for one in found]

    def has(self, study: str, series: str, image: str) -> bool:
        """Whether the archive has an image."""
        what = f"studies/{study}/series/{series}/instances"
        try:
            return any(one.get("SOPInstanceUID") == image
                       for one in self._page(what, {"SOPInstanceUID": image}))  # fmt: skip
        except NotWanted:
            return False

    # -- WADO ----------------------------------------------------------------------------------
    def fetch(self, study: str, series: str, image: str, max_bytes: int) -> bytes:
        """An image as the archive keeps it (PS3.18 10.4), a file of PS3.10.

        Raises:
            Unreachable: the service cannot answer, or the answer was cut short.
            NotWanted: it is larger than ``max_bytes``, or no image.
        """
        what = f"studies/{study}/series/{series}/instances/{image}"
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        with self._request("GET", what, headers={"Accept": accept}) as answer:
            kind = answer.headers.get("content-type", "")
            body = self._bounded(answer, max_bytes + (64 << 10))
        if kind.lower().startswith("multipart/related"):
            body = _only_part(body, kind)
        if body[128:132] != b"DICM":
            raise NotWanted("what the archive gives as an image is no DICOM file")
        return body

    # -- STOW ----------------------------------------------------------------------------------
    def store(self, content: bytes) -> None:
        """Store one instance (PS3.18 10.5).

        Raises:
            Unreachable: the archive cannot take it now.
            NotWanted: it will not take it.
        """
        mark = uuid.uuid4().hex
        head = f"--{mark}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={mark}',
            "Accept": "application/dicom+json",
        }
        body = head + content + f"\r\n--{mark}--\r\n".encode()
        with self._request("POST", "studies", content=body, headers=headers) as answer:
            told = self._bounded(answer, MAX_JSON)
        for reason in _failures(told):
            if reason in BUSY:
                raise Unreachable(f"the archive could not store it (reason {reason:#06x})")
            raise NotWanted(f"the archive does not store it (reason {reason:#06x})")

    def confirm(self, kind: str, image: str) -> None:
        """Nothing more to ask for: the answer to STOW is the archive's word."""

    def _bounded(self, answer: httpx.Response, limit: int) -> bytes:
        """The body, as far as it is no longer than ``limit`` and comes at a pace."""
        return bounded(answer.iter_bytes(), limit, self._patience)

    @contextmanager
    def _request(self, method: str, what: str, **rest: Any) -> Iterator[httpx.Response]:
        """A request; its answer's body is read in the block. Errors hold no URL: it has UIDs."""
        try:
            with self._http.stream(method, f"{self._url}/{what}", **rest) as answer:
                code = answer.status_code
                if code >= 500 or code in LATER or (code == 404 and method == "POST"):
                    raise Unreachable(f"the archive answers {code} to {method}")
                if code >= 300 and code != 409:
                    raise NotWanted(f"the archive answers {code} to {method}")
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL, orjson.JSONDecodeError) as error:
            raise Unreachable(f"{type(error).__name__} while asking the archive") from None


def bounded(
    pieces: Iterable[bytes],
    limit: int,
    patience: float,
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """An answer's body: no longer than ``limit``, no slower than :data:`PACE` after ``patience``.

    Args:
        pieces: of the body, as they come.
        limit: bytes.
        patience: seconds before the pace counts.
        clock: seconds; another one in tests.

    Raises:
        Unreachable: it comes too slowly to ever end.
        NotWanted: it is longer.
    """
    body, begun = bytearray(), clock()
    for piece in pieces:
        body += piece
        if len(body) > limit:
            raise NotWanted(f"the archive's answer has more than {limit} bytes")
        if clock() - begun > patience + len(body) / PACE:
            raise Unreachable(f"the archive's answer comes slower than {PACE} bytes a second")
    return bytes(body)


def _only_part(body: bytes, kind: str) -> bytes:
    """The one part of a body (RFC 2046 5.1)."""
    found = re.search(r'boundary="?([^";]+)"?', kind, re.IGNORECASE)
    mark = b"--" + found[1].strip().encode() if found else body.partition(b"\r\n")[0]
    start = body.find(mark)
    head = body.find(b"\r\n\r\n", start)
    end = body.rfind(b"\r\n" + mark)
    if start < 0 or head < 0 or end <= head:
        raise Unreachable("the archive's answer was cut short")
    return body[head + 4 : end]


def _texts(answer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keyword and value of DICOM JSON (PS3.18 F), many values joined by a backslash."""
    for tag, element in answer.items():
        values = element.get("Value") if isinstance(element, dict) else None
        if not isinstance(values, list) or not values or not TAG.fullmatch(tag):
            continue
        if not isinstance(values[0], dict):
            yield keyword_for_tag(int(tag, 16)), "\\".join(str(one) for one in values)


def _failures(told: bytes) -> list[int]:
    """Failure Reasons of the Store Instances Response (PS3.18 10.5.3), if there are any."""
    try:
        answer = orjson.loads(told or b"{}")
    except orjson.JSONDecodeError:
        return []
    if not isinstance(answer, dict) or "00081198" not in answer:
        return []
    try:
        failed = answer["00081198"].get("Value") or []
        return [int(one["00081197"]["Value"][0]) for one in failed]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise Unreachable("the archive does not say whether it has stored it") from None
