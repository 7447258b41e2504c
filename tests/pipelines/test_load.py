"""The load generator against a real server: what it sends, when, and what it counts."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from moody_server import STALL_SECONDS, running
from scipy import stats

from plinth.engine import ConfigError, Timing
from plinth.pipelines.bench.load import Load, LoadResult, poisson
from plinth.pipelines.bench.load_client import ENGINE
from plinth.pipelines.http.record_routes import timing_json

clock = pytest.mark.clock  # the others hold beside whatever else runs
PARALLEL = 2
ONE_STALL = [b""] * 100 + [b"stall"] + [b""] * 900


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with running() as url:
        yield url


def load(url: str, **settings: Any) -> LoadResult:
    defaults: dict[str, Any] = {"rate": 200.0, "seconds": 0.3, "connections": 8, "timeout": 5.0}
    return Load(url, settings.pop("bodies", [b""]), **{**defaults, **settings}).run()


def test_arrivals_are_poisson_and_seeded() -> None:
    for seed in range(5):
        times = poisson(200.0, 20.0, seed)
        gaps = stats.kstest(np.diff(times), stats.expon(scale=1 / 200).cdf)
        assert gaps.pvalue > 0.01
        assert len(times) == pytest.approx(4000, abs=5 * 4000**0.5)
    assert np.array_equal(poisson(50.0, 2.0, 3), poisson(50.0, 2.0, 3))
    assert not np.array_equal(poisson(50.0, 2.0, 3)[:9], poisson(50.0, 2.0, 4)[:9])
    even = stats.kstest(np.full(4000, 1 / 200), stats.expon(scale=1 / 200).cdf)
    assert even.pvalue < 1e-6, "the test would notice a metronome"


@clock
def test_requests_leave_when_they_are_due(base: str) -> None:
    result = load(f"{base}/plain", rate=200.0, seconds=1.0)
    assert np.array_equal(result.due, poisson(200.0, 1.0, 0))
    assert result.ok == result.offered == len(result.due)
    left = result.due + result.lags + result.waits
    assert (left >= result.due).all()
    assert np.median(left - result.due) < 0.005, "as Poisson as the schedule, but for the noise"


@clock
@pytest.mark.parametrize("connections", [1, 64])
def test_a_stall_is_seen_by_every_request_that_fell_into_it(base: str, connections: int) -> None:
    """A client that waited for the stalled answer would have seen it once, and told of one."""
    settings: Any = {"bodies": ONE_STALL, "connections": connections}
    result = load(f"{base}/stall", rate=500.0, seconds=1.0, **settings)
    assert result.ok == result.offered
    due_in_its_first_half = 500 * STALL_SECONDS / 2
    hit = np.count_nonzero(result.latencies > STALL_SECONDS / 2)
    assert hit > due_in_its_first_half / 2
    assert result.percentile(0.99) > 0.8 * STALL_SECONDS
    if connections == 1:
        on_the_wire = result.latencies - result.lags - result.waits
        assert np.count_nonzero(on_the_wire > STALL_SECONDS / 2) < hit / 5


def test_processes_share_one_schedule_and_send_bodies_in_turn(base: str) -> None:
    bodies = [b"a", b"bb", b"ccc"]
    for processes in (1, PARALLEL):
        url = f"{base}/note?by={processes}"
        headers = {"Content-Type": "text/plain", "X-Key": "k"}
        result = load(url, bodies=bodies, headers=headers, method="put", processes=processes)
        assert np.array_equal(result.due, poisson(200.0, 0.3, 0))
        assert result.ok == result.offered
        assert not np.isnan(result.latencies).any()
        with urllib.request.urlopen(f"{base}/seen") as answer:  # noqa: S310 - our own server
            seen, heads = json.load(answer)
        here = f"/note?by={processes}"
        counts = [seen[f"PUT {here} {body.decode()}"] for body in bodies]
        assert sum(counts) == result.offered
        assert max(counts) - min(counts) <= 1
        assert heads[here] | {"content-type": "text/plain", "x-key": "k"} == heads[here]
        assert heads[here]["host"] == base.removeprefix("http://")


@pytest.mark.parametrize("path", ["plain", "chunked", "early", "last", "unsized"])
def test_every_way_to_end_an_answer_is_understood(base: str, path: str) -> None:
    result = load(f"{base}/{path}")
    assert result.ok == result.offered > 30
    assert result.as_dict()["statuses"] == {"200": result.offered}
    assert (result.connects > 0) == (path in ("last", "unsized"))


@pytest.mark.parametrize(
    ("path", "count", "blind"), [("busy", "refused", False), ("blind", "refused", True)]
)
def test_refusals_are_counted_and_are_not_in_time(
    base: str, path: str, count: str, blind: bool
) -> None:
    result = load(f"{base}/{path}")
    assert getattr(result, count) == result.offered
    assert result.refused_blind == (result.offered if blind else 0)
    assert result.share_in_time(1.0) == 0.0
    assert result.percentile(0.01) == np.inf
    assert result.as_dict(1.0)["latency_ms"]["p50"] is None


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("fault", "HTTP 500"),
        ("cut", "closed the connection"),
        ("hangup", "eset by peer|closed the connection"),
        ("noise", "not HTTP/1.1"),
    ],
)
def test_errors_are_counted_with_their_reason(base: str, path: str, said: str) -> None:
    result = load(f"{base}/{path}")
    assert result.errors == result.offered
    (reason,) = result.failures
    assert any(part in reason for part in said.split("|"))


@clock
def test_silence_ends_in_timeouts_and_unsent_requests_are_told(base: str) -> None:
    result = load(f"{base}/silence", rate=200.0, connections=1, timeout=0.2)
    assert result.timeouts > 4, "the connection is opened anew after a timeout"
    assert result.unsent > 0
    assert result.timeouts + result.unsent == result.offered
    assert np.isnan(result.latencies).all()
    assert any("were never sent" in problem for problem in result.problems())


@clock
def test_too_few_connections_for_the_promise_are_told(base: str) -> None:
    settings: Any = {"bodies": ONE_STALL, "connections": 2}
    result = load(f"{base}/stall", rate=900.0, seconds=0.5, **settings)
    told = [p for p in result.problems(0.05) if "too few" in p]
    assert told
    assert "use 90" in told[0]
    assert not [p for p in result.problems() if "too few" in p], "no promise, no judgement"


def test_warm_up_is_sent_and_does_not_count(base: str) -> None:
    url = f"{base}/note?by=warm-up"
    result = load(url, seconds=0.2, warm_up=0.2, seed=8)
    times = poisson(200.0, 0.4, 8)
    assert np.allclose(result.due, times[times >= 0.2] - 0.2)
    with urllib.request.urlopen(f"{base}/seen") as answer:  # noqa: S310 - our own server
        seen, _ = json.load(answer)
    assert seen["POST /note?by=warm-up "] == len(times) > result.offered


@clock
def test_a_real_engine_answers_and_the_client_is_cheap(base: str) -> None:
    bodies = [json.dumps([float(n)] * 4).encode() for n in range(8)]
    result = load(f"{base}/double", bodies=bodies, rate=500.0, connections=64)
    assert result.ok == result.offered
    summary = result.as_dict(1.0)
    assert summary["in_time"] == result.in_time(1.0) == result.ok
    assert summary["late"] == 0
    assert summary["latency_ms"]["p50"] <= summary["latency_ms"]["max"]
    assert 0 < result.client_us < 400
    json.dumps(summary)


def test_an_answer_tells_its_time_in_the_engine():
    timing = Timing(queue=0.0125, device=0.002, total=0.1)
    found = ENGINE.search(b"HTTP/1.1 200 OK\r\nX-Plinth-Timing: " + timing_json(timing) + b"\r\n")
    assert found is not None
    assert found.groups() == (b"12.500", b"2.000")


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("ftp://127.0.0.1/", {}, "no URL of a server"),
        ("127.0.0.1:80", {}, "no URL of a server"),
        ("http://127.0.0.1/", {"rate": 0.0}, "rate is 0.0"),
        ("http://127.0.0.1/", {"seconds": float("nan")}, "seconds is nan"),
        ("http://127.0.0.1/", {"bodies": []}, "no body"),
        ("http://127.0.0.1/", {"method": "HEAD"}, "HEAD is not supported"),
        ("http://127.0.0.1/", {"headers": {"a": "b\r\nc: d"}}, "line break"),
        ("http://127.0.0.1:1/", {}, "cannot connect to 127.0.0.1:1"),
        ("http://127.0.0.1:1/", {"processes": PARALLEL}, "cannot connect to 127.0.0.1:1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_sent(
    url: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(url, **settings)
