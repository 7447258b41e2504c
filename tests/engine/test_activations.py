"""What a forward holds at its peak, told before it runs, and kept to by the choice of backends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from plinth.engine import Model
from plinth.engine.backends import export
from plinth.engine.backends.choice import prepare
from plinth.engine.backends.export import Traced, run_peak
from plinth.engine.devices.device import pick
from plinth.engine.mapped import forget
from plinth.engine.models.activations import live_bytes

pytestmark = pytest.mark.cpu

MB = 1 << 20
FLOATS = 4


def model_of(module: nn.Module, *size: int, memory: int | None = None) -> Model:
    made = Model.from_torch(module.eval(), example=torch.rand(2, *size), name="some")
    return replace(made, memory=memory)


class Around(nn.Module):
    """A wide layer beside the input that is added at the end."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, wide, 3, padding=1), nn.Conv2d(wide, 4, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(n, 4, y, x) to the same."""
        return image + self.two(self.one(image).relu())


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (nn.Sequential(nn.Conv2d(4, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 3, 1)), 4 + 20),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)), 8 + 6),
        (Around(32), 4 + 4 + 32 + 4),  # a graph begins with a copy of what it is given
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(2), nn.Unflatten(2, (16, 16))), 4 + 8),
    ],
)
def test_tensors_count_from_what_makes_them_to_what_reads_them_last(
    module: nn.Module, channels: int
) -> None:
    found = run_peak(model_of(module, 4, 16, 16))
    assert found is not None
    low, high = (n * 16 * 16 * FLOATS for n in (channels - 4, channels + 4))
    assert low <= found <= high


def test_channels_are_held_in_blocks() -> None:
    model = model_of(nn.Sequential(nn.Conv2d(4, 20, 1), nn.Conv2d(20, 20, 1)), 4, 16, 16)
    program = Traced(model).program
    plane = 16 * 16 * FLOATS
    assert live_bytes(program, 2) == 40 * plane
    assert live_bytes(program, 2, aligned=16) == 64 * plane


def test_a_module_is_traced_once_for_each_size_whoever_asks(monkeypatch) -> None:
    traced = []

    class Counted(Traced):
        def __init__(self, model: Model) -> None:
            traced.append(model)
            super().__init__(model)

    monkeypatch.setattr(export, "Traced", Counted)
    model = model_of(nn.Sequential(nn.Conv2d(4, 20, 1), nn.Conv2d(20, 20, 1)), 4, 16, 16)
    plane = 16 * 16 * FLOATS
    for aligned, planes in ((16, 64), (1, 40), (16, 64), (8, 48)):
        found = run_peak(replace(model, memory=aligned), aligned)
        assert found == planes * plane
    assert len(traced) == 2, "of 8 nobody had asked"
    assert run_peak(model_of(model.module, 4, 8, 8)) == 40 * plane / 4


def test_what_would_take_more_than_a_model_may_is_not_tried() -> None:
    pytest.importorskip("openvino")
    module = nn.Sequential(nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1))
    tight = model_of(module, 4, 32, 32, memory=64 * 32 * 32 * FLOATS)
    found = prepare(tight, pick("cpu"), "fp32", threads=1, rows=1)
    assert found.backend == "eager"
    assert "at its peak" in found.report["refused"]["openvino/fp32"]
    found = prepare(replace(tight, memory=MB), pick("cpu"), "fp32", threads=1, rows=1)
    assert not any("at its peak" in why for why in found.report["refused"].values())


def test_pages_of_a_file_leave_memory_and_come_again(tmp_path: Path) -> None:
    written = {"weight": torch.rand(1 << 20).bfloat16(), "other": torch.rand(1 << 18)}
    torch.save(written, tmp_path / "some.pt")
    read = torch.load(tmp_path / "some.pt", mmap=True, weights_only=True)
    assert torch.equal(read["weight"], written["weight"])
    forget(read["weight"])
    own = torch.rand(1 << 20)
    kept = own.clone()
    forget(own)
    assert torch.equal(own, kept), "memory of no file stays"
    assert torch.equal(read["weight"], written["weight"])
    read["other"][:] = 1
    forget(read["other"])
    assert bool((read["other"] == 1).all()), "what was written to stays"
