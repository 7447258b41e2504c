"""The express lane: requests whose heads are known, in whatever pieces they come."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Raw, Running, running, watch
from tiny_verticals import Tiny

ROUTE = "/v1/tiny/double"


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with running({"tiny": Tiny()}) as server:
        yield server


def request(value: float, lines: str = "Host: x\n", spaces: int = 0) -> bytes:
    """One request; spaces make its body, and so its head, another."""
    body = json.dumps({"id": "a", "value": value}).encode() + b" " * spaces
    if "Content-Type" not in lines:
        lines += "Content-Type: application/json\n"
    head = f"POST {ROUTE} HTTP/1.1\n{lines}Content-Length: {len(body)}\n\n"
    return head.replace("\n", "\r\n").encode() + body


HEADS = st.sampled_from(
    ["Host: x\n", "host: y\nAccept: */*\n", "Host: x\nContent-Type: text/xml\n"]
)
REQUESTS = st.tuples(st.integers(-9, 9), HEADS, st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(REQUESTS, min_size=1, max_size=6), data=st.data())
def test_pieces_make_no_difference(
    tiny: Running, wanted: list[tuple[int, str, int]], data: st.DataObject
) -> None:
    sent = b"".join(request(*one) for one in wanted)
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=4).map(sorted))
    with Raw(tiny) as client:
        for begin, end in pairwise((0, *cuts, len(sent))):
            client.send("", sent[begin:end])
        for value, lines, _ in wanted:
            status, _, answer = client.answer()
            if "xml" in lines:
                assert (status, answer["error"]["reason"]) == (415, "unsupported_media_type")
            else:
                assert (status, answer) == (200, {"id": "a", "twice": 2.0 * value})


def test_a_known_head_asks_for_the_key_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "s3cret")
    with running({"tiny": Tiny()}, serve={"api_key_env": "TINY_KEY"}) as server, Raw(server) as raw:
        for key, expected in (("s3cret", 200), ("s3creT", 401)) * 3:
            raw.send("", request(1, f"Host: x\nX-API-Key: {key}\n"))
            assert raw.answer()[0] == expected


def test_a_known_head_may_ask_to_close_the_connection(tiny: Running) -> None:
    for _ in range(2):
        with Raw(tiny) as client:
            client.send("", request(1, "Host: x\nConnection: close\n"))
            status, headers, _ = client.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert client.file.read() == b""


def test_a_head_of_an_own_deadline_does_not_give_it_to_others(tiny: Running) -> None:
    with Raw(tiny) as client:
        for lines, expected in (("x-slo-deadline-ms: 0.0001\n", 503), ("", 200)) * 2:
            client.send("", request(1, f"Host: x\n{lines}"))
            assert client.answer()[0] == expected


def test_connections_are_kept_while_they_are_used_and_closed_when_they_are_not() -> None:
    with running({"tiny": Tiny()}, serve={"keep_alive_seconds": 1}) as server, Raw(server) as raw:
        for value in range(8):
            raw.send("", request(value))
            assert raw.answer()[2]["twice"] == 2 * value
            watch(0.25)
        assert raw.file.read() == b""


def test_answers_leave_nothing_to_the_garbage_collector(tiny: Running) -> None:
    with Raw(tiny) as client:
        for measured in (False, True):
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL if measured else 0)
            for value in range(20):
                client.send("", request(value))
                client.answer()
        gc.collect()
        gc.set_debug(0)
        left = {type(one).__name__ for one in gc.garbage}
        gc.garbage.clear()
    assert not left & {"Exchange", "Group", "Job", "Work", "Batch", "Timing", "Call"}
