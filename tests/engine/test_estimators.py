"""Fitted estimators become models, and say what they say at home."""

import warnings

import numpy as np
import pytest
import torch

from plinth.engine import Call, Engine, Model, ModelError, ModelStore

pytestmark = pytest.mark.needs("sklearn", "skl2onnx", "onnxmltools")


@pytest.fixture(scope="module")
def table():
    """Rows of five features, a class and a number."""
    noise = np.random.default_rng(0)
    rows = noise.normal(size=(200, 5)).astype(np.float32)
    return rows, (rows[:, 0] + rows[:, 1] > 0).astype(int), rows @ np.arange(5.0)


def classifiers():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    yield LogisticRegression()
    yield make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0))


def boosted():
    import lightgbm
    import xgboost
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    yield make_pipeline(StandardScaler(), lightgbm.LGBMClassifier(n_estimators=5, verbose=-1))
    yield xgboost.XGBClassifier(n_estimators=5)


def served(model, rows):
    def flow():
        return (yield Call(model.spec.name, rows))

    with Engine() as engine:
        engine.add(model)
        return engine.run(flow()).value


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "make", [classifiers, pytest.param(boosted, marks=pytest.mark.needs("lightgbm", "xgboost"))]
)
def test_a_classifier_gives_labels_and_probabilities(table, tmp_path, make, number):
    rows, classes, _ = table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of features that arrays do not have
        estimator = list(make())[number].fit(rows, classes)
        model = Model.from_sklearn(estimator, example=rows[:50], name="risk")
        wanted = estimator.predict(rows), estimator.predict_proba(rows)
    store = ModelStore(tmp_path)
    store.add(model)
    report = store.report("risk")
    assert report["kind"] == "estimator"
    assert report["rows"] >= 50
    assert report["largest_difference"] <= 1e-5
    assert {"scikit-learn", "onnxruntime"} <= set(report["libraries"])
    found = served(store.load("risk"), torch.from_numpy(rows))
    assert np.array_equal(found["label"].numpy(), wanted[0])
    assert np.allclose(found["probabilities"].numpy(), wanted[1], atol=1e-5)


@pytest.mark.needs("lightgbm")
@pytest.mark.parametrize("kind", ["lightgbm", "histogram"])
def test_rows_on_a_threshold_take_the_branch_they_take_at_home(kind):
    """Both compare in float64, rows are float32: the nearest float32 threshold is often above."""
    import lightgbm
    from sklearn.ensemble import HistGradientBoostingClassifier

    noise = np.random.default_rng(0)
    values = noise.gamma(2, 50, (2000, 2))
    classes = (values[:, 0] > 150) | (values[:, 1] < 40)
    made = {
        "lightgbm": lightgbm.LGBMClassifier(n_estimators=10, verbose=-1),
        "histogram": HistGradientBoostingClassifier(max_iter=10),
    }[kind]
    estimator = made.fit(values, classes)
    if kind == "lightgbm":
        splits = estimator.booster_.trees_to_dataframe()["threshold"].dropna()
    else:
        trees = [tree for (tree,) in estimator._predictors]
        splits = np.concatenate([t.nodes["num_threshold"][t.nodes["is_leaf"] == 0] for t in trees])
    near = np.asarray(splits, np.float32)
    beside = [near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1e9))]
    rows = noise.choice(np.concatenate(beside), (500, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of features that arrays do not have
        model = Model.from_sklearn(estimator, example=values[:5], name="m")
        wanted = estimator.predict_proba(rows)
    found = model.run({"X": torch.from_numpy(rows)})["probabilities"]
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.needs("lightgbm", "xgboost")
def test_trees_that_would_answer_otherwise_are_refused(table):
    import lightgbm
    import xgboost
    from sklearn.ensemble import HistGradientBoostingClassifier

    rows, classes, _ = table
    rows = np.where(rows < -1, 0, rows)
    codes = np.abs(rows).round().astype(int)
    times = 1_700_000_000 + np.arange(1000.0).reshape(200, 5)
    few = {"n_estimators": 5}
    for estimator, example, said in (
        (lightgbm.LGBMClassifier(**few, zero_as_missing=True, verbose=-1), rows, "other answers"),
        (HistGradientBoostingClassifier(categorical_features=[1]), codes, "other answers"),
        (xgboost.XGBClassifier(**few, booster="dart"), rows, "booster dart cannot be converted"),
        (lightgbm.LGBMClassifier(**few, verbose=-1), times, "whole numbers as 17000000"),
    ):
        fitted = estimator.fit(example, classes)
        with pytest.raises(ModelError, match=said):
            Model.from_sklearn(fitted, example=example, name="m")


def test_a_regressor_gives_a_number(table):
    from sklearn.linear_model import LinearRegression

    rows, _, numbers = table
    model = Model.from_sklearn(LinearRegression().fit(rows, numbers), example=rows)
    assert model.spec.name == "linearregression"
    found = served(model, torch.from_numpy(rows))
    assert np.allclose(found[:, 0].numpy(), numbers, atol=1e-4)


def test_what_an_estimator_gives_otherwise_is_left_out_on_request(table):
    from sklearn.svm import SVC

    rows, classes, _ = table
    machine = SVC().fit(rows, classes)
    with pytest.raises(ModelError, match=r"no counterpart in SVC.*outputs=\['label'\]"):
        Model.from_sklearn(machine, example=rows, name="svc")
    model = Model.from_sklearn(machine, example=rows, name="svc", outputs=["label"])
    assert np.array_equal(served(model, torch.from_numpy(rows)).numpy(), machine.predict(rows))


def test_what_is_no_fitted_estimator_of_numbers_is_refused(table):
    from sklearn.linear_model import LogisticRegression

    rows, classes, _ = table
    words = LogisticRegression().fit(rows, np.array(["no", "yes"])[classes])
    fitted = LogisticRegression().fit(rows, classes)
    for estimator, example, said in (
        (LogisticRegression(), rows, "cannot be converted.*fit it first"),
        (words, rows, "output label is text.*probabilities"),
        (fitted, rows[0], r"shape \(5,\), expected \(rows, features\)"),
        (fitted, rows[:0], "expected"),
        (fitted, np.array([["a"] * 5]), "no table of numbers"),
        (fitted, np.full((2, 5), 1e300), "beyond float32"),
        (fitted, rows[:, :4], "takes 5 features, the example has 4"),
        (torch.nn.Linear(5, 1), rows, "Linear of torch, not an estimator"),
        ("a file.pkl", rows, "str of builtins, not an estimator"),
    ):
        with pytest.raises(ModelError, match=said):
            Model.from_sklearn(estimator, example=example, name="m")
