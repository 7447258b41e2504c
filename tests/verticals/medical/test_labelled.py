"""Where labels lie: as SciPy finds them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from plinth.verticals.medical.volumes.components import components
from plinth.verticals.medical.volumes.labelled import Patch, boxes_of, mask_of, slices_with


@pytest.mark.parametrize("planes", [1, 16, 37])
def test_boxes_and_slices_are_those_of_each_label(planes: int) -> None:
    chance = np.random.default_rng(planes)
    labels = np.zeros((planes, 9, 11), np.uint8)
    for value in (1, 2, 7, 255):
        at = [chance.integers(0, size, 3) for size in labels.shape]
        labels[tuple(at)] = value
    values = [1, 2, 3, 7, 200, 255]
    expected = ndimage.find_objects(labels)
    held = np.array([[(plane == value).any() for plane in labels] for value in values])
    found = boxes_of(labels, values)
    assert found == {v: expected[v - 1] for v in values if expected[v - 1] is not None}
    assert np.array_equal(slices_with(labels, values), held)
    assert list(found) == [value for value, hit in zip(values, held, strict=True) if hit.any()]


def test_no_labels_have_no_boxes() -> None:
    assert boxes_of(np.zeros((3, 4, 5), np.uint8), [1, 2]) == {}
    assert boxes_of(np.zeros((0, 4, 5), np.uint8), [1]) == {}


def test_a_part_shows_the_patches_that_reach_into_it() -> None:
    chance = np.random.default_rng(5)
    labels = chance.integers(0, 3, (6, 7, 8)).astype(np.uint8)
    box, other = (slice(1, 4), slice(0, 5), slice(2, 8)), (slice(3, 6), slice(4, 7), slice(0, 3))
    patches = [
        Patch(box, chance.random((3, 5, 6)) < 0.5, 4),
        Patch(other, chance.random((3, 3, 3)) < 0.5, 5),
    ]
    whole = labels.copy()
    for patch in patches:
        patch.put(whole)
    for part in (box, other, (slice(0, 6), slice(0, 7), slice(0, 8)), (slice(5, 6),) * 3):
        for label in range(6):
            mask = mask_of(label, labels, part, patches)
            assert np.array_equal(mask, np.pad(whole[part] == label, 1))


def test_components_are_scipy_s_however_many_there_are() -> None:
    few = np.random.default_rng(6).random((20, 21, 22)) < 0.3
    many = np.indices((52, 52, 52)).sum(axis=0) % 2 == 0  # each alone: 70,304 of them
    for mask, kind in ((few, np.uint16), (many, np.int32)):
        labels, count = components(mask)
        expected, number = ndimage.label(mask)
        assert (labels.dtype, count) == (kind, number)
        assert np.array_equal(labels, expected)
