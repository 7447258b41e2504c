"""Models on disk: saved whole, verified when loaded, never a pickle."""

import hashlib
import json
from datetime import datetime

import pytest
import torch
from torch import nn

from plinth.engine import (
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


def test_rows_of_several_inputs_are_as_many_and_a_scalar_is_no_row():
    two = spec(inputs=[TensorSpec(name="a", shape=()), TensorSpec(name="b", shape=(2,))])
    two.check({"a": torch.zeros(4), "b": torch.zeros(4, 2)})
    with pytest.raises(InputError, match="different numbers of rows"):
        two.check({"a": torch.zeros(3), "b": torch.zeros(4, 2)})
    with pytest.raises(InputError, match="input a"):
        two.check({"a": torch.tensor(1.0), "b": torch.zeros(4, 2)})
    two.check(two.example(5))


def test_a_candidate_for_release_comes_before_the_release(store):
    for version in ("2.0", "2.0-rc1", "2.0.1", "10", "1"):
        store.save(spec(version), nn.Linear(3, 1))
    assert store.versions("line") == ["1", "2.0-rc1", "2.0", "2.0.1", "10"]


@architecture("test-tied")
def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def test_a_shared_tensor_is_stored_once_and_shared_again(store):
    module = tied()
    folder = store.save(spec(architecture="test-tied", config={}), module)
    assert json.loads((folder / "manifest.json").read_text())["shared"] == {"1.weight": "0.weight"}
    loaded = store.load("line").module
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, module[0].weight)


def test_weights_of_another_dtype_are_refused_not_rounded(store):
    store.save(spec(), nn.Linear(3, 1).to(torch.bfloat16))
    with pytest.raises(ModelError, match=r"tensor bias is \(1,\) bfloat16 in the file"):
        store.load("line")


def test_what_to_import_is_said(store, monkeypatch):
    store.save(spec(), nn.Linear(3, 1))
    monkeypatch.setattr("plinth.engine.models.store._FACTORIES", {})
    with pytest.raises(ModelError, match=f"import {__name__}"):
        store.load("line")


def test_a_header_of_absurd_size_and_other_files_are_not_read(store):
    path = store.save(spec(), nn.Linear(3, 1)) / "weights.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"x" * 64)
    forge(path)
    with pytest.raises(ModelError, match="its header has"):
        store.load("line")
    manifest = path.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(path.name, "../../secret"))
    with pytest.raises(ModelError, match="expected one model file"):
        store.load("line")


def forge(path) -> None:
    """Make a manifest say what its changed file really is."""
    manifest = path.with_name("manifest.json")
    data = json.loads(manifest.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data["files"][path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(data))


def test_the_manifest_says_where_and_when(store):
    folder = store.save(spec(), nn.Linear(3, 1))
    data = json.loads((folder / "manifest.json").read_text())
    assert datetime.fromisoformat(data["created"]).tzinfo is not None
    assert data["torch"] == torch.__version__
    assert data["factory"].endswith("linear")
    assert data["files"]["weights.safetensors"]["bytes"] > 16
    assert [path.name for path in store.root.rglob(".*")] == []


def test_the_newest_version_is_verified_unless_one_is_named(store):
    store.save(spec(), nn.Linear(3, 1))
    assert store.verify("line").version == "1"
    with pytest.raises(ModelError, match="no version"):
        store.verify("line", "9")


def test_a_contract_names_known_dtypes():
    with pytest.raises(ValueError, match="float33"):
        TensorSpec(name="x", shape=(1,), dtype="float33")
