"""Normalisation over many values in OpenVINO graphs: sums that stay exact.

Its kernel for MVN, which instance and group normalisation become, adds up all values of a channel
in float32 one after another. Over 256³ voxels the mean is off by hundreds of units in the last
place, and a value that lies 100 standard deviations from zero comes out 1.0 wrong; over 128³ it is
1e-4. Its kernel for means adds in parts, so that the same arithmetic made of means is as exact as
torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MANY = 1 << 12
"""Values that MVN adds up as exactly as is needed: what transformers normalise over."""


def exact_norms(graph: Any) -> int:
    """Replace each MVN over many values, or over an unknown number, by means; returns how many.

    Args:
        graph: an ``openvino.Model``, changed in place.
    """
    found = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MVN"]
    wide = [node for node in found if _values(node) > MANY]
    for node in wide:
        made = _of_means(node)
        made.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))
    return len(wide)


def _axes(node: Any) -> list[int]:
    constant = node.input_value(1).get_node()
    rank = node.get_input_partial_shape(0).rank
    if constant.get_type_name() != "Constant" or rank.is_dynamic:
        return []
    return sorted(int(axis) % rank.get_length() for axis in np.ravel(constant.data))


def _values(node: Any) -> float:
    """How many values go into one mean: 0 where the axes are not known, infinite where sizes are
    not.
    """
    shape, axes = node.get_input_partial_shape(0), _axes(node)
    if not axes:
        return 0
    return math.prod(math.inf if shape[n].is_dynamic else shape[n].get_length() for n in axes)


def _of_means(node: Any) -> Any:
    from openvino import opset13 as ops

    told, axes, source = node.get_attributes(), _axes(node), node.input_value(0)
    rows = _rows(node)
    apart = ops.subtract(source, _mean(source, axes, rows))
    if not told["normalize_variance"]:
        return apart
    variance = _mean(ops.multiply(apart, apart), axes, rows)
    # Four times the variance has twice the root, exactly; the plain form would become one kernel
    # (RMS) that adds up as MVN does.
    four, half = ops.constant(np.float32(4)), ops.constant(np.float32(0.5))
    inside = str(told["eps_mode"]).lower() == "inside_sqrt"
    quadruple = ops.multiply(variance, four)
    if inside:
        quadruple = ops.add(quadruple, ops.constant(np.float32(4 * told["eps"])))
    spread = ops.multiply(ops.sqrt(quadruple), half)
    if not inside:
        spread = ops.add(spread, ops.constant(np.float32(told["eps"])))
    return ops.divide(apart, spread)


def _rows(node: Any) -> int:
    """Rows that values along one last axis are cut into: each is added up first; 0: not to be cut.

    Group normalisation has all voxels of a group along one axis.
    """
    shape, axes = node.get_input_partial_shape(0), _axes(node)
    last = shape.rank.get_length() - 1
    if axes != [last] or shape[last].is_dynamic:
        return 0
    size = shape[last].get_length()
    return next((size // n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 0)


def _mean(values: Any, axes: list[int], rows: int = 0) -> Any:
    """The mean along axes, first along the last one, or along rows that it is cut into.

    It is doubled and halved in between, which is exact: OpenVINO would join two means and make an
    MVN of all of it again.
    """
    from openvino import opset13 as ops

    if rows:
        (last,) = axes
        cut = ops.constant(np.array([0] * last + [rows, -1], np.int64))
        mean = _mean(ops.reshape(values, cut, special_zero=True), [last, last + 1])
        whole = ops.constant(np.array([0] * last + [1], np.int64))
        return ops.reshape(mean, whole, special_zero=True)
    *outer, last = axes
    mean = ops.reduce_mean(values, ops.constant(np.array([last], np.int64)), keep_dims=True)
    mean = ops.multiply(mean, ops.constant(np.float32(2)))
    if outer:
        along = ops.constant(np.array(outer, np.int64))
        mean = ops.reduce_mean(mean, along, keep_dims=True)
    return ops.multiply(mean, ops.constant(np.float32(0.5)))
