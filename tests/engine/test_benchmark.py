"""LoadGen's scenarios against a real engine: what it counts is what the engine ran."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    Flow,
    InputError,
    Model,
    ModelSpec,
    Sla,
    TensorSpec,
)
from plinth.engine.benchmark import Sut, offline, server, single_stream

SAMPLES = torch.arange(32.0).reshape(8, 4)


class Counting(nn.Module):
    """Doubles rows and remembers how many it saw of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[float, int] = {}

    def forward(self, rows: Tensor) -> Tensor:
        for first in rows[:, 0].tolist():
            self.seen[first] = self.seen.get(first, 0) + 1
        return rows * 2


class Setup:
    """An engine with one model, and what LoadGen asks of it."""

    def __init__(self, engine: Engine, module: Counting, **facts: Any) -> None:
        self.engine, self.module = engine, module
        self.sut = Sut("double", samples=len(SAMPLES), flow=self.flow, **facts)
        self.asked = 0

    def flow(self, numbers: Sequence[int]) -> Flow[Tensor]:
        self.asked += len(numbers)
        return (yield Call("double", SAMPLES[list(numbers)]))

    @property
    def executed(self) -> int:
        return sum(self.module.seen.values())


@pytest.fixture
def setup() -> Iterator[Setup]:
    spec = ModelSpec(
        name="double",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    module = Counting()
    engine = Engine()
    engine.add(Model(spec, module.eval()), batch_range=(1, 64))
    with engine:
        module.seen.clear()  # the warm-up
        yield Setup(engine, module)


def test_single_stream_asks_one_by_one_and_counts_what_ran(setup: Setup) -> None:
    outcome = single_stream(setup.engine, setup.sut, seconds=0.3)
    assert outcome.scenario == "SingleStream"
    assert outcome.valid, outcome.reasons
    assert outcome.samples == outcome.answered == outcome.facts["result_query_count"]
    assert setup.executed == setup.asked, "each flow ran once; some warmed up before"
    assert outcome.latency_ms["p50"] <= outcome.latency_ms["p99"] <= outcome.latency_ms["max"]
    assert outcome.rate == pytest.approx(1e3 / outcome.latency_ms["mean"], rel=0.5)
    assert set(setup.module.seen) == set(SAMPLES[:, 0].tolist()), "LoadGen draws among all"


def test_offline_measures_throughput_in_large_batches(setup: Setup) -> None:
    outcome = offline(setup.engine, setup.sut, seconds=0.3)
    assert outcome.answered == outcome.samples
    assert setup.executed == setup.asked >= outcome.samples
    assert outcome.valid, outcome.reasons
    alone = single_stream(setup.engine, setup.sut, seconds=0.2)
    assert outcome.rate > 2 * alone.rate


def test_server_keeps_a_promise_at_a_low_rate(setup: Setup) -> None:
    promise = Sla(deadline_ms=500, quantile=0.9)
    outcome = server(setup.engine, setup.sut, rate=300, sla=promise, seconds=1.0)
    assert outcome.valid, outcome.reasons
    assert outcome.samples == outcome.answered == outcome.facts["result_query_count"]
    assert setup.executed == setup.asked
    assert outcome.late == 0
    assert outcome.samples == pytest.approx(300, rel=0.3)
    assert outcome.rate == pytest.approx(outcome.facts["result_scheduled_samples_per_sec"], rel=0.2)


def test_what_the_engine_refuses_counts_as_late(setup: Setup) -> None:
    """A refusal is quick; taken for an answer it would make the worst server the best."""
    hopeless = Sla(deadline_ms=0.001, quantile=0.9)
    outcome = server(setup.engine, setup.sut, rate=200, sla=hopeless, seconds=0.5)
    assert not outcome.valid
    assert sum(outcome.refused.values()) > 0.9 * outcome.samples
    assert outcome.late == outcome.samples == outcome.answered + sum(outcome.refused.values())


def test_the_same_seed_gives_the_same_arrivals(setup: Setup) -> None:
    settings: Any = {"rate": 400, "sla": Sla(deadline_ms=500), "seconds": 0.2, "queries": 1}

    def issued(seed: int) -> int:
        return server(setup.engine, setup.sut, seed=seed, **settings).samples

    assert issued(5) == issued(5)
    assert len({issued(seed) for seed in range(6, 9)}) > 1


def test_wrong_items_and_faults_do_not_pass_for_answers(setup: Setup) -> None:
    def wrong(numbers: Sequence[int]) -> Flow[list[Any]]:
        yield Call("double", SAMPLES[list(numbers)])
        return [InputError("no", reason="unlucky") if n == 3 else n for n in numbers]

    sut = Sut("wrong", samples=8, flow=wrong)
    outcome = single_stream(setup.engine, sut, seconds=0.2)
    assert not outcome.valid
    assert outcome.failed["unlucky"] == outcome.samples - outcome.answered > 0
    assert "unlucky" in outcome.reasons[-1]

    def broken(numbers: Sequence[int]) -> Flow[Tensor]:
        result: Tensor = yield Call("double", SAMPLES[list(numbers)])
        if any(numbers):
            raise KeyError("a fault of the flow")
        return result

    for run in (single_stream, offline):
        with pytest.raises(KeyError, match="a fault of the flow"):
            run(setup.engine, Sut("broken", 8, broken), seconds=0.1)


def test_a_heavy_flow_runs_beside_others(setup: Setup) -> None:
    heavy = Sut("double", samples=8, flow=setup.flow, chunk=4, heavy=True)
    outcome = offline(setup.engine, heavy, seconds=0.1)
    assert outcome.answered == outcome.samples
    assert setup.executed == setup.asked


def test_logs_are_kept_where_asked(setup: Setup, tmp_path: Path) -> None:
    outcome = single_stream(setup.engine, setup.sut, seconds=0.1, folder=tmp_path / "logs")
    assert "Scenario : SingleStream" in (tmp_path / "logs/mlperf_log_summary.txt").read_text()
    assert json.loads(json.dumps(outcome.as_dict()))["loadgen"] == outcome.loadgen


def test_server_needs_a_deadline(setup: Setup) -> None:
    with pytest.raises(ConfigError, match="a deadline and a rate"):
        server(setup.engine, setup.sut, rate=10, sla=Sla())
