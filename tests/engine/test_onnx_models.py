"""ONNX files in the store: checked, described from their graph, run by the engine as any model."""

import shutil
from pathlib import Path

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
from plinth.engine.backends.export import onnx_file
from plinth.engine.models.families.registry import families
from plinth.engine.optimize.export_ahead import export_ahead

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


CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "newcomer"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not here")


def classifier(label=TensorProto.INT64, *, zipmap, label_rows=None):
    """Three classes; the label's rows and the list of maps as the common exporters write them."""
    nodes = [
        helper.make_node(
            "LinearClassifier",
            ["x"],
            ["label", "raw"],
            domain="ai.onnx.ml",
            coefficients=[1.0, 0.0, 0.0, 1.0, -1.0, -1.0],
            intercepts=[0.0, 0.0, 0.0],
            post_transform="SOFTMAX",
            **(
                {"classlabels_ints": [0, 1, 2]}
                if label == TensorProto.INT64
                else {"classlabels_strings": ["a", "b", "c"]}
            ),
        )
    ]
    outputs = [helper.make_tensor_value_info("label", label, [label_rows])]
    if zipmap:
        nodes.append(
            helper.make_node(
                "ZipMap", ["raw"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
            )
        )
        item = helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        )
        outputs.append(helper.make_value_info("scores", helper.make_sequence_type_proto(item)))
    else:
        nodes.append(helper.make_node("Identity", ["raw"], ["scores"]))
        outputs.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 3]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])]
    return helper.make_graph(nodes, "classifier", inputs, outputs)


def write_ml(path, body):
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(body, opset_imports=opsets)
    model.ir_version = 9
    onnx.save_model(model, path)
    return path


def run_rows(store, name, rows):
    model = store.load(name)

    def flow():
        return (yield Call(name, rows))

    with Engine() as engine:
        engine.add(model)
        return engine.run(flow()).value


@pytest.mark.parametrize("label_rows", [None, 1])
def test_a_classifier_with_plain_tensors_gives_labels_and_probabilities(
    store, tmp_path, label_rows
):
    path = write_ml(tmp_path / "c.onnx", classifier(zipmap=False, label_rows=label_rows))
    store.import_onnx(None, path)
    found = run_rows(store, "c", torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]]))
    assert found["label"].tolist() == [0, 1, 2]
    assert torch.allclose(found["scores"].sum(1), torch.ones(3))
    assert found["scores"].argmax(1).tolist() == [0, 1, 2]


def test_a_list_of_maps_is_refused_with_the_exact_option_or_left_out_on_request(store, tmp_path):
    path = write_ml(tmp_path / "c.onnx", classifier(zipmap=True))
    with pytest.raises(ModelError) as refused:
        store.import_onnx(None, path)
    assert "output scores is a sequence or a map" in str(refused.value)
    assert "options={'zipmap': False}" in str(refused.value)
    assert "--output label" in str(refused.value)
    store.import_onnx(None, path, outputs=["label"])
    found = run_rows(store, "c", torch.tensor([[0.0, 9.0], [9.0, 0.0]]))
    assert found.tolist() == [1, 0]
    with pytest.raises(ModelError, match=r"no output nonsense.*label"):
        store.import_onnx(None, path, version="2", outputs=["nonsense"])


def test_labels_that_are_words_are_refused_with_what_to_keep(store, tmp_path):
    path = write_ml(tmp_path / "c.onnx", classifier(TensorProto.STRING, zipmap=False))
    with pytest.raises(ModelError, match=r"output label.*text.*--output scores"):
        store.import_onnx(None, path)
    store.import_onnx(None, path, outputs=["scores"])
    assert run_rows(store, "c", torch.zeros(4, 2)).shape == (4, 3)


def test_an_output_that_really_has_one_row_is_refused(store, tmp_path):
    body = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)],
        "total",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
    )
    with pytest.raises(ModelError, match="output y is fixed to 1 rows"):
        store.import_onnx(None, write(tmp_path / "total.onnx", body))


@needs_cases
def test_a_lightgbm_classifier_is_imported(store):
    store.import_onnx(None, CASES / "lgbc_nz.onnx", name="trees")
    found = run_rows(store, "trees", torch.tensor([[5.0, 0.0, 0.0], [-5.0, 0.0, 0.0]]))
    assert found["label"].tolist() == [1, 0]
    assert found["probabilities"].shape == (2, 2)
    assert torch.allclose(found["probabilities"].sum(1), torch.ones(2))


@needs_cases
def test_a_scikit_learn_classifier_says_how_to_export_it(store):
    with pytest.raises(ModelError, match=r"skl2onnx\.to_onnx\(model, X, options=\{'zipmap': Fals"):
        store.import_onnx(None, CASES / "skc.onnx")
    store.import_onnx(None, CASES / "skc.onnx", outputs=["output_label"])


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("m.pkl", b"\x80\x04\x95", "is a pickle.*skl2onnx"),
        ("m.joblib", b"ZF123456", "is a pickle.*skl2onnx"),
        ("m.onnx", b"\x80\x05\x95\x00", "is a pickle.*skl2onnx"),
        ("m.pt", b"PK\x03\x04", r"checkpoint of torch.*Model\.from_torch"),
        ("m.safetensors", b"\x08\x00\x00", "without a graph"),
        ("m.keras", b"PK\x03\x04", "tf2onnx|checkpoint"),
    ],
)
def test_files_of_other_kinds_are_told_what_to_do_instead(store, tmp_path, name, start, said):
    (tmp_path / name).write_bytes(start + b" more")
    with pytest.raises(ModelError, match=said):
        store.import_onnx(None, tmp_path / name)


@pytest.mark.soak  # starts processes that import torch
@pytest.mark.cpu
def test_a_stored_model_is_exported_by_a_process_of_its_own(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path / "cache"))
    family = families()[0]
    made = family.model(family.small, seed=0)
    assert not export_ahead(made)  # it lies in no store
    folder = store.save(made.spec, made.module)
    model = store.load(made.spec.name)
    assert export_ahead(model)
    (kept,) = (tmp_path / "cache" / "onnx").iterdir()
    assert onnx_file(model) == kept
    assert not export_ahead(model)
    kept.unlink()
    shutil.rmtree(folder)
    assert export_ahead(model)
    assert "was not exported ahead: " in caplog.text
    assert onnx_file(model) == kept
