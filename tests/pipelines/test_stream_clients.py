"""What the Kafka clients do while a broker is away, without one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.errors import KafkaConnectionError, TopicAuthorizationFailedError
from kafka.net.compat import KafkaNetClient
from kafka.producer.sender import Sender
from kafka.producer.transaction_manager import InitProducerIdHandler, TransactionManager

from plinth.engine import ConfigError
from plinth.pipelines.cli.embedded_broker import free_port
from plinth.pipelines.stream import kafka_clients, kafka_python
from plinth.pipelines.stream.chunks import ChunkSize
from plinth.pipelines.stream.kafka_python import LOOKUP_S, Network
from plinth.pipelines.stream.settings import StreamConfig

CONFIG = StreamConfig(input_topic="in", output_topic="out", connect_timeout_s=30.0)


@pytest.mark.parametrize(("network", "kept"), [(KafkaNetClient, False), (Network, True)])
def test_a_request_whose_coordinator_was_lost_is_sent_again(network: Any, kept: bool) -> None:
    """The client's own network loses it; then a commit never returns."""
    client = network(bootstrap_servers=f"127.0.0.1:{free_port()}", metrics_enabled=False)
    try:
        manager = TransactionManager(transactional_id="t", transaction_timeout_ms=1_000)
        manager.initialize_transactions()
        manager._transaction_coordinator = "bootstrap-0"
        sender = Sender(
            client,
            client.cluster,
            SimpleNamespace(has_incomplete=False),
            transaction_manager=manager,
            request_timeout_ms=500,
        )
        assert sender._maybe_send_pending_request()
        waiting = [type(handler) for _, _, handler in manager._pending_requests]
        assert (InitProducerIdHandler in waiting) is kept
    finally:
        client.poll(timeout_ms=50)  # lets go of the connections that failed
        client.close()


def test_a_coordinator_that_is_named_though_lost_is_not_asked_for_in_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = 100.0, []

    async def ask() -> str:
        asked.append(now)
        return "coordinator-1"

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(kafka_python, "time", SimpleNamespace(monotonic=lambda: now))
    coordinator = SimpleNamespace(
        _send_group_coordinator_request=ask, _net=SimpleNamespace(sleep=sleep)
    )
    kafka_python._pace_lookups(coordinator)
    for _ in range(4):
        assert asyncio.run(coordinator._send_group_coordinator_request()) == "coordinator-1"
    assert asked == pytest.approx([100.0 + n * LOOKUP_S for n in range(4)])


def test_a_broker_that_is_lost_while_a_worker_starts_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, tried = 0.0, 0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def topics(admin: Any, config: StreamConfig) -> dict[str, int]:
        nonlocal tried
        tried += 1
        if tried <= away:
            raise error
        return {"in": 1}

    clock = SimpleNamespace(monotonic=lambda: now, sleep=wait)
    admin = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(kafka_clients, "time", clock)
    monkeypatch.setattr(kafka_clients, "connect", lambda kind, **options: admin)
    monkeypatch.setattr(kafka_clients, "_topics", topics)
    monkeypatch.setattr(kafka_clients, "_warn_of_small", lambda admin, config: None)
    error: Exception = KafkaConnectionError("refused")
    away = 5
    assert kafka_clients.prepare(CONFIG) == {"in": 1}
    away = 10**9
    with pytest.raises(ConfigError, match="no Kafka broker answers"):
        kafka_clients.prepare(CONFIG)
    assert 30 <= now < 40, "as long as connect_timeout_s"
    tried, error = 0, TopicAuthorizationFailedError("in")
    with pytest.raises(ConfigError, match="refuses this client"):
        kafka_clients.prepare(CONFIG)
    assert tried == 1, "what will not change is said at once"


def test_a_chunk_is_half_a_second_of_work_or_as_much_as_a_commit_takes() -> None:
    size = ChunkSize(512)
    assert size.count == 128, "a process that just started is slow"
    for _ in range(5):
        size.took(size.count, 0.05, 0.02)
    assert size.count == 512
    for _ in range(2):
        size.took(size.count, 1.2, 0.02)
    assert size.count == 128
    size.took(size.count, 1.2, 1.5)
    assert size.count == 256, "shorter than a commit would only be more commits"
    for _ in range(9):
        size.took(size.count, 9.0, 0.02)
    assert size.count == ChunkSize.LEAST
    assert ChunkSize(10).count == 10
