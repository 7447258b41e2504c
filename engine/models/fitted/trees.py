"""Trees in float32: where their thresholds lie, and which that float32 rows meet exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plinth.engine.errors import ModelError

ROWS = 256
"""Rows that :func:`rows_at_thresholds` makes."""
_TREES = ("TreeEnsembleClassifier", "TreeEnsembleRegressor")
_ZERO = np.float32(1e-35)
"""LightGBM takes what is nearer to 0 for 0, and has thresholds there."""
_CATEGORICAL = 1
"""Bit of ``decision_type`` in LightGBM's files: the threshold is the number of a set."""


def rows_at_thresholds(onnx: Path, features: int) -> Tensor | None:
    """Rows that lie on the thresholds of the trees in an ONNX file and next to them.

    Rows made up without the file reach few of the leaves; these part a tree from one whose
    thresholds were rounded.

    Args:
        onnx: the file.
        features: columns of its rows.

    Returns:
        float32 (:data:`ROWS`, features), or None where no tree reads the rows as they come in.
    """
    found = _thresholds(onnx)
    if not found:
        return None
    numbers = np.random.default_rng(0)
    rows = np.empty((ROWS, features), np.float32)
    for feature in range(features):
        at, codes = (np.array(sorted(one), np.float32) for one in found.get(feature, ((), ())))
        beside = [np.nextafter(at, np.float32(edge)) for edge in (-np.inf, np.inf)]
        rows[:, feature] = numbers.choice(np.concatenate([at, *beside, codes, [0, 1]]), ROWS)
    rows[np.abs(rows) <= _ZERO] = 0
    return torch.from_numpy(rows)


def convertible(estimator: Any) -> Any:
    """The same estimator as converters take it: thresholds in float32, features without names.

    LightGBM and scikit-learn's histogram boosting compare in float64: ``x <= t``. Of float32 x
    that holds exactly where x is at most the largest float32 number that is not above t; the
    nearest one, which converters take, may be above it.

    Args:
        estimator: a booster, an estimator, or a pipeline that ends in one; others than these of
            trees are returned as they are. It is not changed.

    Raises:
        ModelError: trees of XGBoost for which there is no converter.
    """
    library, name = type(estimator).__module__.partition(".")[0], type(estimator).__name__
    if library == "sklearn" and name == "Pipeline":
        made = copy.copy(estimator)
        made.steps = [*estimator.steps[:-1], (estimator.steps[-1][0], convertible(estimator[-1]))]
        return made
    if library == "lightgbm" and name == "Booster":
        return _lightgbm(estimator)
    if library == "lightgbm" and hasattr(estimator, "_Booster"):
        made = copy.copy(estimator)
        made._Booster = _lightgbm(estimator.booster_)
        if np.asarray(getattr(made, "_classes", 0)).dtype == bool:
            made._classes = made._classes.astype(np.int64)  # of bools the converter makes words
        return made
    if library == "xgboost" and hasattr(estimator, "get_booster"):
        return _xgboost(estimator)
    if name.startswith("HistGradientBoosting") and hasattr(estimator, "_predictors"):
        made = copy.copy(estimator)
        made._predictors = copy.deepcopy(estimator._predictors)
        for tree in (tree for round_ in made._predictors for tree in round_):
            tree.nodes["num_threshold"] = _at_most(tree.nodes["num_threshold"])
        return made
    return estimator


def _xgboost(estimator: Any) -> Any:
    """Without the names of features, which its converter takes for errors."""
    booster = estimator.get_booster()
    kind = json.loads(booster.save_config())["learner"]["gradient_booster"]["name"]
    if kind != "gbtree" or "c" in (booster.feature_types or ()):
        what = "categories" if kind == "gbtree" else f"booster {kind}"
        raise ModelError(
            f"XGBoost's {what} cannot be converted",
            hint="train with booster='gbtree' and categories as numbers, or call it from a "
            "vertical's flow",
        )
    plain = copy.deepcopy(estimator)
    plain.get_booster().feature_names = plain.get_booster().feature_types = None
    return plain


def _at_most(thresholds: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The largest float32 numbers that are not above thresholds, as float64."""
    exact = np.asarray(thresholds, np.float64)
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    below = np.nextafter(near, np.float32(-np.inf))
    return np.where(near > exact, below, near).astype(np.float64)


def _lightgbm(booster: Any) -> Any:
    """A booster of the same trees with thresholds in float32."""
    import lightgbm

    return lightgbm.Booster(model_str="\n".join(_rewritten(booster.model_to_string().split("\n"))))


def _rewritten(lines: list[str]) -> Iterator[str]:
    """LightGBM's text with thresholds in float32, without the sizes of trees, which change."""
    kinds = [line.partition("=")[2].split() for line in lines if line.startswith("decision_type=")]
    trees = iter(kinds)
    for line in lines:
        name, _, value = line.partition("=")
        if name == "threshold":
            told = value.split()
            low = _at_most([float(one) for one in told])
            yield "threshold=" + " ".join(
                one if int(kind) & _CATEGORICAL else repr(float(new))
                for one, new, kind in zip(told, low, next(trees), strict=True)
            )
        elif name != "tree_sizes":
            yield line


def _thresholds(onnx: Path) -> dict[int, tuple[set[float], set[float]]]:
    """What trees that read the first input compare each feature with: numbers, categories."""
    import onnx as library

    graph = library.load(str(onnx), load_external_data=False).graph
    found: dict[int, tuple[set[float], set[float]]] = {}
    for node in graph.node:
        if node.op_type not in _TREES or node.input[0] != graph.input[0].name:
            continue
        told = {one.name: one for one in node.attribute}
        splits = zip(
            told["nodes_featureids"].ints,
            told["nodes_values"].floats,
            told["nodes_modes"].strings,
            strict=True,
        )
        for feature, value, mode in splits:
            if mode != b"LEAF":
                found.setdefault(feature, (set(), set()))[mode == b"BRANCH_EQ"].add(value)
    return found
