"""Estimators of scikit-learn, LightGBM and XGBoost as ONNX files."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.cache import cache_folder
from plinth.engine.errors import ModelError
from plinth.engine.models.fitted.trees import convertible

_INSTALL = "pip install 'plinth-engine[convert]'"
_OPSET = {"": 18, "ai.onnx.ml": 3}
INPUT = "X"
LIBRARIES = ("scikit-learn", "lightgbm", "xgboost", "skl2onnx", "onnxmltools", "onnxruntime")


def to_onnx(estimator: Any, rows: Tensor, name: str) -> Path:
    """An ONNX file with plain tensors: labels and probabilities, or predictions.

    Args:
        estimator: fitted; of scikit-learn (pipelines too), LightGBM or XGBoost.
        rows: float32 rows (n, features).
        name: of the model, for errors.

    Raises:
        ModelError: it is no such estimator, is not fitted, or its converter cannot convert it.
    """
    library = type(estimator).__module__.partition(".")[0]
    convert = _CONVERTERS.get(library)
    if convert is None or not hasattr(estimator, "predict"):
        raise ModelError(
            f"model {name} is {type(estimator).__name__} of {library}, not an estimator",
            hint=f"known are fitted estimators of {', '.join(_CONVERTERS)}",
        )
    wanted = getattr(estimator, "n_features_in_", rows.shape[1])
    if wanted != rows.shape[1]:
        raise ModelError(
            f"model {name} takes {wanted} features, the example has {rows.shape[1]}",
            hint="give rows as it was fitted on",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = convert(convertible(estimator), rows).SerializeToString()
    except ImportError as error:
        raise ModelError(f"converting {library} needs {error.name}", hint=_INSTALL) from error
    except ModelError:
        raise
    except Exception as error:  # converters raise errors of every kind
        reason = str(error).strip().partition("\n")[0][:200]
        raise ModelError(
            f"model {name} cannot be converted: {type(error).__name__}: {reason}",
            hint="fit it first; what has no ONNX converter can be served from a vertical's flow",
        ) from error
    path = cache_folder("onnx") / f"estimator-{hashlib.sha256(data).hexdigest()}.onnx"
    if not path.is_file():
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)
    return path


def _sklearn(estimator: Any, rows: Tensor) -> Any:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.base import is_classifier

    _know_boosted()
    return convert_sklearn(
        estimator,
        initial_types=[(INPUT, FloatTensorType([None, rows.shape[1]]))],
        options={id(estimator): {"zipmap": False}} if is_classifier(estimator) else None,
        target_opset=_OPSET,
        custom_conversion_functions=_histograms(),
    )


@cache
def _know_boosted() -> None:
    """Let skl2onnx convert what ends a pipeline in LightGBM or XGBoost, where they are there."""
    with contextlib.suppress(ImportError):
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        _know(lightgbm.LGBMClassifier, convert_lightgbm)
        _know(lightgbm.LGBMRegressor, convert_lightgbm, split=None)
    with contextlib.suppress(ImportError):
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        _know(xgboost.XGBClassifier, convert_xgboost)
        _know(xgboost.XGBRegressor, convert_xgboost)


def _know(made: type, convert: Any, **options: Any) -> None:
    """Have skl2onnx convert estimators of a class so."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common import shape_calculator as shapes

    shape = shapes.calculate_linear_regressor_output_shapes
    if made.__name__.endswith("Classifier"):
        shape = shapes.calculate_linear_classifier_output_shapes
        options |= {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    update_registered_converter(
        made, f"Boosted{made.__name__}", shape, convert, options=options or None
    )


def _histograms() -> dict[type, Callable[[Any, Any, Any], None]]:
    """Converters of histogram boosting, whose lists of bools onnx no longer takes for integers."""
    from skl2onnx.operator_converters import random_forest as trees
    from sklearn import ensemble

    def plain(convert: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
        return lambda scope, operator, container: convert(scope, operator, _Integers(container))

    return {
        ensemble.HistGradientBoostingClassifier: plain(
            trees.convert_sklearn_random_forest_classifier
        ),
        ensemble.HistGradientBoostingRegressor: plain(
            trees.convert_sklearn_random_forest_regressor_converter
        ),
    }


class _Integers:
    """A container of skl2onnx that takes lists of bools for integers."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, *given: Any, **attributes: Any) -> None:
        """As the container's."""
        plain = {
            name: [int(one) if isinstance(one, bool) else one for one in value]
            if isinstance(value, list)
            else value
            for name, value in attributes.items()
        }
        self._container.add_node(*given, **plain)


def _boosted(converter: str, **options: Any) -> Callable[[Any, Tensor], Any]:
    def convert(estimator: Any, rows: Tensor) -> Any:
        import onnxmltools
        from onnxmltools.convert.common.data_types import FloatTensorType

        types = [(INPUT, FloatTensorType([None, rows.shape[1]]))]
        return getattr(onnxmltools, converter)(estimator, initial_types=types, **options)

    return convert


_CONVERTERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "sklearn": _sklearn,
    "lightgbm": _boosted("convert_lightgbm", zipmap=False),
    "xgboost": _boosted("convert_xgboost"),
}


def predictor(
    estimator: Any, outputs: Mapping[str, tuple[int | None, ...]]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The estimator by its own library.

    Args:
        estimator: what predicts.
        outputs: the shape of a row by the name of an output of its ONNX file.
    """

    def run(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (given,) = rows.values()
        found = {}
        for name, shape in outputs.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # feature names that arrays do not have
                array = np.asarray(getattr(estimator, _method(estimator, name))(given.numpy()))
            sizes = (len(given), *(1 if size is None else size for size in shape))
            if array.size != np.prod(sizes):
                raise ModelError(
                    f"output {name} has no counterpart in {type(estimator).__name__} to hold it "
                    "against",
                    hint=f"keep others, outputs={[key for key in outputs if key != name]}",
                )
            kind = torch.int64 if array.dtype.kind in "iub" else torch.float32
            found[name] = torch.from_numpy(array).to(kind).reshape(sizes)
        return found

    return run


def _method(estimator: Any, output: str) -> str:
    """Labels and values are predicted; what else an ONNX file gives is said by other methods."""
    others = ("predict_proba", "decision_function", "transform")
    if output in ("label", "output_label", "variable"):
        return "predict"
    return next((name for name in others if hasattr(estimator, name)), "predict")


def as_rows(example: Any, name: str) -> Tensor:
    """Rows (n, features) in float32 from an array, a tensor or a data frame of numbers.

    Raises:
        ModelError: not two-dimensional, empty, not numbers, beyond float32, or whole numbers that
            float32 rounds.
    """
    try:
        array = np.asarray(example)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{array.dtype} are not numbers")
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"model {name}: the example is no table of numbers: {error}",
            hint="encode words as numbers in the pipeline's place: rows of the engine are numbers",
        ) from error
    if array.ndim != 2 or not array.size:
        raise ModelError(
            f"model {name}: the example has shape {array.shape}, expected (rows, features)"
        )
    with np.errstate(over="ignore"):
        rows = torch.from_numpy(array.astype(np.float32))
    if bool((rows.isinf() & ~torch.from_numpy(np.isinf(array.astype(np.float64)))).any()):
        raise ModelError(f"model {name}: the example has numbers beyond float32")
    whole = array.astype(np.float64)
    lost = (whole == np.floor(whole)) & (rows.double().numpy() != whole)
    if lost.any():
        row, column = np.argwhere(lost)[0]
        raise ModelError(
            f"model {name}: column {column} of the example has whole numbers as "
            f"{whole[row, column]:.0f}, which rows in float32 cannot tell from their neighbours",
            hint="fit on smaller numbers: a time since some day, a code in place of an id",
        )
    return rows
