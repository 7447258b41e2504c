"""Backends agree with eager fp32, say why they cannot, and the faster right one is taken."""

import shutil
from collections.abc import Callable
from functools import cache, partial

import onnx
import pytest
import torch
from torch import Tensor, nn

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    InputError,
    Model,
    ModelError,
    ModelSpec,
    TensorSpec,
)
from plinth.engine.backends import Availability, Executable, backends, export, inductor, prepare
from plinth.engine.backends.choice import difference
from plinth.engine.backends.eager import TorchExecutable, stored_bytes
from plinth.engine.backends.export import onnx_file
from plinth.engine.backends.inductor import Inductor
from plinth.engine.backends.onnxruntime import OrtExecutable
from plinth.engine.backends.planner import GAIN
from plinth.engine.devices.device import Device, pick
from plinth.engine.precision.policy import PRESETS

pytestmark = pytest.mark.cpu
CPU = pick("cpu")
OPENVINO = pytest.param("openvino", marks=pytest.mark.needs("openvino"))
EXPORTING = ["onnxruntime", OPENVINO]


@pytest.fixture(scope="module", autouse=True)
def exports(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PLINTH_CACHE", str(folder))
        yield folder / "onnx"


def spec(inputs: dict[str, tuple], outputs: dict[str, tuple], **facts) -> ModelSpec:
    return ModelSpec(
        name="net",
        inputs=tuple(TensorSpec(name=n, shape=s) for n, s in inputs.items()),
        outputs=tuple(TensorSpec(name=n, shape=s) for n, s in outputs.items()),
        **facts,
    )


def scorer() -> Model:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    return Model(spec({"x": (8,)}, {"score": (1,)}), module)


@cache
def ready(make: Callable[[], Model], backend: str) -> tuple[Model, Executable]:
    """A model on a backend, made once for the tests that only run it."""
    model = make()
    return model, prepare(model, CPU, "fp32", backend)


class Whole(nn.Module):
    """A module that is no container."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer


class TwoWays(nn.Module):
    """Two inputs, two outputs."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, a * b


class Branching(nn.Module):
    """Looks at values, which no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool((x.abs().sum() >= 0).item()) else x * 3


@pytest.mark.parametrize("backend", ["eager", *EXPORTING])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_every_backend_gives_what_the_module_gives_for_any_number_of_rows(backend, rows):
    model, executable = ready(scorer, backend)
    assert isinstance(executable, Executable)
    inputs = torch.randn(rows, 8)
    with torch.inference_mode():
        want = model.module(inputs)
    torch.testing.assert_close(executable.run({"x": inputs})["score"], want)
    assert (executable.backend, executable.precision) == (backend, "fp32")


@pytest.mark.parametrize("backend", ["eager", *EXPORTING])
def test_an_answer_stays_what_it_was_when_other_rows_run(backend):
    model, executable = ready(scorer, backend)
    for count in (3, 3, 20_000):  # bound to buffers from the second run on, or too large for it
        rows = torch.randn(count, 8)
        first = executable.run({"x": rows})["score"]
        kept = first.clone()
        executable.run({"x": rows + 1})
        assert torch.equal(first, kept)
        torch.testing.assert_close(first, model.module(rows).detach())
    assert not executable.release() or executable.run({"x": rows})["score"].equal(kept)


@pytest.mark.parametrize("backend", EXPORTING)
def test_rows_that_are_not_contiguous_are_read_right(backend):
    model, executable = ready(scorer, backend)
    wide = torch.randn(5, 16)[:, ::2]
    for _ in range(2):
        got = executable.run({"x": wide})["score"]
        torch.testing.assert_close(got, model.module(wide).detach())


@pytest.mark.parametrize("backend", ["eager", *EXPORTING])
def test_several_inputs_and_outputs_go_by_name(backend):
    model = Model(spec({"a": (3,), "b": (3,)}, {"sum": (3,), "product": (3,)}), TwoWays())
    executable = prepare(model, CPU, "fp32", backend)
    for _ in range(2):
        a, b = torch.randn(2, 4, 3)
        out = executable.run({"b": b, "a": a})
        torch.testing.assert_close(out["sum"], a + b)
        torch.testing.assert_close(out["product"], a * b)


class Text(nn.Module):
    """Looks ids up twice: as they are, and after arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(10, 4), nn.Embedding(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]) + ids[:, :1] * 0
        return self.words(ids) + self.places(places)


def text(size: int | None, **bounds) -> Model:
    torch.manual_seed(0)
    inputs = (TensorSpec(name="ids", shape=(size,), dtype="int64", **bounds),)
    outputs = (TensorSpec(name="y", shape=(size, 4)),)
    return Model(ModelSpec(name="text", inputs=inputs, outputs=outputs), Text().eval())


def bounded_text() -> Model:
    return text(5, bounds=(0, 9))


@pytest.mark.parametrize("backend", ["eager", *EXPORTING])
@pytest.mark.parametrize("wrong", [10, -1, 2**31, 2**32])
def test_an_id_beyond_its_table_is_an_error_on_every_backend(backend, wrong):
    model, executable = ready(bounded_text, backend)
    good = torch.tensor([[0, 3, 9, 1, 2]])
    for ids in (good, good.repeat(2, 1)):
        torch.testing.assert_close(executable.run({"ids": ids})["y"], model.module(ids).detach())
    with pytest.raises(Exception, match=r"(?i)range|bounds|32 bits"):
        executable.run({"ids": torch.where(good == 9, wrong, good)})


@pytest.mark.needs("openvino")
def test_a_text_longer_than_the_table_of_places_is_an_error_with_openvino():
    model = text(None, bounds=(0, 9))
    executable = prepare(model, CPU, "fp32", "openvino", example={"ids": torch.ones(2, 5).long()})
    executable.run({"ids": torch.ones(2, 6).long()})
    with pytest.raises(ModelError, match="an index is out of range"):
        executable.run({"ids": torch.ones(2, 7).long()})


class Cells(nn.Module):
    """Looks cells of each row up by row and column: GatherND in ONNX."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])[:, None]
        return x[rows, places[:, :, 0], places[:, :, 1]]


@pytest.mark.needs("openvino")
def test_a_cell_beyond_its_row_is_an_error_with_openvino_and_one_from_the_end_is_not():
    inputs = (
        TensorSpec(name="x", shape=(3, 4)),
        TensorSpec(name="places", shape=(2, 2), dtype="int64"),
    )
    outputs = (TensorSpec(name="y", shape=(2,)),)
    model = Model(ModelSpec(name="cells", inputs=inputs, outputs=outputs), Cells().eval())
    executable = prepare(model, CPU, "fp32", "openvino")
    x = torch.arange(24.0).reshape(2, 3, 4)
    for places in ([[[0, 1], [2, 3]]] * 2, [[[-1, -4], [-3, 0]], [[0, 0], [1, -1]]]):
        given = {"x": x, "places": torch.tensor(places)}
        torch.testing.assert_close(executable.run(given)["y"], model.module(**given))
    for wrong in ([3, 0], [0, 4], [-4, 0], [0, -5]):
        places = torch.tensor([[[0, 0], [0, 0]], [[0, 0], wrong]])
        with pytest.raises(ModelError, match="an index is out of range"):
            executable.run({"x": x, "places": places})


class Wide(nn.Module):
    """What needs more digits than OpenVINO holds."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "float64":
            return (x.double() + 1e-12).sqrt().float()
        if self.what == "product":
            return ((x * x) % 1000).float()
        return torch.zeros(len(x), 2, 2).index_put((x[:, :1].long(),), torch.ones(()))[:, 0]


@pytest.mark.needs("openvino")
@pytest.mark.parametrize(
    ("what", "dtype", "reason"),
    [("float64", "float32", "float64"), ("product", "int64", "32 bits")],
)
def test_what_openvino_would_compute_in_fewer_digits_is_refused(what, dtype, reason):
    inputs = (TensorSpec(name="x", shape=(2,), dtype=dtype),)
    outputs = (TensorSpec(name="y", shape=(2,)),)
    model = Model(ModelSpec(name="wide", inputs=inputs, outputs=outputs), Wide(what).eval())
    with pytest.raises(ModelError, match=reason):
        prepare(model, CPU, "fp32", "openvino")


@pytest.mark.needs("openvino")
def test_openvino_says_which_kernels_its_graph_was_compiled_to():
    kernels = ready(scorer, "openvino")[1].report["kernels"]
    assert sum(count for name, count in kernels.items() if "FullyConnected" in name) == 2


@pytest.mark.parametrize("backend", ["eager", *EXPORTING])
def test_sizes_that_the_contract_leaves_open_may_differ_from_the_probe(backend):
    module = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()
    model = Model(spec({"x": (1, None, None, None)}, {"y": (2, None, None, None)}), module)
    executable = prepare(model, CPU, "fp32", backend, rows=1)
    for sizes in ((9, 11, 13), (4, 5, 6)):
        x = torch.randn(2, 1, *sizes)
        torch.testing.assert_close(executable.run({"x": x})["y"], module(x).detach())


def test_auto_takes_the_fastest_and_reports_all_it_tried():
    report = prepare(scorer(), CPU).report
    assert report["requested"] == {"backend": "auto", "precision": "auto"}
    assert set(report["probe_seconds"]) >= {1, 4, 16}
    for rows, seconds in report["probe_seconds"].items():
        assert set(seconds) >= {"eager/fp32", "onnxruntime/fp32"}
        taken = [each["runs"] for each in report["plan"] if each["from_rows"] <= rows][-1]
        assert seconds[taken] <= GAIN * min(seconds.values())
    assert report["difference"] <= 1e-3
    assert report["plan"][0]["from_rows"] == 1


def test_auto_goes_on_with_what_is_left_and_says_why():
    model = Model(spec({"x": (3,)}, {"y": (3,)}), Branching())
    report = prepare(model, CPU, "fp32").report
    assert report["resolved"]["backend"] == "eager"
    assert "cannot be exported to ONNX" in report["refused"]["onnxruntime/fp32"]


def test_auto_takes_bf16_only_where_it_is_native():
    old = Device("cpu", name="an old one")
    report = prepare(scorer(), old, "auto", "eager").report
    assert report["resolved"]["precision"] == "fp32"
    assert "no bf16 instructions" in report["refused"]["bf16"]


def test_bf16_is_really_bf16_and_the_report_names_the_layers():
    model, x = scorer(), torch.randn(4, 8)
    executable = prepare(model, CPU, "bf16", "eager")
    assert (executable.backend, executable.precision) == ("eager", "bf16")
    assert executable.report["layers"] == {"0": "bf16", "1": "bf16", "2": "fp32"}
    auto = prepare(model, CPU, "bf16").report  # OpenVINO, where bf16 is native
    assert "not in bf16" in auto["refused"]["onnxruntime/bf16"]
    out = executable.run({"x": x})["score"]
    assert out.dtype == torch.float32
    assert 0 < difference(out, model.module(x)) < 5e-2


def test_exact_is_the_reference_whatever_else_is_faster():
    executable = prepare(scorer(), CPU, "exact", "auto")
    assert (executable.backend, executable.precision) == ("eager", "fp32")
    with pytest.raises(ConfigError, match="precision exact is what backend eager computes"):
        prepare(scorer(), CPU, "exact", "onnxruntime")


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_an_answer_says_the_precision_it_was_computed_in(precision):
    def flow():
        return (yield Call("net", torch.randn(2, 8)))

    with Engine(device="cpu") as engine:
        engine.add(scorer(), precision=precision)
        answer = engine.run(flow())
    assert answer.precision == {"net": "eager/fp32" if precision == "exact" else "eager/bf16"}


def test_a_choice_that_cannot_be_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="not in bf16"):
        prepare(scorer(), CPU, "bf16", "onnxruntime")
    with pytest.raises(ConfigError, match="did you mean 'onnxruntime'"):
        prepare(scorer(), CPU, "fp32", "onnxruntme")
    with pytest.raises(ModelError, match="cannot be exported"):
        prepare(Model(spec({"x": (3,)}, {"y": (3,)}), Branching()), CPU, "fp32", "onnxruntime")


def test_a_backend_that_is_off_the_reference_is_never_taken(monkeypatch):
    class Wrong:
        name = "wrong"
        automatic = False

        def available(self):
            return Availability("1")

        def supports(self, model, device, policy):
            return None

        def compile(self, model, device, policy, threads):
            def off(x: Tensor) -> Tensor:
                return model.module(x) * 1.01

            return TorchExecutable("wrong", model, model.module, device, compiled=off)

    monkeypatch.setitem(backends(), "wrong", Wrong())
    with pytest.raises(ModelError, match="off the reference"):
        prepare(scorer(), CPU, "fp32", "wrong")


def test_a_difference_is_relative_and_shapes_dtypes_and_nan_count():
    ones = torch.ones(3)
    assert difference(ones * 100.1, ones * 100) == pytest.approx(1e-3, rel=1e-2)
    assert difference(ones, torch.ones(4)) == float("inf")
    assert difference(ones.double(), ones) == float("inf")
    assert not difference(ones * float("nan"), ones) <= 1e-3


def test_an_export_is_made_once_per_weights(exports):
    model = scorer()
    prepare(model, CPU, "fp32", "onnxruntime")
    before = {path: path.stat().st_mtime_ns for path in exports.glob("*.onnx")}
    prepare(scorer(), CPU, "fp32", "onnxruntime")
    assert {path: path.stat().st_mtime_ns for path in exports.glob("*.onnx")} == before
    with torch.no_grad():
        model.module[0].weight.mul_(2)
    prepare(model, CPU, "fp32", "onnxruntime")
    assert len(list(exports.glob("*.onnx"))) == len(before) + 1


def test_a_model_that_breaks_its_contract_is_named():
    lost = Model(spec({"x": (3,)}, {"y": (3,)}), nn.Flatten(0))
    with pytest.raises(ModelError, match=r"output y is .* for 1 rows"):
        prepare(lost, CPU, "fp32", "eager")


def test_inductor_says_when_there_is_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"neither g\+\+ nor clang\+\+"):
        prepare(scorer(), CPU, "fp32", "aotinductor")
    with pytest.raises(ConfigError, match=r"neither g\+\+ nor clang\+\+"):
        prepare(scorer(), CPU, "fp32", "inductor")
    assert "bf16" not in (Inductor().supports(scorer(), CPU, PRESETS["bf16"]) or "")


@pytest.mark.needs("openvino")
def test_what_is_no_number_is_refused_where_openvino_would_make_one_of_it():
    """The ReLU of NaN is 0 there; who sent it is told, and nobody else."""
    with Engine(threads=1) as engine:
        engine.add(scorer(), backend="openvino")
        good, bad = torch.randn(2, 8), torch.randn(3, 8)
        bad[1, 2] = torch.nan
        asked = [engine.submit(Call("net", rows)) for rows in (good, bad, good, good * 1e38)]
        with pytest.raises(InputError, match="input x holds NaN or infinity"):
            asked[1].result(60)
        assert all(asked[i].result(60).value.shape == (2, 1) for i in (0, 2, 3))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where both compile: torch's headers once, and no programs that try what the CPU can do."""
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        yield tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.parametrize("backend", ["inductor", "aotinductor"])
def test_inductor_compiles_for_any_number_of_rows(backend, monkeypatch, compiled):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    model = Model(scorer().spec, Whole(scorer().module).eval())
    executable = prepare(model, CPU, "fp32", backend)
    times = 2 if backend == "aotinductor" else 1  # in its file, and laid out in memory
    assert executable.weights == times * stored_bytes(model.module)
    for rows in (1, 5, 33):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(executable.run({"x": x})["score"], model.module(x).detach())


def test_as_many_models_of_one_class_are_compiled_as_there_are(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    done = []
    for width in range(1, torch._dynamo.config.recompile_limit + 4):
        module, before = nn.Linear(width, 2).eval(), counters["frames"]["ok"]
        run, rows = inductor._compiled(module), torch.ones(3, width)
        with torch.inference_mode():
            assert torch.equal(run(rows), module(rows))
        done.append(counters["frames"]["ok"] > before)
    assert all(done)


def test_torchs_translations_are_made_once_and_files_are_what_they_were(monkeypatch, tmp_path):
    from torch.onnx._internal.exporter import _registration

    made, before = [], _registration._torchlib_registry.get_torchlib_ops
    monkeypatch.setattr(
        _registration._torchlib_registry, "get_torchlib_ops", lambda: made.append(1) or before()
    )
    table, files = vars(_registration.ONNXRegistry)["from_torchlib"], []
    export._TRANSLATIONS.clear()
    for n in range(3):
        monkeypatch.setenv("PLINTH_CACHE", str(tmp_path / str(n)))
        files.append(onnx_file(scorer()).read_bytes())
        (kept,) = export._TRANSLATIONS.values()
        assert kept.functions
    assert files[0] == files[1] == files[2]
    assert len(made) == 1
    assert vars(_registration.ONNXRegistry)["from_torchlib"] is table, "others export as ever"


def test_a_torch_whose_private_table_nobody_looked_at_exports_as_ever(monkeypatch, tmp_path):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    monkeypatch.setattr(export, "_KNOWN_TORCH", ())
    export._TRANSLATIONS.clear()
    assert onnx_file(scorer()).stat().st_size
    assert not export._TRANSLATIONS


def test_an_export_leaves_nothing_of_the_sizes_that_were_traced(monkeypatch, tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    cleared, clear = [], FakeTensorMode.cache_clear
    monkeypatch.setattr(
        FakeTensorMode,
        "cache_clear",
        lambda: (cleared.append(len(FakeTensorMode.cache)), clear()),
    )
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    onnx_file(scorer())
    assert cleared[0] > 0, "torch keeps them; if it does not, _forget_sizes can go"
    assert not FakeTensorMode.cache


class Steps(nn.Module):
    """A recurrent layer, from zeros or from a state of its own, and its last step."""

    def __init__(self, layer: nn.RNNBase, *, started: bool = False) -> None:
        super().__init__()
        self.layer, self.started = layer, started

    def forward(self, x: Tensor) -> Tensor:
        state = x.mean((1, 2))[None, :, None].repeat(1, 1, self.layer.hidden_size)
        return self.layer(x, state if self.started else None)[0][:, -1]


@pytest.mark.parametrize(
    ("net", "most"),
    [
        (lambda: Steps(nn.GRU(5, 6, batch_first=True)), 11),
        (lambda: Steps(nn.GRU(5, 6, batch_first=True), started=True), 20),
        (lambda: Steps(nn.LSTM(5, 6, batch_first=True, bidirectional=True)), 60),
    ],
)
def test_a_recurrent_layer_is_exported_without_what_the_exporter_puts_around_it(net, most):
    torch.manual_seed(0)
    spec = ModelSpec(
        name="steps",
        inputs=(TensorSpec(name="x", shape=(4, 5)),),
        outputs=(TensorSpec(name="y", shape=(None,)),),
    )
    model = Model(spec, net().eval())
    path = onnx_file(model)
    nodes = onnx.load_model(str(path)).graph.node
    assert len(nodes) <= most, [node.op_type for node in nodes]
    x = {"x": torch.randn(3, 4, 5)}
    found = OrtExecutable(spec, path, CPU, 1).run(x)["y"]
    assert difference(found, model.run(x)["y"]) < 1e-5
