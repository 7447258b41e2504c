"""Models on disk: saved whole, verified when loaded, never a pickle."""

import pytest
import torch
from torch import nn

from engine import (
    InputError,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    TensorSpec,
    architecture,
    from_pretrained,
)


@architecture("test-linear")
def linear(width: int) -> nn.Module:
    return nn.Linear(width, 1)


def spec(version: str = "1", **changes) -> ModelSpec:
    facts = {
        "name": "line",
        "version": version,
        "architecture": "test-linear",
        "config": {"width": 3},
        "inputs": [TensorSpec(name="x", shape=(3,))],
        "outputs": [TensorSpec(name="y", shape=(1,))],
        "metrics": {"auc": 0.9},
    }
    return ModelSpec.model_validate(facts | changes)


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path)


def test_what_is_saved_comes_back(store):
    module = nn.Linear(3, 1)
    store.save(spec(), module)
    loaded = from_pretrained("line", store=store.root)
    assert isinstance(loaded, Model)
    assert loaded.spec == spec()
    rows = torch.randn(5, 3)
    assert torch.equal(loaded.module(rows), module(rows))
    assert not loaded.module.training


def test_the_newest_version_is_the_default_and_versions_sort_naturally(store):
    for version in ("1.2", "1.10", "1.9"):
        store.save(spec(version), nn.Linear(3, 1))
    assert store.versions("line") == ["1.2", "1.9", "1.10"]
    assert store.load("line").spec.version == "1.10"
    assert store.load("line", "1.2").spec.version == "1.2"
    assert len(store.list()) == 3


def test_a_version_never_changes(store):
    store.save(spec(), nn.Linear(3, 1))
    with pytest.raises(ModelError, match="exists already"):
        store.save(spec(), nn.Linear(3, 1))


def test_a_changed_byte_is_found(store):
    folder = store.save(spec(), nn.Linear(3, 1))
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not what was saved"):
        store.load("line")


def test_errors_say_what_there_is(store):
    with pytest.raises(ModelError, match="holds nothing"):
        store.load("line")
    store.save(spec(), nn.Linear(3, 1))
    with pytest.raises(ModelError, match="there are"):
        store.load("line", "7")
    with pytest.raises(ModelError, match="not a model name"):
        store.load("../line")
    store.save(spec("2", architecture="nowhere"), nn.Linear(3, 1))
    with pytest.raises(ModelError, match="architecture nowhere, which is not registered"):
        store.load("line")
    store.save(spec("3", config={"width": 4}), nn.Linear(3, 1))
    with pytest.raises(ModelError, match="tensor weight"):
        store.load("line")
    (store.root / "line" / "3" / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match=r"manifest\.json cannot be read"):
        store.load("line")


def test_rows_are_held_against_the_contract():
    spec().check({"x": torch.zeros(7, 3)})
    with pytest.raises(InputError, match=r"expected \(3,\) float32"):
        spec().check({"x": torch.zeros(7, 4)})
    with pytest.raises(InputError, match="float64"):
        spec().check({"x": torch.zeros(7, 3, dtype=torch.float64)})
    with pytest.raises(InputError, match="takes inputs"):
        spec().check({"z": torch.zeros(7, 3)})
