"""Weights that lie in their files: shared, streamed, packed, and leaving memory while idle."""

import copy
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plinth.engine import (
    Call,
    Engine,
    Model,
    ModelSpec,
    ModelStore,
    Sla,
    TensorSpec,
    architecture,
    mapped,
)
from plinth.engine.backends import choice, prepare
from plinth.engine.backends.base import cpu_threads
from plinth.engine.compression.registry import Recipe
from plinth.engine.compression.training import compress
from plinth.engine.devices.device import pick
from plinth.engine.errors import ModelError, OutOfMemory
from plinth.engine.mapped import Pages, is_mapped, mappings
from plinth.engine.memory import residency, streaming
from plinth.engine.memory.plan import _Kernel
from plinth.engine.memory.streaming import _Reader, by_planes
from plinth.engine.models.families import find
from plinth.engine.models.families.layers import by_tokens
from plinth.engine.runtime.model_table import _read

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="Linux only"),
]
CPU = pick("cpu")
WIDTH = 768
"""So that weights, 18 MB, are far more than what an allocator happens to keep."""


class Deep(nn.Module):
    """Tied layers, a look-up table of numbers, a buffer and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.conv = nn.Conv1d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.last = nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(ids).transpose(1, 2))).mean(-1)
        x = self.second(self.first(x).relu()).relu()
        for layer in self.more:
            x = layer(x).relu()
        return self.last(x)


@architecture("deep-layers")
def deep(width: int) -> nn.Module:
    return Deep(width)


def spec_of(name: str, version: str = "1", width: int = WIDTH) -> ModelSpec:
    return ModelSpec(
        name=name,
        version=version,
        architecture="deep-layers",
        config={"width": width},
        inputs=(TensorSpec(name="ids", shape=(6,), dtype="int64", bounds=(0, 39)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ModelStore:
    """Two versions that differ in one layer, and six models that differ in all."""
    made = ModelStore(tmp_path_factory.mktemp("store"))
    torch.manual_seed(0)
    module = deep(WIDTH).eval()
    made.save(spec_of("net"), module)
    with torch.no_grad():
        module.last.weight.add_(1.0)
    made.save(spec_of("net", "2"), module)
    for number in range(6):
        torch.manual_seed(number)
        made.save(spec_of(f"m{number}"), deep(WIDTH))
    return made


def whole(model: Model) -> Model:
    """The same with weights of its own in memory."""
    copy = deep(**model.spec.config)
    copy.load_state_dict({k: v.clone() for k, v in model.module.state_dict().items()})
    return Model(model.spec, copy.eval())


def test_weights_lie_in_their_file_and_come_back_from_it(store):
    model = store.load("net")
    assert model.module.first.weight is model.module.second.weight
    assert is_mapped(model.module.first.weight)
    rows = model.rows(3)
    want = whole(model).run(rows)["y"]
    pages = Pages(model.module.parameters())
    assert pages.bytes > 0.9 * sum(p.nbytes for p in model.module.parameters())
    for _ in range(2):
        assert torch.equal(model.run(rows)["y"], want)
        assert pages.give_back() == pages.bytes


def test_weights_that_are_read_to_be_compared_are_not_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("plinth.engine.models.weights._READ_BYTES", 1 << 20)
    store = ModelStore(tmp_path)
    store.save(spec_of("wide", width=1536), deep(1536))
    meter = _Kernel()
    for there in ("nowhere", "in another model"):
        meter.start(anew=True)
        model = store.load("wide")
        taken = meter.stop()
        weights = sum(p.nbytes for p in model.module.parameters())
        assert weights > 75_000_000
        assert taken < weights / 3, there
        if there == "nowhere":
            kept = model
    assert model.module.first.weight.data_ptr() == kept.module.first.weight.data_ptr()


def test_what_was_written_to_is_never_given_back(store):
    model = store.load("net")
    with torch.no_grad():
        model.module.conv.weight.mul_(2.0)
    want = model.module.conv.weight.clone()
    Pages([model.module.conv.weight]).give_back()
    assert torch.equal(model.module.conv.weight, want)
    assert torch.equal(store.load("net").module.conv.weight * 2, want), "the file is as it was"


@pytest.mark.parametrize("asked", ["_own_pages", "_has_no_own_flag"])
def test_every_system_tells_a_page_that_was_written_to(tmp_path, monkeypatch, asked):
    if asked == "_has_no_own_flag":  # as a system that has no such call

        def missing(*_):
            raise OSError

        monkeypatch.setattr(mapped, "_own_pages", missing)
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * 4096))
    weights = torch.frombuffer(mapped.map_file(path), dtype=torch.uint8)
    pages = Pages([weights])
    assert weights.sum() == 0
    assert pages.give_back() == 64 * 4096
    weights[63 * 4096] = 7
    assert pages.give_back() == 0
    assert weights[63 * 4096] == 7


def test_wide_layers_take_so_many_tokens_of_all_rows():
    seen = []

    def layer(tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        return tokens * 2

    x = torch.randn(3, 5, 4).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(by_tokens(layer, x, 4), x * 2)
    assert seen == [4, 4, 4, 3]
    seen.clear()
    assert torch.equal(by_tokens(layer, x, 15), x * 2)
    assert seen == [3], "all rows at once"


def test_equal_weights_of_versions_are_one_in_memory(store):
    first, second = store.load("net", "1"), store.load("net", "2")
    same = first.module.state_dict(), second.module.state_dict()
    for name in ("first.weight", "conv.weight"):
        assert same[0][name].data_ptr() == same[1][name].data_ptr()
    assert not torch.equal(same[0]["last.weight"], same[1]["last.weight"])
    assert len(mappings(second.module.parameters())) == 2
    rows = first.rows(2)
    with Engine(backend="eager", threads=1, memory_budget=30_000_000) as engine:
        engine.add(first)
        engine.add(Model(spec_of("other", "2"), second.module))  # beside the first: one more layer
        with cpu_threads(1):
            want = first.run(rows)["y"]
        got = engine.submit(Call("net", rows)).result(30).value
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # one row at a time, perhaps
        with pytest.raises(OutOfMemory, match="m0 has"):
            engine.add(whole(store.load("m0")))


def test_a_model_larger_than_the_budget_runs_layer_by_layer(store):
    model = store.load("m1")
    rows = model.rows(4)
    want = whole(model).run(rows)["y"]
    with Engine(backend="auto", precision="auto", threads=1, memory_budget=15_000_000) as engine:
        engine.add(model, batch_range=(1, 4))
        facts = engine.status()["models"]["m1"]
        assert "layer by layer" in facts["memory"]
        assert facts["weights_bytes"] < 1_000_000
        got = engine.submit(Call("m1", rows)).result(30).value
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        with pytest.raises(OutOfMemory, match="weights, the budget is 15000000"):
            engine.add(whole(store.load("m2")))  # of which no file is there


def test_streamed_models_among_those_that_leave_hold_nothing_and_find_room(store):
    models = [store.load(f"m{number}") for number in range(3)]
    rows = models[0].rows(2)
    store.save(spec_of("small", width=300), deep(300))
    models.append(store.load("small"))
    with Engine(backend="eager", threads=1, memory_budget=12_000_000, evict_idle=True) as engine:
        for model in models:
            engine.add(model, batch_range=(1, 2))
        facts = engine.status()["models"]
        assert [name for name, each in facts.items() if each["memory"]] == ["m0", "m1", "m2"]
        assert engine._models._stays >= 0
        assert all(each.resident_weights >= 0 for each in engine._models.all())
        for turn in range(12):
            model = models[turn % 4]
            want = whole(model).run(rows)["y"]
            got = engine.submit(Call(model.spec.name, rows)).result(30).value
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        facts = engine.status()["models"]
        assert [facts[f"m{number}"]["returns"] for number in range(3)] == [0, 0, 0]


def test_a_model_too_slow_to_be_tried_is_streamed_all_the_same(store, monkeypatch):
    monkeypatch.setattr(choice, "CHECK_SECONDS", 0.0)
    model = store.load("m1")
    rows = model.rows(2)
    want = whole(model).run(rows)["y"]
    with Engine(backend="eager", threads=1, memory_budget=15_000_000) as engine:
        engine.add(model)
        assert "layer by layer" in engine.status()["models"]["m1"]["memory"]
        got = engine.submit(Call("m1", rows)).result(30).value
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Layer:
    """Pages that note who reads them."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.bytes, self.readers = size, []

    def read_ahead(self) -> None:
        self.readers.append(threading.current_thread().name.partition("_")[0])


def test_the_next_layer_is_read_while_one_computes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    reader, mine = _Reader(), threading.current_thread().name
    first, second, large, last = layers = (Layer(), Layer(), Layer(1 << 30), Layer())

    def forward(reader, order):
        for layer in layers:
            layer.readers.clear()
        for layer in order:
            reader.arrive(layer)
            assert layer.readers, "a layer runs when its pages are there"
        reader.end()
        return [layer.readers for layer in layers]

    assert forward(reader, layers) == [[mine]] * 4, "nobody knows what comes next"
    ahead = ["plinth-ahead"]
    assert forward(reader, layers) == [[mine], ahead, [mine], ahead]
    assert forward(copy.deepcopy(reader), layers) == [[mine]] * 4, "another's is not waited for"
    forward(reader, (first, large, second, last))
    assert forward(reader, (first, last))[3] == [mine]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert forward(reader, layers) == [[mine]] * 4, "one CPU has none to spare"


def test_texts_are_streamed_with_their_wide_layers_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "TOKENS_AT_ONCE", 48)
    family = find("bert")
    model = family.model({**family.small, "width": 64, "inner": 512, "vocabulary": 4000})
    store = ModelStore(tmp_path)
    store.save(model.spec, model.module)
    ids = torch.randint(0, 4000, (2, 64))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = model.run(rows)
    with Engine(backend="eager", precision="fp32", threads=1, memory_budget=1 << 20) as engine:
        engine.add(store.load("bert"))
        assert "layer by layer" in engine.status()["models"]["bert"]["memory"]
        got = engine.submit(Call("bert", rows)).result(30).value
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


@given(
    depth=st.integers(5, 20),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
    dilation=st.sampled_from([1, 2]),
    at_once=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_convolutions_some_planes_at_once_give_what_all_at_once_give(
    depth, kernel, stride, padding, dilation, at_once
):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(2, 3, (kernel, 3, 3), (stride, 1, 2), (padding, 1, 0), (dilation, 1, 1)),
        nn.BatchNorm3d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, 2, 1),
        nn.Conv3d(3, 2, 1, bias=False),
    ).eval()
    volume = torch.randn(2, 2, depth, 9, 9) - 3.0
    with torch.inference_mode():
        want = layers(volume)
        got = by_planes(list(layers), volume, at_once)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("onnxruntime", "auto")),
    ],  # six exports
)
def test_six_models_in_the_memory_of_two_answer_every_call(store, backend):
    models = [store.load(f"m{number}") for number in range(6)]
    rows = models[0].rows(1)
    want = {model.spec.name: whole(model).run(rows)["y"] for model in models}
    one = sum(t.nbytes for t in models[0].module.parameters())
    budget = int((2.6 if backend == "eager" else 3.3) * one)  # to compile takes three times one
    with Engine(backend=backend, threads=1, memory_budget=budget, evict_idle=True) as engine:
        for model in models:
            engine.add(model, batch_range=(1, 2))

        def ask(number: int) -> tuple[str, Tensor]:
            name = f"m{number % 6}"
            return name, engine.submit(Call(name, rows)).result(60).value

        with ThreadPoolExecutor(4) as callers:
            for name, got in callers.map(ask, range(36)):
                near = 1e-3 * float(want[name].abs().max())  # what "auto" allows its backends
                torch.testing.assert_close(got, want[name], rtol=1e-4, atol=near)
        facts = engine.status()["models"]
        resident = sum(each["weights_bytes"] for each in facts.values() if each["resident"])
        assert resident <= budget
        assert sum(each["returns"] for each in facts.values()) >= 6
        shown = engine.metrics.registry
        values = [shown.get_sample_value("plinth_model_weight_bytes", {"model": n}) for n in facts]
        assert min(values) < 0.1 * one < max(values)


@pytest.mark.parametrize("harm", ["none", "written", "gone"])
@pytest.mark.parametrize(
    ("backend", "place"),
    [("onnxruntime", "onnxruntime/*/constants.bin"), ("openvino", "openvino-graphs/*/model.bin")],
)
def test_a_compiled_model_is_read_again_as_it_was(
    backend, place, harm, tmp_path, monkeypatch, caplog
):
    pytest.importorskip(backend)
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    onnx = pytest.importorskip("onnx")
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    path, node = tmp_path / "m.onnx", onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    kind, many = onnx.TensorProto.FLOAT, ["n", 3, 9, 9]
    graph = onnx.helper.make_graph(
        [node, onnx.helper.make_node("Relu", ["y"], ["z"])],
        "m",
        [onnx.helper.make_tensor_value_info("x", kind, many)],
        [onnx.helper.make_tensor_value_info("z", kind, ["n", 64, 6, 6])],
        [onnx.numpy_helper.from_array(weight.reshape(64, 3, 4, 4).numpy(), "w")],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    made = ModelStore(tmp_path / "store")
    made.import_onnx(None, path)
    executable = prepare(made.load("m"), CPU, "fp32", backend)
    rows = {"x": torch.randn(2, 3, 9, 9)}
    want = executable.run(rows)["z"]
    read = executable.again()
    assert read is not None
    (constants,) = tmp_path.glob(place)
    assert constants.stat().st_size >= weight.nbytes
    if harm == "written":
        constants.write_bytes(bytes(constants.stat().st_size))
    elif harm == "gone":
        shutil.rmtree(constants.parent)
    assert torch.equal(read().run(rows)["z"], want)
    assert ("m: " in caplog.text) == (harm != "none")
    again = executable.again()
    assert torch.equal(again().run(rows)["z"], want), "what was written to is made anew"


def test_what_the_cache_let_go_of_is_made_anew():
    def read() -> str:
        raise FileNotFoundError

    assert _read(read, lambda: "made anew") == "made anew"
    assert _read(lambda: "read", None) == "read"
    with pytest.raises(FileNotFoundError):
        _read(read, None)


def test_what_a_return_takes_is_not_learned_as_the_cost_of_its_batch(store, monkeypatch):
    passed, back = [0.0], residency.Evictable._back

    def slow(self):
        passed[0] += 7.0 if self.seat.away else 0.0
        back(self)

    monkeypatch.setattr(residency.Evictable, "_back", slow)
    models = [store.load(f"m{number}") for number in range(2)]
    rows, one = models[0].rows(1), sum(t.nbytes for t in models[0].module.parameters())
    with Engine(
        backend="eager",
        threads=1,
        memory_budget=int(1.4 * one),
        evict_idle=True,
        clock=lambda: time.monotonic() + passed[0],
    ) as engine:
        for model in models:
            engine.add(model, batch_range=(1, 2))
        for turn in range(12):
            engine.submit(Call(f"m{turn % 2}", rows)).result(60)
        assert passed[0] >= 7 * 11
        assert max(cost for each in engine.costs().values() for cost in each.values()) < 1.0
        engine.submit(Call("m1", rows), Sla(deadline_ms=1500)).result(60)  # it lies in memory


def test_two_lanes_never_have_more_in_memory_than_the_budget(store):
    models = [store.load(f"m{number}") for number in range(3)]
    rows = models[0].rows(1)
    one = sum(t.nbytes for t in models[0].module.parameters())
    with Engine(
        backend="eager", devices=["cpu", "cpu"], memory_budget=int(1.8 * one), evict_idle=True
    ) as engine:
        for model in models:
            engine.add(model, batch_range=(1, 1))
        calls = [engine.submit(Call(f"m{turn % 3}", rows)) for turn in range(30)]
        for turn, call in enumerate(calls):
            want = models[turn % 3].run(rows)["y"]
            torch.testing.assert_close(call.result(60).value, want, rtol=1e-4, atol=1e-5)


def test_a_file_that_was_written_to_while_its_model_was_away_is_not_served(tmp_path):
    store = ModelStore(tmp_path)
    for name in ("one", "two"):
        store.save(spec_of(name), deep(WIDTH))
    path = tmp_path / "one" / "1" / "weights.safetensors"
    with Engine(backend="eager", threads=1, memory_budget=30_000_000, evict_idle=True) as engine:
        for name in ("one", "two"):
            engine.add(store.load(name), batch_range=(1, 1))
        rows = store.load("two").rows(1)
        engine.submit(Call("two", rows)).result(30)
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        with pytest.raises(ModelError, match=r"weights.safetensors was written to while"):
            engine.submit(Call("one", rows)).result(30)
        assert engine.submit(Call("two", rows)).result(30).value.shape == (1, 4)


@pytest.mark.parametrize("budget", [1 << 30, 8 << 20], ids=["whole", "layer by layer"])
def test_a_file_that_was_written_to_under_a_running_engine_is_not_served(tmp_path, budget):
    store = ModelStore(tmp_path)
    folder = store.save(spec_of("one"), deep(WIDTH))
    rows = store.load("one").rows(1)
    with Engine(backend="eager", threads=1, memory_budget=budget) as engine:
        engine.add(store.load("one"), batch_range=(1, 1))
        streams = engine.status()["models"]["one"]["memory"]
        assert (streams is not None) == (budget < 1 << 30)
        want = engine.submit(Call("one", rows)).result(30).value
        other = tmp_path / "other"
        shutil.copyfile(folder / "weights.safetensors", other)
        other.replace(folder / "weights.safetensors")  # this one is seen by the next start alone
        assert torch.equal(engine.submit(Call("one", rows)).result(30).value, want)
    with Engine(backend="eager", threads=1, memory_budget=budget) as engine:
        engine.add(store.load("one"), batch_range=(1, 1))
        engine.submit(Call("one", rows)).result(30)
        with (folder / "weights.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")
        with pytest.raises(ModelError, match=r"weights.safetensors was written to while"):
            engine.submit(Call("one", rows)).result(30)


@pytest.mark.parametrize("bits", ["int8", "int4", "ternary"])
def test_packed_weights_stay_packed_until_they_are_used(tmp_path, bits):
    torch.manual_seed(0)
    module = deep(256).eval()
    rows = {"ids": torch.randint(0, 40, (32, 6))}
    recipe = Recipe({"quantization_aware": {"bits": bits, "ends": bits}}, epochs=0)
    small = compress(module, rows, recipe, lambda m, given: {"y": m(given["ids"])})
    store = ModelStore(tmp_path)
    store.save(spec_of("packed", width=256), small)
    model = store.load("packed")
    assert type(model.module.conv).__name__ == "PackedConv1d"
    assert isinstance(model.module.conv, nn.Conv1d)
    got = model.run(rows)["y"]
    assert torch.equal(got, whole(model).run(rows)["y"]), "the same bits as unpacked"
    ready = prepare(model, CPU, "fp32", "eager")
    dense = sum(t.nbytes for t in whole(model).module.parameters())
    tied = model.module.first.weight.nbytes  # two names of one tensor are unpacked
    packed = 1 if bits == "int8" else 0.5
    assert ready.weights < tied + (dense - tied) * packed / 4 + 60_000
    assert set(model.module.state_dict()) == set(module.state_dict())
    if bits != "int4":
        return
    exported = prepare(model, CPU, "fp32", "onnxruntime")
    torch.testing.assert_close(exported.run(rows)["y"], got, rtol=1e-4, atol=1e-5)
    again = compress(model.module, rows, recipe, lambda m, given: {"y": m(given["ids"])})
    torch.testing.assert_close(again.module(rows["ids"]), got, rtol=0.2, atol=0.05)
