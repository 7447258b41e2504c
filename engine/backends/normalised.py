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
    apart = ops.subtract(source, _mean(source, axes))
    if not told["normalize_variance"]:
        return apart
    variance = _mean(ops.multiply(apart, apart), axes)
    eps = ops.constant(np.float32(told["eps"]))
    if str(told["eps_mode"]).lower() == "inside_sqrt":
        return ops.divide(apart, ops.sqrt(ops.add(variance, eps)))
    return ops.divide(apart, ops.add(ops.sqrt(variance), eps))


def _mean(values: Any, axes: list[int]) -> Any:
    """The mean along axes, first along the last one.

    It is doubled and halved in between, which is exact: OpenVINO would join two means and make an
    MVN of all of it again.
    """
    from openvino import opset13 as ops

    *outer, last = axes
    mean = ops.reduce_mean(values, ops.constant(np.array([last], np.int64)), keep_dims=True)
    mean = ops.multiply(mean, ops.constant(np.float32(2)))
    if outer:
        along = ops.constant(np.array(outer, np.int64))
        mean = ops.reduce_mean(mean, along, keep_dims=True)
    return ops.multiply(mean, ops.constant(np.float32(0.5)))
