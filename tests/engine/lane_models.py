"""Models for lanes: one that doubles, and one that may end its process; and lanes that change."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from plinth.engine import Batcher, Model, ModelSpec, ModelStore, TensorSpec
from plinth.engine.models.store import architecture

SEGFAULT, STOP, RAISE = -11.0, -19.0, -1.0
"""What a row has to hold for its process to crash, to stop, or for its model to raise."""
ROOT = str(Path(__file__).resolve().parents[2])
CARD = "4111 1111 1111 1111"


@architecture("doubles")
class Doubles(nn.Module):
    """Twice its rows, unless one of them says otherwise; only in a process that is not ``home``."""

    def __init__(self, home: int) -> None:
        super().__init__()
        self.home = home
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0]
        if bool((first == RAISE).any()):
            raise ValueError(CARD)
        if os.getpid() != self.home:
            if bool((first == SEGFAULT).any()):
                ctypes.string_at(0)
            if bool((first == STOP).any()):
                os.kill(os.getpid(), signal.SIGSTOP)
        return x * self.factor


class Net(nn.Module):
    """Doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def net(name: str = "net", module: nn.Module | None = None, shape: tuple[int, ...] = (4,)) -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
    )
    return Model(spec, (module or Net()).eval())


def rows(number: int, many: int) -> torch.Tensor:
    return torch.arange(many * 4.0).reshape(many, 4) + 1000.5 * (number + 1)


@architecture("doubles-in-steps")
def doubles_in_steps(home: int) -> nn.Module:
    """Doubles, then keeps its rows: one step for each of two processes."""
    last = Net()
    last.factor.data.fill_(1.0)
    return nn.Sequential(Doubles(home), last)


def doubles(
    folder: Path, version: str = "1", factor: float = 2.0, architecture: str = "doubles"
) -> Model:
    """One that lies in a store."""
    spec = ModelSpec(
        name="net",
        version=version,
        architecture=architecture,
        config={"home": os.getpid()},
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    steps = architecture == "doubles-in-steps"
    module = doubles_in_steps(os.getpid()) if steps else Doubles(os.getpid())
    with torch.no_grad():
        next(module.parameters()).fill_(factor)
    ModelStore(folder).save(spec, module.eval())
    return ModelStore(folder).load("net", version)


def changed(kind: str) -> Callable[[Batcher], list[int]]:
    """A lane joins, or the last one leaves or dies; lane 0 stays."""

    def make(made: Batcher) -> list[int]:
        last = max(lane.number for lane in made.lanes)
        if kind == "join":
            made.add_lane()
        elif last and kind == "drain":
            made.drop_lane(last)
        return [last] if last and kind == "die" else []

    return make
