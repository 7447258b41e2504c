"""Helpers of the doors' tests by name, and models of many kinds behind both doors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from serving import Running, running
from tiny_verticals import Gate, Tiny, gated

from plinth.engine import Model, ModelSpec, ModelStore, Sla, TensorSpec
from plinth.pipelines.served_model import served

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


class Mixed(nn.Module):
    """A picture, token ids of any length and a switch."""

    def forward(self, picture: Tensor, ids: Tensor, on: Tensor) -> dict[str, Tensor]:
        total = picture.sum((1, 2)) + ids.float().sum(1)
        return {"total": torch.where(on, total, -total), "ids": ids, "on": on}


def mixed() -> Model:
    inputs = (
        TensorSpec(name="picture", shape=(2, 3)),
        TensorSpec(name="ids", shape=(None,), dtype="int64", bounds=(0, 99)),
        TensorSpec(name="on", shape=(), dtype="bool"),
    )
    total = TensorSpec(name="total", shape=())
    spec = ModelSpec(name="mixed", version="2.1", inputs=inputs, outputs=(total, *inputs[1:]))
    return Model(spec, Mixed().eval())


class Same(nn.Module):
    """Gives back what it gets, of every dtype."""

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return {f"{name}_out": tensor + 0 for name, tensor in given.items()}


def same() -> Model:
    inputs = tuple(TensorSpec(name=dtype, shape=(3,), dtype=dtype) for dtype in DTYPES)
    outputs = tuple(t.model_copy(update={"name": f"{t.name}_out"}) for t in inputs)
    return Model(ModelSpec(name="same", inputs=inputs, outputs=outputs), Same().eval())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """One model in one version, and the folder of another that is damaged."""
    store = ModelStore(tmp_path_factory.mktemp("store"))
    net = nn.Linear(2, 1)
    net.weight.data, net.bias.data = torch.tensor([[2.0, 3.0]]), torch.tensor([1.0])
    store.add(Model.from_torch(net, example=torch.rand(4, 2), name="line", version="7"))
    broken = store.root / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    return store


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """Where ``twice`` waits with numbers of 1000 or more."""
    with gated(tmp_path_factory.mktemp("gate")) as found:
        yield found


@pytest.fixture(scope="module")
def server(store: ModelStore, gate: Gate) -> Iterator[Running]:
    """Both doors, with a vertical's own model, two without a promise, and the store."""
    verticals = {"tiny": Tiny()} | {
        vertical.name: vertical for vertical in (served(mixed()), served(same(), sla=Sla()))
    }
    serve = {
        "oip": {"load_models": True, "max_body_bytes": 100_000, "max_work_bytes": 40_000},
        **({"grpc": {"port": 0}} if find_spec("grpc") else {}),
    }
    with running(verticals, serve=serve, models={"store": store.root}) as found:
        yield found
