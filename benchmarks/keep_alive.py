"""Many connections that stay open: is memory flat, and is each answered?

    python benchmarks/keep_alive.py [--connections 10000] [--rounds 5] [--json]

A real ``plinth serve finance`` gets the same payment over each connection in every round; the
connections stay open in between. Told for each round: answers by status, how long it took, and the
server's memory (PSS and its private part, Linux).
"""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from head import parser_of, print_json, print_rows
from http_latency import requests_of, serving

TOGETHER = 32
"""Requests on their way at once; the connections are what is many."""
SPARE = 500
"""Descriptors of a process beside its connections."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def answered(connection: Connection, request: bytes) -> int:
    """Status of one request over an open connection; 0: it was closed."""
    reader, writer = connection
    try:
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        await asyncio.wait_for(reader.readexactly(int(fields[b"content-length"])), 60)
        return int(head.split()[1])
    except (OSError, asyncio.IncompleteReadError):
        return 0


async def measure(
    url: str, server: psutil.Process, requests: list[bytes], connections: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each round, the first of them before any connection is open."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    rows = [row(0, 0, Counter(), 0.0, server)]
    gate = asyncio.Semaphore(TOGETHER)

    async def opened() -> Connection:
        async with gate:
            return await asyncio.open_connection(host, port)

    async def one(number: int, connection: Connection) -> int:
        async with gate:
            return await answered(connection, requests[number % len(requests)])

    found = await asyncio.gather(*(opened() for _ in range(connections)))
    try:
        for turn in range(1, rounds + 1):
            begun = time.perf_counter()
            answers = await asyncio.gather(
                *(one(turn * connections + at, each) for at, each in enumerate(found))
            )
            rows.append(
                row(turn, connections, Counter(answers), time.perf_counter() - begun, server)
            )
    finally:
        for _, writer in found:
            writer.close()
    return rows


def row(
    turn: int, connections: int, answers: Counter[int], seconds: float, server: psutil.Process
) -> dict[str, Any]:
    """What a round showed."""
    memory = server.memory_full_info()
    return {
        "round": turn,
        "connections": connections,
        "answers": dict(answers),
        "seconds": round(seconds, 2),
        "pss_mb": round(memory.pss / 1e6, 1),
        "private_mb": round(memory.uss / 1e6, 1),
    }


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = parser_of(__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < given.connections + SPARE:
        raise SystemExit(
            f"this process may open {most} files: raise its limit (ulimit -Hn), or give "
            f"--connections {most - SPARE}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="plinth-keep-alive-") as folder:
        config = Path(folder) / "plinth.toml"
        config.write_text(
            f"[serve]\nmax_connections = {given.connections + SPARE}\nkeep_alive_seconds = 600\n"
        )
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with serving("finance", config) as (url, server):
            requests = requests_of(url, "finance", None)
            rows = asyncio.run(measure(url, server, requests, given.connections, given.rounds))
    if given.json:
        print_json(rows)
        return
    headings = ("round", "connections", "answers by status", "seconds", "PSS MB", "private MB")
    print_rows(headings, [list(one.values()) for one in rows])


if __name__ == "__main__":
    main()
