"""Balls around voxels, held against SciPy's distances over whole volumes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from plinth.verticals.medical.volumes.distance import (
    closed,
    deep,
    dilated,
    eroded,
    near,
    squares,
)

masks = st.builds(
    lambda seed, shape, share: np.random.default_rng(seed).random(shape) < share,
    st.integers(0, 999),
    st.tuples(*[st.integers(1, 14)] * 3),
    st.sampled_from((0.002, 0.05, 0.5, 0.95, 1.0)),
)


def away(mask: np.ndarray) -> np.ndarray:
    """Distance to the nearest voxel of a mask, in voxels."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(~mask)


@settings(max_examples=40)
@given(mask=masks, radius=st.sampled_from((0.0, 1.0, 1.5, 2.0, 3.2, 6.0, 12.5)))
def test_balls_reach_as_far_as_distances_say(mask: np.ndarray, radius: float) -> None:
    reach = np.where(away(mask) <= radius + 1e-9, away(mask), np.inf)
    squared = squares(mask, int(radius))
    assert np.array_equal(near(mask, radius), np.isfinite(reach))
    assert np.array_equal(deep(mask, radius), away(~mask) > radius + 1e-9)
    assert np.array_equal(closed(mask, radius), away(~near(mask, radius)) > radius + 1e-9)
    exact = np.isfinite(reach) & (reach <= int(radius))
    assert np.allclose(squared[exact], reach[exact] ** 2)


@settings(max_examples=20)
@given(mask=masks)
def test_six_neighbours_are_added_and_taken_away(mask: np.ndarray) -> None:
    assert np.array_equal(dilated(mask), ndimage.binary_dilation(mask))
    assert np.array_equal(eroded(mask), ndimage.binary_erosion(mask, border_value=1))


def test_a_reach_beyond_what_squares_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        squares(np.ones((1, 1, 1), bool), 101)
