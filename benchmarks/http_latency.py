"""Latency of the HTTP door, and the CPU it costs.

    python -m benchmarks.http_latency --records sample_data/transactions/transactions.jsonl.gz

Starts a real server process, waits until it is ready, and sends one record a request over
keep-alive connections; each sends its next request when its last is answered. Times are the
client's: from the first byte sent to the last byte read, over loopback. CPU is the server
process's, all threads.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
from head import parser_of, print_json

TIMING = re.compile(rb"x-plinth-timing: (\{.*?\})\r\n", re.IGNORECASE)
LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)


@dataclass
class Measured:
    """What the connections saw.

    Args:
        times: milliseconds of each request.
        parts: milliseconds by part, as the server told them.
        statuses: how many answers had which status.
    """

    times: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)


class Client:
    """One keep-alive connection; as little work around the socket as Python allows."""

    def __init__(self, url: str) -> None:
        base = urlsplit(url)
        self.host = f"{base.hostname}:{base.port}"
        self._socket = socket.create_connection((base.hostname, base.port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and head of the answer to one whole request."""
        self._socket.sendall(request)
        data = self._socket.recv(65536)
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[: end + 2]
        length = LENGTH.search(head)
        rest = end + 4 + int(length[1] if length else 0) - len(data)
        while rest > 0:
            rest -= len(self._more())
        return int(head[9:12]), head

    def _more(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@contextlib.contextmanager
def serving(verticals: str, config: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of a server of one or more verticals; it drains at the end."""
    command = [sys.executable, "-m", "plinth", "serve", *verticals.split(), "--port", "0"]
    if config is not None:
        command += ["--config", str(config)]
    with started(command) as running:
        yield running


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of a server that says on stderr where it listens."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"on (http://\S+)", line):
                yield await_ready(found[1]), psutil.Process(process.pid)
                return
        raise SystemExit(f"the server did not start:\n{said}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def await_ready(url: str) -> str:
    """The URL, once the server is ready."""
    client = Client(url)
    request = f"GET /health/ready HTTP/1.1\r\nhost: {client.host}\r\n\r\n".encode()
    pause, until = threading.Event(), time.monotonic() + 60
    while client.ask(request)[0] != 200:
        if time.monotonic() > until:
            raise SystemExit(f"{url} did not get ready within 60 s")
        pause.wait(0.05)
    client.close()
    return url


def route_and_example(url: str, vertical: str) -> tuple[str, bytes]:
    """Route and example body of a record vertical, from the server's API docs."""
    with urlopen(f"{url}/openapi.json") as answer:  # noqa: S310 - our own server
        document = json.load(answer)
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if path.startswith(f"/v1/{vertical}/") and "application/json" in content:
            return path, json.dumps(content["application/json"]["example"]).encode()
    raise SystemExit(f"{vertical} takes no records on this server")


def read_records(path: Path) -> list[bytes]:
    """The lines of a file of JSON records, packed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [line for line in data.splitlines() if line.strip()]


def requests_of(url: str, vertical: str, records: Path | None) -> list[bytes]:
    """Whole requests, head and body: one for each record."""
    route, example = route_and_example(url, vertical)
    bodies = [example] if records is None else read_records(records)
    head = f"POST {route} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
    head += "content-type: application/json\r\n"
    return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def measure(url: str, requests: list[bytes], connections: int, first: int, total: int) -> Measured:
    """Send requests ``first`` to ``first + total`` over some connections; what was seen."""
    numbers, measured, lock = count(first), Measured(), threading.Lock()

    def drive() -> None:
        client, times, heads = Client(url), [], []
        while (number := next(numbers)) < first + total:
            begun = time.perf_counter()
            status, head = client.ask(requests[number % len(requests)])
            times.append((time.perf_counter() - begun) * 1e3)
            heads.append((status, head))
        client.close()
        with lock:
            measured.times += times
            for status, head in heads:
                measured.statuses[status] = measured.statuses.get(status, 0) + 1
                for name, value in json.loads(
                    found[1] if (found := TIMING.search(head)) else "{}"
                ).items():
                    measured.parts.setdefault(name, []).append(value)

    threads = [threading.Thread(target=drive) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return measured


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure once; the result as JSON-ready data."""
    with serving(given.vertical, given.config) as (url, server):
        requests = requests_of(url, given.vertical, given.records)
        measure(url, requests, given.connections, 0, given.warm_up)
        cpu, begun = sum(server.cpu_times()[:2]), time.perf_counter()
        seen = measure(url, requests, given.connections, given.warm_up, given.requests)
        seconds = time.perf_counter() - begun
        cpu = sum(server.cpu_times()[:2]) - cpu
    times = sorted(seen.times)
    at = {f"p{share:g}_ms": times[int(len(times) * share / 100)] for share in (50, 95, 99, 99.9)}
    return {
        "vertical": given.vertical,
        "connections": given.connections,
        "requests": len(times),
        "statuses": seen.statuses,
        **{name: round(value, 3) for name, value in at.items()},
        "max_ms": round(times[-1], 3),
        "requests_per_second": round(len(times) / seconds, 1),
        "server_cpu_us_per_request": round(cpu / len(times) * 1e6, 1),
        "server_median": {name: round(median(values), 3) for name, values in seen.parts.items()},
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--vertical", default="finance")
    parser.add_argument("--config", type=Path, help="config file of the server")
    parser.add_argument("--records", type=Path, help="JSON lines; default: the vertical's example")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--warm-up", type=int, default=500)
    given = parser.parse_args()
    result = run(given)
    if given.json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name:28}{value}")


if __name__ == "__main__":
    main()
