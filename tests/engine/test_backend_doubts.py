"""What a backend would answer wrongly it does not get, and the engine answers right."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plinth.engine import Call, Engine, Model, ModelError, ModelSpec, TensorSpec
from plinth.engine.backends import prepare
from plinth.engine.devices.device import pick

CPU = pick("cpu")


@pytest.fixture(scope="module", autouse=True)
def exports(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def spec(inputs: dict[str, tuple], outputs: dict[str, tuple]) -> ModelSpec:
    return ModelSpec(
        name="net",
        inputs=tuple(TensorSpec(name=n, shape=s) for n, s in inputs.items()),
        outputs=tuple(TensorSpec(name=n, shape=s) for n, s in outputs.items()),
    )


class Sized(nn.Module):
    """Takes rows of any length, and computes something of the length."""

    def __init__(self, of_length: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.of_length = of_length
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_length(self.linear(x), x.shape[1])


def pooled(x: Tensor, length: int) -> Tensor:
    """An exporter makes an average over a fixed number of values of it."""
    narrow = nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 4)
    return nn.functional.interpolate(narrow, size=length).transpose(1, 2)


SIZED = {
    "a branch": (lambda x, length: x if length < 200 else -x, "2 to 199 in dimension 1"),
    "a number": (lambda x, length: x / float(length), "32 in dimension 1"),
    "a pool": (pooled, r"off the reference by .* at x \(16, 8\)"),
}


@pytest.mark.parametrize("kind", SIZED)
def test_what_was_compiled_for_some_sizes_does_not_run_others(kind):
    """It gave wrong answers, or none, at all sizes but those of the example rows."""
    of_length, told = SIZED[kind]
    model = Model(spec({"x": (None, 8)}, {"y": (None, 8)}), Sized(of_length).eval())
    with pytest.raises(ModelError, match=told):
        prepare(model, CPU, "fp32", "onnxruntime")
    with Engine(threads=1) as engine:
        engine.add(model)
        for length in (1, 16, 32, 33, 200, 300):
            rows = torch.randn(2, length, 8)
            found = engine.submit(Call("net", rows)).result(60).value
            torch.testing.assert_close(found, model.module(rows), rtol=1e-3, atol=1e-3)


def test_what_holds_wherever_the_model_does_is_compiled():
    """A table of positions ends for both."""
    table = torch.randn(64, 8)
    module = Sized(lambda x, length: x + table[torch.arange(length)]).eval()
    made = Model(spec({"x": (None, 8)}, {"y": (None, 8)}), module)
    executable = prepare(made, CPU, "fp32", "onnxruntime")
    for length in (1, 48, 64):
        rows = torch.randn(2, length, 8)
        torch.testing.assert_close(executable.run({"x": rows})["y"], module(rows))


class Filling(nn.Module):
    """Takes a missing value for 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.nan_to_num())


@pytest.mark.needs("openvino")
def test_a_model_that_knows_missing_values_keeps_knowing_them():
    model = Model(spec({"x": (8,)}, {"y": (1,)}), Filling().eval())
    with pytest.raises(ModelError, match="fails at NaN, which the reference takes"):
        prepare(model, CPU, "fp32", "openvino")
    with Engine(threads=1) as engine:
        engine.add(model)
        rows = torch.full((1, 8), torch.nan)
        assert engine.submit(Call("net", rows)).result(60).value.isfinite().all()


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.needs("openvino"))]
)
def test_an_output_may_have_the_name_of_an_input_where_the_backend_can_tell_them_apart(backend):
    module = nn.Linear(8, 8).eval()
    model = Model(spec({"x": (8,)}, {"x": (8,)}), module)
    with pytest.raises(ModelError, match=r"by the name x|name \(x\)"):
        prepare(model, CPU, "fp32", backend)
    with Engine(threads=1) as engine:
        engine.add(model)
        rows = torch.randn(3, 8)
        found = engine.submit(Call("net", rows)).result(60).value
        torch.testing.assert_close(found, module(rows), rtol=1e-3, atol=1e-3)
