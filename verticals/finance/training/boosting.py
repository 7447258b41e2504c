"""Boosted trees by LightGBM, as a module that serving needs no LightGBM for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError
from plinth.verticals.finance.model import FraudEnsemble, FraudScorer, Trees

SETTINGS: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.03,
    "num_leaves": 31,
    "min_child_samples": 40,
    "subsample": 0.8,
    "subsample_freq": 1,
    "colsample_bytree": 0.8,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}
ROUNDS = 300
SIDES = "left_child", "right_child"


def with_trees(
    network: FraudScorer, rows: npt.NDArray[np.float32], fraud: npt.NDArray[np.bool_], seed: int
) -> FraudEnsemble:
    """A network and trees that are fitted on the same rows, as one model.

    Args:
        network: fitted.
        rows: (n, features); fraud: (n,).
        seed: of the samples of rows and columns.

    Raises:
        ConfigError: LightGBM is not installed.
    """
    try:
        import lightgbm
    except ImportError:
        raise ConfigError(
            "boosted trees need LightGBM, which is not installed",
            hint="pip install lightgbm; serving does not need it",
        ) from None
    booster = lightgbm.train(
        SETTINGS | {"seed": seed}, lightgbm.Dataset(rows, fraud.astype(np.float32)), ROUNDS
    )
    grown = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
    return FraudEnsemble(network, as_module(grown)).eval()


def as_module(grown: list[dict[str, Any]]) -> Trees:
    """Trees as LightGBM dumps them, the root of each, as a module."""
    made = Trees(len(grown), max(1, *map(_inner, grown)))
    for tree, root in enumerate(grown):
        _fill(made, tree, root)
    return made


def _inner(node: dict[str, Any]) -> int:
    """Nodes of a tree that ask something."""
    return 0 if "leaf_value" in node else 1 + sum(_inner(node[side]) for side in SIDES)


def _fill(made: Trees, tree: int, root: dict[str, Any]) -> None:
    """Number nodes and leaves as they are met; enter what each asks, or is worth and lies below."""
    waiting: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [(root, [])]
    nodes = leaves = 0
    while waiting:
        node, path = waiting.pop()
        if "leaf_value" in node:
            for above, way in path:
                made.path[tree, above, leaves] = way
            made.lefts[tree, leaves] = sum(way > 0 for _, way in path)
            made.leaf[tree, leaves] = node["leaf_value"]
            leaves += 1
            continue
        made.feature[tree, nodes] = node["split_feature"]
        made.threshold[tree, nodes] = _down(node["threshold"])
        waiting += [
            (node[side], [*path, (nodes, way)]) for side, way in zip(SIDES, (1, -1), strict=True)
        ]
        nodes += 1


def _down(threshold: float) -> float:
    """The largest float32 up to a threshold: float32 rows fall on the same side of both."""
    near = np.float32(threshold)
    return float(np.nextafter(near, np.float32(-np.inf)) if float(near) > threshold else near)
