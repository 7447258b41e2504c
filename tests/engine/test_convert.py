"""Models of other libraries come into the store, and answer as they did at home."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from plinth.engine import Call, Engine, ModelError, ModelStore
from plinth.engine.models.convert import Options, convert

pytestmark = pytest.mark.cpu
CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "newcomer"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the folder of cases is not here")


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def served(store, name, rows):
    """What an engine answers to rows, through the store."""

    def flow():
        return (yield Call(name, rows))

    with Engine() as engine:
        engine.add(store.load(name))
        return engine.run(flow()).value


def test_an_exported_program_is_served(store, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, *, scale):
            return {"scores": self.layer(x) * scale, "sum": x.sum(1)}

    net = Net().eval()
    rows = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        net,
        (torch.randn(2, 4),),
        {"scale": torch.randn(2, 1)},
        dynamic_shapes={"x": {0: rows}, "scale": {0: rows}},
    )
    torch.export.save(program, tmp_path / "net.pt2")
    found = convert(tmp_path / "net.pt2", store, name="net")
    assert [t.name for t in found.spec.inputs] == ["x", "scale"]
    assert found.report["largest_difference"] <= 1e-6
    given = {"x": torch.randn(5, 4), "scale": torch.randn(5, 1)}
    answers = served(store, "net", given)
    for name, want in net(given["x"], scale=given["scale"]).items():
        assert torch.allclose(answers[name], want, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "train", "said"),
    [
        (None, False, "fixed number of rows.*dynamic_shapes"),
        (({0: torch.export.Dim.DYNAMIC},), True, "mixes the rows|another each time"),
    ],
)
def test_a_program_that_cannot_be_batched_is_refused(store, tmp_path, shapes, train, said):
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(train)
    program = torch.export.export(net, (torch.randn(2, 4),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=said):
        convert(tmp_path / "net.pt2", store, name="net")
    assert store.list() == []


CODE = """
import torch
from torch import nn

def build(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

def example():
    return torch.linspace(-1, 1, 12).reshape(3, 4)

def nothing():
    return 1
"""


def weights_and_code(folder):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    save_file(net.state_dict(), folder / "net.safetensors")
    (folder / "net.py").write_text(CODE)
    return net


def test_weights_with_the_code_of_their_module_are_served(store, tmp_path):
    net = weights_and_code(tmp_path)
    options = Options(code=f"{tmp_path / 'net.py'}:build", arguments={"width": 8})
    found = convert(tmp_path / "net.safetensors", store, name="net", options=options)
    assert found.report["rows"] == 3
    rows = torch.randn(5, 4)
    assert torch.allclose(served(store, "net", rows), net(rows), atol=1e-6)


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (None, {}, "without the code"),
        ("net.py", {}, "without the code"),
        ("absent.py:build", {}, "is not a file"),
        ("net.py:absent", {}, "has no function absent"),
        ("net.py:nothing", {}, "gives int, not a module"),
        ("net.py:build", {}, "missing 1 required"),
        ("net.py:build", {"width": 9}, r"tensor 0\.bias is \(8,\) float32 in the file, \(9,\)"),
        ("net.safetensors:build", {}, "not a file of Python"),
    ],
)
def test_weights_without_the_right_code_are_refused(
    store, tmp_path, monkeypatch, code, arguments, said
):
    weights_and_code(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = Options(code=code, arguments=arguments)
    with pytest.raises(ModelError, match=said):
        convert(tmp_path / "net.safetensors", store, name="net", options=options)


def line(path, *, rows="n", dims=None, nodes=None, outputs=None, weights=None, **save):
    """y = x @ w + b as an ONNX file, or what is asked for."""
    w = np.arange(6, dtype=np.float32).reshape(3, 2) / 7
    kind = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "line",
        [kind("x", TensorProto.FLOAT, dims or [rows, 3])],
        outputs or [kind("y", TensorProto.FLOAT, [rows, 2])],
        [numpy_helper.from_array(w, "w"), *(weights or [])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    onnx.save_model(model, str(path), **save)
    return torch.from_numpy(w)


def test_an_onnx_file_is_served(store, tmp_path):
    w = line(tmp_path / "line.onnx")
    found = convert(tmp_path / "line.onnx", store, name="line")
    assert found.report["kind"] == "onnx"
    rows = torch.randn(5, 3)
    assert torch.allclose(served(store, "line", rows), rows @ w, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_number_of_rows_becomes_free(store, tmp_path, batch):
    w = line(tmp_path / "line.onnx", rows=batch)
    convert(tmp_path / "line.onnx", store, name="line")
    rows = torch.randn(6, 3)
    assert torch.allclose(served(store, "line", rows), rows @ w, atol=1e-6)


@pytest.mark.parametrize("shape", [[1, 6], [1, -1], [1, 2, 3]])
def test_reshapes_to_one_row_become_free_too(store, tmp_path, shape):
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    sizes = numpy_helper.from_array(np.array(shape, dtype=np.int64), "s")
    out = [
        helper.make_tensor_value_info(
            "y", TensorProto.FLOAT, [1, *([2, 3] if len(shape) > 2 else [6])]
        )
    ]
    line(tmp_path / "r.onnx", dims=[1, 3, 2], nodes=[node], outputs=out, weights=[sizes])
    convert(tmp_path / "r.onnx", store, name="r")
    rows = torch.randn(5, 3, 2)
    assert torch.equal(served(store, "r", rows), rows.reshape(5, *out_shape(shape)))


def out_shape(shape):
    return [2, 3] if len(shape) > 2 else [6]


def test_rows_that_would_mix_once_they_are_free_are_refused(store, tmp_path):
    """A sum over the first dimension is the row itself while there is but one."""
    node = helper.make_node("ReduceSum", ["x"], ["t"], keepdims=1)
    add = helper.make_node("Add", ["x", "t"], ["y"])
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])]
    line(tmp_path / "s.onnx", rows=1, nodes=[node, add], outputs=out)
    with pytest.raises(ModelError, match="mixes the rows"):
        convert(tmp_path / "s.onnx", store, name="s")
    assert store.list() == []


def test_a_sequence_first_file_needs_to_be_told_so(store, tmp_path):
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    axis = numpy_helper.from_array(np.array(0, dtype=np.int64), "axis")
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", "n", 3])]
    line(tmp_path / "s.onnx", dims=["t", "n", 3], nodes=[node], outputs=out, weights=[axis])
    with pytest.raises(ModelError, match=r"mixes the rows.*rows_dim"):
        convert(tmp_path / "s.onnx", store, name="s")
    found = convert(
        tmp_path / "s.onnx", store, name="s", options=Options(rows_dim={"x": 1, "y": 1})
    )
    assert found.spec.inputs[0].shape == (None, 3)
    rows = torch.randn(4, 7, 3)
    assert torch.allclose(served(store, "s", rows), rows.cumsum(1), atol=1e-5)
    with pytest.raises(ModelError, match="no tensor z"):
        convert(tmp_path / "s.onnx", store, name="t", options=Options(rows_dim={"z": 1}))
    with pytest.raises(ModelError, match="no dimension 5"):
        convert(tmp_path / "s.onnx", store, name="t", options=Options(rows_dim={"x": 5}))


def test_weights_in_another_file_are_brought_in(store, tmp_path):
    save = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    w = line(tmp_path / "line.onnx", **save)
    assert (tmp_path / "w.bin").is_file()
    folder = convert(tmp_path / "line.onnx", store, name="line").folder
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "model.onnx"]
    rows = torch.randn(2, 3)
    assert torch.allclose(served(store, "line", rows), rows @ w, atol=1e-6)


@pytest.mark.parametrize(
    ("location", "length", "said"),
    [
        ("../secret.bin", None, "outside the folder"),
        ("/etc/passwd", None, "outside the folder"),
        ("absent.bin", None, "is not there"),
        ("w.bin", 1 << 40, "takes bytes 0 to 1099511627776 of w.bin, which has 24"),
        ("linked.bin", None, "outside the folder"),
    ],
)
def test_weights_from_elsewhere_are_never_read(store, tmp_path, location, length, said):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    (folder / "linked.bin").symlink_to(tmp_path / "secret.bin")
    path = folder / "line.onnx"
    line(path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load_model(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
        if entry.key == "length" and length:
            entry.value = str(length)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=said):
        convert(path, store, name="line")
    assert store.list() == []


@needs_cases
def test_a_list_of_maps_becomes_the_probabilities_it_was_made_of(store):
    found = convert(CASES / "skc.onnx", store, name="skc")
    assert found.report["classes"] == {"output_probability": [0, 1]}
    width = found.spec.inputs[0].shape[0]
    answers = served(store, "skc", torch.randn(4, width))
    assert answers["output_probability"].shape == (4, 2)
    assert torch.equal(answers["output_label"], answers["output_probability"].argmax(1))


@needs_cases
def test_a_label_that_says_one_row_is_served_for_all(store):
    convert(CASES / "lgbc_nz.onnx", store, name="trees")
    assert served(store, "trees", torch.tensor([[5.0, 0, 0], [-5.0, 0, 0]]))["label"].tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("keep", [1, 20, 0.5, 0.95])
def test_a_cut_off_onnx_file_is_refused(store, tmp_path, keep):
    line(tmp_path / "line.onnx")
    data = (tmp_path / "line.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"cut\.onnx"):
        convert(cut, store, name="cut")
    assert store.list() == []


def test_a_size_beyond_all_memory_is_refused(store, tmp_path):
    """A few bytes that say they are a tensor of a terabyte."""
    node = helper.make_node("Expand", ["x", "s"], ["y"])
    sizes = numpy_helper.from_array(np.array([1, 1 << 38, 3], dtype=np.int64), "s")
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1 << 38, 3])]
    line(tmp_path / "e.onnx", dims=["n", 1, 3], nodes=[node], outputs=out, weights=[sizes])
    with pytest.raises(ModelError, match=r"e\.onnx fails on example rows"):
        convert(tmp_path / "e.onnx", store, name="e")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("m.pt", b"PK\x03\x04", r"pickle could run code.*Model\.from_torch"),
        ("m.pth", b"\x80\x02", "pickle"),
        ("m.bin", b"PK\x03\x04", "pickle"),
        ("m.pkl", b"\x80\x04", r"is a pickle.*Model\.from_sklearn"),
        ("m.joblib", b"x", "is a pickle"),
        ("m.h5", b"\x89HDF", "tf2onnx"),
        ("m.onnx", b"\x80\x04\x95", "is a pickle"),
        ("m.onnx", b"", "is empty"),
        ("m.safetensors", b"", "is empty"),
        ("m.pt2", b"", "is empty"),
        ("m.xyz", b"x", "of no kind that is known"),
    ],
)
def test_other_files_are_told_what_to_do_instead(store, tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=said):
        convert(tmp_path / name, store, name="m")
    with pytest.raises(ModelError, match="is not a file or a folder"):
        convert(tmp_path / "absent.onnx", store, name="m")


def test_example_rows_are_given_in_a_file_and_held_against_the_inputs(store, tmp_path):
    w = line(tmp_path / "line.onnx")
    rows = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows)
    np.save(tmp_path / "rows.npy", rows)
    for version, file in (("1", "rows.npz"), ("2", "rows.npy")):
        found = convert(
            tmp_path / "line.onnx", store, name="line", version=version,
            options=Options(example=tmp_path / file),
        )  # fmt: skip
        assert (found.report["rows"], found.report["example"]) == (3, "given")
    assert torch.allclose(served(store, "line", torch.from_numpy(rows)), torch.from_numpy(rows) @ w)
    for number, (arrays, said) in enumerate(
        [
            ({"z": rows}, r"takes inputs \['x'\], got \['z'\]"),
            ({"x": rows.astype(np.float64)}, "float64"),
            ({"x": rows[:, :2]}, r"rows \(2,\)"),
            ({"x": rows[:0]}, "has no rows"),
            ({"x": np.array([object()])}, "not a file of example rows"),
            ({}, "has no arrays"),
        ]
    ):
        file = tmp_path / f"bad{number}.npz"
        np.savez(file, **arrays)
        with pytest.raises(ModelError, match=said):
            convert(tmp_path / "line.onnx", store, name="x", options=Options(example=file))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ModelError, match="not a file of example rows"):
        convert(
            tmp_path / "line.onnx", store, name="x", options=Options(example=tmp_path / "text.npz")
        )


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        (None, {}, r"has no config\.json"),
        ("{", {}, "cannot be read"),
        ("[]", {}, "not a table"),
        ({"auto_map": {"AutoModel": "code.Net"}}, {}, "code of its own.*not run"),
        ({}, {"pytorch_model.bin": b"PK"}, r"are pickles \(pytorch_model\.bin\)"),
        ({}, {}, "there are no weights"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(store, tmp_path, config, files, said):
    folder = tmp_path / "hub"
    folder.mkdir()
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match=said):
        convert(folder, store, name="hub")
