"""A torch module and rows it takes make a model in one line; what cannot be served is refused."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plinth.engine import Call, Engine, InputError, Model, ModelError, ModelStore, TensorSpec

pytestmark = pytest.mark.cpu


def served(model: Model, rows):
    def flow():
        return (yield Call(model.spec.name, rows))

    with Engine() as engine:
        engine.add(model)
        return engine.run(flow()).value


class Tagger(nn.Module):
    """Token ids and a mask to a score per token and one per text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.drop = nn.Dropout(0.5)
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        tokens = self.score(self.drop(self.words(input_ids)))
        return {"tokens": tokens * mask, "text": (tokens * mask).sum(1) / mask.sum(1)}


def texts(rows: int, length: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(0, 50, (rows, length), generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones(rows, length, dtype=torch.int64)}


def test_one_line_makes_a_model_that_is_served():
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model = Model.from_torch(module, example=torch.randn(3, 4), name="risk")
    assert model.spec.inputs == (TensorSpec(name="input", shape=(4,)),)
    assert model.spec.outputs == (TensorSpec(name="output", shape=(1,)),)
    rows = torch.randn(5, 4)
    assert torch.allclose(served(model, rows), module(rows), atol=1e-6)


def test_names_come_from_forward_dtypes_from_the_example_and_bounds_from_the_embedding():
    model = Model.from_torch(Tagger(), example=texts(2, 7), other=texts(3, 5))
    assert model.spec.name == "tagger"
    assert model.spec.inputs == (
        TensorSpec(name="input_ids", shape=(None,), dtype="int64", bounds=(0, 49)),
        TensorSpec(name="attention_mask", shape=(None,), dtype="int64"),
    )
    assert model.spec.outputs == (
        TensorSpec(name="tokens", shape=(None, 3)),
        TensorSpec(name="text", shape=(3,)),
    )
    with pytest.raises(InputError, match="valid are 0 to 49"):
        served(model, texts(1, 4) | {"input_ids": torch.full((1, 4), 50)})


def test_free_sizes_may_be_named_instead_of_shown():
    free = {"input_ids": [1], "attention_mask": [1]}
    shown = Model.from_torch(Tagger(), example=texts(2, 7), other=texts(2, 4))
    assert Model.from_torch(Tagger(), example=texts(2, 7), free=free).spec == shown.spec
    with pytest.raises(ModelError, match="no tensor input_idz"):
        Model.from_torch(Tagger(), example=texts(2, 7), free={"input_idz": [1]})
    with pytest.raises(ModelError, match="is not a dimension"):
        Model.from_torch(Tagger(), example=texts(2, 7), free={"input_ids": [0]})


def test_an_example_is_a_tensor_a_tuple_in_order_or_a_mapping_in_any():
    rows = texts(2, 6)
    by_place = Model.from_torch(Tagger(), example=(rows["input_ids"], rows["attention_mask"]))
    turned = {name: rows[name] for name in ("attention_mask", "input_ids")}
    by_name = Model.from_torch(Tagger(), example=turned)
    arrays = Model.from_torch(Tagger(), example={k: v.numpy() for k, v in turned.items()})
    assert {t.name: t.dtype for t in by_place.spec.inputs} == {
        t.name: t.dtype for t in by_name.spec.inputs
    }
    assert arrays.spec == by_name.spec


def test_the_model_is_a_copy_in_eval_mode_and_the_module_goes_on_training():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model = Model.from_torch(module, example=torch.randn(4, 3), name="net")
    rows = torch.randn(2, 3)
    before = model.run({"input": rows})["output"]
    assert module.training
    assert not model.module.training
    with torch.no_grad():
        module[0].weight.add_(1)
    module(torch.randn(8, 3))
    assert torch.equal(model.run({"input": rows})["output"], before)


Pair = namedtuple("Pair", "mean top")


class Gives(nn.Module):
    """Gives whatever a function makes of x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x * 2, ["output"]),
        (lambda x: (x, x.sum(1)), ["output_0", "output_1"]),
        (lambda x: [x * 2], ["output"]),
        (lambda x: Pair(x.mean(1), x.amax(1)), ["mean", "top"]),
        (lambda x: {"mean of all": x.mean(1), "größte": x.amax(1)}, ["mean of all", "größte"]),
    ],
)
def test_outputs_of_any_shape_get_names(function, names, tmp_path):
    model = Model.from_torch(Gives(function), example=torch.randn(3, 4), name="net")
    assert [tensor.name for tensor in model.spec.outputs] == names
    rows = {"x": torch.randn(2, 4)}
    store = ModelStore(tmp_path)
    store.add(model)
    stored = store.load("net").run(rows)
    assert all(torch.equal(stored[name], want) for name, want in model.run(rows).items())


def test_outputs_can_be_chosen_and_named():
    both = Gives(lambda x: {"score": x.sum(1), "loss": x.mean(), "cache": (x, x)})
    example = torch.randn(3, 4)
    kept = Model.from_torch(both, example=example, outputs=["score"], name="net")
    assert [tensor.name for tensor in kept.spec.outputs] == ["score"]
    pair = Gives(lambda x: (x, x.sum(1)))
    named = Model.from_torch(pair, example=example, outputs=["all", "sum"], name="net")
    assert [tensor.name for tensor in named.spec.outputs] == ["all", "sum"]
    with pytest.raises(ModelError, match="gave no output nonsense"):
        Model.from_torch(both, example=example, outputs=["nonsense"], name="net")
    with pytest.raises(ModelError, match=r"output cache is tuple.*outputs=\['score', 'loss'\]"):
        Model.from_torch(both, example=example, name="net")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x.mean(), r"output is \(\) for 3 rows"),
        (lambda x: x.sum(0), r"output is \(4,\) for 3 rows"),
        (lambda x: x - x.mean(0), "mixes the rows"),
        (lambda x: x.cumsum(0), "mixes the rows"),
        (lambda x: x / x.norm(), "mixes the rows"),
        (lambda x: x.flip(0), "mixes the rows"),
        (lambda x: x + torch.rand(4), "is another each time"),
        (lambda x: x.tolist(), r"output.*not a tensor"),
        (lambda x: x @ torch.ones(9), r"fails on x \(3, 4\) float32"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
def test_what_has_no_answer_of_its_own_for_each_row_is_refused(function, said):
    with pytest.raises(ModelError, match=said):
        Model.from_torch(Gives(function), example=torch.randn(3, 4), name="net")


@pytest.mark.parametrize("function", [lambda x: x - x.mean(0), lambda x: x.cumsum(0)])
def test_one_row_is_enough_to_see_that_rows_mix(function):
    """Others are made up beside it: the same row twice would have the same mean."""
    with pytest.raises(ModelError, match="mixes the rows"):
        Model.from_torch(Gives(function), example=torch.randn(1, 4), name="net")


def test_a_layer_that_stays_in_training_mode_is_refused():
    class Stubborn(nn.BatchNorm1d):
        def train(self, mode: bool = True):
            return super().train(True)

    with pytest.raises(ModelError, match="mixes the rows"):
        Model.from_torch(Stubborn(4), example=torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({}, "no tensors"),
        (torch.tensor(1.0), "first dimension counts rows"),
        (torch.zeros(0, 4), "expected one number above 0"),
        ({"y": torch.zeros(2, 4), "x": torch.zeros(2, 4)}, r"but its forward takes \['x'\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), r"has 2 tensors, forward names \['x'\]"),
        ("text", "is str in the example"),
        (np.array(["a", "b"]), "is ndarray in the example"),
        ([[1.0, 2.0]], "is list in the example"),
        (torch.zeros(2, 4).to_sparse(), "sparse"),
        (torch.zeros(2, 4, dtype=torch.complex64), "complex64"),
    ],
)
def test_an_example_that_does_not_fit_is_told_why(example, said):
    with pytest.raises(ModelError, match=said):
        Model.from_torch(Gives(lambda x: x * 2), example=example, name="net")


def test_inputs_with_other_numbers_of_rows_are_refused():
    rows = texts(2, 6)
    with pytest.raises(ModelError, match=r"'input_ids': 3, 'attention_mask': 2"):
        Model.from_torch(Tagger(), example=rows | {"input_ids": rows["input_ids"][[0, 1, 0]]})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_keep_their_dtype(dtype, tmp_path):
    example = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    model = Model.from_torch(nn.Embedding(9, 2), example=example, name="words")
    (tensor,) = model.spec.inputs
    assert (tensor.dtype, tensor.bounds) == (str(dtype).removeprefix("torch."), (0, 8))
    other = torch.int32 if dtype is torch.int64 else torch.int64
    with pytest.raises(InputError, match=tensor.dtype):
        served(model, example.to(other))


@pytest.mark.parametrize("name", ["Mein Modell", "../up", "", "x" * 70, "UPPER"])
def test_a_name_that_the_store_would_not_take_is_refused_with_one_it_takes(name):
    with pytest.raises(ModelError, match="is not a model name"):
        Model.from_torch(nn.ReLU(), example=torch.ones(2, 3), name=name)


def test_a_class_of_any_name_gives_a_name_that_the_store_takes():
    names = {"_Net": "net", "Größe": "gr-e", "_": "model"}
    for own, taken in names.items():
        kind = type(own, (nn.ReLU,), {})
        assert Model.from_torch(kind(), example=torch.ones(2, 3)).spec.name == taken


def test_a_sequence_first_model_is_usable_once_it_is_said_where_its_rows_are():
    example = torch.randn(7, 3, 4)  # 7 steps of 3 rows
    layer = nn.GRU(4, 5)
    with pytest.raises(ModelError, match=r"rows_dim"):
        Model.from_torch(layer, example=example, outputs=["steps", "last"], name="gru")
    model = Model.from_torch(
        layer,
        example=example,
        outputs=["steps", "last"],
        rows_dim={"input": 1, "steps": 1, "last": 1},
        name="gru",
    )
    assert [t.shape for t in model.spec.outputs] == [(7, 5), (1, 5)]
    rows = example.movedim(1, 0)
    found = served(model, rows)
    steps, last = layer(example)
    assert torch.allclose(found["steps"], steps.movedim(1, 0), atol=1e-6)
    assert torch.allclose(found["last"], last.movedim(1, 0), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), length=st.integers(1, 9))
def test_a_stored_model_answers_as_the_module_at_every_size(rows, length, tagger):
    module, stored = tagger
    found = stored.run(texts(rows, length))
    with torch.inference_mode():
        for name, want in module(**texts(rows, length)).items():
            assert torch.allclose(found[name], want, atol=1e-6)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    module = Tagger().eval()
    store = ModelStore(tmp_path_factory.mktemp("store"))
    store.add(Model.from_torch(module, example=texts(2, 7), other=texts(2, 4)))
    return module, store.load("tagger")


def test_what_is_stored_says_how_far_it_is_from_its_source(tmp_path):
    store = ModelStore(tmp_path)
    model = Model.from_torch(Tagger(), example=texts(3, 7), other=texts(2, 4))
    store.add(model)
    assert store.list() == [model.spec]
    report = store.report("tagger")
    assert report["rows"] == 3
    assert report["largest_difference"] <= 1e-6
    assert report["versions"]["torch"] == torch.__version__
    assert store.load("tagger").digest() == store.load("tagger").digest()
    with pytest.raises(ModelError, match="exists already"):
        store.add(model)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Gives(lambda x: x * 2 if x.sum() > 0 else x * 3), "control flow depends on values"),
        (Gives(lambda x: torch.from_numpy(np.tanh(x.numpy()))), "cannot be exported"),
    ],
)
def test_what_cannot_be_a_graph_is_not_stored(module, said, tmp_path):
    store = ModelStore(tmp_path)
    model = Model.from_torch(module, example=torch.ones(3, 4), name="net")
    with pytest.raises(ModelError, match=f"{said}.*architecture"):
        store.add(model)
    assert store.list() == []


def test_a_free_size_that_the_export_would_fix_is_not_stored_as_free(tmp_path):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.GRU(4, 5, batch_first=True)

        def forward(self, x):
            return self.steps(x)[0][:, -1]

    model = Model.from_torch(Last(), example=torch.randn(2, 3, 4), free={"x": [1]})
    with pytest.raises(ModelError, match="should be free is fixed"):
        ModelStore(tmp_path).add(model)
    fixed = Model.from_torch(Last(), example=torch.randn(2, 3, 4))
    ModelStore(tmp_path).add(fixed)
    rows = {"x": torch.randn(4, 3, 4)}
    stored = ModelStore(tmp_path).load("last").run(rows)["output"]
    assert torch.allclose(stored, fixed.run(rows)["output"], atol=1e-6)
