"""Which layers compute in which precision, and that outputs stay float32."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from plinth.engine import ConfigError, Model, ModelSpec, TensorSpec
from plinth.engine.backends import prepare
from plinth.engine.backends.choice import difference
from plinth.engine.devices.device import pick
from plinth.engine.precision.policy import CLASSES, PRESETS, PrecisionPolicy, resolve
from plinth.engine.precision.registry import missing
from plinth.engine.precision.transforms import _Census, apply, flops_by_precision, report

pytestmark = pytest.mark.cpu


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64),
        nn.ReLU(),
        nn.LayerNorm(64),
        nn.Linear(64, 64),
        nn.Linear(64, 4),
        nn.Softmax(dim=-1),
    ).eval()


def dtypes(module: nn.Module, rows: torch.Tensor) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """What each leaf is given and gives."""
    seen = {}

    def look(name):
        def hook(_, args, output):
            seen[name] = (args[0].dtype, output.dtype)

        return hook

    for name, layer in module.named_modules():
        if name and not list(layer.children()):
            layer.register_forward_hook(look(name), prepend=True)
    with torch.inference_mode():
        module(rows)
    return seen


def test_the_preset_bf16_keeps_norm_softmax_and_the_last_layer_in_fp32():
    assert [(layer.op_class, layer.precision) for layer in report(network(), PRESETS["bf16"])] == [
        ("matmul", "bf16"),
        ("activation", "bf16"),
        ("norm", "fp32"),
        ("matmul", "bf16"),
        ("matmul", "fp32"),
        ("softmax", "fp32"),
    ]


def test_layers_really_compute_in_what_the_report_says():
    low, high = torch.bfloat16, torch.float32
    changed = apply(network(), PRESETS["bf16"])
    assert dtypes(changed, torch.randn(3, 32)) == {
        "0": (low, low),
        "1": (low, low),
        "2": (high, high),
        "3": (low, low),
        "4": (high, high),
        "5": (high, high),
    }
    assert changed[0].weight.dtype == low
    assert changed[4].weight.dtype == high


def test_outputs_are_float32_near_the_original_which_stays_as_it_was():
    module, rows = network(), torch.randn(16, 32)
    with torch.inference_mode():
        want, got = module(rows), apply(module, PRESETS["bf16"])(rows)
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_fp32_changes_nothing():
    module = network()
    assert apply(module, PRESETS["fp32"]) is module
    assert PRESETS["fp32"].plain
    assert not PRESETS["bf16"].plain


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        (nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)),
         torch.randn(2, 1, 6, 6, 6)),
        (nn.GRU(8, 16, batch_first=True), torch.randn(2, 5, 8)),
        (nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2)), torch.tensor([[1, 2], [3, 4]])),
        (nn.TransformerEncoderLayer(16, 2, batch_first=True), torch.randn(2, 3, 16)),
        (nn.Linear(3, 2), torch.randn(4, 3)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_all_kinds_of_layers_run_in_bf16_even_the_last(module, rows):
    policy = PrecisionPolicy.from_table({"preset": "bf16", "last": "bf16", "norm": "bf16"})
    module = module.eval()
    with torch.inference_mode():
        want, got = module(rows), apply(module, policy)(rows)
    want, got = (value[0] if isinstance(value, tuple) else value for value in (want, got))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)


def traced(module: nn.Module, *rows: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """What a module gives, and the kernels with their dtypes that ran."""

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kinds = [str(a.dtype)[6:] for a in args if isinstance(a, torch.Tensor)]
            ran.append(f"{func.overloadpacket.__name__} {' '.join(kinds)}")
            return func(*args, **(kwargs or {}))

    ran: list[str] = []
    with torch.no_grad(), Log():
        output = module(*rows)
    return output, ran


def casts(ran: list[str]) -> int:
    return sum(line.startswith(("_to_copy", "to ")) for line in ran)


def test_a_layer_used_twice_computes_in_its_precision_each_time():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.body = nn.Sequential(self.shared, nn.ReLU())
            self.out = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(self.shared(x)))

    output, ran = traced(apply(Twice().eval(), PRESETS["bf16"]), torch.randn(2, 4))
    assert output.dtype == torch.float32
    assert [line.split()[1] for line in ran if "addmm" in line] == ["bfloat16"] * 2 + ["float32"]
    assert casts(ran) == 2


class Residual(nn.Module):
    """Convolutions with a norm after each, a sum around them, and functions between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.norm_two = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        for norm in (self.norm_one, self.norm_two):
            nn.init.uniform_(norm.weight)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm_one(self.one(x)))
        x = torch.relu(x + self.norm_two(self.two(x)))
        return self.head(torch.softmax(x.mean((2, 3)), -1))


def test_a_region_of_bf16_layers_has_a_cast_where_it_begins_and_one_where_it_ends():
    torch.manual_seed(0)
    module, x = Residual().eval(), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        want = module(x)
    got, ran = traced(apply(module, PRESETS["bf16"]), x)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=0)
    assert casts(ran) == 2
    assert {line for line in ran if line.startswith("convolution")} == {
        "convolution bfloat16 bfloat16 bfloat16"
    }
    assert "relu bfloat16" in ran
    assert "mean float32" in ran, "a sum over many values is no pointwise function"
    assert "_softmax float32" in ran


def test_norms_after_low_convolutions_are_folded_into_them_and_the_report_says_so():
    module = Residual().eval()
    layers = {layer.name: layer.precision for layer in report(module, PRESETS["bf16"])}
    assert layers["norm_one"] == layers["norm_two"] == "folded"
    _, ran = traced(apply(module, PRESETS["bf16"]), torch.randn(3, 2, 8, 8))
    assert not any("batch_norm" in line for line in ran)
    assert module.norm_one.weight is not None, "the module itself stays as it was"


def test_a_norm_that_is_not_alone_in_reading_a_convolution_is_not_folded():
    class Peeking(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.one(x)
            x = torch.relu(self.norm_one(first)) + first
            return self.head(self.norm_two(self.two(x)).mean((2, 3)))

    module, x = Peeking().eval(), torch.randn(3, 2, 8, 8)
    layers = {layer.name: layer.precision for layer in report(module, PRESETS["bf16"])}
    assert (layers["norm_one"], layers["norm_two"]) == ("fp32", "folded")
    with torch.no_grad():
        want, got = module(x), apply(module, PRESETS["bf16"])(x)
    torch.testing.assert_close(got, want, atol=5e-2, rtol=0)


def test_what_is_written_in_place_is_not_written_to_a_copy():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            x.add_(torch.ones(4))
            self.act(x)
            x.pow_(2)
            return self.out(x)

    torch.manual_seed(0)
    module, x = Writing().eval(), torch.randn(5, 4)
    policy = PrecisionPolicy(bf16=["matmul"])
    with torch.inference_mode():
        want, got = module(x), apply(module, policy)(x)
    torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_of_the_library_runs_in_bf16_but_for_norms_and_the_last(masked):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 7, 32)
    mask = {"src_key_padding_mask": torch.arange(7).expand(3, 7) > 4} if masked else {}
    changed = apply(module, PRESETS["bf16"])
    with torch.inference_mode():
        want, got = module(x, **mask), changed(x, **mask)
        share = flops_by_precision(lambda: changed(x, **mask))
    keep = ~mask["src_key_padding_mask"] if masked else torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(got[keep], want[keep], atol=5e-2, rtol=0)
    assert share["bf16"] > 0.8
    by_class = {layer.op_class: layer.precision for layer in report(module, PRESETS["bf16"])}
    assert by_class["attention"] == "bf16"
    assert by_class["norm"] == "fp32"


def test_a_table_starts_from_a_preset_and_names_classes():
    policy = PrecisionPolicy.from_table({"conv": "bf16"})
    assert policy.table() == {name: "bf16" if name == "conv" else "fp32" for name in CLASSES}
    assert PrecisionPolicy.from_table({"preset": "bf16", "matmul": "fp32"}).conv == "bf16"
    assert resolve({"preset": "bf16"}) is PRESETS["bf16"]
    assert resolve("auto").auto


def test_a_policy_may_be_written_as_lists():
    policy = PrecisionPolicy(fp32=["norm", "softmax"], bf16=["matmul", "conv"], int8=["embedding"])
    assert policy == replace(
        PrecisionPolicy(matmul="bf16", conv="bf16", embedding="int8"), name=policy.name
    )
    assert resolve({"bf16": ["matmul", "conv"], "int8": ["embedding"]}) == policy
    assert policy.used == {"bf16", "int8"}
    assert resolve(policy.as_dict()) == policy


def test_a_layer_may_differ_from_its_class_and_two_policies_never_share_a_name():
    policy = resolve({"preset": "bf16", "layers": {"0": "fp32", "4": "bf16"}})
    layers = {layer.name: layer.precision for layer in report(network(), policy)}
    assert (layers["0"], layers["3"], layers["4"]) == ("fp32", "bf16", "bf16")
    assert policy.name != PRESETS["bf16"].name
    assert policy.name != resolve({"preset": "bf16", "layers": {"0": "fp32"}}).name
    with pytest.raises(ConfigError, match="not a layer with weights"):
        report(network(), resolve({"layers": {"1": "bf16"}}))


def test_a_precision_that_torch_cannot_realise_is_refused_with_those_it_can():
    with pytest.raises(ConfigError, match=r"no matmul in int4 .*fp32, bf16, fp16"):
        apply(network(), PRESETS["int4"])
    why = missing("torch", PRESETS["int8_static"])
    assert why == "it computes matmul in fp32, bf16, fp16, not in int8_static"
    assert missing("torch", PRESETS["bf16"]) is None
    assert missing("torch", resolve({"layers": {"0": "int4"}})) is not None


@pytest.mark.parametrize("seed", range(3))
def test_fp16_is_realised_as_bf16_is(seed):
    torch.manual_seed(seed)
    module, rows = network(), torch.randn(16, 32)
    with torch.inference_mode():
        want, got = module(rows), apply(module, PRESETS["fp16"])(rows)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert not torch.equal(got, want)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"matmull": "bf16"}, "did you mean 'matmul'"),
        ({"conv": "bf61"}, "did you mean 'bf16'"),
        ({"conv": ["int8"]}, "not a precision"),
        ({"bf16": ["conv"], "int8": ["conv"]}, "in two lists"),
        ({"bf16": ["cov"]}, "did you mean 'conv'"),
        ({"bf16": "conv"}, "expected a list"),
        ({"conv": "fp16", "bf16": ["conv"]}, "fp16 and in the list bf16"),
        ({"preset": "fp3"}, "did you mean 'fp32'"),
        ("fast", "use one of fp32, exact, bf16"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest_right_one(setting, says):
    with pytest.raises(ConfigError, match=says):
        resolve(setting)


class Tied(nn.Module):
    """A table of words that is the last layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.inner(self.words(ids))).mean(1))


def test_tables_in_int8_beside_products_in_bf16_each_as_the_policy_says():
    policy = PrecisionPolicy(
        fp32=["norm", "softmax"], bf16=["matmul", "conv", "activation"], int8=["embedding"]
    )
    torch.manual_seed(0)
    ids = TensorSpec(name="ids", shape=(6,), dtype="int64", bounds=(0, 49))
    spec = ModelSpec(name="tied", inputs=(ids,), outputs=(TensorSpec(name="y", shape=(50,)),))
    model = Model(spec, Tied().eval())
    ready = prepare(model, pick("cpu"), policy, "eager")
    assert ready.report["layers"] == {"words": "int8", "inner": "bf16", "out": "fp32"}
    assert set(ready.report["flops"]) == {"bf16", "fp32"}
    assert ready.precision == policy.name
    rows = model.rows(4)
    want, got = model.run(rows)["y"], ready.run(rows)["y"]
    assert 0 < difference(got, want) < 0.02
    table = ready.module.words
    assert table.weight.dtype == torch.int8
    torch.testing.assert_close(
        table(rows["ids"]), model.module.words(rows["ids"]), rtol=0, atol=0.02
    )
    assert model.module.words.weight.dtype == torch.float32, "the model stays as it was"


def test_a_table_that_int8_would_change_is_refused():
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(8, 1))
    with pytest.raises(ConfigError, match="no Embedding in int8"):
        apply(net.eval(), PrecisionPolicy(int8=["embedding"]))


def test_counting_operations_is_kept_apart_from_torchs_compiler_without_importing_it():
    """Torch wraps a mode that does not say no: its first operation imports 800 modules, 80 MB."""
    assert not hasattr(_Census.__torch_dispatch__, "__wrapped__")

    class Wrapped(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert hasattr(Wrapped.__torch_dispatch__, "__wrapped__")
