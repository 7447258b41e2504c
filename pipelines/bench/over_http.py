"""``plinth benchmark URL``: what is sent, and the trials of the search."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from plinth.engine.errors import ConfigError, PlinthError
from plinth.pipelines.bench.load import Load
from plinth.pipelines.bench.search import Goal, Trial

MOST_CONNECTIONS = 768  # within the usual limit of 1024 open files
LEAST_CONNECTIONS = 16
EXCERPT = 300  # bytes of an error that are shown
LINES = (".jsonl", ".ndjson")
ALONE_SECONDS = 30.0  # a lone request may take so long
_HINT = "is the server up? say what to send with --body FILE"


@dataclass(frozen=True)
class HttpSut:
    """A server as the system under test.

    Args:
        url: of the endpoint.
        bodies: sent in turn.
        headers: of each request.
        method: of each request.
        timeout: seconds after which a request is given up.
        warm_up: seconds of load before each trial that do not count.
        connections: how many are kept open; ``None``: enough for the rate and the SLA.
        processes: client processes.
    """

    url: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    timeout: float = 10.0
    warm_up: float = 1.0
    connections: int | None = None
    processes: int = 1

    def try_once(self) -> None:
        """Send one request before many.

        Raises:
            ConfigError: there is no server.
            PlinthError: it does not answer with a status of 2xx.
        """
        place = urlsplit(self.url)
        path = (place.path or "/") + (f"?{place.query}" if place.query else "")
        try:
            status, said = _ask(place, self.method, path, self.bodies[0], self.headers)
        except OSError as error:
            raise ConfigError(f"cannot reach {self.url}: {error}", hint="is it up?") from None
        except http.client.HTTPException as error:
            raise PlinthError(f"{self.url} does not speak HTTP/1.1: {error!r}") from None
        if not 200 <= status < 300:
            excerpt = said[:EXCERPT].decode("utf-8", "replace")
            raise PlinthError(
                f"{self.url} answers HTTP {status} to a lone request: {excerpt}",
                hint="check the path, --body, --method and --header",
            )

    def trial(self, goal: Goal, rate: float, seconds: float, seed: int) -> Trial:
        """One run; ``detail`` is what ``LoadResult.as_dict`` tells of it."""
        result = Load(
            self.url,
            self.bodies,
            self.headers,
            rate=rate,
            seconds=seconds,
            seed=seed,
            connections=self.connections or connections_for(rate, goal.sla),
            timeout=max(self.timeout, 2 * goal.sla),
            method=self.method,
            warm_up=self.warm_up,
            processes=self.processes,
        ).run()
        problems = tuple(result.problems(goal.sla))
        in_time = result.in_time(goal.sla)
        return Trial(result.offered, in_time, problems, result.as_dict(goal.sla))


def connections_for(rate: float, sla: float) -> int:
    """Twice what a server that answers just in time has in work (Little's law), within bounds."""
    return min(MOST_CONNECTIONS, max(LEAST_CONNECTIONS, math.ceil(2 * rate * sla)))


def read_bodies(files: Sequence[Path]) -> list[bytes]:
    """Request bodies: every line of a .jsonl or .ndjson file, every other file as a whole.

    Raises:
        ConfigError: a file cannot be read, or there is nothing in it.
    """
    bodies: list[bytes] = []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read {file}: {error.strerror}", hint="check --body"
            ) from None
        lines = [line for line in data.splitlines() if line.strip()]
        found = lines if file.suffix in LINES else [data] * bool(data)
        if not found:
            raise ConfigError(f"{file} is empty", hint="give a file with a request in it")
        bodies += found
    return bodies


def documented_body(url: str, headers: Mapping[str, str]) -> bytes:
    """The example that the server's own API docs (``/openapi.json``) give for a POST to the URL.

    Raises:
        ConfigError: the server has no such docs, or no example of this endpoint.
    """
    place = urlsplit(url)
    try:
        document = _openapi(place, headers)
        operation = document["paths"][place.path]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConfigError(f"there is no /openapi.json at {url}: {error}", hint=_HINT) from None
    except (KeyError, TypeError):
        raise ConfigError(
            f"the server's API docs have no example of a request to {place.path or '/'}", hint=_HINT
        ) from None
    return json.dumps(example).encode()


def _openapi(place: SplitResult, headers: Mapping[str, str]) -> Any:
    return json.loads(_ask(place, "GET", "/openapi.json", b"", headers)[1])


def _ask(
    place: SplitResult, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    """Status and body of one answer; OSError without one."""
    if place.hostname is None:
        raise ConfigError(f"{place.geturl()!r} is no URL of a server", hint="http://host:port/path")
    secure = place.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(place.hostname, place.port, timeout=ALONE_SECONDS)
    try:
        connection.request(method, path, body or None, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def read_headers(lines: Sequence[str]) -> dict[str, str]:
    """Headers from ``Name: value`` lines.

    Raises:
        ConfigError: a line has no colon.
    """
    found = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            # The line is not repeated: it may be a key.
            raise ConfigError("a header is not of the form 'Name: value'", hint="check --header")
        found[name.strip().lower()] = value.strip()
    return found
