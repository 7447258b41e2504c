"""``auto`` against the true curve, on a clock that the test turns: no machine in between."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plinth.engine.devices.device import pick
from plinth.engine.runtime import batch_range

pytestmark = pytest.mark.cpu

CURVES: dict[str, Callable[[int], float]] = {
    "saturates late": lambda n: 120e-6 + 2.3e-6 * n,
    "saturates early": lambda n: 30e-6 + 2e-3 * n,
    "falls off a cache": lambda n: 1e-4 + (n if n <= 48 else 1.5 * n - 24) * 1.6e-4,
    "dips at three": lambda n: 2e-4 + n * (9e-4 if n == 3 else 2e-4),
    "is best at one": lambda n: 5e-3 * n**1.1,
    "grows with the square": lambda n: 5e-3 + 1e-4 * n + 2e-6 * n * n,
    "takes seconds": lambda n: 0.4 + 0.2 * n,
}
SIZES = range(1, batch_range.LARGEST + 1)


class Pretended:
    """A model that costs what a curve says; delays of 4 ms come at random, 10 a second."""

    backend, precision = "eager", "fp32"
    device = pick("cpu")

    def __init__(self, curve: Callable[[int], float], seed: int) -> None:
        self.curve, self.now = curve, 0.0
        self.report = {"threads": 2}
        self._random = np.random.default_rng(seed)

    def run(self, inputs):
        seconds = self.curve(len(inputs["x"])) * self._random.normal(1.0, 0.01)
        self.now += seconds + 4e-3 * self._random.poisson(10 * seconds)
        return inputs


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("fits", [1024, 20])
def test_the_choice_is_within_5_percent_of_the_best_size(name, fits, monkeypatch):
    for seed in range(5):
        model = Pretended(CURVES[name], seed)
        monkeypatch.setattr(
            batch_range, "time", SimpleNamespace(perf_counter=lambda m=model: m.now)
        )
        found = batch_range.find(model, lambda rows: {"x": torch.empty(rows, 1)}, fits)
        costs = {rows: model.curve(rows) for rows in SIZES if rows <= fits}
        rate = {rows: rows / cost for rows, cost in costs.items() if cost <= 2 or rows == 1}
        assert rate[found.most] >= 0.95 * max(rate.values())
        assert model.now < 60
        assert max(found.seconds) == found.most
        for rows, seconds in found.seconds.items():
            assert seconds == pytest.approx(model.curve(rows), rel=0.5, abs=5e-3)
