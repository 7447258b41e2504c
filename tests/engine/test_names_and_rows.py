"""Inputs and outputs go by name, rows stay the caller's, and every backend says the same."""

import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from plinth.engine import Call, ConfigError, Engine, InputError, Model, ModelError, ModelSpec
from plinth.engine import TensorSpec as Spec
from plinth.engine.backends import choice, prepare
from plinth.engine.backends.choice import difference
from plinth.engine.devices.device import pick

CPU = pick("cpu")
BACKENDS = ["eager", pytest.param("onnxruntime", marks=pytest.mark.cpu)]
INTEGERS = "int64"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def spec(inputs: list[Spec], outputs: list[Spec], name: str = "net") -> ModelSpec:
    return ModelSpec(name=name, inputs=tuple(inputs), outputs=tuple(outputs))


def ask(engine: Engine, rows, name: str = "net"):
    return engine.submit(Call(name, rows)).result(timeout=30).value


class Encoder(nn.Module):
    """Takes its inputs in BERT's order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types = nn.Embedding(50, 8), nn.Embedding(2, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        hidden = self.words(input_ids) + self.types(token_type_ids)
        kept = attention_mask[..., None].float()
        return (hidden * kept).sum(1) / kept.sum(1).clamp_min(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_reach_the_parameter_of_their_name_in_whatever_order_the_spec_has(backend):
    net = Encoder().eval()
    rows = {
        "input_ids": torch.arange(6)[None],
        "token_type_ids": torch.zeros(1, 6, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]]),
    }
    inputs = [Spec(name=name, shape=(6,), dtype=INTEGERS) for name in rows]
    with Engine(backend=backend) as engine:
        engine.add(Model(spec(inputs, [Spec(name="y", shape=(8,))]), net))
        torch.testing.assert_close(ask(engine, rows), net(**rows).detach())


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return (a - b) * scale


class Starred(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] - tensors[1]


@pytest.mark.parametrize(
    ("module", "names"),
    [(Two(), ("a", "c")), (Two(), ("a",)), (Two(), ("a", "b", "d")), (Starred(), ("a", "b"))],
)
def test_names_that_do_not_match_are_refused_with_both_lists(module, names):
    inputs = [Spec(name=name, shape=(3,)) for name in names]
    with pytest.raises(ModelError, match=r"has the inputs .* but its forward takes") as refusal:
        prepare(Model(spec(inputs, [Spec(name="y", shape=(3,))]), module), CPU, "fp32", "eager")
    assert "names of forward's parameters" in refusal.value.hint


class Hidden(nn.Module):
    """Gives its outputs as a mapping, more of them than a contract needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layer(x)
        return {"last_hidden_state": hidden, "pooler_output": hidden.mean(1)}


@pytest.mark.cpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "names"), [(5, ("pooler_output",)), (None, ("pooler_output", "last_hidden_state"))]
)
def test_outputs_come_back_by_name_in_whatever_order_and_number(backend, size, names):
    net, x = Hidden().eval(), torch.randn(2, 5, 4)
    shapes = {"pooler_output": (4,), "last_hidden_state": (size, 4)}
    outputs = [Spec(name=name, shape=shapes[name]) for name in names]
    model = Model(spec([Spec(name="x", shape=(size, 4))], outputs), net)
    found, want = prepare(model, CPU, "fp32", backend).run({"x": x}), net(x)
    assert list(found) == list(names)
    for name in names:
        torch.testing.assert_close(found[name], want[name].detach(), atol=1e-6, rtol=1e-5)


def test_a_named_tuple_is_read_by_its_names_and_a_missing_output_is_named():
    pair = namedtuple("pair", "low high")

    class Bounds(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return pair(x - 1, x + 1)

    x = Spec(name="x", shape=(3,))
    swapped = spec([x], [Spec(name="high", shape=(3,)), Spec(name="low", shape=(3,))])
    found = Model(swapped, Bounds()).run({"x": torch.zeros(1, 3)})
    assert (found["low"].sum(), found["high"].sum()) == (-3, 3)
    with pytest.raises(ModelError, match="no output absent, only"):
        Model(spec([x], [Spec(name="absent", shape=(4,))]), Hidden()).run(
            {"x": torch.ones(1, 5, 4)}
        )


# -- modules that would answer wrongly ---------------------------------------------------------
def test_a_module_left_in_training_mode_serves_as_in_eval_mode_and_stays_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    assert net.training
    with Engine() as engine:
        engine.add(Model(spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(1,))]), net))
        row = torch.ones(1, 4)
        beside = [ask(engine, torch.cat([row, 5 * torch.randn(n, 4)]))[0] for n in (0, 1, 16)]
    for answer in beside:
        torch.testing.assert_close(answer, beside[0])
    assert net.training
    assert int(net[1].num_batches_tracked) == 0


@pytest.mark.cpu
def test_a_module_put_into_training_mode_while_it_serves_is_told():
    net = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5)).eval()
    with Engine() as engine:
        engine.add(Model(spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(1,))]), net))
        net.train()
        with pytest.raises(ModelError, match="training mode while it is served"):
            ask(engine, torch.ones(1, 4))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x)


@pytest.mark.parametrize("module", [Centred(), Random()])
def test_a_model_whose_answer_depends_on_its_batch_is_refused(module):
    model = Model(spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(4,))]), module.eval())
    with pytest.raises(ModelError, match="mixes the rows of a batch, or answers at random"):
        prepare(model, CPU, "fp32", "eager")


class Scales(nn.Module):
    """Divides its input in place, as careless preprocessing does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.div_(255.0)
        return self.layer(x)


RELU = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("backend", "size", "net"),
    [("eager", 2, Scales()), ("eager", None, Scales()), ("eager", 2, RELU),
     pytest.param("onnxruntime", 2, Scales(), marks=pytest.mark.cpu)],
)  # fmt: skip
def test_a_module_that_writes_to_its_input_never_reaches_the_callers_tensor(backend, size, net):
    inputs, outputs = [Spec(name="x", shape=(size, 4))], [Spec(name="y", shape=(size, 1))]
    x = torch.full((1, 2, 4), -255.0)
    want = net.eval()(x.clone()).detach()
    with Engine(backend=backend) as engine:
        engine.add(Model(spec(inputs, outputs), net))
        for _ in range(2):
            torch.testing.assert_close(ask(engine, x), want)
    assert torch.equal(x, torch.full((1, 2, 4), -255.0))


class Late(nn.Module):
    """Writes to its input only for rows that the examples do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return x.neg_() if bool((x > 100).all()) else -x


@pytest.mark.cpu  # an accelerator's model writes into rows of its own
def test_a_write_that_no_example_showed_is_an_error_once_and_then_a_copy():
    with Engine() as engine:
        engine.add(Model(spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(4,))]), Late()))
        x = torch.full((1, 4), 200.0)
        with pytest.raises(ModelError, match="wrote into its input"):
            ask(engine, x)
        x = torch.full((1, 4), 200.0)
        assert ask(engine, x).tolist() == [[-200.0] * 4]
        assert x.tolist() == [[200.0] * 4]


class Reuses(nn.Module):
    """Gives out a buffer of its own, which the next batch overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out", torch.zeros(128, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.out[: len(x)] = 2 * x
        return self.out[: len(x)]


class Cached(nn.Module):
    """As :class:`Reuses`, but where no walk over the module's tensors finds the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {"out": torch.zeros(128, 4)}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["out"][: len(x)] = 2 * x
        return self.cache["out"][: len(x)]


@pytest.mark.parametrize("module", [Reuses(), Cached()], ids=["buffer", "hidden"])
def test_an_answer_does_not_change_when_the_next_batch_runs(module: nn.Module):
    with Engine() as engine:
        engine.add(Model(spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(4,))]), module))
        first = ask(engine, torch.ones(1, 4))
        ask(engine, torch.full((1, 4), 9.0))
    assert first.tolist() == [[2.0] * 4]


class Sometimes(nn.Module):
    """Gives out memory that is not the caller's alone, but not for the rows it is tried on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("out", torch.zeros(1, 4))
        self.array = np.zeros((1, 4), np.float32)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] < 50:
            return 2 * x
        if self.kind == "its rows":
            return x
        self.out.copy_(2 * x)
        if self.kind == "an array":
            self.array[:] = self.out.numpy()
            return torch.from_numpy(self.array)
        return self.out if self.kind == "a buffer" else self.out.view(1, 4)


@pytest.mark.parametrize(
    "kind", ["a buffer", "a view", pytest.param("an array", marks=pytest.mark.cpu), "its rows"]
)
def test_an_answer_stays_as_it_was_where_only_some_rows_share_memory(kind):
    with Engine() as engine:
        contract = spec([Spec(name="x", shape=(4,))], [Spec(name="y", shape=(4,))])
        engine.add(Model(contract, Sometimes(kind)), batch_range=(1, 1))
        rows = torch.full((1, 4), 60.0)
        first = ask(engine, rows)
        want = first.clone()
        rows.fill_(70.0)
        assert ask(engine, rows).tolist() != want.tolist()
        assert first.tolist() == want.tolist()


def test_two_outputs_that_are_one_tensor_are_two_answers():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = 2 * x
            return {"y": y, "z": y}

    outputs = [Spec(name=name, shape=(4,)) for name in "yz"]
    with Engine() as engine:
        engine.add(Model(spec([Spec(name="x", shape=(4,))], outputs), Twice()))
        found = ask(engine, torch.ones(1, 4))
        with torch.inference_mode():
            found["y"].zero_()
    assert found["z"].tolist() == [[2.0] * 4]


def test_an_answer_does_not_change_when_the_caller_uses_its_rows_again():
    with Engine() as engine:
        outputs = [Spec(name="y", shape=(4,))]
        engine.add(Model(spec([Spec(name="x", shape=(4,))], outputs), nn.Identity()))
        rows = torch.ones(1, 4)
        answer = ask(engine, rows)
        rows.fill_(9.0)
    assert answer.tolist() == [[1.0] * 4]


# -- example rows ------------------------------------------------------------------------------
class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])


class Attention(nn.Module):
    """Masked attention: nothing but NaN where all is masked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.head = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x)[..., 0].masked_fill(mask == 0, float("-inf")).softmax(1)
        return self.head((scores[..., None] * x).sum(1))


def attention(**facts) -> Model:
    mask = Spec(name="mask", shape=(5,), dtype=INTEGERS, **facts)
    return Model(
        spec([Spec(name="x", shape=(5, 4)), mask], [Spec(name="y", shape=(1,))]),
        Attention().eval(),
    )


@pytest.mark.cpu
def test_lengths_and_masks_get_valid_rows_without_being_asked():
    lengths = Spec(name="lengths", shape=(), dtype=INTEGERS)
    contract = spec([Spec(name="x", shape=(5, 4)), lengths], [Spec(name="y", shape=(1,))])
    assert (
        prepare(Model(contract, Lengths().eval()), CPU, "fp32", "eager").report["difference"] == 0
    )
    executable = prepare(attention(), CPU, "fp32", "onnxruntime")
    assert executable.report["difference"] <= 1e-3
    assert "warning" not in executable.report


@pytest.mark.cpu
def test_rows_of_nothing_but_nan_prove_nothing():
    """NaN beside NaN is not agreement: another backend is refused, and the report says so."""
    with pytest.raises(ModelError, match="nothing but NaN"):
        prepare(attention(bounds=(0, 0)), CPU, "fp32", "onnxruntime")
    report = prepare(attention(bounds=(0, 0)), CPU, "fp32", "eager").report
    assert "100% of the outputs are NaN" in report["warning"]


def test_given_rows_are_what_a_model_is_tried_on():
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x <= 1).any()):
                raise AssertionError("takes numbers above 1")
            return x.log()

    model = Model(spec([Spec(name="x", shape=(3,))], [Spec(name="y", shape=(3,))]), Positive())
    with Engine() as engine:
        with pytest.raises(ModelError, match=r"fails on example rows: takes numbers") as refusal:
            engine.add(model)
        assert "example={...}" in refusal.value.hint
        with pytest.raises(InputError, match="input x has rows"):
            engine.add(model, example={"x": torch.full((2, 4), 2.0)})
        engine.add(model, example={"x": torch.full((2, 3), 2.0)})
        torch.testing.assert_close(
            ask(engine, torch.full((1, 3), 5.0)), torch.full((1, 3), 5.0).log()
        )


def test_bounds_make_rows_up_and_refuse_integers_outside():
    ids = Spec(name="ids", shape=(64,), dtype=INTEGERS, bounds=(3, 7))
    assert set(ids.example(8).flatten().tolist()) == {3, 4, 5, 6, 7}
    pixels = Spec(name="x", shape=(64,), bounds=(-2, -1)).example(8)
    assert -2 <= pixels.min() < pixels.max() <= -1
    contract = spec([ids], [Spec(name="y", shape=(64,))])
    contract.check({"ids": torch.full((1, 64), 7)})
    with pytest.raises(InputError, match="values from 2 to 2, valid are 3 to 7") as refusal:
        contract.check({"ids": torch.full((1, 64), 2)})
    assert refusal.value.field == "ids"
    with pytest.raises(ValueError, match="smallest, largest"):
        Spec(name="x", shape=(), bounds=(2, 1))


@pytest.mark.skipif(
    pick("auto").kind not in ("cpu", "fakeacc"), reason="it stops a GPU for its process"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_the_table_is_an_error_on_every_backend_and_the_next_is_answered(backend):
    table = nn.Embedding(10, 3)
    contract = spec([Spec(name="ids", shape=(2,), dtype=INTEGERS)], [Spec(name="y", shape=(2, 3))])
    with Engine(backend=backend) as engine:
        engine.add(Model(contract, table.eval()))
        good = torch.tensor([[0, 9]])
        for wrong in (-1, -10, 10, 2**40):
            with pytest.raises(ModelError):
                ask(engine, torch.tensor([[wrong, 9]]))
            torch.testing.assert_close(ask(engine, good), table(good).detach())


@pytest.mark.parametrize("at_once", [1 << 20, 1])
def test_differences_see_nan_infinities_and_negative_zero_as_they_are(at_once, monkeypatch):
    monkeypatch.setattr(choice, "_COMPARED_AT_ONCE", at_once)
    nan, inf = float("nan"), float("inf")
    assert difference(torch.tensor([0.0, 1]), torch.tensor([-0.0, 1])) == 0
    assert difference(torch.tensor([inf, 1]), torch.tensor([inf, 1])) == 0
    assert difference(torch.tensor([inf, 1]), torch.tensor([-inf, 1])) == inf
    assert difference(torch.tensor([nan, 1]), torch.tensor([inf, 1])) == inf
    assert difference(torch.tensor([nan, 1.5]), torch.tensor([nan, 1])) == 0.5
    assert (
        difference(torch.tensor([[3.0, nan], [0, 8]]), torch.tensor([[2.0, nan], [0, 8]])) == 1 / 8
    )
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25


# -- threads -----------------------------------------------------------------------------------
class Look(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.get_num_threads())
        return x


def look() -> Model:
    return Model(spec([Spec(name="x", shape=(3,))], [Spec(name="y", shape=(3,))]), Look().eval())


@pytest.mark.cpu
def test_threads_are_those_of_the_engine_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    model = look()
    with Engine(threads=before + 1) as engine:
        engine.add(model)
        ask(engine, torch.zeros(1, 3))
        assert torch.get_num_threads() == before
    assert model.module.seen == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.cpu
def test_a_second_engine_with_other_threads_is_refused_while_the_first_runs():
    running = Engine(threads=1)
    running.add(look())
    with running:
        ask(running, torch.zeros(1, 3))
        with pytest.raises(ConfigError, match="an engine of this process runs with 1"):
            Engine(threads=2).add(look())
        Engine(threads=1).add(look())
    Engine(threads=2).add(look())
    assert threading.active_count() < 50
