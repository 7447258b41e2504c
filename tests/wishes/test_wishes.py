"""What users of other servers ask for in vain, each as a test against a real server here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

from serving import Raw, Running, error, running, until
from tiny_verticals import Gate, Tiny, gated, model

from plinth.engine import Call, DeviceError, Engine, Model, ModelSpec, Sla, TensorSpec
from plinth.pipelines.served_model import served

ROUTE = "/v1/tiny/double"
URGENT = Sla(deadline_ms=60_000)
QUEUE = 64


class Sums(nn.Module):
    """Sums rows of any length, and remembers the shapes of its batches."""

    shapes: list[tuple[int, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def forward(self, rows: Tensor) -> Tensor:
        self.shapes.append(tuple(rows.shape))
        return rows.sum(1, keepdim=True)


SUMS = Sums().eval()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gated(tmp_path_factory.mktemp("gate")) as found:
        yield found


@pytest.fixture(scope="module")
def server(gate: Gate) -> Iterator[Running]:
    """``tiny``, whose model waits at the gate with numbers of 1000 or more, and ``sums``."""
    spec = ModelSpec(
        name="sums",
        inputs=(TensorSpec(name="rows", shape=(None,)),),
        outputs=(TensorSpec(name="sum", shape=(1,)),),
    )
    verticals = {"tiny": Tiny(), "sums": served(Model(spec, SUMS), sla=URGENT)}
    with running(verticals, engine={"max_queue": QUEUE}) as found:
        yield found


@pytest.fixture
def busy(server: Running, gate: Gate) -> Iterator[Raw]:
    """The device is held by a request until the end of the test."""
    with Raw(server) as held:
        held.post(ROUTE, {"id": "held", "value": 1000.0})
        gate.await_arrival()
        yield held
        gate.open()
        assert held.answer()[2]["twice"] == 2000.0
        until(lambda: waiting(server) == 0)


def waiting(server: Running) -> int:
    return int(server.engine.status()["urgent_rows"])


def double(server: Running, value: float, **headers: str) -> httpx.Response:
    return server.post(ROUTE, json={"id": "a", "value": value}, headers=headers)


def metric(server: Running, name: str, **labels: str) -> float:
    """The value of a sample as Prometheus would scrape it."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    for line in server.client.get("/metrics").text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and wanted <= set((found[1] or "").split(",")):
            return float(found[2])
    return 0.0


# -- seeing what happens ---------------------------------------------------------------------------
def test_histograms_of_each_model_and_phase_that_add_up_over_replicas(server: Running) -> None:
    before = metric(server, "plinth_call_seconds_count", model="twice")
    assert double(server, 1.0).is_success
    for phase in ("call", "queue", "batch"):
        name = f"plinth_{phase}_seconds"
        whole = metric(server, f"{name}_bucket", model="twice", le="+Inf")
        assert whole == metric(server, f"{name}_count", model="twice") > 0
    assert metric(server, "plinth_call_seconds_count", model="twice") == before + 1


def test_where_the_time_of_each_single_answer_went(server: Running) -> None:
    told = json.loads(double(server, 1.0).headers["x-plinth-timing"])
    assert {"decode_ms", "queue_ms", "device_ms", "encode_ms", "total_ms"} <= told.keys()
    assert told["total_ms"] >= told["device_ms"]


def test_queue_depth_as_a_metric(server: Running, busy: Raw) -> None:
    with Raw(server) as other:
        other.post(ROUTE, [{"id": "a", "value": 1.0}] * 7)
        until(lambda: metric(server, "plinth_queue_rows", kind="urgent") == 7)


def test_metrics_in_the_format_of_prometheus_at_the_usual_route(server: Running) -> None:
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE plinth_call_seconds histogram" in answer.text


def test_overload_is_never_silent_but_counted_by_cause(server: Running) -> None:
    before = metric(server, "plinth_sla_misses_total", model="twice", cause="deadline")
    assert double(server, 1.0, **{"x-slo-deadline-ms": "0.001"}).status_code == 503
    assert metric(server, "plinth_sla_misses_total", model="twice", cause="deadline") == before + 1


# -- deadlines, priorities and refusals ------------------------------------------------------------
def test_a_limit_of_waiting_for_each_request_without_a_default_on_the_server(
    server: Running,
) -> None:
    """``sums`` has a promise of a minute; the parameter of one request is heeded all the same."""
    rows = {"name": "rows", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    route = "/v2/models/sums/infer"
    late = server.post(route, json={"inputs": [rows], "parameters": {"timeout": 1}})
    assert late.status_code == 503
    assert "deadline" in late.json()["error"]
    assert server.post(route, json={"inputs": [rows]}).is_success


def test_a_refusal_says_why_by_how_much_and_when_to_try_again(server: Running, busy: Raw) -> None:
    found = error(double(server, 1.0, **{"x-slo-deadline-ms": "0.01"}), 503, "deadline")
    assert found["predicted_seconds"] > found["deadline_seconds"] == pytest.approx(1e-5)
    assert found["rows_ahead"] >= 0
    assert found["retry_after_seconds"] >= 0


def test_a_full_queue_is_429_and_not_500_or_503(server: Running, busy: Raw) -> None:
    with Raw(server) as other:
        other.post(ROUTE, [{"id": "a", "value": 1.0}] * (QUEUE * 8 // 9))
        until(lambda: waiting(server) == QUEUE * 8 // 9)
        refused = server.post(ROUTE, json=[{"id": "b", "value": 1.0}] * QUEUE)
        found = error(refused, 429, "queue_full")
        assert refused.headers["retry-after"]
        assert found["retry_after_seconds"] is not None


def test_of_two_that_wait_the_nearer_deadline_goes_first(gate: Gate) -> None:
    order: list[str] = []
    with Engine(backend="eager") as engine:
        engine.add(model("twice"), batch_range=(1, 1))
        held = engine.submit(Call("twice", torch.full((1, 1), 1000.0)), URGENT)
        gate.await_arrival()
        waiting = []
        for name, ms in (("patient", 3_600_000), ("urgent", 60_000)):
            future = engine.submit(Call("twice", torch.ones(1, 1)), Sla(deadline_ms=ms))
            future.add_done_callback(lambda _, name=name: order.append(name))
            waiting.append(future)
        gate.open()
        for future in (held, *waiting):
            future.result(60)
    assert order == ["urgent", "patient"]


# -- leaving ---------------------------------------------------------------------------------------
def test_a_request_whose_client_is_gone_leaves_the_queue(server: Running, busy: Raw) -> None:
    with Raw(server) as leaves:
        leaves.post(ROUTE, [{"id": "a", "value": 1.0}] * 9)
        until(lambda: waiting(server) == 9)
    until(lambda: waiting(server) == 0)


@pytest.mark.needs("grpc", "tritonclient", "rapidjson")
def test_cancellation_over_grpc(gate: Gate) -> None:
    import numpy as np
    import tritonclient.grpc as triton

    with running({"tiny": Tiny()}, serve={"grpc": {"port": 0}}) as server, Raw(server) as held:
        held.post(ROUTE, {"id": "held", "value": 1000.0})
        gate.await_arrival()
        client = triton.InferenceServerClient(server.server.grpc_address)
        rows = triton.InferInput("rows", [5, 1], "FP32")
        rows.set_data_from_numpy(np.ones((5, 1), np.float32))
        call = client.async_infer("twice", [rows], lambda result, error: None)
        until(lambda: waiting(server) == 5)
        call.cancel()
        until(lambda: waiting(server) == 0)
        gate.open()
        assert held.answer()[0] == 200
        client.close()


# -- batches ---------------------------------------------------------------------------------------
def test_mixed_shapes_share_the_device_without_padding(server: Running) -> None:
    SUMS.shapes.clear()
    records = [{"rows": [1.0] * length} for length in (1, 5, 2, 5, 1)]
    found = server.post("/v1/sums/predict", json=records).json()["results"]
    assert [one["result"]["sum"] for one in found] == [[1.0], [5.0], [2.0], [5.0], [1.0]]
    assert sorted(SUMS.shapes) == [(1, 2), (2, 1), (2, 5)]


def test_requests_of_different_clients_share_a_batch_over_the_v2_protocol(
    server: Running, gate: Gate
) -> None:
    with Raw(server) as held, Raw(server) as one, Raw(server) as other:
        held.post(ROUTE, {"id": "held", "value": 1000.0})
        gate.await_arrival()
        for client, value in ((one, 1.0), (other, 2.0)):
            rows = {"name": "rows", "datatype": "FP32", "shape": [1, 1], "data": [value]}
            client.post("/v2/models/twice/infer", {"inputs": [rows]})
        until(lambda: waiting(server) == 2)
        gate.open()
        assert held.answer()[0] == 200
        for client, twice in ((one, 2.0), (other, 4.0)):
            _, headers, told = client.answer()
            assert told["outputs"][0]["data"] == [twice]
            assert json.loads(headers["x-plinth-timing"])["batch_rows"] == 2


def test_real_time_work_overtakes_batch_work_on_one_device(gate: Gate) -> None:
    order: list[str] = []
    with Engine(backend="eager") as engine:
        engine.add(model("twice"), batch_range=(1, 16))
        held = engine.submit(Call("twice", torch.full((1, 1), 1000.0)), URGENT)
        gate.await_arrival()
        batch = engine.submit(Call("twice", torch.ones(200, 1)), Sla())
        urgent = engine.submit(Call("twice", torch.ones(1, 1)), URGENT)
        batch.add_done_callback(lambda _: order.append("batch"))
        urgent.add_done_callback(lambda _: order.append("urgent"))
        gate.open()
        for future in (held, batch, urgent):
            future.result(60)
    assert order == ["urgent", "batch"]


def test_one_bad_record_does_not_fail_its_batch(server: Running) -> None:
    records = [{"id": "a", "value": 1.0}, {"id": "b", "value": 13}, {"id": "c"}]
    first, second, third = server.post(ROUTE, json=records).json()["results"]
    assert first["result"]["twice"] == 2.0
    assert second["error"]["reason"] == "unlucky"
    assert third["error"]["field"] == "value"


# -- models ----------------------------------------------------------------------------------------
class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.factor


def times(factor: float, version: str) -> Model:
    spec = ModelSpec(
        name="times",
        version=version,
        inputs=(TensorSpec(name="rows", shape=(1,)),),
        outputs=(TensorSpec(name="out", shape=(1,)),),
    )
    return Model(spec, Times(factor).eval())


def test_a_model_is_replaced_while_requests_run_and_each_is_answered_by_one(gate: Gate) -> None:
    with Engine(backend="eager") as engine:
        engine.add(model("twice"))
        engine.add(times(3.0, "1"))
        held = engine.submit(Call("twice", torch.full((1, 1), 1000.0)), URGENT)
        gate.await_arrival()
        accepted = engine.submit(Call("times", torch.ones(1, 1)), URGENT)
        engine.add(times(5.0, "2"))
        later = engine.submit(Call("times", torch.ones(1, 1)), URGENT)
        gate.open()
        assert float(accepted.result(60).value) == 3.0
        assert float(later.result(60).value) == 5.0
        held.result(60)


def test_a_model_that_two_ask_for_is_loaded_once(tmp_path: Path) -> None:
    with Engine(backend="eager") as engine:
        one = times(2.0, "1")
        engine.add(one)
        first = engine.status()["models"]
        engine.add(one)
        assert engine.status()["models"] == first
        assert list(first) == ["times"]


def test_one_memory_budget_over_all_models() -> None:
    with Engine(backend="eager", memory_budget=4 << 20) as engine:
        engine.add(times(1.0, "1"))
        big = nn.Linear(2048, 2048)
        spec = ModelSpec(
            name="big",
            inputs=(TensorSpec(name="rows", shape=(2048,)),),
            outputs=(TensorSpec(name="out", shape=(2048,)),),
        )
        with pytest.raises(DeviceError, match="bytes of weights, the budget is 4194304"):
            engine.add(Model(spec, big.eval()))
        assert list(engine.status()["models"]) == ["times"]


def test_readiness_and_liveness_for_an_orchestrator(server: Running) -> None:
    for route in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
        assert server.client.get(route).status_code == 200


def test_a_schema_and_a_page_of_each_model_without_writing_any(server: Running) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    assert "sums.Record" in schemas
    assert server.client.get("/docs").is_success
