"""An open-loop HTTP load generator: requests come when they are due, not when the server is ready.

    load = Load("http://127.0.0.1:8000/v1/finance/score", [body], rate=500, seconds=10)
    result = load.run()
    print(result.percentile(0.99), result.share_in_time(0.050), result.problems(0.050))

Arrivals are a seeded Poisson process. Every latency runs from the moment a request was *due*, so
a stall of the server is seen by each request that fell into it and not only by those that a
waiting client still managed to send (Gil Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
from numpy.typing import NDArray

from plinth.pipelines.bench.load_client import (
    ERROR,
    OK,
    REFUSED,
    TIMEOUT,
    UNSENT,
    Client,
    Record,
    Target,
)

Floats = NDArray[np.float64]

PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
OUTSIDE = 1000
"""Requests of which the time outside of the engine is kept."""
MAX_LAG = 0.002  # seconds a client may look late at its schedule (p99), or a tenth of the SLA
START_SECONDS = 60  # for the processes to start and connect


def poisson(rate: float, seconds: float, seed: int) -> Floats:
    """Arrival times of a Poisson process.

    Args:
        rate: arrivals per second.
        seconds: length.
        seed: of the random generator; the same seed gives the same times.

    Returns:
        Seconds from the start, ascending.
    """
    random = np.random.default_rng(seed)
    return np.sort(random.uniform(0.0, seconds, random.poisson(rate * seconds)))


@dataclass(frozen=True)
class Load:
    """One run at one rate.

    Args:
        url: ``http://`` or ``https://``, with path and query.
        bodies: sent in turn, at least one.
        headers: added to each request; ``Host`` and ``Content-Length`` are set here.
        rate: requests per second on average.
        seconds: how long requests become due.
        seed: of the arrival times.
        connections: how many are kept open; one request at a time on each. With fewer than
            ``rate`` times the SLA the client, not the server, may set the limit.
        timeout: seconds from when a request was due until it is given up.
        method: any but HEAD.
        warm_up: seconds of the same load before, which do not count.
        processes: client processes that share requests and connections. More than one needs
            the usual ``if __name__ == "__main__"`` in the calling script.
        id_field: name of a header whose value differs in each request, as trace ids do.
        pool_seconds: longest wait for a free connection, after which a request is given up
            unsent (httpx calls it the pool timeout); ``None``: as long as ``timeout``.
        tail: rate and seconds of requests that follow the others at once, to see a server recover.
    """

    url: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    rate: float = 100.0
    seconds: float = 10.0
    seed: int = 0
    connections: int = 64
    timeout: float = 10.0
    method: str = "POST"
    warm_up: float = 0.0
    processes: int = 1
    id_field: str | None = None
    pool_seconds: float | None = None
    tail: tuple[float, float] | None = None

    def run(self) -> LoadResult:
        """Send the load; returns when each request is answered or given up.

        Raises:
            ConfigError: a setting is wrong, or the server takes no connection.
        """
        target = self._target()
        times = poisson(self.rate, self.warm_up + self.seconds, self.seed)
        if self.tail is not None:
            later = poisson(*self.tail, self.seed + 1) + self.warm_up + self.seconds
            times = np.concatenate((times, later))
        share = max(1, min(self.processes, len(times)))
        try:
            if share == 1:
                records = [_drive(target, times.tolist(), 0, 1, None)]
            else:
                records = _spread(target, times, share)
        except OSError as error:
            place = f"{target.host}:{target.port}"
            raise _wrong(f"cannot connect to {place}: {error}", "is the server up?") from None
        return _result(self, times, records)

    def _target(self) -> Target:
        url = urlsplit(self.url)
        host = url.hostname
        if url.scheme not in ("http", "https") or host is None:
            raise _wrong(f"{self.url!r} is no URL of a server", "write http://host:port/path")
        positive = {"rate": self.rate, "seconds": self.seconds, "timeout": self.timeout}
        positive |= {"connections": self.connections, "processes": self.processes}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise _wrong(f"{name} is {value}, expected a number above 0", None)
        if not self.bodies or self.method.upper() == "HEAD":
            what = "HEAD is not supported" if self.bodies else "there is no body to send"
            raise _wrong(what, "give at least one body (b'' for GET) and another method")
        return Target(
            host=host,
            port=url.port or (443 if url.scheme == "https" else 80),
            tls=url.scheme == "https",
            requests=tuple(self._request(url, body) for body in self.bodies),
            connections=math.ceil(self.connections / self.processes),
            timeout=self.timeout,
            id_at=self._id_at(url),
            pool_seconds=self.timeout if self.pool_seconds is None else self.pool_seconds,
        )

    def _id_at(self, url: SplitResult) -> int | None:
        """Where the value of ``id_field`` begins in each request."""
        if self.id_field is None:
            return None
        return len(self._request(url, b"").partition(b"\r\n")[0]) + 2 + len(self.id_field) + 2

    def _request(self, url: SplitResult, body: bytes) -> bytes:
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        own = {"host": url.netloc.rpartition("@")[2], "content-length": str(len(body))}
        given = {name.lower(): value for name, value in self.headers.items()} | own
        lines = [f"{self.method.upper()} {path} HTTP/1.1"]
        if self.id_field is not None:
            lines.append(f"{self.id_field}: {0:016x}")
        lines += [f"{name}: {value}" for name, value in given.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise _wrong("a header, the path or the method contains a line break", None)
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True)
class LoadResult:
    """What came of one run. Arrays have one entry per request that counted, in order of ``due``.

    Args:
        load: what was asked for.
        due: seconds from the start of counting.
        latencies: seconds from due to whole answer, of any status; nan without an answer.
        lags: seconds by which the client itself looked late at its schedule.
        waits: seconds for a free connection, inside the latency; nan if never sent.
        outsides: seconds of the latency that were not spent in an engine of Plinth; nan if unknown.
        outcomes: ``OK``, ``REFUSED`` ... of :mod:`plinth.pipelines.bench.load_client`.
        statuses: HTTP status of each answer, 0 without one.
        failures: what went wrong and how often, warm-up included.
        refused_blind: refusals without Retry-After, warm-up included.
        client_us: CPU microseconds the client spent per request.
        connects: connections that had to be opened again.
    """

    load: Load
    due: Floats
    latencies: Floats
    lags: Floats
    waits: Floats
    outsides: Floats
    outcomes: NDArray[np.uint8]
    statuses: NDArray[np.uint16]
    failures: Mapping[str, int]
    refused_blind: int
    client_us: float
    connects: int

    @property
    def offered(self) -> int:
        """Requests that were due."""
        return len(self.due)

    @property
    def ok(self) -> int:
        """Answers with a status of 2xx, whenever they came."""
        return self._count(OK)

    @property
    def refused(self) -> int:
        """Answers 429 and 503."""
        return self._count(REFUSED)

    @property
    def errors(self) -> int:
        """Other answers, broken connections, and what is not HTTP."""
        return self._count(ERROR)

    @property
    def timeouts(self) -> int:
        """Requests that were sent and not answered within the timeout."""
        return self._count(TIMEOUT)

    @property
    def unsent(self) -> int:
        """Requests that found no free connection within the timeout."""
        return self._count(UNSENT)

    def _count(self, outcome: int) -> int:
        return int(np.count_nonzero(self.outcomes == outcome))

    @property
    def throughput(self) -> float:
        """Answers with a status of 2xx per second."""
        return self.ok / self.load.seconds

    def in_time(self, sla: float) -> int:
        """Answers with a status of 2xx within ``sla`` seconds of when they were due."""
        return int(np.count_nonzero((self.outcomes == OK) & (self.latencies <= sla)))

    def share_in_time(self, sla: float) -> float:
        """:meth:`in_time` over all that was offered; refused or lost requests are not in time."""
        return self.in_time(sla) / max(self.offered, 1)

    def percentile(self, quantile: float, *, answered: bool = False) -> float:
        """Latency that this share of the requests did not exceed, seconds.

        Args:
            quantile: 0 to 1.
            answered: of the 2xx answers alone; otherwise of all requests, where a request
                without such an answer took for ever (``inf``).
        """
        good = np.where(self.outcomes == OK, self.latencies, np.inf)
        chosen = good[np.isfinite(good)] if answered else good
        if not len(chosen):
            return math.inf
        return float(np.quantile(chosen, quantile, method="higher"))

    def problems(self, sla: float | None = None) -> list[str]:
        """Why this run says little about the server: the client was the limit. Empty if it does.

        The client's lag is inside the latencies, so a run that met its SLA met it all the same.

        Args:
            sla: seconds; judges whether lag and connections sufficed for it.
        """
        found = []
        lag = float(np.quantile(self.lags, 0.99)) if len(self.lags) else 0.0
        allowed = MAX_LAG if sla is None else max(MAX_LAG, sla / 10)
        if lag > allowed:
            found.append(
                f"the client was {lag * 1e3:.1f} ms behind its schedule (p99; {allowed * 1e3:.1f} "
                f"ms allowed, {self.client_us:.0f} µs of CPU a request): use more processes, "
                "or another machine for the client"
            )
        if self.unsent and self.load.pool_seconds is None:
            found.append(
                f"{self.unsent} requests were never sent: all {self.load.connections} connections "
                f"were busy for {self.load.timeout:g} s"
            )
        waited = int(np.count_nonzero(self.waits > allowed))
        needed = math.ceil(self.load.rate * (sla or 0.0))
        if waited and self.load.connections < needed:
            found.append(
                f"{waited} requests waited for a connection, and {self.load.connections} are "
                f"too few to hold {self.load.rate:g}/s for {sla:g} s each: use {2 * needed}"
            )
        return found

    def as_dict(self, sla: float | None = None) -> dict[str, Any]:
        """Counts, and latencies in milliseconds, ready for JSON (``None`` stands for never)."""
        timed: dict[str, Any] = {}
        if sla is not None:
            timed = {
                "in_time": self.in_time(sla),
                "late": self.ok - self.in_time(sla),
                "share_in_time": self.share_in_time(sla),
            }
        return {
            "rate": self.load.rate,
            "seconds": self.load.seconds,
            "offered": self.offered,
            "ok": self.ok,
            **timed,
            "refused": self.refused,
            "refused_without_retry_after": self.refused_blind,
            "errors": self.errors,
            "timeouts": self.timeouts,
            "unsent": self.unsent,
            "throughput": self.throughput,
            "latency_ms": self._spread(answered=False),
            "latency_of_ok_ms": self._spread(answered=True),
            "outside_by_engine_ms": self._outside(),
            "statuses": self._statuses(),
            "failures": dict(self.failures),
            "client": {
                "cpu_us_per_request": round(self.client_us, 2),
                "lag_p99_ms": _ms(float(np.quantile(self.lags, 0.99)) if self.offered else 0.0),
                "waited_for_connection": int(np.count_nonzero(self.waits > 1e-3)),
                "connections": self.load.connections,
                "reconnects": self.connects,
                "processes": self.load.processes,
            },
            "problems": self.problems(sla),
        }

    def _statuses(self) -> dict[str, int]:
        found, counts = np.unique(self.statuses[self.statuses > 0], return_counts=True)
        return {str(status): int(count) for status, count in zip(found, counts, strict=True)}

    def _outside(self) -> list[float]:
        """Time outside of the engine, milliseconds, in the order of the time in the engine.

        Of evenly chosen requests. What waits in the engine waits longer in the door too, where both
        have the same cores: the two do not add up as if they were independent.
        """
        known = np.isfinite(self.outsides)
        outside = self.outsides[known]
        order = np.argsort(self.latencies[known] - outside, kind="stable")
        count = min(OUTSIDE, len(order))
        places = ((np.arange(count) + 0.5) / max(count, 1) * len(order)).astype(int)
        return [round(float(each) * 1e3, 4) for each in outside[order[places]]]

    def _spread(self, *, answered: bool) -> dict[str, float | None]:
        named = {f"p{q * 100:g}": self.percentile(q, answered=answered) for q in PERCENTILES}
        named["max"] = self.percentile(1.0, answered=answered)
        return {name: _ms(seconds) for name, seconds in named.items()}


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 4) if math.isfinite(seconds) else None


def _wrong(message: str, hint: str | None) -> Exception:
    # The engine takes seconds to import, and client processes do without it.
    from plinth.engine.errors import ConfigError

    return ConfigError(message, hint=hint)


def _drive(
    target: Target, due: Sequence[float], first: int, stride: int, barrier: Barrier | None
) -> Record:
    """Be one client: connect, wait for the others, run. Raises OSError: no connection."""

    async def drive() -> Record:
        client = Client(target, due, first, stride)
        await client.connect()
        if barrier is not None:
            barrier.wait(START_SECONDS)
        return await client.run()

    try:
        import uvloop
    except ModuleNotFoundError:  # not for every platform; asyncio's own loop costs more CPU
        return asyncio.run(drive())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(drive())


def _child(
    pipe: Connection, barrier: Barrier, target: Target, due: Floats, n: int, of: int
) -> None:
    try:
        pipe.send(_drive(target, due.tolist(), n, of, barrier))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        barrier.abort()
        pipe.send(error)


def _spread(target: Target, times: Floats, processes: int) -> list[Record]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    pipes, children = [], []
    for n in range(processes):
        here, there = context.Pipe(duplex=False)
        arguments = (there, barrier, target, times[n::processes], n, processes)
        child = context.Process(target=_child, args=arguments, daemon=True)
        child.start()
        there.close()
        pipes.append(here)
        children.append(child)
    answers = [_receive(pipe) for pipe in pipes]
    for child in children:
        child.join()
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    if failed:  # whoever only waited at the barrier for the one that failed knows no reason
        raise next((f for f in failed if not isinstance(f, BrokenBarrierError)), failed[0])
    return answers


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("a client process died; was it killed for lack of memory?")


def _result(load: Load, times: Floats, records: list[Record]) -> LoadResult:
    def woven(name: str, kind: Any) -> NDArray[Any]:
        joined = np.empty(len(times), dtype=kind)
        for n, record in enumerate(records):
            joined[n :: len(records)] = np.frombuffer(getattr(record, name), dtype=kind)
        return joined[counted]

    counted = times >= load.warm_up
    return LoadResult(
        load=load,
        due=times[counted] - load.warm_up,
        latencies=woven("latency", np.float64),
        lags=woven("lag", np.float64),
        waits=woven("waited", np.float64),
        outsides=woven("outside", np.float64),
        outcomes=woven("outcome", np.uint8),
        statuses=woven("status", np.uint16),
        failures=sum((record.failures for record in records), Counter()),
        refused_blind=sum(record.refused_blind for record in records),
        client_us=1e6 * sum(record.cpu for record in records) / max(len(times), 1),
        connects=sum(record.connects for record in records),
    )
