"""Fixtures of a real Apache Kafka: found by KAFKA_HOME or beside the repository, else skipped."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from kafka_node import KafkaNode, find_home

__all__ = ["KafkaNode", "eventually", "kafka_node", "own_node", "spare_node"]


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
    node = KafkaNode(required_home(), tmp_path_factory.mktemp("kafka"))
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


def eventually(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until ``check()``; fail with ``what`` after ``seconds``."""
    pause = threading.Event()
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        pause.wait(0.02)
