"""From a series to the tensor a model takes: resampled, windowed by the standard, and back."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.medical import DICOMLoader, load_volume
from plinth.verticals.medical.volumes.resample import fit_size, fit_spacing, resample
from plinth.verticals.medical.volumes.window import apply_window

Write = Callable[..., Path]
Edit = Callable[..., None]
Files = Callable[[str], Path]


# -- windows (PS3.3 C.11.2.1.2 and C.11.2.1.3) ------------------------------------------------
def linear(x: float, c: float, w: float) -> float:
    """C.11.2.1.2.1, word for word, output 0 to 1."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return (x - (c - 0.5)) / (w - 1) + 0.5


def linear_exact(x: float, c: float, w: float) -> float:
    """C.11.2.1.3.2, word for word, output 0 to 1."""
    if x <= c - w / 2:
        return 0.0
    if x > c + w / 2:
        return 1.0
    return (x - c) / w + 0.5


values = st.lists(st.floats(-4000, 4000, width=32), min_size=1, max_size=50)


@given(values, st.integers(-1000, 1000), st.integers(1, 4000))
def test_windows_are_those_of_the_standard(xs: list[float], c: int, w: int) -> None:
    given_values = torch.tensor(xs, dtype=torch.float32)
    for function, rule in (("linear", linear), ("linear_exact", linear_exact)):
        shown = apply_window(given_values, c, w, function).tolist()  # type: ignore[arg-type]
        assert shown == pytest.approx([rule(x, c, w) for x in xs], abs=2e-6 + 1e-3 / w)


def test_the_standards_own_example() -> None:
    """C.11.2.1.2.1: centre 2048, width 4096 maps 0 to 4095 onto the whole range."""
    shown = apply_window(torch.tensor([0.0, 4095.0]), 2048, 4096, "linear")
    assert shown.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {"window_width": 0},
        {"window_width": 0.5, "window": "linear"},
        {"window": "log"},
        {"volume_size": (0, 1, 1)},
        {"spacing": (1.0, 1.0, 0.0)},
        {"interpolation": "cubic"},
        {"gaps": "ignore"},
    ],
)
def test_impossible_settings_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DICOMLoader(**options)


# -- tensors ----------------------------------------------------------------------------------
def test_the_simple_door(write: Write) -> None:
    loaded = DICOMLoader(volume_size=(18, 15, 20), window_center=40, window_width=400).load(write())
    assert loaded.tensor.shape == (1, 20, 15, 18)
    assert loaded.tensor.dtype == torch.float32
    assert loaded.tensor.min() == 0
    assert loaded.tensor.max() == 1
    assert loaded.verdict.ok


def test_at_native_size_nothing_is_interpolated(write: Write, expected: Any) -> None:
    loaded = DICOMLoader((36, 30, 10), 100, 1000).load(write())
    exact = np.clip((expected() - 100.0) / 1000 + 0.5, 0, 1)
    assert np.abs(loaded.tensor[0].numpy() - exact).max() < 1e-6
    assert np.array_equal(loaded.affine, loaded.native.affine)


@pytest.mark.parametrize("options", [{"volume_size": (17, 40, 23)}, {"spacing": (7.0, 7.0, 7.0)}])
def test_the_resampled_grid_covers_the_same_field_of_view(
    write: Write, options: dict[str, Any]
) -> None:
    loaded = DICOMLoader(**options).load(write(rotation=(10.0, 20.0, 30.0)))
    native = loaded.native
    _, z, y, x = loaded.tensor.shape
    middle = loaded.affine @ [(x - 1) / 2, (y - 1) / 2, (z - 1) / 2, 1]
    z, y, x = native.shape
    assert middle[:3] == pytest.approx(native.index_to_lps([(x - 1) / 2, (y - 1) / 2, (z - 1) / 2]))
    if "spacing" in options:
        assert np.linalg.norm(loaded.affine[:3, :3], axis=0) == pytest.approx((7.0, 7.0, 7.0))
    else:
        extent = np.linalg.norm(loaded.affine[:3, :3], axis=0) * (17, 40, 23)
        assert extent == pytest.approx(np.array(native.spacing) * native.shape[::-1])


sizes = st.tuples(*[st.integers(1, 12)] * 3)


@given(sizes, sizes)
def test_a_ramp_stays_a_ramp(native: tuple[int, int, int], size: tuple[int, int, int]) -> None:
    """Linear resampling of a linear function is exact away from the clamped edges."""
    z, y, x = np.indices(native).astype(np.float32)
    ramp = 100 * z + 10 * y + x
    grid = fit_size(native, size)
    shown = resample(ramp.astype(np.int16), grid).numpy()
    places = [
        np.clip((np.arange(m) - (m - 1) / 2) * s + (n - 1) / 2, 0, n - 1)
        for n, m, s in zip(native, size, grid.scale, strict=True)
    ]
    exact = 100 * places[0][:, None, None] + 10 * places[1][:, None] + places[2]
    assert shown == pytest.approx(exact, abs=1e-2)


def test_linear_agrees_with_torch(write: Write) -> None:
    voxels = load_volume(write()).voxels
    ours = resample(voxels, fit_size((10, 30, 36), (7, 64, 18)))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(voxels)[None, None].float(), (7, 64, 18), mode="trilinear"
    )
    assert torch.allclose(ours, theirs[0, 0], atol=1e-3)


@given(sizes, sizes)
def test_area_keeps_the_mean_when_it_shrinks(
    native: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    size = tuple(min(a, b) for a, b in zip(native, size, strict=True))  # type: ignore[assignment]
    noise = np.random.default_rng(0).standard_normal(native).astype(np.float32)
    shrunk = resample(noise, fit_size(native, size), "area")
    assert float(shrunk.mean()) == pytest.approx(float(noise.mean()), abs=1e-5)


def test_area_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 100], np.int16), (8, 8, 32))
    grid = fit_spacing((8, 8, 64), (1.0, 1.0, 1.0), (1.0, 1.0, 4.0))
    assert set(resample(stripes, grid, "area").flatten().tolist()) == {50.0}


@given(sizes, sizes)
def test_labels_come_back_to_the_native_grid(
    native: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    """Each native voxel gets the label of the nearest grid voxel; growing loses nothing."""
    size = tuple(n * m for n, m in zip(native, size, strict=True))  # type: ignore[assignment]
    labels = np.random.default_rng(0).integers(0, 200, native).astype(np.uint8)
    grown = labels
    for axis in range(3):
        grown = grown.repeat(size[axis] // native[axis], axis=axis)
    back = fit_size(native, size).to_native(grown)
    assert back.dtype == np.uint8
    assert np.array_equal(back, labels)


def test_to_native_takes_tensors_and_checks_the_shape(write: Write) -> None:
    loaded = DICOMLoader((18, 15, 5)).load(write())
    labels = (loaded.tensor > 0.5).to(torch.uint8)
    native = loaded.to_native(labels)
    assert native.shape == loaded.native.shape
    agree = (native == 1) == (loaded.native.voxels > 40)
    assert agree.mean() > 0.9
    with pytest.raises(InputError, match="labels of shape"):
        loaded.to_native(np.zeros((2, 2, 2)))


def test_monochrome1_is_shown_the_right_way_round(write: Write, edit: Edit) -> None:
    folder = write()
    normal = DICOMLoader((18, 15, 5)).load(folder)
    edit(folder, lambda image, _: setattr(image, "PhotometricInterpretation", "MONOCHROME1"))
    inverse = DICOMLoader((18, 15, 5)).load(folder)
    assert np.array_equal(inverse.native.voxels, normal.native.voxels)
    assert torch.equal(inverse.tensor, 1 - normal.tensor)


def test_a_ct_window_on_mr_is_remarked(pydicom_data: Files) -> None:
    loaded = DICOMLoader((8, 8, 1)).load(pydicom_data("MR_small.dcm"))
    assert any("no fixed scale" in issue.message for issue in loaded.verdict.issues)


# -- memory -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("tilt", "most"), [(0.0, 1.15), (15.0, 2.8)])
def test_memory_is_the_volume_and_little_else(write: Write, tilt: float, most: float) -> None:
    """Peak of what Python and numpy hold, over the int16 voxels of the source."""
    shape = (320, 300, 50)
    folder = write(shape=shape, spacing=(1.2, 1.2, 4.0), tilt=tilt, noise_hu=0.0)
    load_volume(folder)  # imports and caches
    tracemalloc.start()
    try:
        volume = load_volume(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert volume.verdict.resampled == (tilt > 0)
    assert peak < most * 2 * math.prod(shape)
