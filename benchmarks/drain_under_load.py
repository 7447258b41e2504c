"""SIGTERM in the middle of a load: is everything that was accepted answered?

    python benchmarks/drain_under_load.py [--runs 5] [--rate 400] [--json]

A real ``plinth serve finance`` gets payments when they are due (Poisson, open loop) over keep-alive
connections, and SIGTERM somewhere in the middle. The client goes on sending for as long as a
connection is open. A request is *answered* by 200, or by 429 or 503 with an error as JSON; it is
*lost* when its connection ended, or was reset, without a whole answer. Connections that the server
closes are not opened again; what was due after the last one had gone was never sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
from head import parser_of, print_json
from http_latency import requests_of, serving
from mixed_device import ROOT
from rich.console import Console
from rich.table import Table

from plinth.pipelines.bench.load import poisson

RECORDS = ROOT / "sample_data" / "transactions" / "transactions.jsonl.gz"
PATIENCE = 60.0  # seconds after which a connection that says nothing counts as hung


@dataclass
class Witness:
    """What became of every request.

    Args:
        sent: requests whose bytes were handed to a connection.
        answers: whole answers by status.
        wrong: answers that are no score and no proper refusal.
        lost: why a connection ended with a request unanswered, and how often.
        unsent: requests that found no open connection.
        times: when the answers came (``perf_counter``).
    """

    sent: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    unsent: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Requests that were sent and got no whole answer."""
        return sum(self.lost.values())

    def after(self, moment: float) -> int:
        """Answers that came after a moment (``perf_counter``)."""
        return sum(at > moment for at in self.times)


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time; free ones stand in ``idle``."""

    def __init__(self, witness: Witness, idle: deque[Connection]) -> None:
        self._witness = witness
        self._idle = idle
        self.busy = False
        self.gone = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can carry a request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._idle.append(self)

    def send(self, request: bytes) -> None:
        """Send one whole request."""
        self.busy, self._body = True, b""
        self._witness.sent += 1
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take in a part of an answer."""
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """Take in a part of an answer's body."""
        self._body += data

    def on_message_complete(self) -> None:
        """Judge the answer; the connection is free again, or at its end."""
        status, self.busy = self._parser.get_status_code(), False
        self._witness.answers[status] += 1
        self._witness.times.append(time.perf_counter())
        if not _is_proper(status, self._body):
            self._witness.wrong.append(f"{status} {self._body[:200]!r}")
        if self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note what it leaves unanswered."""
        if self.busy:
            self._witness.lost[type(exc).__name__ if exc else "closed"] += 1
            self.busy = False
        if self in self._idle:
            self._idle.remove(self)
        if not self.gone.done():
            self.gone.set_result(None)


def _is_proper(status: int, body: bytes) -> bool:
    try:
        document = json.loads(body)
    except ValueError:
        return False
    return status == 200 or (status in (429, 503) and bool(document["error"]["reason"]))


async def send(
    url: str, requests: Sequence[bytes], rate: float, seconds: float, connections: int, seed: int
) -> Witness:
    """Send requests when they are due, until the server has closed every connection."""
    base, loop = urlsplit(url), asyncio.get_running_loop()
    host, port = base.hostname or "", base.port or 80
    witness, idle = Witness(), deque[Connection]()
    opened = [
        await loop.create_connection(lambda: Connection(witness, idle), host, port)
        for _ in range(connections)
    ]
    ends = [connection.gone for _, connection in opened]
    waiting: deque[bytes] = deque()
    begun = loop.time()
    for number, due in enumerate(poisson(rate, seconds, seed).tolist()):
        await asyncio.sleep(max(0.0, begun + due - loop.time()))
        waiting.append(requests[number % len(requests)])
        while waiting and idle:
            idle.popleft().send(waiting.popleft())
        if all(end.done() for end in ends):
            witness.unsent += len(waiting)
            waiting.clear()
    _, hung = await asyncio.wait(ends, timeout=PATIENCE)
    witness.unsent += len(waiting)
    witness.lost["hung"] += len(hung)
    witness.lost += Counter()  # without zeros
    return witness


def drain(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run: load, SIGTERM somewhere in its middle, wait for the end."""
    after = given.seconds * random.Random(seed).uniform(0.4, 0.6)
    told = 0.0
    with serving("finance", None) as (url, server):
        requests = requests_of(url, "finance", RECORDS)

        def tell() -> None:
            nonlocal told
            told = time.perf_counter()
            server.send_signal(signal.SIGTERM)

        async def run() -> Witness:
            asyncio.get_running_loop().call_later(after, tell)
            return await send(url, requests, given.rate, given.seconds, given.connections, seed)

        witness = asyncio.run(run())
        code = server.wait(timeout=PATIENCE)
        ended = time.perf_counter()
    return {
        "sigterm_after_seconds": round(after, 3),
        "sent": witness.sent,
        "answers": {str(status): count for status, count in sorted(witness.answers.items())},
        "wrong": witness.wrong,
        "unanswered": witness.unanswered,
        "lost": dict(witness.lost),
        "unsent": witness.unsent,
        "answered_after_sigterm": witness.after(told),
        "end_seconds": round(ended - told, 3),
        "exit_code": code,
    }


def show(runs: list[dict[str, Any]], rate: float) -> None:
    """Print a line for each run."""
    table = Table(
        *("run", "sent", "answered 200", "refused", "improper", "unanswered"),
        *("answered after SIGTERM", "SIGTERM to end, s", "exit code"),
        title=f"SIGTERM amid {rate:g} payments/s",
    )
    for number, run in enumerate(runs, 1):
        refused = sum(count for status, count in run["answers"].items() if status != "200")
        table.add_row(
            *(f"{number}", f"{run['sent']:,}", f"{run['answers'].get('200', 0):,}", f"{refused:,}"),
            *(f"{len(run['wrong'])}", f"{run['unanswered']}"),
            *(f"{run['answered_after_sigterm']}", f"{run['end_seconds']:.2f}"),
            f"{run['exit_code']}",
        )
    ends = [run["end_seconds"] for run in runs]
    table.caption = (
        f"unanswered in all: {sum(run['unanswered'] for run in runs)}; to the end: median "
        f"{statistics.median(ends):.2f} s ({min(ends):.2f} to {max(ends):.2f})"
    )
    Console(width=120).print(table)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=400.0, help="payments per second")
    parser.add_argument("--seconds", type=float, default=4.0, help="that payments become due for")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    runs = [drain(given, given.seed + number) for number in range(given.runs)]
    if given.json:
        print_json({"rate": given.rate, "runs": runs})
        return
    show(runs, given.rate)


if __name__ == "__main__":
    main()
