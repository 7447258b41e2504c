"""What clients and foreign pages try: smuggling, endless heads and bodies, other people's names."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import Raw, Running, error, running
from tiny_verticals import GATE, Gate, Tiny

from plinth.engine import Refused
from plinth.pipelines.http.access import Access
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.wire.head import parse_head
from plinth.pipelines.identity.callers import Identity

ROUTE = "/v1/tiny/double"
GOOD = {"id": "a", "value": 2.5}
BODY = b'{"id":"a","value":2.5}'
HEAD = f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Type: application/json\n"
INNER = b"GET /health/live?smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
KEY = "s3cret"
ENOUGH = 16 << 20
"""Bytes an attack may send before a test fails; the sockets' own buffers take some of them."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with running({"tiny": Tiny()}) as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_KEY", KEY)
        with running({"tiny": Tiny()}, serve={"api_key_env": "TINY_KEY"}) as server:
            yield server


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(GATE, str(tmp_path))
    return Gate(tmp_path)


def statuses(client: Raw) -> list[int]:
    """Statuses of all answers until the server closes the connection."""
    found = []
    with contextlib.suppress(ConnectionResetError):
        while line := client.file.readline():
            found.append(int(line.split()[1]))
            length = 0
            while field := client.file.readline().strip():
                name, _, value = field.lower().partition(b": ")
                length = int(value) if name == b"content-length" else length
            client.file.read(length)
    return found


def flood(client: Raw, piece: bytes) -> int:
    """Send a piece again and again until the server closes the connection; the bytes it took."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < ENOUGH:
            client.socket.sendall(piece)
            sent += len(piece)
    return sent


# -- Upgrade is ignored --------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["h2c", "websocket", "foo"])
@pytest.mark.parametrize("whole", [True, False], ids=["one segment", "two segments"])
def test_a_post_with_upgrade_is_answered_as_one_without(
    tiny: Running, protocol: str, whole: bool
) -> None:
    """curl --http2 and Java's default client send these."""
    lines = f"Connection: Upgrade, HTTP2-Settings\nUpgrade: {protocol}\nHTTP2-Settings: AAMA\n"
    head = f"{HEAD}{lines}Content-Length: {len(BODY)}\n\n"
    with Raw(tiny) as client:
        if whole:
            client.send(head, BODY)
        else:
            client.send(head)
            client.send("", BODY)
        assert client.answer()[::2] == (200, {"id": "a", "twice": 5.0})
        client.post(ROUTE, GOOD)
        assert client.answer()[0] == 200


@pytest.mark.parametrize("framing", [f"Content-Length: {len(INNER)}", "Transfer-Encoding: chunked"])
def test_the_body_of_an_upgrade_is_never_a_request(tiny: Running, framing: str) -> None:
    body = INNER if "Length" in framing else b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
    with Raw(tiny) as client:
        client.send(f"{HEAD}Connection: upgrade\nUpgrade: foo\n{framing}\n\n")
        client.send("", body)
        assert client.answer()[0] == 400  # it is no JSON
        client.send("GET /health/live HTTP/1.1\nHost: x\nConnection: close\n\n")
        assert statuses(client) == [200]


# -- one grammar for heads -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "head",
    [
        f"{HEAD}Content-Length: 22\nContent-Length: 22\n\n",
        f"{HEAD}Content-Length: 22\nTransfer-Encoding: chunked\n\n",
        f"{HEAD}Content-Length: +22\n\n",
        f"{HEAD}Content-Length: 22, 22\n\n",
        f"{HEAD}Content-Length: {'0' * 5000}22\n\n",
        f"{HEAD}Content-Length : 22\n\n",
        f"{HEAD}Transfer-Encoding: gzip, chunked\n\n",
        f"{HEAD}Transfer-Encoding: xchunked\n\n",
        f"{HEAD}X: a\n folded: b\nContent-Length: 22\n\n",
        f"{HEAD}X: a\rY: b\nContent-Length: 22\n\n",
        f"{HEAD}X\x00: a\nContent-Length: 22\n\n",
        f"{HEAD}Host: other\nContent-Length: 22\n\n",
        f"POST {ROUTE} HTTP/1.1\nContent-Type: application/json\nContent-Length: 22\n\n",
        f"POST {ROUTE} HTTP/2.0\nHost: x\nContent-Length: 22\n\n",
        f"POST {ROUTE}#x HTTP/1.1\nHost: x\nContent-Length: 22\n\n",
        f"POST\t{ROUTE} HTTP/1.1\nHost: x\nContent-Length: 22\n\n",
    ],
)
def test_what_two_readers_might_read_differently_is_400(tiny: Running, head: str) -> None:
    with Raw(tiny) as client:
        client.send(head, BODY)
        assert statuses(client) == [400]


def test_lines_that_end_without_a_carriage_return_are_400(tiny: Running) -> None:
    with Raw(tiny) as client:
        client.socket.sendall(HEAD.encode() + b"Content-Length: 22\n\n" + BODY)
        assert statuses(client) == [400]


def test_other_methods_and_targets_are_told_so(tiny: Running) -> None:
    for line, expected in (
        ("CONNECT a:1", 405), ("TRACE /", 405), ("PRI *", 405), ("OPTIONS *", 400),
        ("GET http://localhost/health/live", 200), ("OPTIONS /health/live", 405),
    ):  # fmt: skip
        with Raw(tiny) as client:
            client.send(f"{line} HTTP/1.1\nHost: x\nConnection: close\n\n")
            assert statuses(client) == [expected], line


def test_more_than_256_fields_are_431(tiny: Running) -> None:
    fields = "".join(f"a{number}: 1\n" for number in range(300))
    with Raw(tiny) as client:
        client.send(f"GET /health/live HTTP/1.1\nHost: x\n{fields}\n")
        assert statuses(client) == [431]


def test_json_nested_beyond_all_measure_is_400(tiny: Running) -> None:
    for body in (b"[" * 900 + b"]" * 900, b"[" * 16_000 + b"]" * 16_000):
        error(tiny.post(ROUTE, content=body), 400, "malformed_json")


# -- what has no end -----------------------------------------------------------------------------
@pytest.mark.parametrize("path", [ROUTE, "/nope"])
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"2\r\n{}\r\n0\r\n", b"a: " + b"v" * 400 + b"\r\n"),
        (b"2;", b"e" * 400),
        (b"", b"1;" + b"e" * 400 + b"\r\n{\r\n"),
    ],
    ids=["trailers", "one extension", "extensions"],
)
def test_what_costs_more_than_it_brings_ends_the_connection(
    tiny: Running, path: str, begin: bytes, piece: bytes
) -> None:
    with Raw(tiny) as client:
        head = f"POST {path} HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        client.send(f"{head}Transfer-Encoding: chunked\n\n", begin)
        assert flood(client, piece * 100) < ENOUGH


def test_who_has_no_key_is_told_so_before_the_body(locked: Running) -> None:
    with Raw(locked) as client:
        client.send(f"{HEAD}Content-Length: 1000000\n\n")
        assert statuses(client) == [401]
    with Raw(locked) as client:
        client.send(f"{HEAD}Transfer-Encoding: chunked\n\n", b"2\r\n{}\r\n0\r\n")
        assert flood(client, b"a: b\r\n" * 1000) < ENOUGH


def test_empty_lines_do_not_keep_a_connection_open() -> None:
    with (
        running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.3}) as server,
        Raw(server) as client,
    ):
        assert trickle(client, b"\r\n") == b""


@pytest.mark.parametrize(
    ("head", "step", "said"),
    [
        (f"{HEAD}", b"X: 1\r\n", b""),
        (f"{HEAD}Content-Length: 1000\n\n", b" ", b"body_too_slow"),
        (f"{HEAD}Content-Length: 100000\n\n", b" ", b"body_too_slow"),
        (f"{HEAD}Transfer-Encoding: chunked\n\n", b"1\r\n \r\n", b"body_too_slow"),
        ("POST /nope HTTP/1.1\nHost: x\nContent-Length: 90000\n\n", b" ", b"not_found"),
    ],
    ids=["head", "body", "large body", "chunks", "body of no route"],
)
def test_what_comes_a_byte_at_a_time_has_to_come_whole_in_time(
    head: str, step: bytes, said: bytes
) -> None:
    with (
        running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.3}) as server,
        Raw(server) as client,
    ):
        client.send(head)
        assert said in trickle(client, step)


def trickle(client: Raw, step: bytes) -> bytes:
    """Send a step each time nothing came for 20 ms, until the server closes; what it said."""
    client.socket.settimeout(0.02)
    said = b""
    for _ in range(1500):
        try:
            client.socket.sendall(step)
            data = client.socket.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return said
        if not data:
            return said
        said += data
    raise AssertionError("the connection lives for as long as a byte comes now and then")


def test_who_sends_and_never_reads_is_not_read_either() -> None:
    """Answers nobody takes stop the reading, and then end the connection."""
    with (
        running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.5}) as server,
        Raw(server) as client,
    ):
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert flood(client, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50) < ENOUGH


# -- connections that are too many ---------------------------------------------------------------
def test_liveness_answers_when_all_connections_are_taken() -> None:
    with running({"tiny": Tiny()}, serve={"max_connections": 4}) as server:
        server.client.close()
        with contextlib.ExitStack() as stack:
            taken = [stack.enter_context(Raw(server)) for _ in range(4)]
            for client in taken:
                client.post(ROUTE, GOOD)
                assert client.answer()[0] == 200
            for _ in range(50):
                with Raw(server) as probe:
                    probe.send("GET /health/live HTTP/1.1\nHost: x\n\n")
                    assert probe.answer()[::2] == (200, {"live": True})
                with Raw(server) as other:
                    other.post(ROUTE, GOOD)
                    assert other.answer()[0] == 503
            silent = [stack.enter_context(Raw(server)) for _ in range(60)]
            with Raw(server) as probe:
                probe.send("GET /health/live HTTP/1.1\nHost: x\n\n")
                assert probe.answer()[0] == 200
            assert len(silent) == 60


# -- foreign pages -------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_a_foreign_name_that_points_here_is_refused(tiny: Running, host: str) -> None:
    for method, path in (("GET", "/v1/status"), ("POST", ROUTE)):
        response = tiny.client.request(method, path, json=GOOD, headers={"host": host})
        error(response, 403, "foreign_host")
    assert tiny.client.get("/health/live", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:9", "plinth"])
def test_names_nobody_can_register_are_ours(tiny: Running, host: str) -> None:
    assert tiny.post(ROUTE, json=GOOD, headers={"host": host}).status_code == 200


def test_more_names_can_be_allowed() -> None:
    with running({"tiny": Tiny()}, serve={"allowed_hosts": ["scores.bank.example"]}) as server:
        for host, expected in (("scores.bank.example", 200), ("other.example", 403)):
            assert server.post(ROUTE, json=GOOD, headers={"host": host}).status_code == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_site_may_not_post(tiny: Running, fields: dict[str, str]) -> None:
    error(tiny.post(ROUTE, json=GOOD, headers=fields), 403, "cross_site")


def test_our_own_pages_may_post(tiny: Running) -> None:
    ours = f"http://{tiny.client.base_url.host}:{tiny.client.base_url.port}"
    for fields in ({"origin": ours}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert tiny.post(ROUTE, json=GOOD, headers=fields).status_code == 200


def test_a_packed_body_is_415_and_not_called_wrong_json(tiny: Running) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = tiny.client.post(ROUTE, content=gzip.compress(BODY), headers=headers)
    error(answer, 415, "unsupported_media_type")
    headers["Content-Encoding"] = "identity"
    assert tiny.client.post(ROUTE, content=BODY, headers=headers).status_code == 200


def test_a_body_without_a_type_is_415(tiny: Running) -> None:
    """A page of another site can send one without the browser asking first."""
    error(tiny.client.post(ROUTE, content=BODY), 415, "unsupported_media_type")


# -- keys and deadlines --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], 401),
        ([("authorization", f"bearer {KEY}")], 200),
        ([("authorization", KEY)], 401),
        ([("authorization", f"Basic {KEY}")], 401),
        ([("x-api-key", "")], 401),
        ([("x-api-key", "no"), ("authorization", f"Bearer {KEY}")], 401),
        ([("x-api-key", "no"), ("x-api-key", KEY)], 400),
    ],
)
def test_a_key_is_asked_for_in_one_way(
    locked: Running, fields: list[tuple[str, str]], expected: int
) -> None:
    given = [("content-type", "application/json"), *fields]
    assert locked.client.post(ROUTE, content=BODY, headers=given).status_code == expected


def test_no_spelling_of_an_open_path_opens_another(locked: Running) -> None:
    for path in ("/metrics", "/v1/status", "/health/live/", "/HEALTH/LIVE", "/health%2flive", "/"):
        assert locked.client.get(path).status_code == 401, path


@pytest.mark.parametrize("path", ["/v1/tiny/double", "/%76%31/tiny/double", "/v1%2ftiny/double"])
def test_no_spelling_of_a_path_gets_past_the_warm_up(path: str) -> None:
    head = parse_head(f"POST {path} HTTP/1.1\r\nhost: localhost\r\n".encode())
    asked = SimpleNamespace(head=head, who="")
    refusal = Access(Identity([]), "127.0.0.1", (), (), Health()).refusal(asked)
    assert isinstance(refusal, Refused)


@pytest.mark.parametrize("value", ["1_000", "0x10", "1e999", "٣", "5 5"])
def test_a_deadline_is_a_plain_number(tiny: Running, value: str) -> None:
    fields: Any = {"x-slo-deadline-ms": value.encode()}
    error(tiny.post(ROUTE, json=GOOD, headers=fields), 400, "bad_header")


# -- one bad request among forty -----------------------------------------------------------------
class Blocking(Tiny):
    """Its parser waits at the gate for a record named "block"; a name of "bad" makes it fail."""

    def parse(self, raw: bytes) -> Any:
        record = super().parse(raw)
        if record.id == "block":
            Gate(Path(threading.current_thread().name)).pass_through()
        return record

    def infer(self, requests: Any) -> Any:
        if any(request.id == "bad" for request in requests):
            raise KeyError("secret 4111111111111111")
        return (yield from super().infer(requests))

    def encode(self, result: Any) -> bytes:
        if result.id == "unwritable":
            raise SystemExit("secret 4111111111111111")
        return super().encode(result)


@pytest.mark.parametrize("name", ["bad", "unwritable"])
def test_thirty_nine_neighbours_of_a_bad_request_are_answered(gate: Gate, name: str) -> None:
    """All forty are read in one turn of the loop, which the test holds up until they are there."""
    with running({"tiny": Blocking()}) as server, ThreadPoolExecutor(1) as pool:
        server.thread.name = str(gate.entered.parent)
        blocked = pool.submit(server.post, ROUTE, json={"id": "block", "value": 1})
        gate.await_arrival()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(server)) for _ in range(40)]
            for number, client in enumerate(clients):
                named = name if number == 7 else f"n{number}"
                client.post(ROUTE, {"id": named, "value": number + 100})
            gate.open()
            answers = [client.answer() for client in clients]
        assert blocked.result().status_code == 200
    status, _, told = answers.pop(7)
    assert (status, told["error"]["reason"]) == (500, "internal")
    assert "4111" not in str(told)
    numbers = [number for number in range(40) if number != 7]
    expected = [(200, {"id": f"n{n}", "twice": 2.0 * n + 200}) for n in numbers]
    assert [answer[::2] for answer in answers] == expected


def test_bad_records_of_a_list_are_told_apart_from_the_others(tiny: Running) -> None:
    with running({"tiny": Blocking()}) as server:
        names = ["a", "bad", "b", "unwritable", "bad"]
        answer = server.post(ROUTE, json=[{"id": name, "value": 1} for name in names])
    results = answer.json()["results"]
    assert [result.get("result", {}).get("id") for result in results] == [
        "a",
        None,
        "b",
        None,
        None,
    ]
    assert all(one["error"]["reason"] == "internal" for one in results if "error" in one)
    assert "4111" not in answer.text


class Panic(BaseException):
    """As the Rust libraries of Python raise it when they meet a fault of their own."""


class Panicking(Tiny):
    """Its record's name says where a library panics."""

    def parse(self, raw: bytes) -> Any:
        return self._met("parse", super().parse(raw))

    def infer(self, requests: Any) -> Any:
        for request in requests:
            self._met("infer", request)
        return (yield from super().infer(requests))

    def encode(self, result: Any) -> bytes:
        return super().encode(self._met("encode", result))

    def _met(self, step: str, record: Any) -> Any:
        if record.id == step:
            raise Panic("secret 4111111111111111")
        return record


@pytest.mark.parametrize("step", ["parse", "infer", "encode"])
def test_a_panic_of_a_library_fails_its_record_alone(step: str) -> None:
    panics = {"id": step, "value": 1}
    with running({"tiny": Panicking()}) as server:
        found = error(server.post(ROUTE, json=panics), 500, "internal")
        results = server.post(ROUTE, json=[GOOD, panics]).json()["results"]
        assert server.post(ROUTE, json=GOOD).json()["twice"] == 5.0
    assert "4111" not in str(found)
    assert results[0]["result"]["twice"] == 5.0
    assert results[1]["error"]["reason"] == "internal"
