"""ONNX files in the store: checked, described from their graph, run by the engine as any model."""

import pytest
import torch

from plinth.engine import (
    Call,
    Engine,
    ModelError,
    ModelSpec,
    ModelStore,
    TensorSpec,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def graph(batch="n", kind=TensorProto.FLOAT):
    """y = x @ w, w (3, 2) of ones."""
    weights = numpy_helper.from_array(torch.ones(3, 2).numpy(), "w")
    return helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "line",
        [helper.make_tensor_value_info("x", kind, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [weights],
    )


def write(path, body=None, **options):
    model = helper.make_model(body or graph(), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save_model(model, path, **options)
    return path


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def test_the_contract_is_read_from_the_graph(store, tmp_path):
    store.import_onnx(None, write(tmp_path / "line.onnx"), version="3")
    spec = store.load("line").spec
    assert spec.version == "3"
    assert spec.inputs == (TensorSpec(name="x", shape=(3,)),)
    assert spec.outputs == (TensorSpec(name="y", shape=(2,)),)
    assert spec.source == "line.onnx"


def test_the_engine_runs_it_like_any_other_model(store, tmp_path):
    store.import_onnx(None, write(tmp_path / "line.onnx"))
    model = store.load("line")

    def flow():
        return (yield Call("line", torch.ones(5, 3)))

    with Engine() as engine:
        engine.add(model)
        assert torch.equal(engine.run(flow()).value, torch.full((5, 2), 3.0))


def test_a_given_spec_is_held_against_the_graph(store, tmp_path):
    path = write(tmp_path / "line.onnx")
    facts = {"name": "line", "outputs": (TensorSpec(name="y", shape=(2,)),)}
    good = ModelSpec(inputs=(TensorSpec(name="x", shape=(3,)),), metrics={"auc": 0.9}, **facts)
    wide = ModelSpec(inputs=(TensorSpec(name="x", shape=(4,)),), **facts)
    other = ModelSpec(inputs=(TensorSpec(name="z", shape=(3,)),), **facts)
    with pytest.raises(ModelError, match=r"input x is \(3,\) float32 in the graph, \(4,\)"):
        store.import_onnx(wide, path)
    with pytest.raises(ModelError, match="has inputs"):
        store.import_onnx(other, path)
    store.import_onnx(good, path)
    assert store.load("line").spec == good
    with pytest.raises(ModelError, match="exists already"):
        store.import_onnx(good, path)


def test_a_fixed_number_of_rows_is_refused_with_what_to_do(store, tmp_path):
    with pytest.raises(ModelError, match=r"fixed to 4 rows.*dynamic first dimension"):
        store.import_onnx(None, write(tmp_path / "line.onnx", graph(batch=4)))


def test_weights_in_another_file_are_refused_with_what_to_do(store, tmp_path):
    path = write(
        tmp_path / "line.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    with pytest.raises(ModelError, match=r"tensor w in another file.*save_as_external_data=False"):
        store.import_onnx(None, path)


def test_what_is_no_onnx_file_is_refused(store, tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"junk\.onnx"):
        store.import_onnx(None, junk)
    with pytest.raises(ModelError, match="not a file"):
        store.import_onnx(None, tmp_path / "absent.onnx")
    bad = graph()
    bad.node[0].op_type = "Nonsense"
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        store.import_onnx(None, write(tmp_path / "bad.onnx", bad))
    with pytest.raises(ModelError, match="name"):
        store.import_onnx(None, write(tmp_path / "line.onnx"), name="../up")
    assert store.list() == []


def test_a_changed_byte_is_found(store, tmp_path):
    folder = store.import_onnx(None, write(tmp_path / "line.onnx"))
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="not what was saved"):
        store.load("line")
