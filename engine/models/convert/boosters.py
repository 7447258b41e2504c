"""Boosted trees in their libraries' own files: LightGBM's text, XGBoost's JSON and UBJSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.errors import ModelError
from plinth.engine.models import estimators
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.fidelity import Run
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
    them, are in the facts.

    Raises:
        ModelError: its library is not installed, it is no such file, or it cannot be converted.
    """
    try:
        booster, features, run = (
            _lightgbm(path) if path.suffix.lower() == ".txt" else _xgboost(path)
        )
    except ImportError as error:
        raise ModelError(f"reading {path} needs {error.name}", hint=_INSTALL) from error
    given = (request.example or {}).get(estimators.INPUT, (request.example or {}).get(""))
    noise = np.random.default_rng(0)
    rows = given if given is not None else noise.normal(size=(_ROWS, len(features)))
    tensors = {estimators.INPUT: estimators.as_rows(rows, request.name)}
    onnx = estimators.to_onnx(booster, tensors[estimators.INPUT], request.name)
    spec = spec_of(
        onnx, read_contract(onnx, request.options.outputs), request.name, request.version
    ).model_copy(update={"source": path.name})
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    example = given_rows(request.name, spec.inputs, tensors)
    model = Model(spec, OnnxModule(onnx, *names).eval(), onnx, example)
    named = [name for name in features if name]
    return Source(
        model,
        run=lambda given: {key: value for key, value in run(given).items() if key in names[1]},
        facts={"kind": "booster", "features": named if len(named) == len(features) else []},
        libraries=estimators.LIBRARIES,
    )


def _lightgbm(path: Path) -> tuple[Any, list[str], Run]:
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
    return booster, [""] * len(names) if made_up else names, _running(booster.predict, chance)


def _xgboost(path: Path) -> tuple[Any, list[str], Run]:
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
    return estimator, names, _running(predict, chance)


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
