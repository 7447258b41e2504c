"""A volume cut into windows and blended back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plinth.engine import ConfigError, InputError, Tiling
from plinth.engine.tiling import WindowGrid, WindowMerger

sizes = st.tuples(*[st.integers(1, 13)] * 3)
windows = st.tuples(*[st.integers(1, 6)] * 3)


def blend(tiling: Tiling, volume: torch.Tensor, chunk: int = 3) -> torch.Tensor:
    """Run a model that changes nothing over all windows."""
    grid = WindowGrid(tiling, tuple(volume.shape[1:]))
    merger = WindowMerger(grid)
    for first in range(0, len(grid), chunk):
        merger.put(grid.cut(volume, first, min(first + chunk, len(grid))))
    return merger.result()


@given(
    sizes,
    windows,
    st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    st.sampled_from(["gaussian", "constant"]),
)
def test_a_model_that_changes_nothing_gives_the_volume_back(size, window, overlap, kind):
    volume = torch.randn(2, *size)
    tiling = Tiling(window, overlap, blend=kind)
    torch.testing.assert_close(blend(tiling, volume), volume, rtol=1e-4, atol=1e-5)


@given(sizes, windows, st.sampled_from([0.0, 0.3, 0.5]))
def test_argmax_by_slabs_equals_argmax_of_everything(size, window, overlap):
    volume = torch.randn(4, *size)
    labels = blend(Tiling(window, overlap, reduce="argmax"), volume)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), volume.argmax(0))


@given(sizes, windows, st.sampled_from([0.0, 0.3, 0.6]))
def test_every_voxel_is_covered(size, window, overlap):
    grid = WindowGrid(Tiling(window, overlap), size)
    seen = torch.zeros(size, dtype=torch.bool)
    for index in range(len(grid)):
        z, y, x = grid.corner(index)
        seen[z : z + window[0], y : y + window[1], x : x + window[2]] = True
    assert seen.all()


def test_logits_held_at_once_do_not_grow_with_depth():
    held = []
    for depth in (16, 64):
        merger = WindowMerger(WindowGrid(Tiling((8, 8, 8), reduce="argmax"), (depth, 8, 8)))
        merger.put(torch.zeros(1, 3, 8, 8, 8))
        held.append(merger._slab.numel())
    assert held[0] == held[1]


def test_wrong_settings_and_outputs_are_named():
    with pytest.raises(ConfigError, match="overlap is 1"):
        Tiling((4, 4, 4), overlap=1.0)
    with pytest.raises(ConfigError, match="window"):
        Tiling((0, 4, 4))
    merger = WindowMerger(WindowGrid(Tiling((4, 4, 4)), (8, 8, 8)))
    with pytest.raises(InputError, match=r"\(4, 4, 4\) into \(2, 2, 2\)"):
        merger.put(torch.zeros(1, 1, 2, 2, 2))
