"""From a config to an engine: names of models, the store, settings of several configs."""

import os
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from plinth.engine import (
    Call,
    ConfigError,
    Model,
    ModelSpec,
    ModelStore,
    TensorSpec,
    architecture,
    from_pretrained,
)
from plinth.pipelines.assembly import build_engine, models_of, store_path
from plinth.pipelines.config.settings import Config
from plinth.verticals import Vertical

EAGER = {"engine": {"backend": "eager"}}
SPEC = ModelSpec(
    name="risk",
    inputs=(TensorSpec(name="x", shape=(1,)),),
    outputs=(TensorSpec(name="y", shape=(1,)),),
)


class Number(BaseModel):
    v: float


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


def bringing(name: str, factor: float) -> Vertical:
    class Brings(Vertical[Number, Number]):
        request = response = Number
        summary = "multiplies"

        def models(self):
            return [Model(SPEC, Times(factor).eval())]

        def example(self):
            return Number(v=1)

        def infer(self, requests):
            y = yield Call("risk", torch.tensor([[r.v] for r in requests]))
            return [Number(v=value) for value in y[:, 0].tolist()]

    Brings.name = name
    return Brings()


def test_settings_of_accelerators_reach_the_engine_which_says_what_its_device_has():
    one = Config(engine={"device": "cpu", "pipeline_depth": 1, "graphs": True})
    assert str(build_engine(one, {}).device) == "cpu"
    two = Config(engine={"device": "cpu", "pipeline_depth": 2})
    with pytest.raises(ConfigError, match="pipeline_depth is 2, expected 1 on cpu"):
        build_engine(two, {})


def test_two_models_of_one_name_are_refused_with_both_verticals():
    both = {"a": bringing("a", 2.0), "b": bringing("b", 10.0)}
    with pytest.raises(ConfigError, match="a and b bring different models named risk") as caught:
        build_engine(Config.model_validate(EAGER), both)
    assert "b-risk" in caught.value.hint


def test_verticals_that_bring_the_same_model_share_it():
    both = {"a": bringing("a", 2.0), "b": bringing("b", 2.0)}
    with build_engine(Config.model_validate(EAGER), both) as engine:
        assert list(engine.status()["models"]) == ["risk"]
        assert engine.run(both["a"].infer([Number(v=1)])).value[0].v == 2.0
        assert engine.run(both["b"].infer([Number(v=3)])).value[0].v == 6.0


def test_a_shared_model_has_one_batch_range():
    both = {"a": bringing("a", 2.0), "b": bringing("b", 2.0)}
    config = Config.model_validate(EAGER | {"verticals": {"a": {"batch_range": [1, 8]}, "b": {}}})
    with pytest.raises(ConfigError, match="a and b share model risk, but their batch_range differ"):
        build_engine(config, both)


def test_rows_of_a_batch_are_what_config_or_vertical_says_and_else_what_the_caller_does():
    one = {"a": bringing("a", 2.0)}
    told = Config.model_validate(EAGER | {"verticals": {"a": {"batch_range": [1, 8]}}})
    for config, most in ((Config.model_validate(EAGER), 256), (told, 8)):
        engine = build_engine(config, one, rows=(1, 256))
        assert engine.status()["models"]["risk"]["largest_batch"] == most


@architecture("test-assembly-times")
def times(factor: float) -> Times:
    return Times(factor)


class FromStore(Vertical[Number, Number]):
    name, summary, request, response = "from-store", "asks the store", Number, Number

    def models(self):
        return [from_pretrained("risk")]

    def example(self):
        return Number(v=1)

    def infer(self, requests):
        y = yield Call("risk", torch.tensor([[r.v] for r in requests]))
        return [Number(v=value) for value in y[:, 0].tolist()]


def with_store(folder: Path, factor: float) -> Config:
    spec = SPEC.model_copy(
        update={"architecture": "test-assembly-times", "config": {"factor": factor}}
    )
    ModelStore(folder).save(spec, Times(factor))
    return Config.model_validate(EAGER | {"models": {"store": str(folder)}})


def test_the_store_of_one_config_is_not_that_of_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("PLINTH_MODEL_STORE", raising=False)
    environment = dict(os.environ)
    one, two = with_store(tmp_path / "one", 2.0), with_store(tmp_path / "two", 5.0)
    vertical = FromStore()
    with build_engine(one, {"v": vertical}) as first, build_engine(two, {"v": vertical}) as second:
        assert first.run(vertical.infer([Number(v=1)])).value[0].v == 2.0
        assert second.run(vertical.infer([Number(v=1)])).value[0].v == 5.0
    assert models_of(vertical, one)[0].digest() != models_of(vertical, two)[0].digest()
    assert store_path(Config()) == Path.home() / ".local/share/plinth/models"
    assert dict(os.environ) == environment
