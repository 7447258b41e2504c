"""A bank's own Kafka and messages: mapped, in Avro, behind TLS and passwords."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka_fixtures import PASSWORD, USER, KafkaNode
from tally import TallyVertical, spends, started_engine

from plinth.engine import ConfigError
from plinth.pipelines.observability.tracing import Tracing
from plinth.pipelines.stream.history.rebuild import newest
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.worker import StreamConfig, StreamSummary, run

pytestmark = [pytest.mark.slow, pytest.mark.kafka]
MAPPING = """
[[message]]
name = "spend"
when = {"type" = "SPEND"}
[message.fields]
id = "payload.number"
card = "payload.card"
amount = {path = "payload.cents", unit = "0.01"}

[[message]]
name = "heartbeat"
when = {"type" = "PING"}
skip = true
"""


def messages(count: int) -> list[tuple[bytes, bytes]]:
    made = []
    for number in range(count):
        spend = {"number": number, "card": f"c{number % 5}", "cents": str(100 + number)}
        made.append((b"k", json.dumps({"type": "SPEND", "payload": spend}).encode()))
    return made


def stream(config: StreamConfig) -> StreamSummary:
    vertical = TallyVertical()
    with started_engine(vertical) as engine:
        return run(vertical, engine, config, threading.Event())


def test_own_messages_are_mapped_skipped_or_dead_letters_as_they_came(
    kafka_node: KafkaNode, tmp_path: Path
) -> None:
    (tmp_path / "ours.toml").write_text(MAPPING)
    odd = [(b"k", b'{"type": "PING"}'), (b"k", b'{"type": "NEW"}'), (b"k", b'{"type": "SPEND"}')]
    config = kafka_node.config(
        partitions=1, max_events=203, mapping=tmp_path / "ours.toml", state_dir=tmp_path / "state"
    )
    kafka_node.fill(config, messages(100) + odd + messages(200)[100:])
    summary = stream(config)
    assert (summary.records, summary.scored, summary.skipped) == (203, 200, 1)
    assert summary.dead_letters == {"unmapped_message": 1, "missing": 1}
    answers = kafka_node.answers(config)
    assert [(a["id"], a["score"]) for a in answers[:2]] == [(0, 2.0), (1, pytest.approx(2.01))]
    assert {a["count"] for a in answers} == set(range(1, 41)), "skipped ones are not counted"
    assert [letter.value for letter in kafka_node.read(config.dead_letters)] == [
        value for _, value in odd[1:]
    ]
    assert [record.value for record in newest(config, 2)] == [v for _, v in messages(200)[198:]]


@pytest.mark.needs("opentelemetry.sdk")
def test_a_records_trace_goes_on_in_its_answer(kafka_node: KafkaNode) -> None:
    """W3C context in a record's header, a span for it, and the span's context with the answer."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    trace, before = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    config = kafka_node.config(partitions=1, max_events=3)
    prepare(config)
    records = [*spends(2), (b"k", b'{"id": 7, "card": "4012888888881881", "amount": -1}')]
    producer = KafkaProducer(bootstrap_servers=kafka_node.servers)
    for number, (key, value) in enumerate(records):
        context = [("traceparent", f"00-{trace}-{before}-01".encode())] if number else []
        producer.send(
            config.input_topic, value, key, [*context, ("tracestate", b"x=4012888888881881")]
        )
    producer.flush(60)
    producer.close()
    spans, vertical = InMemorySpanExporter(), TallyVertical()
    tracing = Tracing(SimpleSpanProcessor(spans))
    with started_engine(vertical) as engine:
        summary = run(vertical, engine, config, threading.Event(), tracing=tracing)
    tracing.close()
    assert (summary.scored, summary.dead_letters) == (2, {"negative": 1})
    told = spans.get_finished_spans()
    first, second, dead = [span for span in told if span.name == f"process {config.input_topic}"]
    assert first.parent is None
    for span in (second, dead):
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, before)
    assert dead.attributes["error.type"] == "negative"
    assert second.attributes["messaging.destination.name"] == config.input_topic
    inside = {span.name for span in told if span.parent == second.context}
    assert inside == {"decode", "queue", "device", "encode"}
    carried = [
        dict(record.headers)["traceparent"] for record in kafka_node.read(config.output_topic)
    ]
    assert carried == [
        f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{int(span.context.trace_flags):02x}".encode()
        for span in (first, second)
    ]
    [letter] = kafka_node.read(config.dead_letters)
    assert dict(letter.headers)["traceparent"] == f"00-{trace}-{before}-01".encode()
    assert "4012888888881881" not in "".join(span.to_json() for span in told)


def unsigned_token(seconds: float) -> str:
    """What a Kafka takes that validates no signature."""
    now = time.time()
    told = {"alg": "none"}, {"sub": USER, "iat": now, "exp": now + seconds}
    parts = [
        base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=") for one in told
    ]
    return ".".join([*parts, ""])


@pytest.mark.parametrize(
    ("mechanism", "client"),
    [
        ("SCRAM-SHA-512", "kafka-python"),
        pytest.param("SCRAM-SHA-256", "kafka-python", marks=pytest.mark.soak),
        ("PLAIN", "kafka-python"),
        ("OAUTHBEARER", "kafka-python"),
        (None, "kafka-python"),
        pytest.param(
            "OAUTHBEARER",
            "confluent",
            marks=[pytest.mark.soak, pytest.mark.needs("confluent_kafka")],
        ),
        pytest.param("SCRAM-SHA-512", "confluent", marks=pytest.mark.needs("confluent_kafka")),
        pytest.param(None, "confluent", marks=pytest.mark.needs("confluent_kafka")),
    ],
)
def test_a_stream_runs_behind_tls_with_a_password_a_token_or_a_certificate(
    kafka_node: KafkaNode,
    mechanism: str | None,
    client: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if not kafka_node.secure:
        pytest.skip("needs openssl for the certificate")
    files = {"ssl_cafile": kafka_node.folder / "certificate.pem"}
    security: dict[str, Any] = {
        "bootstrap_servers": kafka_node.secure,
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": mechanism,
        "sasl_username": USER,
    }
    if mechanism == "OAUTHBEARER":
        files["sasl_token_file"] = tmp_path / "token"
        files["sasl_token_file"].write_text(f"{unsigned_token(60)}\n")
    if mechanism is None:
        files |= {"ssl_certfile": files["ssl_cafile"], "ssl_keyfile": kafka_node.folder / "key.pem"}
        security = {"bootstrap_servers": kafka_node.certified, "security_protocol": "SSL"}
    monkeypatch.setenv("PLINTH_KAFKA_PASSWORD", PASSWORD)
    config = kafka_node.config(max_events=50, client=client)
    spends = [(b"k", json.dumps({"id": n, "card": "c", "amount": 1}).encode()) for n in range(50)]
    kafka_node.fill(config, spends)
    secured = StreamConfig(**config.model_dump() | security | files)
    assert stream(secured).scored == 50
    assert sorted(a["id"] for a in kafka_node.answers(config)) == list(range(50))


def test_a_wrong_password_and_an_unknown_certificate_are_said_at_the_start(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kafka_node.secure:
        pytest.skip("needs openssl for the certificate")
    config = kafka_node.config(
        bootstrap_servers=kafka_node.secure, security_protocol="SASL_SSL", connect_timeout_s=2,
        sasl_mechanism="SCRAM-SHA-512", sasl_username=USER,
    )  # fmt: skip
    trusting = {"ssl_cafile": kafka_node.folder / "certificate.pem"}
    monkeypatch.setenv("PLINTH_KAFKA_PASSWORD", "wrong")
    with pytest.raises(ConfigError, match="user plinth and its password"):
        stream(StreamConfig(**config.model_dump() | trusting))
    monkeypatch.setenv("PLINTH_KAFKA_PASSWORD", PASSWORD)
    with pytest.raises(ConfigError, match=r"certificate .* is not trusted"):
        stream(config)
    plain = {"security_protocol": "PLAINTEXT", "sasl_username": None}
    with pytest.raises(ConfigError, match=r"check stream\.security_protocol"):
        stream(StreamConfig(**config.model_dump() | plain))
