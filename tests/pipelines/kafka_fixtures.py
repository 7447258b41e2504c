"""Fixtures of a real Apache Kafka: found by KAFKA_HOME or beside the repository, else skipped."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from kafka_node import PASSWORD, USER, Kafka, KafkaNode, find_home

__all__ = [
    "CLIENTS_OF_KAFKA",
    "PASSWORD",
    "USER",
    "Kafka",
    "KafkaNode",
    "clients_end",
    "eventually",
    "kafka_node",
    "own_node",
    "spare_node",
]
os.environ.setdefault("KAFKA_JVM_PERFORMANCE_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
"""A broker of a minute: it starts in half the time where Java compiles once, without profiles."""
CLIENTS_OF_KAFKA = (
    "kafka-python",
    pytest.param("confluent", marks=[pytest.mark.needs("confluent_kafka"), pytest.mark.soak]),
)
"""For tests of what a client does; the others run with kafka-python."""
CLIENTS = re.compile("kafka-io-|-network-thread|^plinth-(commit|metadata|stream)")


def required_home() -> Path:
    """The Kafka to use; skips the test when there is none, or fails it where one is required."""
    try:
        return find_home()
    except FileNotFoundError as error:
        if os.environ.get("PLINTH_REQUIRE_KAFKA") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kafka_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """A node shared by the tests that leave it alive."""
    secure = shutil.which("openssl") is not None
    node = KafkaNode(required_home(), tmp_path_factory.mktemp("kafka"), secure=secure)
    yield node
    node.kill()


@pytest.fixture(scope="session")
def spare_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """The node behind ``own_node``."""
    node = KafkaNode(required_home(), tmp_path_factory.mktemp("spare-kafka"))
    yield node
    node.kill()


@pytest.fixture
def own_node(spare_node: KafkaNode) -> KafkaNode:
    """A running node for a test that kills or freezes it, in whatever state that leaves it."""
    spare_node.revive()
    return spare_node


@pytest.fixture(autouse=True)
def clients_end() -> Iterator[None]:
    """No Kafka client outlives the test that made it, nor its stream."""
    before = set(threading.enumerate())
    yield
    left: list[str] = []

    def none() -> bool:
        left[:] = [t.name for t in set(threading.enumerate()) - before if CLIENTS.search(t.name)]
        return not left

    try:
        eventually(none, 60, "every Kafka client ended")
    except AssertionError as error:
        error.add_note(f"left: {', '.join(left)}")
        raise


def eventually(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``check()``; fail with ``what`` after ``seconds``."""
    pause = threading.Event()
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        pause.wait(0.02)
