"""A voxel's label is looked up in a table of all cases: the same as asking each threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from plinth.verticals.medical.ct import analysis
from plinth.verticals.medical.ct.segment import (
    AIRWAY,
    BODY,
    BONE,
    BONE_HU,
    INSIDE,
    LEFT,
    LEFT_CORE,
    LUNG_EDGE_HU,
    LUNG_HU,
    RIGHT,
    RIGHT_CORE,
    TISSUE_HU,
)

EDGES = [h + d for h in (TISSUE_HU, LUNG_HU, LUNG_EDGE_HU, BONE_HU) for d in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@given(data=st.data())
def test_counts_and_labels_are_those_of_the_rules(dtype, data):
    shape = (6, 7)
    hu = data.draw(arrays.arrays(dtype, shape, elements=st.sampled_from(EDGES)))
    if dtype == np.float32:
        hu[data.draw(arrays.arrays(np.bool_, shape))] = np.nan
    bits = data.draw(arrays.arrays(np.uint8, shape))
    counts, labels = analysis._Counts(), np.zeros(shape, np.uint8)
    with np.errstate(invalid="ignore"):
        counts.add(hu, bits, labels)
    body = ((bits & INSIDE) > 0) | (((bits & BODY) > 0) & (hu > TISSUE_HU))
    want = np.zeros(shape, np.uint8)
    want[(hu >= BONE_HU) & ((bits & BONE) > 0) & body] = analysis.BONE_LABEL
    low = (hu < LUNG_EDGE_HU) & ((bits & AIRWAY) == 0)
    sides = ((analysis.LUNG_RIGHT, RIGHT, RIGHT_CORE), (analysis.LUNG_LEFT, LEFT, LEFT_CORE))
    for side, may, core in sides:
        whole = (((bits & may) > 0) & low) | ((bits & core) > 0)
        want[whole] = side
        assert counts.lung[side] == whole.sum()
        assert counts.air[side].sum() == (whole & (hu < LUNG_HU)).sum()
    assert np.array_equal(labels, want)
    assert counts.body == body.sum()
    assert counts.bone == (want == analysis.BONE_LABEL).sum()
    tubes = (hu < TISSUE_HU) & ((bits & AIRWAY) > 0) & (want == 0)
    assert counts.airway == tubes.sum()
