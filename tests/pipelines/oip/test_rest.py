"""The Open Inference Protocol over REST, by an unmodified ``tritonclient`` and by hand."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Raw, Running, running, until
from tensor_inputs import mixed_inputs, tensor
from tiny_verticals import Gate, Tiny

triton = pytest.mark.needs("tritonclient", "geventhttpclient", "aiohttp", "rapidjson")
EACH = int(os.environ.get("PLINTH_FUZZ_CASES", "3"))
ROWS = {"name": "rows", "datatype": "FP32", "shape": [1, 1], "data": [2.5]}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(address(server))
    yield client
    client.close()


def address(server: Running) -> str:
    return server.server.url.removeprefix("http://")


def infer(server: Running, model: str = "twice", **fields: Any) -> httpx.Response:
    return server.post(f"/v2/models/{model}/infer", json={"inputs": [ROWS]} | fields)


def told(response: httpx.Response, status: int) -> str:
    """The sentence of an error that must have this status."""
    assert response.status_code == status, response.text
    sentence = response.json()["error"]
    assert isinstance(sentence, str)
    return sentence


# -- tritonclient --------------------------------------------------------------------------------
@triton
def test_tritonclient_sees_the_server_and_its_models(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mixed")
    assert client.is_model_ready("mixed", "2.1")
    assert not client.is_model_ready("mixed", "3")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "plinth"
    metadata = client.get_model_metadata("mixed")
    assert metadata["versions"] == ["2.1"]
    assert metadata["inputs"][1] == {"name": "ids", "datatype": "INT64", "shape": [-1, -1]}
    config = client.get_model_config("mixed")
    assert config["input"][0] == {"name": "picture", "data_type": "TYPE_FP32", "dims": [2, 3]}
    assert config["max_batch_size"] >= 1


@triton
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers_with_binary_and_with_json_tensors(client: Any, binary: bool) -> None:
    import tritonclient.http as kind

    outputs = [kind.InferRequestedOutput(n, binary_data=binary) for n in ("ids", "total")]
    result = client.infer(
        "mixed", mixed_inputs(kind, binary_data=binary), outputs=outputs, request_id="r1"
    )
    assert result.get_response()["id"] == "r1"
    assert [one["name"] for one in result.get_response()["outputs"]] == ["ids", "total"]
    assert result.as_numpy("total").tolist() == [15.0 + 6, -(51.0 + 15)]
    assert result.as_numpy("ids").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert result.as_numpy("on") is None


@triton
def test_tritonclient_gets_every_dtype_back_bit_for_bit(client: Any) -> None:
    import tritonclient.http as kind

    floats = np.array([[1.5, np.nan, -np.inf]])
    given = {
        "float32": ("FP32", floats.astype("f4")),
        "float64": ("FP64", floats),
        "float16": ("FP16", floats.astype("f2")),
        "uint8": ("UINT8", np.uint8([[0, 7, 255]])),
        **{f"int{n}": (f"INT{n}", np.array([[-1, 0, 5]], f"i{n // 8}")) for n in (8, 16, 32, 64)},
        "bfloat16": ("BF16", np.array([[1.5, -2.0, 0.25]], ml_dtypes.bfloat16)),
    }
    inputs = [tensor(kind, name, array, datatype) for name, (datatype, array) in given.items()]
    result = client.infer("same", inputs)
    for name, (_, array) in given.items():
        np.testing.assert_array_equal(result.as_numpy(f"{name}_out"), array, strict=True)


@triton
def test_tritonclient_in_an_event_loop_and_on_greenlets(server: Running, client: Any) -> None:
    import tritonclient.http as kind
    import tritonclient.http.aio

    def rows(value: float) -> list[Any]:
        return [tensor(kind, "rows", np.array([[value]], "f4"), "FP32")]

    async def many() -> list[float]:
        async with tritonclient.http.aio.InferenceServerClient(address(server)) as there:
            results = await asyncio.gather(*(there.infer("twice", rows(n)) for n in range(40)))
            return [float(result.as_numpy("twice")[0, 0]) for result in results]

    assert asyncio.run(many()) == [2.0 * n for n in range(40)]
    waiting = [client.async_infer("twice", rows(n)) for n in range(5)]
    assert [one.get_result().as_numpy("twice")[0, 0] for one in waiting] == [0, 2, 4, 6, 8]


@triton
def test_tritonclient_loads_and_unloads_models_of_the_store(client: Any) -> None:
    import tritonclient.http as kind

    def state() -> dict[str, str]:
        return {one["name"]: one["state"] for one in client.get_model_repository_index()}

    given = np.array([[1, 1], [10, 0]], "f4")
    rows = [tensor(kind, "input", given, "FP32")]
    assert state()["line"] == state()["broken"] == "UNAVAILABLE"
    with pytest.raises(kind.InferenceServerException, match="in the store but not loaded"):
        client.infer("line", rows)
    client.load_model("line")
    assert state()["line"] == "READY"
    rows = [tensor(kind, client.get_model_metadata("line")["inputs"][0]["name"], given, "FP32")]
    name = client.get_model_metadata("line")["outputs"][0]["name"]
    assert client.infer("line", rows).as_numpy(name).tolist() == [[6.0], [21.0]]
    stats = client.get_inference_statistics("line")["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == 1
    assert stats["inference_count"] == 2
    client.unload_model("line")
    assert state()["line"] == "UNAVAILABLE"
    for name, why in (("broken", "manifest"), ("nobody", "no such model"), ("twice", "vertical")):
        with pytest.raises(kind.InferenceServerException, match=why):
            client.load_model(name)
    with pytest.raises(kind.InferenceServerException, match="as it is in the store"):
        client.load_model("line", config="{}")


@triton
def test_a_key_is_asked_for_by_all_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    import tritonclient.http as kind

    monkeypatch.setenv("OIP_KEY", "s3cret")
    with running({"tiny": Tiny()}, serve={"api_key_env": "OIP_KEY"}) as server:
        client = kind.InferenceServerClient(address(server))
        assert client.is_server_live()
        assert client.is_server_ready()
        with pytest.raises(kind.InferenceServerException, match=r"\[401\] this server needs"):
            client.get_server_metadata()
        client.get_server_metadata(headers={"authorization": "Bearer s3cret"})
        with pytest.raises(kind.InferenceServerException, match=r"\[403\].*load_models"):
            client.load_model("x", headers={"x-api-key": "s3cret"})
        client.close()


# -- by hand ---------------------------------------------------------------------------------------
def test_json_comes_back_flat_and_headers_tell_where_the_time_went(server: Running) -> None:
    response = infer(server, id="7")
    assert response.json() == {
        "model_name": "twice",
        "model_version": "3",
        "id": "7",
        "outputs": [{"name": "twice", "datatype": "FP32", "shape": [1, 1], "data": [5.0]}],
    }
    assert json.loads(response.headers["x-plinth-timing"])["total_ms"] > 0
    assert response.headers["x-plinth-models"] == "twice=3"


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"datatype": "FP64", "shape": [1, 1]}, 400, "input rows has rows (1,) float64, expected"),
        ({"datatype": "BYTES"}, 400, "use one of BOOL, UINT8"),
        ({"datatype": 7}, 400, "datatype is none"),
        ({"name": "row"}, 400, "takes inputs ['rows'], got ['row']"),
        ({"name": ""}, 400, "an input has no name"),
        ({"shape": [2, 1]}, 400, "data has the shape [1], the header says [2, 1]"),
        ({"shape": [0, 1], "data": []}, 400, "whole numbers, 1 or more"),
        ({"shape": [-1, 1]}, 400, "whole numbers, 1 or more"),
        ({"shape": [True, 1]}, 400, "whole numbers, 1 or more"),
        ({"shape": []}, 400, "0 sizes"),
        ({"shape": "11"}, 400, "no list"),
        ({"shape": [1 << 40, 1 << 40]}, 413, "at most 100,000"),
        ({"data": ["1"]}, 400, "not FP32"),
        ({"data": [True]}, 400, "not FP32"),
        ({"data": [None]}, 400, "not FP32"),
        ({"data": [1e39]}, 400, "beyond FP32"),
        ({"data": [[1], [2, 3]]}, 400, "differ in length"),
        ({"data": 1}, 400, "data is no list"),
        ({"parameters": {"binary_data_size": 4}}, 400, "the 0 that are left"),
        ({"parameters": {"shared_memory_region": "x"}}, 400, "shared memory"),
        ({"parameters": []}, 200, ""),
        ({"parameters": 1}, 400, "rows.parameters is no JSON object"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(
    server: Running, change: dict[str, Any], status: int, sentence: str
) -> None:
    response = infer(server, inputs=[ROWS | change])
    assert response.status_code == status, response.text
    assert status == 200 or sentence in told(response, status)


@pytest.mark.parametrize(
    ("fields", "status", "sentence"),
    [
        ({"inputs": []}, 400, "takes inputs ['rows'], got []"),
        ({"inputs": {}}, 400, "inputs is no list"),
        ({"inputs": [ROWS, ROWS]}, 400, "more than once"),
        ({"outputs": [{"name": "thrice"}]}, 400, "it gives twice"),
        ({"outputs": [{"name": "twice", "parameters": {"classification": 3}}]}, 400, "classes"),
        ({"parameters": {"timeout": -1}}, 400, "parameters.timeout is no whole number"),
        ({"parameters": {"timeout": 1.5}}, 400, "parameters.timeout is no whole number"),
        ({"parameters": {"priority": 1001}}, 400, "from 0 to 1,000"),
        ({"parameters": {"sequence_id": 4}}, 400, "no state between requests"),
        ({"parameters": {"timeout": 1}}, 503, "deadline"),
        ({"parameters": {"timeout": "60000000", "priority": 3, "mine": "x"}}, 200, ""),
        ({"id": 5}, 400, "the id is no string"),
    ],
)
def test_a_wrong_request_is_refused_with_what_to_do(
    server: Running, fields: dict[str, Any], status: int, sentence: str
) -> None:
    response = infer(server, **fields)
    assert response.status_code == status, response.text
    assert status == 200 or sentence in told(response, status)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ('"id": "a", "id": "b", ', "[1.0]"),
        ('"parameters": {"timeout": 9, "\\u0074imeout": 8}, ', "[1.0]"),
        ("", '[1.0], "data": [2.0]'),
        ("", '[1.0], "datatype": "FP32"'),
        ("", '[{"a": 1, "a": 2}]'),
    ],
)
def test_a_key_that_is_there_twice_is_refused(server: Running, fields: str, data: str) -> None:
    tensor = f'{{"name": "rows", "datatype": "FP32", "shape": [1, 1], "data": {data}}}'
    body = f'{{{fields}"inputs": [{tensor}]}}'
    response = server.post("/v2/models/twice/infer", content=body.encode())
    assert "is there twice" in told(response, 400)


def test_a_number_without_end_is_no_fault_of_the_server(server: Running) -> None:
    # What is escaped has its keys read again, by Python.
    body = f'{{"id": "\\u0061", "inputs": [{{"shape": [{"9" * 5000}]}}]}}'
    told(server.post("/v2/models/twice/infer", content=body.encode()), 400)


@pytest.mark.parametrize(
    ("length", "size", "tail", "sentence"),
    [
        ("x", 4, b"\0\0\0\0", "inference-header-content-length is no number"),
        ("9999", 4, b"\0\0\0\0", "inference-header-content-length is no number"),
        (None, 4, b"\0\0\0\0", "the body is not JSON"),
        ("", 4, b"", "no number of bytes up to the 0 that are left"),
        ("", 3, b"\0\0\0", "3 bytes came, its shape and datatype ask for 4"),
        ("", 4, b"\0\0\0\0\0", "1 bytes follow that belong to no input"),
        ("", -4, b"\0\0\0\0", "binary_data_size is no number"),
    ],
)
def test_malformed_binary_headers_are_refused(
    server: Running, length: str | None, size: int, tail: bytes, sentence: str
) -> None:
    one = {"name": "rows", "datatype": "FP32", "shape": [1, 1]}
    head = json.dumps({"inputs": [one | {"parameters": {"binary_data_size": size}}]}).encode()
    headers = {"content-type": "application/octet-stream"}
    if length is not None:
        headers["inference-header-content-length"] = length or str(len(head))
    response = server.post("/v2/models/twice/infer", content=head + tail, headers=headers)
    assert sentence in told(response, 400)


def test_other_routes_types_and_sizes_are_refused_in_the_protocols_shape(server: Running) -> None:
    assert "no such model" in told(infer(server, "nobody"), 404)
    assert "in version 3" in told(infer(server, "twice/versions/4"), 404)
    assert infer(server, "twice/versions/3").is_success
    assert "no such route" in told(server.client.get("/v2/nothing"), 404)
    assert "not allowed" in told(server.client.get("/v2/models/twice/infer"), 405)
    route = "/v2/models/twice/infer"
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        told(server.post(route, content=b"{}", headers=headers), 415)
    assert "another site" in told(
        server.post(route, json={}, headers={"origin": "http://a.b"}), 403
    )
    told(server.post(route, content=b" " * 100_001), 413)
    assert "infinite or not a number" in told(infer(server, inputs=[ROWS | {"data": [-3e38]}]), 400)


# -- bounds ----------------------------------------------------------------------------------------
def rows(count: int, value: float) -> dict[str, Any]:
    """Rows of which the first alone may wait at the gate."""
    return ROWS | {"shape": [count, 1], "data": [value] + [1.000001] * (count - 1)}


def post(raw: Raw, count: int, value: float) -> None:
    raw.post("/v2/models/twice/infer", {"inputs": [rows(count, value)]})


def test_a_client_that_goes_away_frees_its_place_in_the_queue(server: Running, gate: Gate) -> None:
    with Raw(server) as held, Raw(server) as leaves:
        post(held, 1, 1000.0)
        gate.await_arrival()
        post(leaves, 200, 1.0)
        until(lambda: server.engine.status()["urgent_rows"] == 200)
        leaves.socket.close()
        leaves.file.close()
        until(lambda: server.engine.status()["urgent_rows"] == 0)
        gate.open()
        assert held.answer()[2]["outputs"][0]["data"] == [2000.0]


def test_bytes_in_work_together_are_bounded(server: Running, gate: Gate) -> None:
    with Raw(server) as held:
        post(held, 3_000, 1000.0)  # 27 kB as JSON
        gate.await_arrival()
        refused = infer(server, inputs=[rows(3_000, 1.0)])
        gate.open()
        assert "bytes of tensors are in work, at most 40,000" in told(refused, 429)
        assert refused.headers["retry-after"] == "1"
        assert held.answer()[0] == 200
    assert infer(server, inputs=[rows(3_000, 1.0)]).is_success


# -- what the document says ------------------------------------------------------------------------
def test_every_route_answers_as_the_document_says(server: Running) -> None:
    """Made-up requests: none ends in a 500, all answers are in the document."""
    document = schemathesis.openapi.from_url(f"{server.server.url}/openapi.json")
    document.validate()
    routes = [found.ok() for found in document.get_all_operations()]
    routes = [route for route in routes if route.path.startswith("/v2")]
    assert len(routes) == 17
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    for route in routes:

        @given(case=route.as_strategy())
        @settings(
            max_examples=EACH,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=EACH == 3,
        )
        def check(case: Any) -> None:
            if "model" in case.path_parameters:
                case.path_parameters["model"] = "mixed"
            case.call_and_validate(checks=checks)

        check()
