"""How much fits: the arithmetic for all numbers, the measurement where the need is known."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from plinth.engine import ConfigError, Model, ModelSpec, TensorSpec
from plinth.engine.backends import prepare
from plinth.engine.devices.device import pick
from plinth.engine.errors import OutOfMemory
from plinth.engine.runtime.memory_plan import MOST_ROWS, MemoryPlan, budget, measure

CPU = pick("cpu")
BYTES = st.integers(0, 1 << 40)


@given(BYTES, BYTES, BYTES, BYTES)
def test_the_most_rows_fit_and_one_more_does_not(weights, fixed, per_row, limit):
    plan = MemoryPlan(weights, fixed, per_row, limit)
    most = plan.max_rows
    if most:
        assert plan.peak(most) <= limit
        plan.check(most)
    if most < MOST_ROWS:
        assert plan.peak(most + 1) > limit
        with pytest.raises(OutOfMemory) as refusal:
            plan.check(most + 1)
        assert refusal.value.needed == plan.peak(most + 1)
        assert refusal.value.available == limit


@given(BYTES, BYTES, BYTES, BYTES, BYTES)
def test_a_larger_budget_never_fits_fewer_rows(weights, fixed, per_row, limit, more):
    small = MemoryPlan(weights, fixed, per_row, limit)
    large = MemoryPlan(weights, fixed, per_row, limit + more)
    assert small.max_rows <= large.max_rows


def test_a_refusal_names_the_bytes_and_what_would_fit():
    with pytest.raises(OutOfMemory, match=r"9 rows need 1100 bytes .*budget is 1000.*at most 8"):
        MemoryPlan(weights=100, fixed=100, per_row=100, budget=1000).check(9)
    with pytest.raises(OutOfMemory, match="raise the memory budget"):
        MemoryPlan(weights=2000, fixed=0, per_row=1, budget=1000).check(1)
    with pytest.raises(ConfigError, match="fixed is -1"):
        MemoryPlan(0, -1, 0, 0)


def test_the_budget_is_a_share_of_what_is_free_or_bytes():
    available = CPU.memory().available
    assert budget(CPU) == pytest.approx(0.6 * available, rel=0.2)
    assert budget(CPU, 1 << 20) == 1 << 20
    with pytest.raises(OutOfMemory, match="cpu has"):
        budget(CPU, 1 << 60)
    for wrong in ("much", 0, -1):
        with pytest.raises(ConfigError, match="memory budget"):
            budget(CPU, wrong)
    with pytest.raises(ConfigError, match="share"):
        budget(CPU, share=1.5)


class Widening(nn.Module):
    """Makes 8 MiB per row on the way, gives 4 bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2 << 20).sum(1, keepdim=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_of_a_forward_is_measured():
    spec = ModelSpec(
        name="wide",
        inputs=(TensorSpec(name="x", shape=(1,)),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
    )
    executable = prepare(Model(spec, Widening()), CPU, "fp32", "eager", rows=1)
    plan = measure(
        executable, lambda rows: {"x": torch.ones(rows, 1)}, (1, 9), weights=5, limit=64 << 20
    )
    assert plan.weights == 5
    assert plan.per_row == pytest.approx(8 << 20, rel=0.25)
    assert plan.how
    assert 5 <= plan.max_rows <= 10
    with pytest.raises(ConfigError, match="small < large"):
        measure(executable, lambda rows: {"x": torch.ones(rows, 1)}, (4, 4))
