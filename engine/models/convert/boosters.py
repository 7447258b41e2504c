"""Boosted trees in their libraries' own files: LightGBM's text, XGBoost's JSON and UBJSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.errors import ModelError
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.fidelity import Run, compare
from plinth.engine.models.fitted import estimators
from plinth.engine.models.fitted.trees import rows_at_thresholds
from plinth.engine.models.onnx import OnnxModule, read_contract
from plinth.engine.models.signature import given_rows
from plinth.engine.models.spec import spec_of
from plinth.engine.models.store import Model

_INSTALL = "pip install 'plinth-engine[convert]' and the library"
_ROWS = 64


def read(path: Path, request: Request) -> Source:
    """A file that ``booster.save_model`` wrote.

    The model takes ``X``, float32 rows of the features, and gives ``label`` and
    ``probabilities``, or ``variable`` for a number. The names of the features, where the file has
    them, are in the facts, and as ``missing`` the places of those that may be NaN.

    Raises:
        ModelError: its library is not installed, it is no such file, or it cannot be converted.
    """
    try:
        booster, features, run, missing = (
            _lightgbm(path) if path.suffix.lower() == ".txt" else _xgboost(path)
        )
    except ImportError as error:
        raise ModelError(f"reading {path} needs {error.name}", hint=_INSTALL) from error
    given = (request.example or {}).get(estimators.INPUT, (request.example or {}).get(""))
    noise = np.random.default_rng(0).normal(size=(_ROWS, len(features)))
    rows = estimators.as_rows(noise if given is None else given, request.name)
    onnx = estimators.to_onnx(booster, rows, request.name)
    met = rows_at_thresholds(onnx, len(features))
    rows = met if given is None and met is not None else rows
    spec = spec_of(
        onnx, read_contract(onnx, request.options.outputs), request.name, request.version
    ).model_copy(update={"source": path.name})
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    example = given_rows(request.name, spec.inputs, {estimators.INPUT: rows})
    model = Model(spec, OnnxModule(onnx, *names).eval(), onnx, example)
    named = [name for name in features if name]

    def at_home(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in run(given).items() if key in names[1]}

    if met is not None and rows is not met:
        compare(request.name, model.run, at_home, {estimators.INPUT: met})
    return Source(
        model,
        run=at_home,
        facts={
            "kind": "booster",
            "features": named if len(named) == len(features) else [],
            "missing": _missing(model, at_home, missing),
        },
        libraries=estimators.LIBRARIES,
    )


Found = tuple[Any, list[str], Run, list[int]]
"""What is converted, names of its features or "", its own answers, features that may be NaN."""


def _missing(model: Model, at_home: Run, wanted: list[int]) -> list[int]:
    """Of the features that may be NaN those for which the converted model answers as at home."""
    rows = (model.example or {})[estimators.INPUT]
    kept = []
    for feature in wanted:
        holed = rows.clone()
        holed[:, feature] = float("nan")
        with contextlib.suppress(ModelError):  # it answers otherwise: NaN is refused there
            compare(model.spec.name, model.run, at_home, {estimators.INPUT: holed})
            kept.append(feature)
    return kept


def _lightgbm_missing(booster: Any) -> list[int]:
    """Features whose every split says where NaN goes; at others LightGBM takes it for 0."""
    told: dict[int, set[str]] = {}
    nodes = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
    while nodes:
        node = nodes.pop()
        if "split_feature" in node:
            told.setdefault(node["split_feature"], set()).add(node["missing_type"])
            nodes += [node["left_child"], node["right_child"]]
    return sorted(feature for feature, kinds in told.items() if kinds == {"NaN"})


def _lightgbm(path: Path) -> Found:
    import lightgbm

    try:
        booster = lightgbm.Booster(model_file=str(path))
        classes = int(booster.dump_model(num_iteration=1).get("num_class", 1))
        objective = str(booster.dump_model(num_iteration=1).get("objective", "")).partition(" ")[0]
    except (lightgbm.basic.LightGBMError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} is not a model file of LightGBM",
            hint="write it with booster.save_model('model.txt')",
        ) from error
    names = [str(name) for name in booster.feature_name()]
    made_up = names == [f"Column_{number}" for number in range(len(names))]
    chance = classes > 1 or objective in ("binary", "cross_entropy", "xentropy")
    named = [""] * len(names) if made_up else names
    return booster, named, _running(booster.predict, chance), _lightgbm_missing(booster)


def _xgboost(path: Path) -> Found:
    import xgboost

    try:
        booster = xgboost.Booster(model_file=str(path))
        objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
        chance = objective.startswith(("binary:logistic", "multi:"))
        estimator = (xgboost.XGBClassifier if chance else xgboost.XGBRegressor)()
        estimator.load_model(str(path))
    except (xgboost.core.XGBoostError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a model file of XGBoost",
            hint="write it with model.save_model('model.ubj')",
        ) from error
    names = [str(name) for name in booster.feature_names or [""] * booster.num_features()]
    predict = estimator.predict_proba if chance else estimator.predict
    return estimator, names, _running(predict, chance), list(range(len(names)))


def _running(predict: Callable[[Any], Any], chance: bool) -> Run:
    """The library's own answers by the names of the outputs."""

    def run(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = np.asarray(predict(rows[estimators.INPUT].numpy()), np.float32)
        if not chance:
            return {"variable": torch.from_numpy(found).reshape(len(found), -1)}
        if found.ndim == 1:
            found = np.stack([1 - found, found], 1)
        shares = torch.from_numpy(found)
        return {"label": shares.argmax(1), "probabilities": shares}

    return run
