"""Modules that make a large row in parts: run as they are, without copies of rows and outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plinth.engine import Call, Engine, Model, ModelError, ModelSpec, TensorSpec, Tiling
from plinth.engine.backends import eager
from plinth.engine.memory import foresight

pytestmark = pytest.mark.cpu

SIZE = (8, 8, 8)
CALL = {"volume": torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))}


class Parts(nn.Module):
    """Wide features of a volume, which are said never to be there at once."""

    def __init__(self, says: int | None = 1) -> None:
        super().__init__()
        self.wide, self.says, self.seen = nn.Conv3d(1, 64, 1), says, list[Tensor]()
        self.kept = list[Tensor]()

    def forward_bytes(self, size: tuple[int, int, int]) -> int | None:
        """Bytes of a forward."""
        return self.says

    def forward(self, volume: Tensor) -> Tensor:
        """(n, 1, z, y, x) to the same."""
        if not volume.is_meta:
            self.seen.append(volume)
        return self.wide(volume).mean(1, keepdim=True)


class Writing(Parts):
    def forward(self, volume: Tensor) -> Tensor:
        return super().forward(volume.mul_(2))


class Secretive(Parts):
    """Writes into its input where nobody foresees it."""

    def forward(self, volume: Tensor) -> Tensor:
        return super().forward(volume if volume.is_meta else volume.mul_(2))


class Keeping(Parts):
    def forward(self, volume: Tensor) -> Tensor:
        self.kept.append(super().forward(volume))
        return self.kept[-1]


class KeepingAPart(Parts):
    def forward(self, volume: Tensor) -> Tensor:
        found = super().forward(volume)
        self.kept.append(found[:, :, :1])
        return found


class Buffer(Parts):
    """Gives memory of NumPy's, the same for each number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = {n: np.zeros((n, 1, *SIZE), np.float32) for n in range(1, 17)}

    def forward(self, volume: Tensor) -> Tensor:
        found = super().forward(volume)
        if volume.is_meta:
            return found
        self.rooms[len(volume)][:] = found.numpy()
        return torch.from_numpy(self.rooms[len(volume)])


def model_of(module: Parts, memory: int | None = 1000) -> Model:
    inputs = (TensorSpec(name="volume", shape=(1, *SIZE), bounds=(0.0, 1.0)),)
    outputs = (TensorSpec(name="made", shape=(1, *SIZE)),)
    spec = ModelSpec(name="parts", inputs=inputs, outputs=outputs)
    return Model(spec, module.eval(), memory=memory, made_from=type(module).__name__)


def test_rows_are_lent_and_nothing_else_is_tried() -> None:
    module = Parts()
    with Engine(threads=1, backend="auto") as engine:
        engine.add(model_of(module), batch_range=(1, 1))
        assert not module.seen  # not even on rows that are made up
        engine.submit(Call("parts", CALL)).result()
        facts = engine.status()["models"]["parts"]
    assert facts["backend"] == "eager"
    assert module.seen[0].data_ptr() == CALL["volume"].data_ptr()


@pytest.mark.parametrize(
    ("says", "memory"),
    [
        (None, 1000),  # made whole
        (1 << 20, 1000),  # not much less than others take
        (1, None),  # nobody asked for little memory
        (1, 1 << 30),  # there is plenty for others
    ],
)
def test_others_are_tried_where_little_is_saved_or_much_is_allowed(
    says: int | None, memory: int | None
) -> None:
    assert foresight.leaner(model_of(Parts(says), memory)) is None


def test_a_module_that_writes_into_its_rows_gets_copies() -> None:
    before = CALL["volume"].clone()
    with Engine(threads=1, backend="auto") as engine:
        engine.add(model_of(Writing()), batch_range=(1, 1))
        engine.submit(Call("parts", CALL)).result()
    assert torch.equal(CALL["volume"], before)


def test_a_module_that_writes_unforeseen_is_refused() -> None:
    given = {"volume": CALL["volume"].clone()}
    with Engine(threads=1, backend="auto") as engine:
        engine.add(model_of(Secretive()), batch_range=(1, 1))
        with pytest.raises(ModelError, match="wrote into its input"):
            engine.submit(Call("parts", given)).result()
        again = engine.submit(Call("parts", CALL)).result().value
    assert again.shape == (1, 1, *SIZE)


@pytest.mark.parametrize("kind", [Keeping, KeepingAPart, Buffer])
def test_outputs_that_the_module_still_holds_are_copied(kind: type[Parts]) -> None:
    module = kind()
    with Engine(threads=1, backend="auto") as engine:
        engine.add(model_of(module), batch_range=(1, 1))
        first = engine.submit(Call("parts", CALL)).result().value
        before = first.clone()
        with torch.inference_mode():
            for held in module.kept:
                held.zero_()
        engine.submit(Call("parts", {"volume": CALL["volume"] + 1})).result()
    assert torch.equal(first, before)


def test_outputs_of_a_module_that_was_tried_are_its_caller_s_too() -> None:
    """NumPy's memory has no storage that torch knows it by: what counts is where it lies."""
    module = Buffer()
    with Engine(threads=1, backend="eager") as engine:
        engine.add(model_of(module, None), batch_range=(1, 1))
        first = engine.submit(Call("parts", CALL)).result().value
        before = first.clone()
        engine.submit(Call("parts", {"volume": CALL["volume"] + 1})).result()
    assert torch.equal(first, before)


def test_what_nobody_else_holds_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()
    disown = eager._disown

    def watched(output: dict[str, Tensor]) -> None:
        made.extend(t.data_ptr() for t in output.values())
        disown(output)

    monkeypatch.setattr(eager, "_disown", watched)
    with Engine(threads=1, backend="auto") as engine:
        engine.add(model_of(Parts()), batch_range=(1, 1))
        found = engine.submit(Call("parts", CALL)).result().value
    assert [found.data_ptr()] == made


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.made = list[int]()

    def forward(self, volume: Tensor) -> Tensor:
        found = (volume > 0.5).to(torch.uint8)
        self.made.append(found.data_ptr())
        return found


@pytest.mark.parametrize("window", [SIZE, (8, 8, 6)])
def test_labels_of_a_window_that_is_the_volume_are_the_result(
    window: tuple[int, int, int],
) -> None:
    """In the memory that the model made; of several windows the result is memory of its own."""
    shape = (1, *window)
    outputs = (TensorSpec(name="labels", shape=shape, dtype="uint8"),)
    inputs = (TensorSpec(name="volume", shape=shape),)
    module, volume = Labels().eval(), CALL["volume"][0]
    model = Model(ModelSpec(name="labels", inputs=inputs, outputs=outputs), module)
    tiling = Tiling(window=window, reduce="labels", halo=(1, 1, 1))
    with Engine(threads=1, backend="eager") as engine:
        engine.add(model, batch_range=(1, 1))
        found = engine.submit(Call("labels", volume, tiling=tiling)).result().value
    assert torch.equal(found, (volume[0] > 0.5).to(torch.uint8))
    assert (found.data_ptr() == module.made[-1]) == (window == SIZE)
