"""``plinth serve-model``: a model behind HTTP; every wrong record is a clear 4xx."""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
from serving import Running, await_ready, error, running, until
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import Command

from plinth.engine import (
    ConfigError,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    Sla,
    TensorSpec,
)
from plinth.engine.models.convert import Options
from plinth.pipelines.cli.serve_model import (
    feature_names,
    milliseconds,
    model_at,
    store_entry,
)
from plinth.pipelines.served_model import served, vertical_name
from plinth.verticals.testing import checks, run_with_models

JSON = {"content-type": "application/json"}


class Mixed(nn.Module):
    """Takes a picture, token ids of any length and a switch."""

    def forward(self, picture: Tensor, ids: Tensor, on: Tensor) -> dict[str, Tensor]:
        total = picture.sum((1, 2)) + ids.float().sum(1)
        return {"total": torch.where(on, total, -total), "root": total.sqrt()[:, None]}


def mixed() -> Model:
    spec = ModelSpec(
        name="mixed-inputs",
        version="2.1",
        inputs=(
            TensorSpec(name="picture", shape=(2, 3)),
            TensorSpec(name="ids", shape=(None,), dtype="int64", bounds=(0, 99)),
            TensorSpec(name="on", shape=(), dtype="bool"),
        ),
        outputs=(TensorSpec(name="total", shape=()), TensorSpec(name="root", shape=(1,))),
    )
    return Model(spec, Mixed().eval())


def linear(features: int = 3) -> Model:
    net = nn.Linear(features, 1).eval()
    net.weight.data = torch.arange(1.0, features + 1)[None]
    net.bias.data.zero_()
    spec = ModelSpec(
        name="risk",
        inputs=(TensorSpec(name="x", shape=(features,)),),
        outputs=(TensorSpec(name="score", shape=(1,)),),
    )
    return Model(spec, net)


RECORD: dict[str, Any] = {"picture": [[1, 2, 3], [4, 5, 6]], "ids": [1, 2, 3, 4], "on": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    verticals = [
        served(mixed(), sla=Sla(deadline_ms=60_000)),
        served(linear(), features=("amount", "age (years)", "n")),
    ]
    with running({vertical.name: vertical for vertical in verticals}) as found:
        yield found


@pytest.mark.parametrize("check", checks(served(mixed())), ids=str)
def test_it_keeps_the_contract_of_verticals(check: Any) -> None:
    check()


def test_records_by_input_name_alone_and_as_a_batch_of_many_shapes(server: Running) -> None:
    one = server.post("/v1/mixed_inputs/predict", json=RECORD)
    assert one.json() == {"total": 31.0, "root": [pytest.approx(31**0.5)]}
    assert one.headers["x-plinth-models"] == "mixed-inputs=2.1"
    others = [RECORD | {"ids": [1] * n, "on": n % 2 == 0} for n in (1, 4, 2, 4)]
    many = server.post("/v1/mixed_inputs/predict", json=[*others, RECORD | {"ids": [100]}]).json()
    totals = [entry["result"]["total"] for entry in many["results"][:4]]
    assert totals == [-22.0, 25.0, 23.0, 25.0]
    assert many["results"][4]["error"]["field"] == "ids.0"


def test_records_by_feature_name(server: Running) -> None:
    record = {"n": 3, "amount": 10.5, "age (years)": 2}
    assert server.post("/v1/risk/predict", json=record).json() == {"score": [10.5 + 4 + 9]}


@pytest.mark.parametrize(
    ("route", "raw", "status", "field"),
    [
        ("risk", {"amount": 1, "n": 2}, 422, "age (years)"),
        ("risk", {"amount": 1, "age (years)": 1, "n": 2, "m": 1}, 422, "m"),
        ("risk", '{"amount": NaN, "age (years)": 1, "n": 2}', 422, "amount"),
        ("risk", '{"amount": 1e39, "age (years)": 1, "n": 2}', 422, "amount"),
        ("risk", {"amount": "1", "age (years)": 1, "n": 2}, 422, "amount"),
        ("risk", {"amount": None, "age (years)": 1, "n": 2}, 422, "amount"),
        ("risk", {"amount": True, "age (years)": 1, "n": 2}, 422, "amount"),
        ("risk", '{"amount": 1', 400, None),
        ("mixed_inputs", RECORD | {"picture": [[1, 2, 3]]}, 422, "picture"),
        ("mixed_inputs", RECORD | {"picture": [[1, 2, 3], [4, 5]]}, 422, "picture.1"),
        ("mixed_inputs", RECORD | {"picture": 1}, 422, "picture"),
        ("mixed_inputs", RECORD | {"ids": [1.5]}, 422, "ids.0"),
        ("mixed_inputs", RECORD | {"ids": [-1]}, 422, "ids.0"),
        ("mixed_inputs", RECORD | {"ids": []}, 422, "ids"),
        ("mixed_inputs", RECORD | {"on": 1}, 422, "on"),
        ("mixed_inputs", {}, 422, "picture"),
    ],
)
def test_a_wrong_record_is_a_clear_4xx(
    server: Running, route: str, raw: Any, status: int, field: str | None
) -> None:
    content = raw if isinstance(raw, str) else json.dumps(raw)
    answer = server.post(f"/v1/{route}/predict", content=content)
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert found["field"] == field
    assert found["message"]
    assert found["hint"]


def test_an_answer_that_json_cannot_say_is_refused_and_its_neighbour_answered(
    server: Running,
) -> None:
    negative = RECORD | {"picture": [[-9, -9, -9], [-9, -9, -9]], "ids": [0]}
    error(server.post("/v1/mixed_inputs/predict", json=negative), 422, "not_finite")
    both = server.post("/v1/mixed_inputs/predict", json=[negative, RECORD | {"ids": [10]}]).json()
    assert both["results"][0]["error"]["reason"] == "not_finite"
    assert both["results"][1]["result"]["total"] == 31.0


def test_the_deadline_is_kept_by_the_engine(server: Running) -> None:
    headers = {"x-slo-deadline-ms": "0.001"}
    found = server.post("/v1/mixed_inputs/predict", json=RECORD, headers=headers)
    error(found, 503, "deadline")


def test_schema_and_docs_are_served(server: Running) -> None:
    assert server.client.get("/docs").status_code == 200
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    record = schemas["risk.Record"]
    assert list(record["properties"]) == ["amount", "age (years)", "n"]
    assert record["additionalProperties"] is False
    picture = schemas["mixed_inputs.Record"]["properties"]["picture"]
    assert (picture["minItems"], picture["items"]["maxItems"]) == (2, 3)


# -- files -------------------------------------------------------------------------------------


def exported(folder: Path) -> Path:
    rows = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        linear().module, (torch.randn(4, 3),), dynamic_shapes=({0: rows},)
    )
    torch.export.save(program, folder / "risk.pt2")
    return folder / "risk.pt2"


def test_one_line_serves_an_export_until_it_is_told_to_stop(tmp_path: Path) -> None:
    path = exported(tmp_path)
    words = ["plinth", "serve-model", str(path), "--name", "lin-1", "--deadline", "30s"]
    words += ["--port", "0", "--json", "--features", "a,b,c"]
    plain = {"PLINTH_ENGINE__BACKEND": "eager", "PLINTH_ENGINE__PRECISION": "fp32"}
    command = Command(words, tmp_path, plain, tmp_path / "said.txt")
    try:
        until(lambda: command.said.rstrip().endswith("\n}") or command.wait(0) is not None)
        assert command.wait(0) is None, command.said
        told = json.loads(command.said[command.said.index("{\n") :])
        assert told["deadline_ms"] == 30_000
        assert told["features"] == ["a", "b", "c"]
        assert told["route"] == "/v1/lin_1/predict"
        with httpx.Client(base_url=told["url"], timeout=60) as client:
            await_ready(client)
            answer = client.post(told["route"], json={"a": 1, "b": 2, "c": 3})
            assert list(answer.json().values()) == [[14.0]]
            assert client.post(told["route"], json=told["example"]).status_code == 200
        command.signal(signal.SIGTERM)
        assert command.wait(60) == 0, command.said
    finally:
        command.end()


def test_an_entry_of_a_store_is_served_by_version_or_newest(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    for version in ("1.9", "1.10"):
        model = linear()
        spec = model.spec.model_copy(update={"version": version})
        store.add(Model(spec, model.module))
    found = {
        str(path.relative_to(tmp_path)): store_entry(path)
        for path in (store.root / "risk", store.root / "risk" / "1.9")
    }
    assert [entry and entry[2] for entry in found.values()] == [None, "1.9"]
    with model_at(store.root / "risk", None, Options()) as (model, facts):
        assert (model.spec.version, facts) == ("1.10", {"missing": None})
    with model_at(next((store.root / "risk" / "1.9").glob("program*")), None, Options()) as (
        old,
        _,
    ):
        assert old.spec.version == "1.9"


@pytest.mark.needs("lightgbm", "onnxmltools", "sklearn", "xgboost", "skl2onnx")
@pytest.mark.parametrize(
    ("kind", "target"),
    [("lightgbm", "two"), ("lightgbm", "number"), ("xgboost", "three"), ("xgboost", "number")],
)
def test_boosted_trees_answer_as_at_home_from_their_own_files(
    tmp_path: Path, kind: str, target: str
) -> None:
    import lightgbm
    import xgboost

    rows = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    number = rows @ np.array([3.0, 2.0, 1.0], np.float32)
    wanted = {"two": number > 0, "three": np.digitize(number, [-1, 1]), "number": number}[target]
    names = ["amount", "age", "n"]
    regress, plain = target == "number", {"n_estimators": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "lightgbm":
            make = lightgbm.LGBMRegressor if regress else lightgbm.LGBMClassifier
            trees = make(**plain, verbose=-1).fit(rows, wanted, feature_name=names)
            path = tmp_path / "trees.txt"
            trees.booster_.save_model(str(path))
        else:
            trees = (xgboost.XGBRegressor if regress else xgboost.XGBClassifier)(**plain)
            trees.fit(
                pd.DataFrame(rows, columns=names), wanted.astype(int) if not regress else wanted
            )
            path = tmp_path / "trees.ubj"
            trees.save_model(str(path))
        home = trees.predict(rows) if regress else trees.predict_proba(rows)
    with model_at(path, None, Options()) as (model, facts):
        assert facts["features"] == names
        assert facts["missing"] == ([] if kind == "lightgbm" else [0, 1, 2])
        found = model.run({"X": torch.from_numpy(rows)})
    key = "variable" if regress else "probabilities"
    assert np.allclose(found[key].numpy().reshape(home.shape), home, atol=1e-5)


@pytest.mark.needs("lightgbm", "onnxmltools", "sklearn", "xgboost", "skl2onnx")
def test_null_is_a_missing_value_where_the_trees_have_seen_some(tmp_path: Path) -> None:
    """LightGBM says so of each feature, XGBoost of all; elsewhere the field is named."""
    import lightgbm
    import xgboost

    rows = np.random.default_rng(2).normal(size=(400, 2)).astype(np.float32)
    rows[::3, 0] = np.nan
    wanted = np.where(np.isnan(rows[:, 0]), 2.0, rows[:, 0]) + rows[:, 1] > 0.5
    holed = np.array([[np.nan, -1.0], [0.25, 1.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {"n_estimators": 5}
        light = lightgbm.LGBMClassifier(**plain, verbose=-1)
        light.fit(rows, wanted, feature_name=["amount", "age"])
        light.booster_.save_model(str(tmp_path / "light.txt"))
        extreme = xgboost.XGBClassifier(**plain).fit(rows, wanted)
        extreme.save_model(str(tmp_path / "extreme.ubj"))
        home = {"light": light.predict_proba(holed), "extreme": extreme.predict_proba(holed)}
    with (
        model_at(tmp_path / "light.txt", None, Options()) as (first, named),
        model_at(tmp_path / "extreme.ubj", None, Options()) as (second, unnamed),
    ):
        assert (named["missing"], unnamed["missing"]) == ([0], [0, 1])
        verticals = [
            served(first, features=named["features"], missing=named["missing"]),
            served(second, missing=unnamed["missing"]),
        ]
        by_name = {vertical.name: vertical for vertical in verticals}
        with running(by_name, engine={"backend": "onnxruntime"}) as server:
            records = [{"amount": None, "age": -1.0}, {"amount": 0.25, "age": 1.0}]
            found = server.post("/v1/light/predict", json=records).json()["results"]
            told = [one["result"]["probabilities"] for one in found]
            assert np.allclose(told, home["light"], atol=1e-5)
            record = {"X": [None, -1.0]}
            told = server.post("/v1/extreme/predict", json=record).json()["probabilities"]
            assert np.allclose(told, home["extreme"][0], atol=1e-5)
            wrong = server.post("/v1/light/predict", json={"amount": 1.0, "age": None})
            assert wrong.json()["error"]["field"] == "age"


def test_null_in_a_row_without_names_is_refused_at_its_place() -> None:
    vertical = served(linear(3), missing=(0, 2))
    assert vertical.request is not None
    records = [vertical.request.model_validate({"x": x}) for x in ([None, 1, None], [1, None, 1])]
    found = run_with_models(vertical, records)
    assert found[0].reason == "not_finite"  # what a network makes of NaN
    assert found[1].field == "x.1"


@pytest.mark.needs("lightgbm", "xgboost")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.pkl", b"\x80\x05whatever", "pickle"),
        ("model.joblib", b"\x80\x04whatever", "pickle"),
        ("net.pt", b"PK\x03\x04zip", "pickle"),
        ("net.onnx", b"not a graph", "not an ONNX file"),
        ("net.pt2", b"not a program", "net.pt2"),
        ("net.safetensors", b"x" * 20, "without the code"),
        ("trees.txt", b"shopping list", "not a model file of LightGBM"),
        ("trees.json", b'{"learner": 3}', "not a model file of XGBoost"),
        ("trees.ubj", b"{{{{", "not a model file of XGBoost"),
        ("empty.onnx", b"", "is empty"),
        ("model.dat", b"abc", "of no kind that is known"),
        (None, b"", "is not a file or a folder"),
    ],
)
def test_a_file_that_cannot_be_served_says_why(
    tmp_path: Path, name: str | None, content: bytes, said: str
) -> None:
    path = tmp_path / (name or "absent.onnx")
    if name:
        path.write_bytes(content)
    with (
        pytest.raises(ModelError, match=re.escape(said)) as refused,
        model_at(path, None, Options()),
    ):
        pass
    assert refused.value.hint or name in (None, "net.onnx", "net.pt2")


@pytest.mark.parametrize(("text", "found"), [("50ms", 50), ("2s", 2000), ("7", 7), ("500us", 0.5)])
def test_times(text: str, found: float) -> None:
    assert milliseconds(text) == found


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    for text in ("0ms", "-1", "5 minutes", "inf", "2d"):
        with pytest.raises(ConfigError, match="--deadline"):
            milliseconds(text)
    with pytest.raises(ConfigError, match="stands twice"):
        served(linear(), features=("a", "a", "b"))
    with pytest.raises(ConfigError, match=r"2 features are named.*x \[3\]"):
        served(linear(), features=("a", "b"))
    with pytest.raises(ConfigError, match="empty name"):
        feature_names("a,,b")
    (tmp_path / "head.csv").write_text('amount,"age, years",n\n1,2,3\n')
    assert feature_names(str(tmp_path / "head.csv")) == ["amount", "age, years", "n"]
    assert vertical_name("2-Risk.v1") == "m2_risk_v1"
