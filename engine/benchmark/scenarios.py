"""MLPerf's scenarios SingleStream, Offline and Server, driven by its LoadGen."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plinth.engine.benchmark import loadgen
from plinth.engine.benchmark.callers import Callers, LoneCaller, Sut, Tally
from plinth.engine.errors import ConfigError
from plinth.engine.flow import Sla
from plinth.engine.runtime.engine import Engine

MARGIN = 1.3  # how much more work than measured LoadGen is told to prepare
_PROBE = 0.3  # seconds of trying out before a test
_TRIES = 3  # Offline: guesses of the throughput

_RATES = {
    "SingleStream": "result_qps_with_loadgen_overhead",
    "Offline": "result_samples_per_second",
    "Server": "result_completed_samples_per_sec",
}


@dataclass(frozen=True)
class Outcome:
    """What LoadGen found; times in milliseconds, rates per second.

    Args:
        scenario: ``SingleStream``, ``Offline`` or ``Server``.
        valid: LoadGen says so, and no sample failed. Refused ones are late in Server, failed
            elsewhere.
        reasons: why it is not valid.
        samples: issued by LoadGen.
        answered: of these, by the engine.
        late: Server: queries over the allowed latency, refused ones included.
        refused: by the engine, by reason.
        failed: all others without an answer, by reason.
        rate: SingleStream: answers; Offline: throughput; Server: completed queries.
        latency_ms: by ``p50`` ... ``p99.9``, ``mean``, ``max``; Offline: of the one big query.
        loadgen: version of LoadGen.
        facts: its other results as it names them.
    """

    scenario: str
    valid: bool
    reasons: tuple[str, ...]
    samples: int
    answered: int
    late: int
    refused: dict[str, int]
    failed: dict[str, int]
    rate: float
    latency_ms: dict[str, float]
    loadgen: str
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def single_stream(
    engine: Engine,
    sut: Sut,
    *,
    sla: Sla | None = None,
    seconds: float = 10.0,
    queries: int = 100,
    seed: int = 0,
    folder: Path | None = None,
) -> Outcome:
    """One query at a time, the next one when the last is answered: the latency of lone requests.

    Args:
        engine: started.
        sut: what to ask.
        sla: the promise asked for; nothing is refused in this scenario.
        seconds: at least so long.
        queries: at least so many.
        seed: of LoadGen's choice of samples.
        folder: where LoadGen's logs are kept; ``None`` keeps none.
    """
    patient = dataclasses.replace(sla or Sla(), on_overload="late")
    settings = loadgen.settings("SingleStream", seconds, queries, seed)
    settings.single_stream_expected_latency_ns = int(1e9 * _fastest(engine, sut) / MARGIN)
    tally = Tally()
    caller = LoneCaller(engine, sut, patient, tally)
    facts = loadgen.start(settings, caller.issue, sut.samples, folder)
    return _outcome("SingleStream", facts, tally)


def offline(
    engine: Engine,
    sut: Sut,
    *,
    seconds: float = 10.0,
    seed: int = 0,
    folder: Path | None = None,
) -> Outcome:
    """All samples at once, without a deadline: the throughput.

    Args:
        engine: started.
        sut: what to ask.
        seconds: at least so long; LoadGen is told a size, so a test that ends too soon, because
            the guess before it was too low, is made again.
        seed: of LoadGen's choice of samples.
        folder: where LoadGen's logs are kept; ``None`` keeps none.
    """
    expected = _throughput(engine, sut)
    for left in reversed(range(_TRIES)):
        settings = loadgen.settings("Offline", seconds, 1, seed)
        settings.offline_expected_qps = MARGIN * expected
        tally = Tally()
        with Callers(engine, sut, Sla(), tally) as callers:
            facts = loadgen.start(settings, callers.issue_chunks, sut.samples, folder)
        outcome = _outcome("Offline", facts, tally)
        if facts["result_min_duration_met"] or not left:
            break
        expected = outcome.rate
    return outcome


def server(
    engine: Engine,
    sut: Sut,
    *,
    rate: float,
    sla: Sla,
    seconds: float = 10.0,
    queries: int = 100,
    seed: int = 0,
    folder: Path | None = None,
) -> Outcome:
    """Poisson arrivals at a rate; valid if the promised share is answered in time.

    LoadGen knows no refusals. A refused query is reported to it once its time is up, so that it
    counts as late.

    Args:
        engine: started.
        sut: what to ask.
        rate: queries per second.
        sla: the promise: LoadGen's target latency and percentile, and the engine's deadline.
        seconds: at least so long.
        queries: at least so many.
        seed: of LoadGen's arrivals and choice of samples.
        folder: where LoadGen's logs are kept; ``None`` keeps none.

    Raises:
        ConfigError: the SLA has no deadline, or the rate is not above 0.
    """
    if sla.deadline_ms is None or not rate > 0:
        raise ConfigError(
            f"the Server scenario takes a deadline and a rate above 0, got {sla.deadline_ms} ms "
            f"and {rate}/s",
            hint="give an Sla with deadline_ms",
        )
    _fastest(engine, sut)
    settings = loadgen.settings("Server", seconds, queries, seed)
    settings.server_target_qps = rate
    settings.server_target_latency_ns = int(1e6 * sla.deadline_ms)
    settings.server_target_latency_percentile = sla.quantile
    tally = Tally()
    with Callers(engine, sut, sla, tally) as callers:
        facts = loadgen.start(settings, callers.issue_each, sut.samples, folder)
    return _outcome("Server", facts, tally)


def _fastest(engine: Engine, sut: Sut) -> float:
    """Seconds of the fastest of some lone requests; also warms up."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < _PROBE:
        begun = time.perf_counter()
        engine.run(sut.flow([0]), Sla())
        times.append(time.perf_counter() - begun)
    return min(times)


def _throughput(engine: Engine, sut: Sut) -> float:
    """Samples per second in flows of one chunk, one after the other; also warms up."""
    numbers = [number % sut.samples for number in range(sut.chunk)]
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < _PROBE:
        engine.run(sut.flow(numbers), Sla())
        done += len(numbers)
    return done / (time.perf_counter() - began)


def _outcome(scenario: str, facts: dict[str, Any], tally: Tally) -> Outcome:
    if tally.bug is not None:
        raise tally.bug
    told = [key for key in facts if key.startswith(("error_", "result_invalid_reason"))]
    reasons = [str(facts[key]).strip() for key in told]
    lost = dict(tally.failed if scenario == "Server" else tally.failed + tally.refused)
    if lost:
        reasons.append(f"samples without an answer: {lost}")
    latency = {
        f"p{float(key.split('_')[1]):g}": value / 1e6
        for key, value in facts.items()
        if key.endswith("_percentile_latency_ns")
    }
    latency |= {name: facts[f"result_{name}_latency_ns"] / 1e6 for name in ("mean", "max")}
    return Outcome(
        scenario=scenario,
        valid=facts["result_validity"] == "VALID" and not lost,
        reasons=tuple(reasons),
        samples=tally.issued,
        answered=tally.answered,
        late=int(facts.get("result_overlatency_query_count", 0)),
        refused=dict(tally.refused),
        failed=dict(tally.failed),
        rate=float(facts[_RATES[scenario]]),
        latency_ms=latency,
        loadgen=str(facts["loadgen_version"]),
        facts={key: value for key, value in facts.items() if not key.endswith("latency_ns")},
    )
