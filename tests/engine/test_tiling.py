"""A volume cut into windows and blended back."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from plinth.engine import ConfigError, InputError, Tiling
from plinth.engine.tiling import Onto, WindowGrid, WindowMerger

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
    st.sampled_from(["gaussian", "constant", "floored"]),
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


def merged(tiling: Tiling, volume: torch.Tensor, model) -> torch.Tensor | dict[str, torch.Tensor]:
    """Run a model over all windows, one by one."""
    grid = WindowGrid(tiling, tuple(volume.shape[1:]))
    merger = WindowMerger(grid)
    for number in range(len(grid)):
        merger.put(model(grid.cut(volume, number, number + 1)))
    return merger.result()


@given(
    st.tuples(*[st.integers(9, 20)] * 3),
    st.tuples(*[st.integers(7, 9)] * 3),
    st.sampled_from(["none", "argmax"]),
)
@settings(max_examples=30)
def test_a_halo_gives_what_one_pass_over_the_whole_volume_gives(size, window, reduce):
    torch.manual_seed(0)
    first, second = torch.randn(4, 2, 3, 3, 3), torch.randn(3, 4, 3, 3, 3)

    def network(rows):  # reads 1 + 2 voxels to each side
        hidden = F.relu(F.conv3d(rows, first, padding=1))
        return F.conv3d(hidden, second, padding=2, dilation=2)

    volume = torch.randn(2, *size)
    got = merged(Tiling(window, halo=(3, 3, 3), reduce=reduce), volume, network)
    whole = network(volume[None])[0]
    if reduce == "argmax":
        assert torch.equal(got.long(), whole.argmax(0))
    else:
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


@given(
    st.tuples(*[st.integers(4, 12)] * 3),
    st.tuples(*[st.integers(1, 20)] * 3),
    st.sampled_from([(0, 0, 0), (2, 2, 2)]),
)
def test_outputs_are_interpolated_as_torch_interpolates_a_whole_volume(size, onto, halo):
    volume = torch.randn(3, *size)
    scale = tuple(n / m for n, m in zip(size, onto, strict=True))
    first = tuple(s / 2 - 0.5 for s in scale)  # outer edges stay
    tiling = Tiling((5, 6, 5), 0.5, halo=halo, onto=Onto(onto, first, scale))
    want = F.interpolate(volume[None], onto, mode="trilinear")[0]
    torch.testing.assert_close(
        merged(tiling, volume, lambda rows: rows), want, rtol=1e-4, atol=1e-4
    )
    labels = merged(
        Tiling((5, 6, 5), 0.5, halo=halo, onto=tiling.onto, reduce="argmax", activation="softmax"),
        volume,
        lambda rows: rows,
    )
    assert labels.shape == onto


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(2, 5)] * 3),
    st.integers(2, 5),
    st.sampled_from(["gaussian", "constant", "floored"]),
    st.sampled_from([None, (7, 11, 5)]),
    st.booleans(),
)
@settings(max_examples=30)
def test_planes_in_pieces_give_what_whole_ones_give(size, window, pieces, kind, onto, halo):
    volume = torch.randn(3, *size)
    scale = tuple(n / m for n, m in zip(size, onto or size, strict=True))
    tiling = Tiling(
        window,
        0.5,
        kind,
        activation="softmax",
        halo=(1, 1, 1) if halo and min(window) > 2 else (0, 0, 0),
        onto=onto and Onto(onto, tuple(s / 2 - 0.5 for s in scale), scale),
    )
    grid = WindowGrid(tiling, size, pieces)
    merger = WindowMerger(grid)
    for number in range(len(grid)):
        rows = grid.cut(volume, number, number + 1)
        merger.put(rows)
    torch.testing.assert_close(merger.result(), blend(tiling, volume), rtol=1e-6, atol=1e-6)
    assert grid.bytes(3) <= WindowGrid(tiling, size).bytes(3)


def test_a_whole_body_of_104_classes_is_made_in_pieces_that_fit():
    grid = WindowGrid(Tiling((96, 96, 96), 0.5, reduce="argmax"), (300, 512, 512))
    assert grid.bytes(104) > 10.4e9
    small = grid.within(4 << 30, 104)
    assert len(small.strips) == 4
    assert small.bytes(104) < 4 << 30
    assert len(small) <= 1.5 * len(grid)
    assert grid.within(11 << 30, 104) is grid
    most = grid.within(0, 104)
    assert len(most.strips) == grid.max_pieces == 10


def test_uncertainty_is_none_where_one_class_is_sure_and_all_where_classes_are_even():
    volume = torch.zeros(4, 6, 6, 6)
    volume[2, :3] = 100.0
    for tiling in (
        Tiling((4, 4, 4), reduce="argmax", uncertainty=True),
        Tiling((4, 4, 4), halo=(1, 1, 1), reduce="argmax", uncertainty=True),
    ):
        got = merged(tiling, volume, lambda rows: rows)
        assert (got["labels"][:3] == 2).all()
        assert (got["uncertainty"][:3] == 0).all()
        assert (got["uncertainty"][3:] == 255).all()


def test_a_threshold_gives_the_last_channel_above_one_half():
    volume = torch.full((3, 4, 4, 4), -5.0)
    volume[0, 0], volume[1, 0, 0], volume[2, 1] = 5.0, 5.0, 5.0
    got = merged(
        Tiling((2, 2, 2), 0.0, reduce="threshold", activation="sigmoid"), volume, lambda rows: rows
    )
    assert (got[0, 0] == 2).all()
    assert (got[0, 1:] == 1).all()
    assert (got[1] == 3).all()
    assert (got[2:] == 0).all()


@given(st.integers(8, 60), st.integers(4, 8), st.sampled_from([0.25, 0.5]))
def test_even_windows_cover_the_volume_with_steps_no_longer_than_asked(size, window, overlap):
    starts = WindowGrid(Tiling((window, 1, 1), overlap, even=True), (size, 1, 1)).starts[0]
    steps = [b - a for a, b in pairwise(starts)]
    assert starts[0] == 0
    assert starts[-1] == size - window
    assert all(step <= window * (1 - overlap) + 1 for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_logits_of_windows_with_a_halo_are_not_held_at_all():
    merger = WindowMerger(
        WindowGrid(Tiling((8, 8, 8), halo=(2, 2, 2), reduce="argmax"), (64, 8, 8))
    )
    merger.put(torch.zeros(1, 104, 8, 8, 8))
    assert merger._slab.numel() == 0
    assert merger.grid.bytes(104) < 64 * 8 * 8 * 2


def test_a_halo_that_leaves_nothing_of_a_window_is_refused():
    with pytest.raises(ConfigError, match="leaves nothing"):
        WindowGrid(Tiling((8, 8, 8), halo=(4, 4, 4)), (16, 16, 16))
    with pytest.raises(ConfigError, match="expected a halo"):
        Tiling((8, 8, 8), reduce="labels")


@given(st.tuples(*[st.integers(2, 9)] * 3), st.tuples(*[st.integers(1, 15)] * 3), st.integers(0, 2))
def test_an_axis_may_take_the_nearest_plane_and_the_others_interpolate(size, onto, axis):
    volume = torch.randn(2, *size)
    scale = tuple(n / m for n, m in zip(size, onto, strict=True))
    nearest = tuple(number == axis for number in range(3))
    grid = Onto(onto, tuple(s / 2 - 0.5 for s in scale), scale, nearest)
    planes = [min(int(scale[axis] * (k + 0.5) + 1e-9), size[axis] - 1) for k in range(onto[axis])]
    picked = volume.index_select(axis + 1, torch.tensor(planes))
    want = F.interpolate(picked[None], onto, mode="trilinear")[0]
    got = merged(Tiling((5, 6, 5), 0.5, onto=grid), volume, lambda rows: rows)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_network_gives_is_interpolated_before_or_after_its_activation():
    logits = torch.tensor([-3.0, 0.5]).reshape(1, 1, 1, 2)
    far = torch.tensor([-1.0, 9.0]).reshape(1, 1, 1, 2)  # a quarter: 1.5, but of sigmoids 0.45
    onto = Onto((1, 1, 5), (0.0, 0.0, 0.0), (1.0, 1.0, 0.25))
    first = Tiling((1, 1, 2), reduce="threshold", activation="sigmoid", onto=onto)
    raw = replace(first, interpolate="raw")
    for volume in (logits, far):
        low, high = volume.flatten().tolist()
        between = torch.linspace(low, high, 5)
        want = torch.linspace(*torch.sigmoid(torch.tensor([low, high])).tolist(), 5)
        assert blend(raw, volume).flatten().tolist() == (between > 0).int().tolist()
        assert blend(first, volume).flatten().tolist() == (want > 0.5).int().tolist()
    assert not torch.equal(blend(raw, far), blend(first, far))


@pytest.mark.parametrize("onto", [None, Onto((4, 4, 4), (0.0,) * 3, (1.0, 1.0, 1.0))])
def test_voxels_that_a_later_channel_takes_are_counted(onto):
    volume = torch.zeros(2, 4, 4, 4)
    volume[0, :, :2], volume[1, :, :3] = 1, 1
    found = blend(Tiling((3, 3, 3), reduce="threshold", hidden=True, onto=onto), volume)
    assert found["hidden"].tolist() == [32, 0]
    assert torch.bincount(found["labels"].flatten().long()).tolist() == [16, 0, 48]


@pytest.mark.parametrize("reduce", ["argmax", "threshold"])
def test_outputs_that_are_no_numbers_have_no_labels(reduce):
    volume = torch.randn(3, 5, 5, 5)
    volume[1, 2, 3, 4] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        blend(Tiling((3, 3, 3), reduce=reduce), volume)


def test_one_channel_has_no_largest_one():
    with pytest.raises(InputError, match="threshold"):
        blend(Tiling((3, 3, 3), reduce="argmax"), torch.randn(1, 5, 5, 5))


def test_a_window_that_is_the_whole_volume_is_not_copied():
    volume = torch.randn(2, 5, 6, 7)
    whole = WindowGrid(Tiling((5, 6, 7)), (5, 6, 7)).cut(volume, 0, 1)
    assert whole.data_ptr() == volume.data_ptr()
    assert torch.equal(whole, volume[None])
    padded = WindowGrid(Tiling((5, 6, 8)), (5, 6, 7)).cut(volume, 0, 1)
    assert torch.equal(padded[..., :7], volume[None])
