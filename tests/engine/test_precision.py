"""Which layers compute in which precision, and that outputs stay float32."""

import pytest
import torch
from torch import nn

from plinth.engine import ConfigError
from plinth.engine.precision.policy import CLASSES, PRESETS, PrecisionPolicy, resolve
from plinth.engine.precision.transforms import apply, report


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


def test_a_layer_used_twice_is_never_left_in_bf16():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.body = nn.Sequential(self.shared, nn.ReLU())
            self.out = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.shared(x)
            assert first.dtype == torch.float32
            return self.out(self.body(first))

    assert apply(Twice().eval(), PRESETS["bf16"])(torch.randn(2, 4)).dtype == torch.float32


def test_a_table_starts_from_a_preset_and_names_classes():
    policy = PrecisionPolicy.from_table({"conv": "bf16"})
    assert policy.table() == {name: "bf16" if name == "conv" else "fp32" for name in CLASSES}
    assert PrecisionPolicy.from_table({"preset": "bf16", "matmul": "fp32"}).conv == "bf16"
    assert resolve({"preset": "bf16"}) is PRESETS["bf16"]
    assert resolve("auto").auto


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"matmull": "bf16"}, "did you mean 'matmul'"),
        ({"conv": "bf61"}, "did you mean 'bf16'"),
        ({"conv": "int8"}, "not there yet"),
        ({"preset": "fp3"}, "did you mean 'fp32'"),
        ("int8", "not there yet"),
        ("fast", "use one of fp32, bf16, auto"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_nearest_right_one(setting, says):
    with pytest.raises(ConfigError, match=says):
        resolve(setting)
