"""The Open Inference Protocol over gRPC, by an unmodified ``tritonclient``."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from certificates import signed
from half_sent import HalfSent
from serving import Running, running, until
from tensor_inputs import mixed_inputs, tensor
from tiny_verticals import Gate, Tiny

from plinth.engine import ConfigError, ModelStore
from plinth.pipelines.config.settings import Config, OipConfig
from plinth.pipelines.identity.callers import Identity
from plinth.pipelines.identity.key_file import add
from plinth.pipelines.oip.service import ModelService

pytestmark = pytest.mark.needs("tritonclient", "grpc", "rapidjson")


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    import tritonclient.grpc

    client = tritonclient.grpc.InferenceServerClient(server.server.grpc_address)
    yield client
    client.close()


def rows(value: float, count: int = 1) -> list[Any]:
    import tritonclient.grpc as kind

    return [tensor(kind, "rows", np.full((count, 1), value, "f4"), "FP32")]


def test_tritonclient_sees_the_server_and_its_models(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mixed", "2.1")
    assert not client.is_model_ready("mixed", "3")
    assert not client.is_model_ready("nobody")
    assert "model_repository" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("mixed", as_json=True)
    assert metadata["inputs"][1] == {"name": "ids", "datatype": "INT64", "shape": ["-1", "-1"]}
    config = client.get_model_config("mixed", as_json=True)["config"]
    assert config["input"][2] == {"name": "on", "data_type": "TYPE_BOOL"}
    assert config["output"][0]["data_type"] == "TYPE_FP32"


def test_tritonclient_infers(client: Any) -> None:
    import tritonclient.grpc as kind

    outputs = [kind.InferRequestedOutput(name) for name in ("on", "total")]
    result = client.infer("mixed", mixed_inputs(kind), outputs=outputs, request_id="r1")
    assert result.get_response().id == "r1"
    assert result.as_numpy("total").tolist() == [15.0 + 6, -(51.0 + 15)]
    assert result.as_numpy("on").tolist() == [True, False]
    assert result.as_numpy("ids") is None


def test_tritonclient_infers_with_callbacks_and_in_an_event_loop(
    server: Running, client: Any
) -> None:
    import tritonclient.grpc.aio

    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer("twice", rows(4), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=60)
    assert error is None
    assert result.as_numpy("twice").tolist() == [[8.0]]

    async def many() -> list[float]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.server.grpc_address) as there:
            results = await asyncio.gather(*(there.infer("twice", rows(n)) for n in range(40)))
            return [float(result.as_numpy("twice")[0, 0]) for result in results]

    assert asyncio.run(many()) == [2.0 * n for n in range(40)]


def test_a_stream_answers_in_the_order_of_its_requests_and_goes_on_after_an_error(
    client: Any,
) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for n in range(60):
        client.async_stream_infer("nobody" if n == 5 else "twice", rows(n), request_id=str(n))
    found = [answers.get(timeout=60) for _ in range(60)]
    client.stop_stream()
    assert "no such model" in str(found[5][1])
    for n, (result, error) in enumerate(found):
        if n != 5:
            assert error is None
            assert result.get_response().id == str(n)
            assert result.as_numpy("twice").tolist() == [[2.0 * n]]


def test_a_stream_in_an_event_loop(server: Running) -> None:
    import tritonclient.grpc.aio

    async def requests() -> Any:
        for n in range(20):
            yield {"model_name": "twice", "inputs": rows(n), "request_id": str(n)}

    async def run() -> list[float]:
        async with tritonclient.grpc.aio.InferenceServerClient(server.server.grpc_address) as there:
            found = there.stream_infer(requests())
            return [float(result.as_numpy("twice")[0, 0]) async for result, _ in found]

    assert asyncio.run(run()) == [2.0 * n for n in range(20)]


def test_tritonclient_loads_and_unloads_models_and_reads_statistics(client: Any) -> None:
    import tritonclient.grpc as kind

    def state() -> dict[str, str]:
        return {one.name: one.state for one in client.get_model_repository_index().models}

    assert state()["line"] == state()["broken"] == "UNAVAILABLE"
    client.load_model("line")
    assert state()["line"] == "READY"
    told = client.get_model_metadata("line")
    given = tensor(kind, told.inputs[0].name, np.array([[1, 1], [10, 0]], "f4"), "FP32")
    result = client.infer("line", [given])
    assert result.as_numpy(told.outputs[0].name).tolist() == [[6.0], [21.0]]
    stats = client.get_inference_statistics("line").model_stats[0]
    assert stats.inference_stats.success.count == 1
    client.unload_model("line")
    assert state()["line"] == "UNAVAILABLE"
    for name, why in (("broken", "manifest"), ("nobody", "NOT_FOUND"), ("twice", "PRECONDITION")):
        with pytest.raises(kind.InferenceServerException, match=why):
            client.load_model(name)


@pytest.mark.parametrize(
    ("model", "options", "code", "sentence"),
    [
        ("nobody", {}, "NOT_FOUND", "no such model"),
        ("twice", {"model_version": "9"}, "NOT_FOUND", "in version 3"),
        ("mixed", {}, "INVALID_ARGUMENT", "takes inputs"),
        ("twice", {"timeout": 1}, "DEADLINE_EXCEEDED", "deadline"),
        ("twice", {"timeout": -1}, "INVALID_ARGUMENT", "no whole number"),
        ("twice", {"sequence_id": 5}, "INVALID_ARGUMENT", "no state between requests"),
        ("twice", {"priority": 2000}, "INVALID_ARGUMENT", "from 0 to 1,000"),
    ],
)
def test_errors_have_codes_and_sentences(
    client: Any, model: str, options: dict[str, Any], code: str, sentence: str
) -> None:
    import tritonclient.grpc as kind

    with pytest.raises(kind.InferenceServerException, match=sentence) as caught:
        client.infer(model, rows(1), **options)
    assert caught.value.status() == f"StatusCode.{code}"


# -- messages by hand ------------------------------------------------------------------------------
def asked(model: str, **inputs: tuple[str, list[int], dict[str, list[Any]] | bytes]) -> Any:
    """A request of tritonclient's own message types, with typed or raw contents."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, shape, values) in inputs.items():
        contents = {"contents": values} if isinstance(values, dict) else {}
        request.inputs.add(name=name, datatype=datatype, shape=shape, **contents)
        if isinstance(values, bytes):
            request.raw_input_contents.append(values)
    return request


def send(server: Running, request: Any) -> Any:
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    with grpc.insecure_channel(server.server.grpc_address) as channel:
        return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)


def test_typed_contents_of_every_kind(server: Running) -> None:
    answer = send(
        server,
        asked(
            "mixed",
            picture=("FP32", [1, 2, 3], {"fp32_contents": [1, 2, 3, 4, 5, 6]}),
            ids=("INT64", [1, 2], {"int64_contents": [7, 8]}),
            on=("BOOL", [1], {"bool_contents": [True]}),
        ),
    )
    assert np.frombuffer(answer.raw_output_contents[0], "f4").tolist() == [36.0]
    assert np.frombuffer(answer.raw_output_contents[1], "i8").tolist() == [7, 8]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"rows": ("FP32", [1, 1], b"\0\0\0")}, "3 bytes came"),
        ({"rows": ("FP32", [1, 1], {"fp32_contents": [1, 2]})}, "ask for 4"),
        ({"rows": ("FP16", [1, 1], {"fp32_contents": [1]})}, "no typed contents"),
        ({"rows": ("INT8", [1, 1], {"int_contents": [300]})}, "beyond INT8"),
        ({"rows": ("BYTES", [1, 1], {"bytes_contents": [b"x"]})}, "use one of BOOL"),
        ({"rows": ("FP32", [0, 1], b"")}, "1 or more"),
        (
            {"a": ("FP32", [1, 1], b"\0\0\0\0"), "b": ("FP32", [1, 1], {"fp32_contents": [1]})},
            "names 2 inputs, model twice has 1",
        ),
    ],
)
def test_wrong_tensors_are_refused(server: Running, tensors: Any, sentence: str) -> None:
    import grpc

    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
        send(server, asked("twice", **tensors))
    assert sentence in caught.value.details()


def test_what_is_no_message_and_what_is_too_large_is_refused(server: Running) -> None:
    import grpc

    with grpc.insecure_channel(server.server.grpc_address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError, match=r"no inference\.ModelInferRequest"):
            call(b"\xff\xff\xff")
        with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
            call(b" " * 200_000)
        call = channel.unary_unary("/inference.GRPCInferenceService/Nothing")
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            call(b"")


def test_the_messages_are_those_of_tritonclient() -> None:
    """Every message and field of ours has the name, number and type that a client sends."""
    from tritonclient.grpc import service_pb2

    from plinth.pipelines.grpc.messages import _MESSAGES, INFERENCE, message

    names = [
        line.partition(":")[0] for line in _MESSAGES[INFERENCE].split("\n") if line[:1].strip()
    ]
    compared = 0

    def compare(ours: Any, theirs: Any) -> None:
        nonlocal compared
        assert ours.full_name.rpartition(".")[2] == theirs.full_name.rpartition(".")[2]
        for field in ours.fields:
            other = theirs.fields_by_number[field.number]
            assert (field.name, field.is_repeated) == (other.name, other.is_repeated)
            enumeration = other.type == other.TYPE_ENUM and field.type == field.TYPE_INT32
            assert field.type == other.type or enumeration
            compared += 1
            if field.message_type:
                compare(field.message_type, other.message_type)

    for name in names:
        if hasattr(service_pb2, name):
            compare(message(name).DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR)
    assert compared > 100


# -- bounds and ends -------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["cancelled", "deadline", "channel"])
def test_a_call_that_its_client_gives_up_leaves_the_queue(
    server: Running, client: Any, gate: Gate, how: str
) -> None:
    import tritonclient.grpc

    held: queue.Queue[Any] = queue.Queue()
    client.async_infer("twice", rows(1000.0), lambda result, error: held.put((result, error)))
    gate.await_arrival()
    other = tritonclient.grpc.InferenceServerClient(server.server.grpc_address)
    given_up: queue.Queue[Any] = queue.Queue()
    call = other.async_infer(
        "twice",
        rows(1.0, 200),
        lambda result, error: given_up.put(error),
        client_timeout=1.0 if how == "deadline" else None,
    )
    if how != "deadline":
        until(lambda: server.engine.status()["urgent_rows"] == 200)
    if how == "cancelled":
        call.cancel()
    elif how == "channel":
        other.close()
    assert given_up.get(timeout=60) is not None
    until(lambda: server.engine.status()["urgent_rows"] == 0)
    gate.open()
    assert held.get(timeout=60)[0].as_numpy("twice").tolist() == [[2000.0]]
    other.close()


def test_a_key_is_asked_for_by_all_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc
    import tritonclient.grpc as kind

    monkeypatch.setenv("OIP_KEY", "s3cret")
    serve = {"api_key_env": "OIP_KEY", "grpc": {"port": 0}}
    with running({"tiny": Tiny()}, serve=serve) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        assert client.is_server_ready()
        for options in ({}, {"headers": {"authorization": "Bearer other"}}):
            with pytest.raises(kind.InferenceServerException, match="needs an API key"):
                client.infer("twice", rows(1), **options)
        key = {"authorization": "Bearer s3cret"}
        assert client.infer("twice", rows(1), headers=key).as_numpy("twice").tolist() == [[2.0]]
        with pytest.raises(kind.InferenceServerException, match="PERMISSION_DENIED"):
            client.load_model("x", headers={"x-api-key": "s3cret"})
        errors: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: errors.put(error))
        assert "needs an API key" in str(errors.get(timeout=60))
        client.close()
        with grpc.insecure_channel(server.server.grpc_address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert check(b"") == b"\x08\x01"  # status: SERVING
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                check(b"\x0a\x01x")  # service: "x"
            watches = [channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for _ in range(17)]
            with pytest.raises(grpc.RpcError, match="all 16 places"):
                [next(watch) for watch in watches]


def test_messages_that_do_not_become_whole_hold_few_places() -> None:
    """256 calls may be open, and each could hold a message of 64 MiB that never ends."""
    import tritonclient.grpc as kind

    infer = "/inference.GRPCInferenceService/ModelInfer"
    serve = {"grpc": {"port": 0, "max_arriving": 2}, "request_timeout_seconds": 600.0}
    with running({"tiny": Tiny()}, serve=serve) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        with HalfSent(server.server.grpc_address) as slow:
            begun = [slow.begin(infer, 1 << 20) for _ in range(8)]
            refused = {slow.ended() for _ in range(6)}
            assert len(refused) == 6
            assert refused < set(begun)
            # Whole messages need no place, streams do.
            assert client.infer("twice", rows(1)).as_numpy("twice").tolist() == [[2.0]]
            errors: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: errors.put(error))
            assert "all 2 places" in str(errors.get(timeout=60))
            client.stop_stream()

        def streams() -> bool:
            told: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: told.put(result))
            with contextlib.suppress(kind.InferenceServerException):  # it was refused before
                client.async_stream_infer("twice", rows(2))
            found = told.get(timeout=60)
            client.stop_stream()
            return found is not None

        until(streams)  # the connection is gone, and its places are free
        client.close()


def test_without_a_key_no_message_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OIP_KEY", "s3cret")
    serve = {"api_key_env": "OIP_KEY", "grpc": {"port": 0}, "request_timeout_seconds": 600.0}
    service, health = "/inference.GRPCInferenceService", "/grpc.health.v1.Health"
    with (
        running({"tiny": Tiny()}, serve=serve) as server,
        HalfSent(server.server.grpc_address) as slow,
    ):
        methods = ("ModelInfer", "ModelStreamInfer", "RepositoryModelLoad", "ServerMetadata")
        for method in (*methods, "ServerLive", "ServerReady"):
            assert slow.begin(f"{service}/{method}", 1 << 20, x_api_key="no") == slow.ended()
        assert slow.begin(f"{health}/Check", 1 << 20) == slow.ended()


def test_health_and_work_take_no_place_from_each_other(gate: Gate) -> None:
    import grpc
    import tritonclient.grpc as kind

    with running({"tiny": Tiny()}, serve={"grpc": {"port": 0, "max_streams": 2}}) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        with grpc.insecure_channel(server.server.grpc_address) as channel:
            watches = [channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for _ in range(16)]
            assert [next(watch) for watch in watches] == [b"\x08\x01"] * 16
            answers: queue.Queue[Any] = queue.Queue()
            for value in (1000.0, 1.0):
                client.async_infer("twice", rows(value), lambda result, error: answers.put(error))
                gate.await_arrival() if value == 1000.0 else until(
                    lambda: server.engine.status()["urgent_rows"] == 1
                )
            with pytest.raises(kind.InferenceServerException, match="all 2 places for calls"):
                client.infer("twice", rows(3))
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
            assert client.is_server_live()
            gate.open()
            assert [answers.get(timeout=60) for _ in range(2)] == [None, None]
            until(lambda: client.infer("twice", rows(3)).as_numpy("twice").tolist() == [[6.0]])
        client.close()


def test_a_key_leaves_others_a_place_to_stream(tmp_path: Path) -> None:
    import tritonclient.grpc as kind

    keys = tmp_path / "keys.toml"
    alice, bob = ({"x-api-key": add(keys, who, {"role": "score"})} for who in ("alice", "bob"))
    serve = {"keys": keys, "grpc": {"port": 0, "max_arriving": 4}}
    with running({"tiny": Tiny()}, serve=serve) as server, contextlib.ExitStack() as stack:

        def streams(key: dict[str, str]) -> str:
            """Open a stream, which stays open; what its first request gets."""
            client = kind.InferenceServerClient(server.server.grpc_address)
            stack.callback(client.close)
            told: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: told.put(error), headers=key)
            with contextlib.suppress(kind.InferenceServerException):  # it was refused before
                client.async_stream_infer("twice", rows(2))
            return str(told.get(timeout=60) or "")

        assert [streams(alice) for _ in range(2)] == ["", ""]
        assert "this key holds 2 of 4 places" in streams(alice)
        assert streams(bob) == ""
        assert "this key holds 1 of 4 places" in streams(bob)


def test_models_are_not_loaded_by_grpc_where_that_has_an_address_of_its_own(
    store: ModelStore, tmp_path: Path
) -> None:
    import tritonclient.grpc as kind

    serve = {"admin": {"port": 0}, "grpc": {"port": 0}, "oip": {"load_models": True}}
    with running({"tiny": Tiny()}, serve=serve, models={"store": store.root}) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        for call in (client.load_model, client.unload_model):
            with pytest.raises(kind.InferenceServerException, match=r"serve\.admin") as refused:
                call("line")
            assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
        assert client.get_model_repository_index().models
        url = f"{server.server.admin_url}/v2/repository/models/line/load"
        assert httpx.post(url).status_code == 200
        assert client.is_model_ready("line")
        client.close()


def test_a_call_in_work_is_answered_while_the_server_drains(gate: Gate) -> None:
    import grpc
    import tritonclient.grpc as kind

    with running({"tiny": Tiny()}, serve={"grpc": {"port": 0}}) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            "twice", rows(1000.0), lambda result, error: answers.put((result, error))
        )
        gate.await_arrival()
        with grpc.insecure_channel(server.server.grpc_address) as channel:
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            assert next(watch) == b"\x08\x01"
            server.client.close()
            server.server.drain()
            assert next(watch) == b"\x08\x02"  # status: NOT_SERVING
            assert list(watch) == []
        gate.open()
        result, error = answers.get(timeout=60)
        assert error is None
        assert result.as_numpy("twice").tolist() == [[2000.0]]
        client.close()


def test_a_port_in_use_and_files_that_are_not_there_are_named(server: Running) -> None:
    from plinth.pipelines.grpc.server import GrpcDoor

    def door(**table: Any) -> GrpcDoor:
        service = ModelService(server.engine, ModelStore(Path("none")), OipConfig())
        config = Config.model_validate({"serve": {"grpc": table}})
        return GrpcDoor(
            service,
            config.serve.grpc,
            tls=config.files_of(config.serve.grpc),
            host="127.0.0.1",
            identity=Identity([]),
            requests=None,
            reasons={},
            seconds=1.0,
        )

    port = int(server.server.grpc_address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        asyncio.run(door(port=port).start())
    with pytest.raises(ConfigError, match=r"cannot read no\.pem"):
        door(port=0, certificate="no.pem", key="no.key")
    with pytest.raises(ValueError, match="certificate and key go together"):
        door(port=0, certificate="no.pem")


# -- TLS -------------------------------------------------------------------------------------------
def test_tls_on_both_sides(tmp_path: Path) -> None:
    import tritonclient.grpc as kind

    certificate, key = signed(tmp_path, "server")
    own, own_key = signed(tmp_path, "client")
    authority = tmp_path / "ca.pem"
    grpc = {"port": 0, "certificate": certificate, "key": key, "client_ca": authority}
    with running({"tiny": Tiny()}, serve={"grpc": grpc}) as server:
        options = {"ssl": True, "root_certificates": str(authority)}
        both = {"certificate_chain": str(own), "private_key": str(own_key)}
        client = kind.InferenceServerClient(server.server.grpc_address, **options, **both)
        assert client.infer("twice", rows(3)).as_numpy("twice").tolist() == [[6.0]]
        client.close()
        for without in (options, {}):
            stranger = kind.InferenceServerClient(server.server.grpc_address, **without)
            with pytest.raises(kind.InferenceServerException, match="UNAVAILABLE"):
                stranger.infer("twice", rows(3), client_timeout=30)
            stranger.close()
