"""The log of requests: who, what, when, with what end; nothing of what they sent."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import running, until
from tensor_rows import ROWS
from tiny_verticals import Tiny

from plinth.engine import ConfigError
from plinth.pipelines.identity import request_log
from plinth.pipelines.identity.key_file import add
from plinth.pipelines.identity.request_log import LOST, RequestLog

SECRET = "4111111111111111"  # noqa: S105 - a card number
DOUBLE = "/v1/tiny/double"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.needs("tritonclient", "grpc", "rapidjson")
def test_who_asked_what_with_what_end_and_nothing_of_what_they_sent(tmp_path: Path) -> None:
    import grpc
    import tritonclient.grpc as kind

    path, keys = tmp_path / "requests.jsonl", tmp_path / "keys.toml"
    alice = {"x-api-key": add(keys, "alice", {"role": "score", "only": ("tiny", "twice")})}
    serve = {"keys": keys, "request_log": path, "grpc": {"port": 0}}
    begun = datetime.datetime.now(datetime.UTC)
    rows = kind.InferInput("rows", [1, 1], "FP32")
    rows.set_data_from_numpy(np.full((1, 1), 3.0, "f4"))
    with running({"tiny": Tiny()}, serve=serve) as server:
        record = {"id": SECRET, "value": 2}
        server.post(DOUBLE, json=record, headers=alice)
        server.post(DOUBLE, json=[record, {"id": SECRET}], headers=alice)
        server.post(DOUBLE, json={"id": "a", SECRET: SECRET}, headers=alice)
        server.post(DOUBLE, json=record, headers={"x-api-key": SECRET})
        server.post("/v2/models/twice/infer", json={"id": SECRET, "inputs": [ROWS]}, headers=alice)
        server.client.get(f"/v1/{SECRET}/{SECRET}?card={SECRET}", headers=alice)
        server.client.get("/metrics", headers=alice)
        client = kind.InferenceServerClient(server.server.grpc_address)
        client.infer("twice", [rows], headers=alice, request_id=SECRET)
        with pytest.raises(kind.InferenceServerException):
            client.get_model_metadata(SECRET, headers=alice)
        for refused in (
            lambda: client.load_model(SECRET, headers=alice),
            lambda: client.infer("twice", [rows], headers={"x-api-key": SECRET}),
        ):
            with pytest.raises(kind.InferenceServerException):
                refused()
        assert client.is_server_ready()  # probes are not in it
        client.close()
        with grpc.insecure_channel(server.server.grpc_address) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{SECRET}")
            with pytest.raises(grpc.RpcError):
                call(b"", metadata=tuple(alice.items()))
    found = lines(path)
    told = [(line["who"], line["what"], line["status"], "models" in line) for line in found]
    assert told == [
        ("alice", f"POST {DOUBLE}", "200", True),
        ("alice", f"POST {DOUBLE}", "200", True),
        ("alice", f"POST {DOUBLE}", "422", False),
        ("", "POST other", "401", False),
        ("alice", "POST /v2/models/{model}/infer", "200", True),
        ("alice", "GET other", "403", False),
        ("alice", "GET other", "403", False),
        ("alice", "gRPC ModelInfer", "OK", True),
        ("alice", "gRPC ModelMetadata", "PERMISSION_DENIED", False),
        ("alice", "gRPC RepositoryModelLoad", "PERMISSION_DENIED", False),
        ("", "gRPC ModelInfer", "UNAUTHENTICATED", False),
        ("alice", "gRPC other", "UNIMPLEMENTED", False),
    ]
    assert found[0]["models"] == "twice=3"
    assert SECRET not in path.read_text()
    for line in found:
        when = datetime.datetime.fromisoformat(line["time"])
        assert begun - datetime.timedelta(seconds=1) <= when
        assert line["ms"] >= 0
    assert path.stat().st_mode & 0o077 == 0


def test_old_files_are_kept_up_to_a_number(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, max_bytes=4096, files=3)
    for _ in range(4):  # each larger than a file
        for _ in range(100):
            log.note("alice", "POST /v1/tiny/double", 200, 0.001, "twice=1")
        until(lambda: not log._lines)
    log.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"),
    ]
    for file in tmp_path.iterdir():
        assert all(line["who"] == "alice" for line in lines(file))
        assert file.stat().st_size < 40_000


def test_what_the_disk_does_not_take_in_time_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "WAITING", 10)
    before = LOST._value.get()
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, max_bytes=1 << 20, files=2)
    sent = 100_000
    for _ in range(sent):
        log.note("alice", "POST /", 200, 0.0)
    log.close()
    told = lines(path)
    missing = sum(line.get("missing", 0) for line in told)
    assert missing > 0
    assert missing + sum("who" in line for line in told) == sent
    assert LOST._value.get() - before == missing


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        RequestLog(tmp_path / "none" / "requests.jsonl", 4096, 2)
