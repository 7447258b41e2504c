"""int8 and int4: what they compute, what really ran, and that no row depends on its neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    InputError,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    TensorSpec,
)
from plinth.engine.backends import prepare, registry
from plinth.engine.backends.choice import compiled, difference
from plinth.engine.devices.device import pick
from plinth.engine.precision.onnx_graph import saturates
from plinth.engine.precision.policy import resolve

pytestmark = pytest.mark.cpu
CPU = pick("cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Reader(nn.Module):
    """Token ids to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.body(x)).mean(1))


@pytest.fixture(scope="module")
def reader() -> Model:
    torch.manual_seed(0)
    spec = ModelSpec(
        name="reader",
        inputs=(TensorSpec(name="ids", shape=(7,), dtype="int64", bounds=(0, 499)),),
        outputs=(TensorSpec(name="scores", shape=(3,)),),
    )
    rows = {"ids": torch.randint(0, 500, (32, 7))}
    return Model(spec, Reader().eval(), example=rows)


@pytest.fixture(scope="module")
def scorer() -> Model:
    """One Linear with weights all over their range, where 16-bit sums overflow."""
    torch.manual_seed(0)
    spec = ModelSpec(
        name="scorer",
        inputs=(TensorSpec(name="x", shape=(96,)),),
        outputs=(TensorSpec(name="y", shape=(8,)),),
    )
    module = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    return Model(spec, module, example={"x": torch.randn(32, 96)})


@pytest.mark.parametrize(
    ("precision", "dtype", "off"),
    [("int8", "int8", 0.02), ("int8_static", "int8", 0.1), ("int4", "int4", 0.25)],
)
def test_most_of_the_arithmetic_runs_low_and_the_report_has_it_from_the_profile(
    reader, precision, dtype, off
):
    ran = prepare(reader, CPU, precision, "onnxruntime")
    assert ran.precision == precision
    assert ran.report["flops"][dtype] > 0.9
    kernels = {
        "int8": "MatMulIntegerToFloat",
        "int8_static": "QLinearMatMul",
        "int4": "MatMulNBits",
    }
    assert ran.report["kernels"][kernels[precision]] == 2
    assert ran.report["layers"]["head"] == "fp32", "the last layer that runs"
    rows = {"ids": torch.randint(0, 500, (9, 7))}
    assert 0 < difference(ran.run(rows)["scores"], reader.run(rows)["scores"]) < off
    if precision == "int8":
        assert ran.weights < 0.4 * sum(p.nbytes for p in reader.module.parameters())


@pytest.mark.parametrize("precision", ["int8", "int8_static", "int4"])
def test_a_stored_program_runs_low_and_says_its_share(scorer, tmp_path, precision):
    store = ModelStore(tmp_path)
    store.add(Model.from_torch(scorer.module, example=scorer.example["x"], name="scorer"))
    model = replace(store.load("scorer"), example={"input": scorer.example["x"]})
    ran = prepare(model, CPU, precision, "onnxruntime")
    assert ran.precision == precision
    assert ran.report["flops"][precision.removesuffix("_static")] > 0.85


class Steps(nn.Module):
    """Products beside a recurrent layer, whose weights ONNX Runtime packs before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gru, self.head = nn.Linear(8, 32), nn.GRU(32, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.body(x).transpose(0, 1))[0][-1])


def test_products_beside_a_recurrent_layer_run_in_int8_and_its_share_is_counted():
    torch.manual_seed(0)
    model = Model.from_torch(Steps().eval(), example=torch.randn(8, 5, 8), name="steps")
    report = prepare(model, CPU, "int8", "onnxruntime").report
    products, recurrent = 8 * 32, 3 * 16 * (32 + 16)
    whole = 5 * (products + recurrent) + 16 * 2
    assert report["flops"] == pytest.approx(
        {"int8": 5 * products / whole, "fp32": 1 - 5 * products / whole}
    )


@settings(max_examples=25)
@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 2**31))
def test_a_row_in_int8_has_the_same_answer_whatever_shares_its_batch(scorer, scale, seed):
    ran = prepared(scorer)
    torch.manual_seed(seed)
    mine, others = torch.randn(1, 96), torch.randn(3, 96) * scale
    alone = ran.run({"x": mine})["y"]
    together = ran.run({"x": torch.cat([others, mine, others])})["y"][3:4]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**31))
def test_int8_is_near_float32_whatever_the_scale_of_a_row(scorer, scale, seed):
    torch.manual_seed(seed)
    rows = {"x": torch.randn(5, 96) * scale}
    got, want = prepared(scorer).run(rows)["y"], scorer.run(rows)["y"]
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) < 0.06, "16-bit sums that overflow are off by 0.1 and more"


PREPARED = {}


def prepared(model: Model):
    if model.spec.name not in PREPARED:
        policy = {"preset": "int8", "last": "int8"}
        PREPARED[model.spec.name] = prepare(model, CPU, policy, "onnxruntime")
    return PREPARED[model.spec.name]


@pytest.mark.parametrize("value", [0.0, 1e9])
def test_a_row_of_nothing_or_huge_numbers_leaves_its_neighbours_alone(scorer, value):
    rows = torch.randn(3, 96)
    want = prepared(scorer).run({"x": rows})["y"]
    rows[1] = value
    got = prepared(scorer).run({"x": rows})["y"]
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    if value == 0:
        torch.testing.assert_close(got[1:2], scorer.run({"x": rows[1:2]})["y"], atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_no_numbers_are_refused(scorer, value):
    """In static int8 they would be numbers like others."""
    rows = torch.randn(3, 96)
    rows[1, 5] = value
    with pytest.raises(InputError, match="input x holds NaN or infinity"):
        prepared(scorer).run({"x": rows})


def test_whether_int8_products_overflow_is_probed_and_weights_fit_it(scorer):
    import onnx

    path = prepared(scorer).files["model.onnx"]
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) == 2
    assert max(int(np.abs(w).max()) for w in weights) == (63 if saturates() else 127)


def test_a_layer_may_stay_in_float32_and_layers_have_the_names_of_the_module(reader):
    policy = resolve({"preset": "int8", "layers": {"body.2": "fp32"}})
    layers = prepare(reader, CPU, policy, "onnxruntime").report["layers"]
    assert layers["body.0"] == layers["table"] == "int8"
    assert layers["body.2"] == "fp32"
    with pytest.raises(ConfigError, match=r"body\.1 is not a layer with weights"):
        prepare(reader, CPU, resolve({"layers": {"body.1": "int8"}}), "onnxruntime")


def test_static_int8_needs_real_rows(reader):
    bare = Model(reader.spec, reader.module)
    prepare(bare, CPU, "int8", "onnxruntime")
    with pytest.raises(ModelError, match="needs calibration rows"):
        compiled(registry.find("onnxruntime"), bare, CPU, resolve("int8_static"), 1)


@pytest.mark.parametrize(
    ("setting", "backend", "says"),
    [
        ({"conv": "int8"}, "onnxruntime", "conv in fp32, int8_static, not in int8"),
        ({"matmul": "bf16"}, "onnxruntime", "matmul in fp32, int8, int8_static, int4, not in bf16"),
        ({"norm": "int8"}, "onnxruntime", "norm in fp32, not in int8"),
        ("int8", "eager", "matmul in fp32, bf16, fp16, not in int8"),
        ("int4", "eager", "matmul in fp32, bf16, fp16, not in int4"),
    ],
)
def test_what_a_backend_cannot_compute_is_refused_with_what_it_can(scorer, setting, backend, says):
    with pytest.raises(ConfigError, match=says):
        prepare(scorer, CPU, setting, backend)


def test_auto_finds_the_backend_that_has_int8_and_the_answer_says_so(scorer):
    def flow():
        return (yield Call("scorer", torch.randn(2, 96)))

    with Engine(device="cpu") as engine:
        engine.add(scorer, precision="int8", backend="auto")
        answer = engine.run(flow())
    assert answer.precision == {"scorer": "onnxruntime/int8"}


class Net(nn.Module):
    """Convolutions with a norm, as images are read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "backend",
    ["onnxruntime", pytest.param("openvino", marks=pytest.mark.needs("openvino", "nncf"))],
)
def test_convolutions_run_in_int8_with_ranges_from_the_example_rows(backend):
    torch.manual_seed(0)
    spec = ModelSpec(
        name="net",
        inputs=(TensorSpec(name="x", shape=(1, 12, 12)),),
        outputs=(TensorSpec(name="y", shape=(3, 12, 12)),),
    )
    model = Model(spec, Net().eval(), example={"x": torch.randn(16, 1, 12, 12)})
    ran = prepare(model, CPU, "int8_static", backend)
    assert (ran.backend, ran.precision) == (backend, "int8_static")
    assert list(ran.report["layers"].values()) == ["int8_static", "int8_static", "fp32"]
    said = " ".join(ran.report["kernels"])
    assert ("QLinearConv" if backend == "onnxruntime" else "Convolution") in said
    rows = {"x": torch.randn(4, 1, 12, 12)}
    got, want = ran.run(rows)["y"], model.run(rows)["y"]
    assert 0 < difference(got, want) < 0.1
    assert float((got.argmax(1) == want.argmax(1)).double().mean()) > 0.95


class Masked(nn.Module):
    """Attention that a padding mask keeps from places, as encoders of texts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        lowest = torch.finfo(torch.float32).min
        scores = q @ k.transpose(1, 2) / 8 + (1.0 - mask[:, None].float()) * lowest
        x = x + self.out(scores.softmax(-1) @ v)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.needs("openvino", "nncf")
def test_a_padding_mask_gives_no_scale_of_openvinos_int8():
    torch.manual_seed(0)
    spec = ModelSpec(
        name="masked",
        inputs=tuple(
            TensorSpec(name=name, shape=(12,), dtype="int64", bounds=bounds)
            for name, bounds in (("ids", (0, 49)), ("mask", (0, 1)))
        ),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    lengths = torch.arange(16) % 11 + 2
    rows = {
        "ids": torch.randint(0, 50, (16, 12)),
        "mask": (torch.arange(12) < lengths[:, None]).long(),
    }
    model = Model(spec, Masked().eval(), example=rows)
    ran = prepare(model, CPU, "int8_static", "openvino")
    assert difference(ran.run(rows)["y"], model.run(rows)["y"]) < 0.1
