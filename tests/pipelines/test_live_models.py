"""A served model is switched to another variant, and back, while requests go on."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import torch
from serving import Running, await_ready, until
from tiny_verticals import Doubled, Number, Tiny
from torch import nn
from typer.testing import CliRunner

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    Flow,
    InputError,
    Model,
    ModelError,
    ModelStore,
    Sla,
)
from plinth.engine.models.variants import Evidence, Variant
from plinth.engine.precision.policy import PrecisionPolicy
from plinth.pipelines.assembly import running
from plinth.pipelines.cli.main import app
from plinth.pipelines.config.settings import Config
from plinth.pipelines.http.server import Server, bind, create_app

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(rows)
        return out


class Stored(Tiny):
    """Asks a model of a store."""

    sla: ClassVar[Sla] = Sla(deadline_ms=60_000)
    store: ClassVar[ModelStore]

    def models(self) -> Sequence[Model]:
        return [self.store.load("net")]

    def infer(self, requests: Sequence[Number]) -> Flow[list[Doubled | InputError]]:
        rows = torch.tensor([[request.value] for request in requests])
        found = yield Call("net", rows)
        return [
            Doubled(id=request.id, twice=value)
            for request, value in zip(requests, found[:, 0].tolist(), strict=True)
        ]


def variant_of(store: ModelStore, name: str, speed: float, **policy: str) -> None:
    """Write a variant that ONNX Runtime realises from the reference."""
    variants = store.variants("net")
    evidence = Evidence(
        speed=speed,
        seconds=1.0,
        reference_seconds=speed,
        rows=8,
        threads=1,
        memory=1,
        reference_memory=1,
        metric="cosine",
        loss=0.0,
        max_loss=0.1,
        data="noise",
        data_digest="0",
        held_out=8,
        machine="this",
    )
    precision = PrecisionPolicy(**policy).as_dict()
    facts = {"backend": "onnxruntime", "precision": precision, "reference": variants.reference}
    variants.add(Variant(name=name, evidence=evidence, **facts), {})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path / "cache"))
    made = ModelStore(tmp_path / "store")
    made.add(Model.from_torch(Net().eval(), example=torch.randn(16, 1), name="net"))
    variant_of(made, "half", 2.0, matmul="int8", last="int8")
    variant_of(made, "quarter", 4.0, matmul="int4", last="int4")
    return made


@contextlib.contextmanager
def served(store: ModelStore) -> Iterator[Running]:
    """A real server in precision auto that follows its store."""
    vertical = Stored()
    Stored.store = store
    config = Config.model_validate({"serve": {"port": 0}, "models": {"store": store.root}})
    bound = bind(config.serve.host, config.serve.port)
    with running(config, {"tiny": vertical}, follow=True) as engine:
        server = Running(
            Server(create_app({"tiny": vertical}, engine, config), config, bound), engine, {}
        )
        try:
            await_ready(server.client)
            yield server
        finally:
            server.client.close()
            server.server.drain()
            server.thread.join(60)


def test_a_server_under_load_is_switched_and_back_without_a_failed_request(
    store: ModelStore,
) -> None:
    told: list[tuple[int, str]] = []
    stop = threading.Event()
    with served(store) as server:
        url = str(server.client.base_url)

        def ask() -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                while not stop.is_set():
                    answer = client.post("/v1/tiny/double", json={"id": "a", "value": 1.5})
                    told.append((answer.status_code, answer.headers["x-plinth-precision"]))

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            try:
                until(lambda: len(told) > 20)
                for words in (["half"], ["quarter"], ["--back"], ["reference"]):
                    options = ["--store", str(store.root), "--server", url.rstrip("/")]
                    done = CliRunner().invoke(app, ["models", "switch", "net", *words, *options])
                    assert done.exit_code == 0, done.output
                    count = len(told)
                    until(lambda count=count: len(told) > count + 20)
            finally:
                stop.set()
            for each in asking:
                each.result()
        status = server.client.get("/v1/status").json()["models"]["net"]
    assert {code for code, _ in told} == {200}
    order = [word for i, (_, word) in enumerate(told) if not i or told[i - 1][1] != word]
    served_as = [word.rpartition("/")[2].rstrip('"') for word in order]
    assert {"half", "quarter", "fp32"} <= set(served_as), order
    assert status["variant"] is None
    assert status["default"] is None


def test_a_variant_that_cannot_be_loaded_changes_nothing_and_is_told(store: ModelStore) -> None:
    with Engine(device="cpu", backend="auto", precision="auto") as engine:
        engine.add(store.load("net"))
        assert engine.renew() == []
        folder = store.root / "net" / "1" / "variants"
        (folder / "default.json").write_text(json.dumps({"default": 5}))
        assert engine.renew() == []
        assert "cannot be read" in engine.status()["models"]["net"]["default_refused"]
        store_default = folder / "default.json"
        store_default.unlink()
        store.variants("net").set_default("half")
        assert engine.renew() == ["net"]
        assert engine.status()["models"]["net"]["variant"] == "half"
        assert engine.renew() == [], "once for each change"
        engine.add(store.load("net"), precision="exact")
        store.variants("net").set_default(None)
        assert engine.renew() == [], "what is served exact follows nothing"


def test_without_a_server_the_default_is_changed_and_an_unknown_variant_is_refused(
    store: ModelStore,
) -> None:
    options = ["--store", str(store.root)]
    done = CliRunner().invoke(app, ["models", "switch", "net", "half", *options])
    assert done.exit_code == 0, done.output
    assert store.variants("net").default == "half"
    done = CliRunner().invoke(app, ["models", "switch", "net", "halve", *options])
    assert isinstance(done.exception, ModelError)
    assert "half" in str(done.exception.hint)
    assert store.variants("net").default == "half"
    done = CliRunner().invoke(app, ["models", "switch", "net", *options])
    assert isinstance(done.exception, ConfigError)


def test_what_would_be_late_is_answered_by_a_faster_variant_and_says_so(store: ModelStore) -> None:
    def ask() -> Flow[torch.Tensor]:
        return (yield Call("net", torch.ones(1, 1)))

    store.variants("net").set_default("half")
    degrading = Sla(deadline_ms=60_000, on_overload="degrade")
    with Engine(device="cpu", backend="auto", precision="auto") as engine:
        engine.add(store.load("net"), sla=degrading)
        assert engine.status()["models"]["net"]["degraded"] == "onnxruntime/quarter"
        assert engine.run(ask()).precision == {"net": "onnxruntime/half"}
        engine._batcher.latency.seed(engine._models.get("net").key, 1, 1e4)
        answer = engine.run(ask())
        assert answer.precision == {"net": "onnxruntime/quarter"}
        assert answer.degraded == {"net": "quarter"}
        store.variants("net").set_default("quarter")
        assert engine.renew() == ["net"]
        assert engine.status()["models"]["net"]["degraded"] is None, "nothing is faster"
        engine.add(store.load("net"))
        assert engine.status()["models"]["net"]["degraded"] is None, "nobody asked for it"
        engine.add(store.load("net"), sla=degrading, precision="exact")
        assert engine.status()["models"]["net"]["degraded"] is None, "exact is never coarser"
