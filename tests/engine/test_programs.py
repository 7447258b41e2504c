"""Exported programs on disk: what anybody wrote is read without running what it says."""

import io
import json
import zipfile

import pytest
import torch
from torch import nn

from plinth.engine import Model, ModelError, ModelStore
from plinth.engine.backends import prepare
from plinth.engine.devices.device import pick
from plinth.engine.models import program
from plinth.engine.precision.policy import resolve
from plinth.engine.precision.programs import with_layers
from plinth.engine.precision.transforms import apply, report, sharing_copy

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A program as anybody would write it, and its contract."""
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    rows = torch.randn(2, 3)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(module, (rows,), dynamic_shapes=shapes), path)
    return path, module


def changed(path, target, edit):
    """The archive with some entries edited: name -> new content, None to leave it out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = edit(entry.filename.partition("/")[2], old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return target


def in_graph(old, new):
    """Replace text of the graph; what is replaced must be there."""

    def edit(name, data):
        if name == "models/model.json":
            assert old.encode() in data
            data = data.replace(old.encode(), new.encode())
        return data

    return edit


def test_a_program_of_anybodys_runs_as_its_module(exported):
    path, module = exported
    runs = program.read(path).module(check_guards=False)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 3)
        assert torch.allclose(runs(x), module(x), atol=1e-6)


BOOM = "__import__('pathlib').Path('boom').touch()"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "not an operator"),
        ("torch.ops.aten.relu.default", "torch.hub.load", "not an operator"),
        ("torch.ops.aten.relu.default", "_operator.methodcaller", "not an operator"),
        ("torch.ops.aten.relu.default", "#anybody.extension", "not an operator"),
        ("torch.ops.aten.relu.default", "math.factorial", "not an operator"),
        ('"expr_str": "Symbol(', f'"expr_str": "{BOOM} or Symbol(', "not arithmetic"),
        ('"expr_str": "Symbol(', '"expr_str": "9**9**9*Symbol(', "not arithmetic"),
        ('"expr_str": "Symbol(', '"expr_str": "Pow(9,Pow(9,9))*Symbol(', "not arithmetic"),
        ('"builtins.tuple\\"', '"collections.defaultdict\\"', "nest in"),
        ('"graph_module"', '"graph_modul"', "not an exported program"),
    ],
)
def test_a_hostile_graph_is_refused_and_nothing_of_it_runs(
    exported, tmp_path, monkeypatch, old, new, said
):
    monkeypatch.chdir(tmp_path)
    bad = changed(exported[0], tmp_path / "bad.pt2", in_graph(old, new))
    with pytest.raises(ModelError, match=said):
        program.read(bad)
    assert not (tmp_path / "boom").exists()


def test_guards_that_are_code_are_dropped(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def edit(name, data):
        if name != "models/model.json":
            return data
        graph = json.loads(data)
        graph["guards_code"] = [BOOM]
        return json.dumps(graph)

    bad = changed(exported[0], tmp_path / "bad.pt2", edit)
    program.read(bad).module(check_guards=True)(torch.ones(2, 3))
    assert not (tmp_path / "boom").exists()


def test_no_pickle_in_it_is_opened(exported, tmp_path):
    def edit(name, data):
        return b"\x80\x04 not even a pickle" if name.startswith("data/sample_inputs") else data

    program.read(changed(exported[0], tmp_path / "fine.pt2", edit))

    def pickled(name, data):
        return data.replace(b'"use_pickle": false', b'"use_pickle": true')

    with pytest.raises(ModelError, match="is a pickle, which is never opened"):
        program.read(changed(exported[0], tmp_path / "bad.pt2", pickled))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"sizes": [{"as_int": 4}', b'"sizes": [{"as_int": 4000000000}', "takes .* bytes"),
        (b'"strides": [{"as_int": 3}', b'"strides": [{"as_int": -3}', "negative sizes"),
        (b'"path_name": "weight_0"', b'"path_name": "../model.json"', "lies in"),
        (b'"path_name": "weight_0"', b'"path_name": "weight_99"', "not an exported program"),
    ],
)
def test_weights_that_do_not_lie_in_the_file_are_refused(exported, tmp_path, old, new, said):
    def edit(name, data):
        return data.replace(old, new) if name.endswith("weights_config.json") else data

    with pytest.raises(ModelError, match=said):
        program.read(changed(exported[0], tmp_path / "bad.pt2", edit))


def test_a_bomb_is_not_unpacked(exported, tmp_path):
    packed = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(exported[0]) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        big = io.BytesIO(bytes(8 << 20)).getvalue()
        root = old.namelist()[0].partition("/")[0]
        new.writestr(f"{root}/data/weights/weight_9", big, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="weight_9 is compressed"):
        program.read(packed)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(exported, tmp_path, keep):
    data = exported[0].read_bytes()
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"bad\.pt2 .*no.* exported program"):
        program.read(bad)


@pytest.mark.parametrize(
    "data", [b"", b"not a program", b"PK\x05\x06" + bytes(18), b"\x80\x04\x95"]
)
def test_other_files_are_refused(tmp_path, data):
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(data)
    with pytest.raises(ModelError, match=r"bad\.pt2 is not an exported program"):
        program.read(bad)
    with pytest.raises(ModelError, match="is not a file"):
        program.read(tmp_path / "absent.pt2")


def test_a_stored_program_that_was_changed_is_refused(tmp_path):
    store = ModelStore(tmp_path)
    folder = store.add(Model.from_torch(nn.Linear(3, 2), example=torch.ones(2, 3)))
    data = bytearray((folder / "program.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "program.pt2").write_bytes(data)
    with pytest.raises(ModelError, match="not what was saved"):
        store.load("linear")


# -- precision ---------------------------------------------------------------------------------
class Mixed(nn.Module):
    """Convolutions with norms, in place too, attention of the library, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.down = nn.Sequential(
            *(nn.Conv1d(16, 16, 3, padding=1, groups=2, bias=False), nn.BatchNorm1d(16)),
            nn.ReLU(inplace=True),
        )
        self.up = nn.ConvTranspose1d(16, 16, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.up(self.down(self.words(x).transpose(1, 2))).transpose(1, 2)
        return self.head(self.twice(torch.relu(self.twice(self.encoder(x)))).mean(1))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model, and the same as a program of a store."""
    torch.manual_seed(0)
    model = Model.from_torch(Mixed().eval(), example=torch.randint(0, 30, (8, 6)), name="mixed")
    store = ModelStore(tmp_path_factory.mktemp("store"))
    store.add(model)
    return model, store.load("mixed")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_layers_of_a_stored_program_compute_in_what_a_policy_says(stored, precision):
    model, loaded = stored
    low, full = (prepare(loaded, pick("cpu"), each, "eager") for each in (precision, "fp32"))
    layers = {name.removeprefix("program.module."): p for name, p in low.report["layers"].items()}
    assert layers == {
        **dict.fromkeys(("down.0", "up", "twice", "encoder.self_attn.in_proj"), precision),
        **dict.fromkeys(("encoder.self_attn.out_proj", "encoder.linear1"), precision),
        "encoder.linear2": precision,
        "down.1": "folded",
        "head": precision,
        "head_linear": "fp32",  # the table, and what shares its weights
    }
    same = prepare(model, pick("cpu"), precision, "eager")
    assert low.report["flops"] == pytest.approx(same.report["flops"])
    assert low.report["flops"][precision] > 0.9
    rows = model.rows(5)
    (name, want), got = next(iter(full.run(rows).items())), low.run(rows)
    assert got[name].dtype == torch.float32
    assert torch.allclose(got[name], want, atol=0.05 * float(want.abs().max()))
    assert torch.equal(prepare(loaded, pick("cpu"), "fp32", "eager").run(rows)[name], want)


def test_a_policy_names_the_layers_of_a_program_as_its_report_does(stored):
    layer = "program.module.twice"
    policy = {"preset": "bf16", "embedding": "int8", "layers": {layer: "fp32"}}
    found = prepare(stored[1], pick("cpu"), policy, "eager").report["layers"]
    assert (found[layer], found["program.module.head"]) == ("fp32", "int8")


def test_operations_of_a_program_of_anybodys_that_are_no_layers_stay_fp32(tmp_path):
    """Such as products of decomposed programs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    rows = torch.randn(3, 1, 6, 6)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (rows,)).run_decompositions(), path)
    module = program.in_one_mode(program.read(path).module(check_guards=False))
    layered = with_layers(sharing_copy(module))
    policy = resolve({"conv": "bf16", "last": "bf16"})
    assert [(r.kind, r.precision) for r in report(layered, policy)] == [("Conv2d", "bf16")]
    want = net(rows).detach()
    assert torch.allclose(layered(rows), want, atol=1e-6)
    low = apply(layered, policy)(rows).detach()
    assert low.dtype == torch.float32
    assert 0 < float((low - want).abs().max()) < 0.05
