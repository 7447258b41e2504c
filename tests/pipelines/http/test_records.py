"""The HTTP door for records: answers, refusals, health, draining."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import Running, error, running, until
from tiny_verticals import GATE, Gate, Tiny

from plinth.engine import ConfigError
from plinth.pipelines.http.server import bind

ROUTE = "/v1/tiny/double"
GOOD = {"id": "a", "value": 2.5}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with running({"tiny": Tiny()}, serve={"max_items": 4, "max_body_bytes": 512}) as server:
        yield server


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(GATE, str(tmp_path))
    return Gate(tmp_path)


# -- answers -----------------------------------------------------------------------------------
def test_one_record_is_answered_with_the_verticals_own_json(tiny: Running) -> None:
    response = tiny.post(ROUTE, json=GOOD)
    assert response.status_code == 200
    assert response.json() == {"id": "a", "twice": 5.0}
    assert response.headers["x-plinth-models"] == "twice=3"
    assert response.headers["x-plinth-precision"] == "twice=eager/fp32"
    timing = json.loads(response.headers["x-plinth-timing"])
    assert 0 < timing["decode_ms"] < timing["total_ms"]
    assert timing["batch_rows"] == 1
    assert "x-plinth-degraded" not in response.headers


def test_a_list_has_a_result_or_an_error_for_each(tiny: Running) -> None:
    body = [GOOD, {"id": "b", "value": "many"}, {"id": "c", "value": 13}, {"id": "d", "value": 1}]
    document = tiny.post(ROUTE, json=body).json()
    assert [item.get("result", {}).get("twice") for item in document["results"]] == [
        5.0,
        None,
        None,
        2.0,
    ]
    assert document["results"][1]["error"]["field"] == "value"
    assert document["results"][2]["error"]["reason"] == "unlucky"
    assert document["models"] == {"twice": "3"}
    assert document["timing"]["batch_rows"] == 3
    assert document["late"] is False


def test_a_list_of_bad_records_is_answered_without_the_engine(tiny: Running) -> None:
    response = tiny.post(ROUTE, json=[{}, 5])
    assert response.status_code == 200
    assert all("error" in item for item in response.json()["results"])


# -- refusals ----------------------------------------------------------------------------------
def test_malformed_json_is_400(tiny: Running) -> None:
    for body in (b"{", b"", b"   ", b"[1,"):
        error(tiny.post(ROUTE, content=body), 400, "malformed_json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_a_number_that_json_does_not_know_is_400(tiny: Running, value: str) -> None:
    body = f'{{"id":"a","value":{value}}}'
    error(tiny.post(ROUTE, content=body), 400, "malformed_json")
    error(tiny.post(ROUTE, content=f"[{body}]"), 400, "malformed_json")


@pytest.mark.parametrize("again", ['"value"', '"v\\u0061lue"'])
def test_a_key_that_is_there_twice_is_refused(tiny: Running, again: str) -> None:
    body = f'{{"id":"a","value":1,{again}:2}}'
    assert error(tiny.post(ROUTE, content=body), 422, "duplicate_key")["field"] == "value"


@pytest.mark.parametrize("value", ["soon", "-5", "0", "nan", "inf"])
def test_a_senseless_deadline_is_400(tiny: Running, value: str) -> None:
    response = tiny.post(ROUTE, json=GOOD, headers={"x-slo-deadline-ms": value})
    assert error(response, 400, "bad_header")["field"] == "x-slo-deadline-ms"


def test_a_wrong_field_is_422_and_is_named_without_its_value(tiny: Running) -> None:
    response = tiny.post(ROUTE, json={"id": "a", "value": "4111111111111111x"})
    assert error(response, 422, "float_parsing")["field"] == "value"
    assert "4111" not in response.text
    error(tiny.post(ROUTE, json={"id": "a"}), 422, "missing")
    error(tiny.post(ROUTE, json={"id": "c", "value": 13}), 422, "unlucky")
    error(tiny.post(ROUTE, json=[]), 422, "empty")


def test_other_media_types_are_415(tiny: Running) -> None:
    response = tiny.post(ROUTE, content=b"<x/>", headers={"content-type": "text/xml"})
    assert "application/json" in error(response, 415, "unsupported_media_type")["hint"]


def test_large_bodies_are_413_by_header_and_by_count(tiny: Running) -> None:
    large = json.dumps({"id": "a" * 600, "value": 1}).encode()
    error(tiny.post(ROUTE, content=large), 413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 100):
            yield large[start : start + 100]

    response = tiny.post(ROUTE, content=chunks())
    error(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"
    error(tiny.post(ROUTE, json=[GOOD] * 5), 413, "too_many_items")


def test_unknown_routes_list_the_known(tiny: Running) -> None:
    found = error(tiny.post("/v1/tiny/doubel", json=GOOD), 404, "not_found")
    assert f"POST {ROUTE}" in found["routes"]
    assert found["hint"] == f"did you mean POST {ROUTE}?"
    response = tiny.client.get(ROUTE)
    error(response, 405, "not_allowed")
    assert response.headers["allow"] == "POST"


def test_work_that_cannot_make_its_deadline_is_503_with_the_sum(tiny: Running) -> None:
    response = tiny.post(ROUTE, json=GOOD, headers={"x-slo-deadline-ms": "0.0001"})
    found = error(response, 503, "deadline")
    assert int(response.headers["retry-after"]) >= 1
    assert found["predicted_seconds"] > found["deadline_seconds"]
    assert found["rows_ahead"] == 0
    assert "retry_after_seconds" in found


def test_a_full_queue_is_429(gate: Gate) -> None:
    with (
        running({"tiny": Tiny()}, engine={"max_queue": 2}) as server,
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(server.post, ROUTE, json={"id": "a", "value": 1000})
        gate.await_arrival()
        response = server.post(ROUTE, json=[GOOD] * 3)
        gate.open()
        error(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert held.result().status_code == 200


def test_a_fault_is_500_and_tells_nothing(tiny: Running) -> None:
    response = tiny.post(ROUTE, json={"id": "a", "value": 666})
    error(response, 500, "internal")
    assert "Traceback" not in response.text
    assert "4111" not in response.text
    assert tiny.post(ROUTE, json=GOOD).status_code == 200


def test_an_answer_that_takes_too_long_is_504(gate: Gate) -> None:
    with running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.05}) as server:
        response = server.post(ROUTE, json={"id": "a", "value": 1000})
        gate.await_arrival()
        gate.open()
        error(response, 504, "timeout")


# -- what is around it -------------------------------------------------------------------------
def test_health_metrics_and_index(tiny: Running) -> None:
    assert tiny.client.get("/health/live").json() == {"live": True}
    assert tiny.client.get("/health/ready").json() == {"ready": True, "reasons": {}}
    tiny.post(ROUTE, json=GOOD)
    metrics = tiny.client.get("/metrics").text
    assert f'plinth_http_requests_total{{route="{ROUTE}",status="200"}}' in metrics
    bucket = f'plinth_http_request_seconds_bucket{{le="0.01",outcome="answered",route="{ROUTE}"}}'
    assert bucket in metrics
    assert tiny.client.get("/").json()["verticals"] == {"tiny": "Doubles numbers."}
    page = tiny.client.get("/", headers={"accept": "text/html"})
    assert "Doubles numbers." in page.text
    assert tiny.client.get("/v1/status").json()["models"]["twice"]["version"] == "3"


def test_the_api_docs_know_the_verticals_types(tiny: Running) -> None:
    document = tiny.client.get("/openapi.json").json()
    operation = document["paths"][ROUTE]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["example"] == {"id": "a", "value": 1.5}
    assert document["components"]["schemas"]["tiny.Number"]["required"] == ["id", "value"]
    assert {"200", "400", "413", "415", "422", "429", "503"} <= operation["responses"].keys()
    assert tiny.client.get("/docs").status_code == 200


def test_an_api_key_is_asked_for_everywhere_but_at_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINY_KEY", "s3cret")
    with running({"tiny": Tiny()}, serve={"api_key_env": "TINY_KEY"}) as server:
        response = server.post(ROUTE, json=GOOD)
        error(response, 401, "unauthorised")
        challenge = response.headers["www-authenticate"]
        assert challenge == 'Bearer, Basic realm="plinth", charset="UTF-8"'
        for header in ({"authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}):
            assert server.post(ROUTE, json=GOOD, headers=header).status_code == 200
        for header in ({"authorization": "Bearer no"}, {"x-api-key": b"\xfc"}):
            assert server.post(ROUTE, json=GOOD, headers=header).status_code == 401
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/health/live").status_code == 200


def test_a_browser_opens_the_api_docs_with_the_key_as_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINY_KEY", "s3:cret")
    with running({"tiny": Tiny()}, serve={"api_key_env": "TINY_KEY"}) as server:
        for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
            assert server.client.get(path).status_code == 401
            assert server.client.get(path, auth=("anyone", "s3:cret")).status_code == 200
            assert server.client.get(path, auth=("s3:cret", "")).status_code == 401
        for damaged in ("Basic", "Basic \xfc", "Basic c3M6", "Basic !!!"):
            header = {"authorization": damaged.encode("latin-1")}
            assert server.client.get("/docs", headers=header).status_code == 401
        foreign = {"origin": "https://elsewhere.example"}
        answer = server.post(ROUTE, json=GOOD, headers=foreign, auth=("anyone", "s3:cret"))
        error(answer, 403, "cross_site")


def test_a_port_in_use_is_a_clear_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="is not an address"):
        bind("no such host", 0)
    with pytest.raises(ConfigError, match="does not have that address"):
        bind("192.0.2.1", 0)


# -- draining ----------------------------------------------------------------------------------
def test_draining_answers_all_that_was_accepted(gate: Gate) -> None:
    """One request is in the model and eight wait when the server is told to drain."""
    with (
        running({"tiny": Tiny()}, serve={"announce_seconds": 0.5}) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        first = pool.submit(server.post, ROUTE, json={"id": "a", "value": 1000})
        gate.await_arrival()
        rest = [pool.submit(server.post, ROUTE, json=GOOD) for _ in range(8)]
        until(lambda: server.engine.status()["urgent_rows"] == 8)
        server.server.drain()
        until(lambda: server.client.get("/health/ready").status_code == 503)
        reasons = server.client.get("/health/ready").json()["reasons"]
        assert reasons == {"draining": "the server is shutting down"}
        gate.open()
        assert [answer.result().status_code for answer in (first, *rest)] == [200] * 9
        server.thread.join(60)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.server.url}/health/live")


def test_draining_is_bounded(gate: Gate) -> None:
    with (
        running({"tiny": Tiny()}, serve={"drain_seconds": 0.1}) as server,
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(server.post, ROUTE, json={"id": "a", "value": 1000})
        gate.await_arrival()
        server.server.drain()
        server.thread.join(60)
        assert not server.thread.is_alive()
        gate.open()
        error(held.result(60), 503, "shutting_down")
