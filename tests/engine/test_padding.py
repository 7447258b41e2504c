"""Texts of different lengths share batches where the model's mask hides the padding."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plinth.engine import Call, Engine, Model, ModelSpec, TensorSpec
from plinth.engine.models.families import find
from plinth.engine.runtime import loaded_model
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel

pytestmark = pytest.mark.cpu  # other lengths are tried on a device, and its models are the CPU's
WIDTH, PLACES = 16, 64


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A slow minute must not end the search for lengths."""
    found = loaded_model.find_padding
    monkeypatch.setattr(loaded_model, "find_padding", lambda *given: found(*given, seconds=60.0))


class Reader(nn.Module):
    """Tokens see each other through a mask; gives each token's state and the mean of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shapes: list[tuple[int, ...]] = []
        self.watched = False

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self.watched:
            self.shapes.append(tuple(ids.shape))
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        seen = (x @ self.key(x).transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
        x = seen.softmax(-1) @ self.value(x)
        weight = mask[..., None].to(x.dtype)
        return {"mean": (x * weight).sum(1) / weight.sum(1), "states": x.transpose(1, 2)}


class Unmasked(Reader):
    """Forgets its mask."""

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return super().forward(ids, torch.ones_like(mask))


class FromTheEnd(Reader):
    """Reads its last token, wherever the text ends."""

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        found = super().forward(ids, mask)
        return found | {"mean": found["states"][..., -1]}


def model(
    kind: type[Reader] = Reader,
    names: tuple[str, str] = ("ids", "mask"),
    mask: str | None = None,
) -> Model:
    torch.manual_seed(0)
    spec = ModelSpec(
        name="reader",
        inputs=(
            TensorSpec(name=names[0], shape=(None,), dtype="int64", bounds=(0, 49)),
            TensorSpec(name=names[1], shape=(None,), dtype="int64", bounds=(0, 1)),
        ),
        outputs=(
            TensorSpec(name="mean", shape=(WIDTH,)),
            TensorSpec(name="states", shape=(WIDTH, None)),
        ),
        mask=mask,
    )
    return Model(spec, kind().eval())


def text(length: int, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(100 * length + seed)
    ids = torch.randint(0, 50, (1, length), generator=noise)
    return {"ids": ids, "mask": torch.ones_like(ids)}


class Door(nn.Module):
    """Keeps the device until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.closed, self.entered, self.opened = False, threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if self.closed:
            self.entered.set()
            assert self.opened.wait(60)
        return x


def engine_of(subject: Model, **how: Any) -> Engine:
    """An engine with the model, and a door before the device."""
    engine = Engine(Batcher(LatencyModel(), idle_slice=60.0))  # no hiccup splits a batch
    door, one = Door(), (TensorSpec(name="x", shape=(1,)),)
    engine.add(Model(ModelSpec(name="door", inputs=one, outputs=one), door), backend="eager")
    engine.add(subject, **how)
    DOORS[engine] = door
    return engine


DOORS: dict[Engine, Door] = {}


def answers(engine: Engine, texts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Of texts that all came while the device was taken."""
    door = DOORS[engine]
    door.entered.clear()
    door.opened.clear()
    with engine:
        door.closed = True
        engine.submit(Call("door", torch.zeros(1, 1)))
        assert door.entered.wait(60)
        futures = [engine.submit(Call("reader", rows)) for rows in texts]
        door.closed = False
        door.opened.set()
        return [future.result(60).value for future in futures]


def padding_of(engine: Engine) -> dict[str, object]:
    return engine.status()["models"]["reader"]["padding"]


REFERENCE = model()


def assert_as_alone(texts: list[dict[str, Tensor]], got: list[dict[str, Tensor]], net: Model):
    for rows, answer in zip(texts, got, strict=True):
        want = net.run(rows)
        assert answer["states"].shape == want["states"].shape
        for name in want:
            torch.testing.assert_close(answer[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def served(request: pytest.FixtureRequest) -> Engine:
    return engine_of(model(), backend=request.param)


@pytest.mark.cpu
@given(lengths=st.lists(st.integers(1, PLACES), min_size=2, max_size=24))
@settings(max_examples=15, deadline=None)
def test_a_text_is_answered_as_alone_whatever_lengths_share_its_batch(served, lengths):
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    assert_as_alone(texts, answers(served, texts), REFERENCE)


def test_texts_of_all_lengths_run_in_a_few_batches_and_a_lone_one_is_not_padded():
    net = model()
    engine = engine_of(net)
    ran = net.module.shapes
    assert padding_of(engine)["up_to"] == PLACES
    assert padding_of(engine)["reason"] == "IndexError at length 96"
    texts = [text(length) for length in range(1, PLACES + 1)]
    answers(engine, texts)  # the first batch of each range is small: its cost is not known yet
    net.module.watched = True
    assert_as_alone(texts, answers(engine, texts), REFERENCE)
    assert len(ran) <= 7, ran
    ran.clear()
    answers(engine, [text(33)])
    assert ran == [(1, 33)]


@pytest.mark.parametrize("kind", [Unmasked, FromTheEnd])
def test_a_model_whose_answers_padding_changes_gets_none(kind):
    net = model(kind)
    engine = engine_of(net)
    assert padding_of(engine)["up_to"] == 0
    assert "padding changes answers by" in str(padding_of(engine)["reason"])
    texts = [text(length) for length in range(20, 30)]
    net.module.watched = True
    got = answers(engine, texts)
    assert sorted(net.module.shapes) == [(1, length) for length in range(20, 30)]
    assert_as_alone(texts, got, net)


def test_exact_numbers_and_single_rows_are_never_padded():
    for how in ({"precision": "exact"}, {"batch_range": (1, 1)}):
        assert padding_of(engine_of(model(), **how)) is None


def test_the_spec_may_name_the_mask_or_say_that_there_is_none():
    class Shown(Reader):
        def forward(self, ids: Tensor, shown: Tensor) -> dict[str, Tensor]:
            return super().forward(ids, shown)

    assert padding_of(engine_of(model(Shown, names=("ids", "shown")))) is None
    shown = padding_of(engine_of(model(Shown, names=("ids", "shown"), mask="shown")))
    assert shown["up_to"] == PLACES
    assert padding_of(engine_of(model(mask=""))) is None
    with pytest.raises(ValueError, match="which is no input"):
        model(mask="masks")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_families_of_texts_share_batches(family):
    size = {"vocabulary": 60, "width": 16, "depth": 1, "heads": 2}
    size |= {"key_heads": 2, "inner": 32} if family == "llama" else {"positions": 48}
    engine = Engine()
    engine.add(find(family).model(size, name="reader"))
    assert padding_of(engine)["up_to"] >= 48


def test_a_last_range_of_one_length_hides_no_dimension_of_an_output(monkeypatch):
    """On an accelerator the ranges end at the example's length, which may be a range of its own."""
    from plinth.engine.runtime import padding

    monkeypatch.setattr(padding, "_tried", lambda *_: (8, 9))
    engine = engine_of(model())
    assert padding_of(engine)["up_to"] == 9
    texts = [text(3), text(7)]
    assert_as_alone(texts, answers(engine, texts), REFERENCE)
