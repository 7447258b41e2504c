"""API keys by role and reach, at every door; limits; a file that changes while the server runs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, error, running, settle, until
from tensor_rows import ROWS
from tiny_verticals import Shelf, Tiny

from plinth.engine import ConfigError
from plinth.pipelines.config.settings import Config
from plinth.pipelines.http.access import need_of
from plinth.pipelines.identity.callers import (
    AccessDenied,
    Bucket,
    Caller,
    Identity,
    Need,
    RateLimited,
)
from plinth.pipelines.identity.key_file import FileKeys, add, revoke
from plinth.pipelines.live.tables import mark_of

RECORD = {"id": "a", "value": 2}
DOUBLE, INFER = "/v1/tiny/double", "/v2/models/twice/infer"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Known:
    """A server with a file of keys; ``keys`` has them by name."""

    def __init__(self, server: Running, path: Path, keys: dict[str, str]) -> None:
        self.server, self.path, self.keys = server, path, keys

    def ask(self, name: str, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = bearer(self.keys[name]) | (
            {} if body is None else {"content-type": "application/json"}
        )
        content = None if body is None else json.dumps(body).encode()
        return self.server.client.request(method, path, headers=headers, content=content)


PEOPLE: dict[str, dict[str, Any]] = {
    "viewer": {"role": "read"},
    "clerk": {"role": "score", "only": ("tiny",)},
    "modeller": {"role": "score", "only": ("twice",)},
    "operator": {"role": "admin"},
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys = {name: add(path, name, table) for name, table in PEOPLE.items()}
    serve = {"keys": path, "oip": {"load_models": True}}
    with running({"tiny": Tiny(), "shelf": Shelf()}, serve=serve) as server:
        yield Known(server, path, keys)


def test_the_file_has_hashes_and_no_key(known: Known) -> None:
    text = known.path.read_text()
    assert all(key not in text for key in known.keys.values())
    assert len({table["sha256"] for table in tomllib.loads(text)["keys"].values()}) == 4
    assert known.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "allowed"),
    [
        ("POST", DOUBLE, RECORD, ["clerk", "operator"]),
        ("POST", DOUBLE, [RECORD], ["clerk", "operator"]),
        ("POST", "/v1/%74iny/double", RECORD, ["clerk", "operator"]),
        ("GET", "/v1/shelf/jobs/none", None, ["operator"]),
        ("POST", INFER, {"inputs": [ROWS]}, ["modeller", "operator"]),
        ("GET", "/v2/models/twice", None, ["viewer", "modeller", "operator"]),
        ("GET", "/v2", None, list(PEOPLE)),
        ("GET", "/", None, list(PEOPLE)),
        ("GET", "/openapi.json", None, list(PEOPLE)),
        ("GET", "/metrics", None, ["viewer", "operator"]),
        ("GET", "/v1/status", None, ["viewer", "operator"]),
        ("GET", "/v2/models/stats", None, ["viewer", "operator"]),
        ("POST", "/v2/repository/index", {}, ["viewer", "operator"]),
        ("POST", "/v2/repository/models/none/load", {}, ["operator"]),
    ],
)
def test_a_key_does_what_its_role_and_reach_allow(
    known: Known, method: str, path: str, body: Any, allowed: list[str]
) -> None:
    found = {name: known.ask(name, method, path, body).status_code for name in PEOPLE}
    assert [name for name, status in found.items() if status != 403] == allowed
    assert 401 not in found.values()
    assert known.server.client.request(method, path, headers=bearer("plinth_no")).status_code == 401


def test_every_route_of_the_document_needs_a_role(known: Known) -> None:
    """A route that somebody adds is not open to who may only look."""
    document = known.ask("operator", "GET", "/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            need = need_of(method.upper().encode(), path.encode())
            assert method == "get" or need.role != "read" or path == "/v2/repository/index"


@pytest.mark.needs("tritonclient", "grpc", "rapidjson")
def test_grpc_knows_the_same_keys(tmp_path: Path) -> None:
    import grpc
    import tritonclient.grpc as kind

    path = tmp_path / "keys.toml"
    keys = {name: add(path, name, table) for name, table in PEOPLE.items()}
    keys["slow"] = add(path, "slow", {"per_second": 1e-6, "burst": 2})
    serve = {"keys": path, "grpc": {"port": 0}, "oip": {"load_models": True}}
    rows = kind.InferInput("rows", [1, 1], "FP32")
    rows.set_data_from_numpy(np.full((1, 1), 3.0, "f4"))
    with running({"tiny": Tiny()}, serve=serve) as server:
        client = kind.InferenceServerClient(server.server.grpc_address)
        calls = {
            "infer": lambda headers: client.infer("twice", [rows], headers=headers),
            "metadata": lambda headers: client.get_model_metadata("twice", headers=headers),
            "all": lambda headers: client.get_inference_statistics(headers=headers),
            "index": lambda headers: client.get_model_repository_index(headers=headers),
            "load": lambda headers: client.load_model("none", headers=headers),
        }

        def code(what: str, key: str) -> str:
            try:
                calls[what](bearer(key))
            except kind.InferenceServerException as problem:
                return str(problem.status()).removeprefix("StatusCode.")
            return "OK"

        codes = {what: {name: code(what, keys[name]) for name in PEOPLE} for what in calls}
        assert {code for told in codes.values() for code in told.values()} == {
            *("OK", "PERMISSION_DENIED", "NOT_FOUND"),
        }
        allowed = {
            what: [name for name, code in told.items() if code != "PERMISSION_DENIED"]
            for what, told in codes.items()
        }
        assert allowed == {
            "infer": ["modeller", "operator"],
            "metadata": ["viewer", "modeller", "operator"],
            "all": ["viewer", "operator"],
            "index": ["viewer", "operator"],
            "load": ["operator"],
        }
        assert code("infer", "plinth_no") == "UNAUTHENTICATED"
        assert [code("metadata", keys["slow"]) for _ in range(3)] == [
            *("OK", "OK", "RESOURCE_EXHAUSTED"),
        ]
        with grpc.insecure_channel(server.server.grpc_address) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
            with pytest.raises(grpc.RpcError, match="times a second") as caught:
                call(b"", metadata=tuple(bearer(keys["slow"]).items()))
        trailing = dict(caught.value.trailing_metadata())
        assert trailing["plinth-reason"] == "rate_limited"
        assert int(trailing["retry-after-ms"]) > 0
        client.close()


@pytest.mark.needs("tritonclient", "grpc", "rapidjson")
@contextlib.contextmanager
def streaming(
    server: Running, key: str
) -> Iterator[tuple[Callable[[], None], queue.Queue[tuple[Any, Any]]]]:
    """A stream of gRPC: sends a request, and has (answer, error) of each in a queue."""
    import tritonclient.grpc as kind

    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    rows = kind.InferInput("rows", [1, 1], "FP32")
    rows.set_data_from_numpy(np.full((1, 1), 3.0, "f4"))
    with contextlib.closing(kind.InferenceServerClient(server.server.grpc_address)) as client:
        client.start_stream(lambda result, error: told.put((result, error)), headers=bearer(key))
        yield partial(client.async_stream_infer, "twice", [rows]), told


def test_each_request_of_a_stream_counts(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add(path, "slow", {"per_second": 1e-6, "burst": 2})
    with (
        running({"tiny": Tiny()}, serve={"keys": path, "grpc": {"port": 0}}) as server,
        streaming(server, key) as (ask, told),
    ):
        for _ in range(3):
            ask()
        answers = [told.get(timeout=60) for _ in range(3)]
        assert [error is None for _, error in answers] == [True, True, False]
        assert "times a second" in str(answers[2][1])


def test_a_key_that_was_revoked_ends_its_stream(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key, other = add(path, "gone", {}), add(path, "other", {})
    with (
        running({"tiny": Tiny()}, serve={"keys": path, "grpc": {"port": 0}}) as server,
        streaming(server, key) as (ask, told),
    ):
        ask()
        assert told.get(timeout=60)[1] is None
        revoke(path, "gone")
        status = partial(server.post, DOUBLE, json=RECORD, headers=bearer(key))
        until(lambda: status().status_code == 401)
        ask()
        assert "key" in str(told.get(timeout=60)[1])
        assert server.post(DOUBLE, json=RECORD, headers=bearer(other)).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/status", "/v2/repository/index"])
def test_a_newline_at_its_end_makes_no_other_path(known: Known, path: str) -> None:
    for end in ("%0A", "%0a", "%0D%0A", "%00"):
        for method in ("GET", "POST"):
            assert known.ask("clerk", method, path + end).status_code == 404


# -- limits ---------------------------------------------------------------------------------------
def test_beyond_the_rate_a_key_gets_429_and_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    slow = add(path, "slow", {"per_second": 0.01, "burst": 3})
    free = add(path, "free", {})
    with running({"tiny": Tiny()}, serve={"keys": path}) as server:
        answers = [server.post(DOUBLE, json=RECORD, headers=bearer(slow)) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        told = error(answers[3], 429, "rate_limited")
        assert "0.01 times a second" in told["message"]
        assert 90 <= int(answers[3].headers["retry-after"]) <= 100
        index = server.client.get("/v2", headers=bearer(slow))
        assert index.status_code == 429
        assert server.post(DOUBLE, json=RECORD, headers=bearer(free)).status_code == 200


@given(
    st.floats(0.01, 1000),
    st.integers(1, 50),
    st.lists(st.floats(0, 10), max_size=60),
)
def test_a_bucket_gives_its_burst_and_its_rate_and_no_more(
    rate: float, burst: int, gaps: list[float]
) -> None:
    now = 0.0
    bucket = Bucket(rate, burst, lambda: now)
    taken = 0
    for gap in gaps:
        now += gap
        try:
            bucket.take()
        except RateLimited as refused:
            now += (refused.retry_after or 0.0) * 1.000001
            bucket.take()  # it said when there would be room
        taken += 1
    assert taken <= burst + rate * now + 1e-6


# -- change ---------------------------------------------------------------------------------------
def test_keys_come_and_go_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    old = add(path, "old", {})
    with running({"tiny": Tiny()}, serve={"keys": path}) as server:

        def status(key: str) -> int:
            return server.post(DOUBLE, json=RECORD, headers=bearer(key)).status_code

        new = add(path, "new", {})
        until(lambda: status(new) == 200)
        assert status(old) == 200
        revoke(path, "old")
        until(lambda: status(old) == 401)
        whole = path.read_text()
        path.write_text("[keys.new]\nsha256 = 7\n")
        path.write_text(whole.replace("score", "nobody"))
        assert status(new) == 200  # what is wrong changes nothing
        other = add_beside(path, whole)
        until(lambda: status(other) == 200)


def test_a_rate_without_end_is_refused_and_the_next_change_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    old = add(path, "old", {})
    with pytest.raises(ConfigError):
        add(path, "endless", {"per_second": float("inf")})
    assert "endless" not in path.read_text(), "what cannot be read is not written"
    with running({"tiny": Tiny()}, serve={"keys": path}) as server:

        def status(key: str) -> int:
            return server.post(DOUBLE, json=RECORD, headers=bearer(key)).status_code

        whole = path.read_text()
        path.write_text(whole.replace("[keys", "x = 1\n[keys", 1) + "per_second = inf\n")
        assert status(old) == 200
        path.write_text(whole)
        revoke(path, "old")
        until(lambda: status(old) == 401)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_who_changes_the_keys_of_a_server_leaves_it_its_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add(path, "one", {})
    os.chown(path, 65534, 65534)
    before = mark_of(path)
    add(path, "two", {})
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)
    changed = mark_of(path)
    os.chown(path, 0, 0)
    assert len({before, changed, mark_of(path)}) == 3, "other rights are a change too"


def add_beside(path: Path, whole: str) -> str:
    """Mend a file that was damaged, and make another key."""
    path.write_text(whole)
    return add(path, "other", {})


def test_a_wrong_file_changes_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.toml"
    key = add(path, "a", {})
    keys = FileKeys(path)
    identity = Identity([keys])
    whole = path.read_text()
    for wrong, told in (
        ("[", "keys.toml"),
        (whole.replace('role = "score"', 'role = "boss"'), "role"),
        (whole + "colour = 1\n", "unknown key keys.a.colour"),
        (whole.replace("sha256", "sha255"), "sha256"),
        (whole.replace('"a"', '"a b"'), "a name has 1 to 64"),
    ):
        path.write_text(wrong)
        settle(path)
        keys.look()
        assert told in caplog.messages[-1]
        assert identity.caller({b"x-api-key": key.encode()}).name == "a"
    path.unlink()
    keys.look()
    assert identity.caller({b"x-api-key": key.encode()}).name == "a"
    os.mkfifo(path)
    settle(path)
    keys.look()  # on the thread that answers, which must not wait for somebody to write
    assert "keys.toml is not a file" in caplog.messages[-1]
    assert identity.caller({b"x-api-key": key.encode()}).name == "a"


def test_a_key_ends_when_its_time_is_over() -> None:
    now = 0.0

    class Keys:
        def of(self, digest: bytes) -> Caller | None:
            return Caller("a", "score", expires=10.0)

        def look(self) -> None: ...

    identity = Identity([Keys()], clock=lambda: now)
    assert identity.caller({b"x-api-key": b"k"}).name == "a"
    now = 10.0
    with pytest.raises(AccessDenied, match="not any more"):
        identity.caller({b"x-api-key": b"k"})


# -- who needs a key ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("table", "fine"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "127.8.8.8"}, True),
        ({"host": "0.0.0.0"}, False),  # noqa: S104
        ({"host": "scores.bank.example"}, False),
        ({"host": "0.0.0.0", "insecure": True}, True),  # noqa: S104
        ({"host": "0.0.0.0", "api_key_env": "A"}, True),  # noqa: S104
        ({"host": "0.0.0.0", "keys": "keys.toml"}, True),  # noqa: S104
        ({"admin": {"host": "0.0.0.0", "port": 0}}, False),  # noqa: S104
        ({"admin": {"host": "0.0.0.0"}}, True),  # noqa: S104
        ({"host": "0.0.0.0", "tls": {"certificate": "c", "key": "k"}}, False),  # noqa: S104
        ({"host": "::", "tls": {"certificate": "c", "key": "k", "client_ca": "a"}}, True),
        (
            {
                "host": "::",
                "tls": {"certificate": "c", "key": "k", "client_ca": "a"},
                "grpc": {"port": 0},
            },
            False,
        ),
    ],
)
def test_an_address_that_others_reach_needs_keys(table: dict[str, Any], fine: bool) -> None:
    config = Config.model_validate({"serve": table})
    if fine:
        config.check_access()
    else:
        with pytest.raises(ConfigError, match="no key is asked for"):
            config.check_access()


def test_needs_are_told_by_path() -> None:
    assert need_of(b"POST", b"/v1/a/b/c/d") == Need("score", "a")
    assert need_of(b"GET", b"/v1/a/jobs/1/files/x") == Need("score", "a")
    assert need_of(b"GET", b"/v2/models/m/versions/1/stats") == Need("read", "m")
    assert need_of(b"DELETE", b"/anything") == Need("admin")
