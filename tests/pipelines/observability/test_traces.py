"""Spans of requests and records, as a real collector gets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from otlp import Collector, about, collector
from serving import Running, running, until
from tensor_rows import ROWS
from tiny_verticals import Shelf, Tiny, install

from plinth.engine import ConfigError
from plinth.pipelines.cli.main import main
from plinth.pipelines.observability.tracing import PARTS, tracing_from

pytestmark = pytest.mark.needs("opentelemetry.sdk", "opentelemetry.exporter")
ROUTE = "/v1/tiny/double"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
CARD = "4012888888881881"


@pytest.fixture(scope="module")
def told() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(told: Collector) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", told.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with running({"tiny": Tiny(), "shelf": Shelf()}, serve={"grpc": {"port": 0}}) as found:
            yield found


def of_client(told: Collector, name: str, trace: str = TRACE) -> Any:
    """The newest span of this name in the client's trace."""
    found: list[Any] = []

    def came() -> bool:
        found[:] = [one for one in told.named(name) if one.trace_id.hex() == trace]
        return bool(found)

    until(came)
    return found[-1]


def check_parts(told: Collector, span: Any, answer_ms: float) -> None:
    """What is inside a request's span lies inside its time, one after the other."""
    until(lambda: told.inside(span).keys() >= set(PARTS))
    parts = [told.inside(span)[name] for name in PARTS]
    ends = span.start_time_unix_nano
    for part in parts:
        assert part.trace_id == span.trace_id
        assert ends <= part.start_time_unix_nano <= part.end_time_unix_nano
        ends = part.end_time_unix_nano
    assert ends <= span.end_time_unix_nano
    took = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
    assert took >= answer_ms - 0.01


def test_a_request_goes_on_in_its_clients_trace(server: Running, told: Collector) -> None:
    answer = server.post(ROUTE, json={"id": "a", "value": 2}, headers={"traceparent": PARENT})
    span = of_client(told, f"POST {ROUTE}")
    assert span.parent_span_id.hex() == SPAN
    assert about(span) == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "plinth.models": "twice=3",
        "plinth.batch_rows": 1,
    }
    check_parts(told, span, json.loads(answer.headers["x-plinth-timing"])["total_ms"])
    assert told.services == {"plinth"}


@pytest.mark.parametrize(
    ("body", "status", "failed"),
    [
        ([{"id": "a", "value": 1}, {"id": "b"}], 200, False),
        ({"id": "a"}, 422, False),
        ({"id": "a", "value": 666}, 500, True),
    ],
    ids=["a list", "a mistake", "a fault"],
)
def test_each_end_of_a_request_is_told(
    server: Running, told: Collector, body: Any, status: int, failed: bool
) -> None:
    trace = f"{status:032x}"
    parent = f"00-{trace}-{SPAN}-01"
    assert server.post(ROUTE, json=body, headers={"traceparent": parent}).status_code == status
    span = of_client(told, f"POST {ROUTE}", trace)
    assert about(span)["http.response.status_code"] == status
    assert (span.status.code == 2) is failed


def test_tensors_over_both_doors(server: Running, told: Collector) -> None:
    import tritonclient.grpc as kind

    server.post("/v2/models/twice/infer", json={"inputs": [ROWS]}, headers={"traceparent": PARENT})
    rest = of_client(told, "POST /v2/models/{model}/infer")
    check_parts(told, rest, 0.0)
    rows = kind.InferInput("rows", [1, 1], "FP32")
    rows.set_data_from_numpy(np.full((1, 1), 3.0, "f4"))
    client = kind.InferenceServerClient(server.server.grpc_address)
    client.infer("twice", [rows], headers={"traceparent": PARENT})
    with pytest.raises(kind.InferenceServerException):
        client.infer(CARD, [rows], headers={"traceparent": PARENT}, request_id=CARD)
    client.close()
    method = "inference.GRPCInferenceService/ModelInfer"
    until(lambda: len(told.named(method)) == 2)
    good, bad = told.named(method)
    assert about(good)["rpc.grpc.status_code"] == 0
    assert about(bad)["rpc.grpc.status_code"] == 5
    assert good.parent_span_id.hex() == bad.parent_span_id.hex() == SPAN
    check_parts(told, good, 0.0)


def test_nothing_that_was_sent_is_in_a_span(server: Running, told: Collector) -> None:
    trace = "c" * 32
    headers = {
        "traceparent": f"00-{trace}-{SPAN}-01",
        "tracestate": f"x={CARD}",
        "baggage": f"card={CARD}",
        "x-api-key": CARD,
    }
    server.post(ROUTE, json={"id": CARD, "value": 2}, headers=headers)
    server.post(ROUTE, json={CARD: CARD}, headers=headers)
    server.client.get(f"/v1/{CARD}/{CARD}?card={CARD}", headers=headers)
    server.client.request("DELETE", f"/v1/tiny/{CARD}", headers=headers)
    server.post(ROUTE, json={"id": "a", "value": 1}, headers={"traceparent": CARD})
    until(lambda: len([s for s in told.spans if s.trace_id.hex() == trace and s.kind == 2]) == 4)
    until(lambda: any(not span.parent_span_id for span in told.spans))  # the one without a context
    assert CARD.encode() not in told.raw


def test_a_trace_that_its_client_does_not_keep_is_not_kept(
    server: Running, told: Collector
) -> None:
    left, kept = "d" * 32, "e" * 32
    for trace, flag in ((left, "00"), (kept, "01")):
        parent = {"traceparent": f"00-{trace}-{SPAN}-{flag}"}
        server.post(ROUTE, json={"id": "a", "value": 2}, headers=parent)
    of_client(told, f"POST {ROUTE}", kept)
    assert left not in {span.trace_id.hex() for span in told.spans}


# -- items of uploads and batches ------------------------------------------------------------------
def check_items(told: Collector, outer: Any, failed: str) -> None:
    """One item went well and shows where its time went; one could not be read, and says so."""
    until(lambda: len([s for s in told.spans if s.parent_span_id == outer.span_id]) >= 2)
    inner = [one for one in told.spans if one.parent_span_id == outer.span_id]
    bad, good = sorted(
        (one for one in inner if one.name == "item shelf"),
        key=lambda one: "error.type" not in about(one),
    )
    assert about(good) == {
        "plinth.vertical": "shelf",
        "plinth.models": "page=3",
        "plinth.batch_rows": 1,
    }
    check_parts(told, good, 0.0)
    assert about(bad) == {
        "plinth.vertical": "shelf",
        "plinth.step": "load",
        "error.type": failed,
    }
    assert bad.status.code != 2, "who sent it is at fault"
    for one in inner:
        assert outer.start_time_unix_nano <= one.start_time_unix_nano
        assert one.end_time_unix_nano <= outer.end_time_unix_nano


def test_a_studys_work_goes_on_in_the_trace_of_its_upload(server: Running, told: Collector) -> None:
    trace = "a" * 32
    headers = {"traceparent": f"00-{trace}-{SPAN}-01"}
    files = [("file", (f"{name}.txt", text)) for name, text in (("a", "2"), (CARD, "bad"))]
    job = server.post("/v1/shelf/read?wait=true", files=files, headers=headers).json()
    span = of_client(told, "job shelf", trace)
    posted = of_client(told, "POST /v1/shelf/read", trace)
    assert posted.parent_span_id.hex() == SPAN
    assert span.parent_span_id == posted.span_id
    assert about(span) == {"plinth.vertical": "shelf", "plinth.items": 2, "plinth.failed": 1}
    check_items(told, span, "invalid_input")
    queue = told.inside(span)["queue"]
    assert queue.start_time_unix_nano == span.start_time_unix_nano
    assert CARD.encode() not in told.raw
    retried = {"traceparent": f"00-{'b' * 32}-{SPAN}-01"}
    assert server.post(f"{job['url']}/retry", headers=retried).status_code == 202
    again = of_client(told, "job shelf", "b" * 32)
    assert [s.name for s in told.spans if s.parent_span_id == again.span_id].count(
        "item shelf"
    ) == 1, "what is done is not done again"


def test_each_item_of_a_batch_is_told_in_the_trace_of_who_began_it(
    told: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, folder = "9" * 32, tmp_path / "in"
    folder.mkdir()
    for name, text in (("a", "2"), (CARD, "bad")):
        (folder / f"{name}.txt").write_text(text)
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": told.url,
        "TRACEPARENT": f"00-{trace}-{SPAN}-01",
        "PLINTH_ENGINE__BACKEND": "eager",
        "PLINTH_ENGINE__PRECISION": "fp32",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="1"):
        main(["batch", "shelf", str(folder), "--out", str(tmp_path / "out")])
    span = of_client(told, "batch shelf", trace)
    assert span.parent_span_id.hex() == SPAN
    assert span.status.code != 2
    check_items(told, span, "invalid_input")


# -- settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    ],
)
def test_without_a_word_there_is_no_tracing(environ: dict[str, str]) -> None:
    assert tracing_from(environ) is None


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "use otlp, console or none"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
            "use http/protobuf or grpc",
        ),
    ],
)
def test_what_there_is_not_is_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tracing_from(environ)


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"plinth-engine\[otel\]"):
        tracing_from({"OTEL_TRACES_EXPORTER": "otlp"})
