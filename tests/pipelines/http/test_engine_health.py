"""What a server says and does when a model raises, and when its engine ends."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from pydantic import BaseModel
from serving import await_ready, running, until
from torch import nn

from plinth.engine import Call, EngineFailed, Model, ModelSpec, Sla, TensorSpec
from plinth.pipelines.assembly import running as assembled
from plinth.pipelines.config.settings import Config
from plinth.pipelines.http.server import Server, bind, create_app
from plinth.verticals import Vertical


class Number(BaseModel):
    v: float


class Picky(nn.Module):
    def forward(self, x):
        assert float(x.abs().max()) < 100, f"secret {x.tolist()}"
        return x


class Checked(Vertical[Number, Number]):
    name, summary, request, response = "checked", "gives back what it gets", Number, Number
    sla = Sla(deadline_ms=5000)
    closed = 0

    def models(self):
        spec = ModelSpec(
            name="picky",
            inputs=(TensorSpec(name="x", shape=(1,)),),
            outputs=(TensorSpec(name="y", shape=(1,)),),
        )
        return [Model(spec, Picky().eval())]

    def example(self):
        return Number(v=1)

    def infer(self, requests):
        y = yield Call("picky", torch.tensor([[r.v] for r in requests]))
        return [Number(v=value) for value in y[:, 0].tolist()]

    def close(self):
        self.closed += 1


ROUTE = "/v1/checked/infer"


def test_a_record_that_a_model_cannot_take_fails_alone_and_the_server_stays_ready():
    with running({"checked": Checked()}) as server:
        answers = [server.post(ROUTE, json={"v": v}) for v in (1, 1000, 1)]
        assert [answer.status_code for answer in answers] == [200, 503, 200]
        error = answers[1].json()["error"]
        assert error["reason"] == "model"
        assert "secret" not in answers[1].text
        assert server.client.get("/health/ready").status_code == 200
        with ThreadPoolExecutor(16) as pool:
            values = [1000 if n == 7 else n for n in range(40)]
            answers = list(pool.map(lambda v: server.post(ROUTE, json={"v": v}), values))
        assert [n for n, a in enumerate(answers) if a.status_code != 200] == [7]


def test_a_server_whose_engine_ended_says_so_drains_and_fails():
    serve = {"port": 0, "announce_seconds": 0, "drain_seconds": 1}
    vertical = Checked()
    config = Config.model_validate({"engine": {"backend": "eager"}, "serve": serve})
    bound = bind(config.serve.host, config.serve.port)
    verticals = {"checked": vertical}
    with ThreadPoolExecutor(1) as pool, assembled(config, verticals) as engine:
        server = Server(create_app(verticals, engine, config), config, bound)
        served = pool.submit(server.run)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            await_ready(client)
            assert client.post(ROUTE, json={"v": 1}).status_code == 200

            def broken(now: float, lane: int) -> None:
                raise ZeroDivisionError

            engine._batcher.next = broken
            answer = client.post(ROUTE, json={"v": 1})
            assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "engine_failed")
        with pytest.raises(EngineFailed, match="ended: ZeroDivisionError"):
            served.result(30)
        reasons = json.dumps(server._health.reasons)
        assert "the device thread of the engine ended: ZeroDivisionError" in reasons
    assert vertical.closed == 1


def test_readiness_turns_red_within_a_second():
    with running({"checked": Checked()}, serve={"announce_seconds": 2.0}) as server:
        app, failure = server.server._app, ["gone"]
        object.__setattr__(app, "failure", lambda: failure[0])
        assert until(lambda: server.client.get("/health/ready").status_code == 503) is None
        body = server.client.get("/health/ready").json()
        assert "gone" in body["reasons"]["engine"]
        failure[0] = None
