"""Another version of the model takes over a real stream, and is taken back, while it runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka_fixtures import KafkaNode, eventually

from plinth.engine.metrics import REGISTRY
from plinth.pipelines.assembly import running, sla_of
from plinth.pipelines.cli.main import main
from plinth.pipelines.config.settings import Config
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.settings import StreamConfig
from plinth.pipelines.stream.worker import StreamSummary, run
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.succession.champion import Champion
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json
from plinth.verticals.testing.flows import drive

sys.path.insert(0, str(Path(__file__).parents[1] / "verticals" / "finance"))
from stores import add_version

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
ROUND = 100


def shadowed() -> float:
    name, labels = "plinth_finance_challenger_payments_total", {"outcome": "scored"}
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Streaming:
    """A stream in a thread, payments that are sent a hundred at a time, and their answers."""

    def __init__(self, node: KafkaNode, config: StreamConfig, vertical: FraudScoring) -> None:
        self.vertical, self.config = vertical, config
        table = simulate(Population(customers=200, terminals=100, days=365, radius=30), seed=2)
        self._payments = transactions_json(table)
        self.sent: list[bytes] = []
        self.answers: list[dict[str, Any]] = []
        self.summary: list[StreamSummary] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream")
        self._producer = KafkaProducer(bootstrap_servers=node.servers)
        self._reader = KafkaConsumer(
            bootstrap_servers=node.servers,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        self._reader.assign([TopicPartition(config.output_topic, 0)])
        self._thread.start()

    def _run(self) -> None:
        settings = Config.model_validate({"engine": {"backend": "eager", "precision": "fp32"}})
        with running(settings, {"finance": self.vertical}, follow=True) as engine:
            sla = sla_of(self.vertical, settings)
            self.summary.append(run(self.vertical, engine, self.config, self._stop, sla=sla))

    def round(self) -> str:
        """Send a hundred payments and await their answers; the version of the last."""
        for _ in range(ROUND):
            self.sent.append(next(self._payments))
            self._producer.send(self.config.input_topic, self.sent[-1], b"one")
        self._producer.flush(60)

        def came() -> bool:
            polled = self._reader.poll(100)
            self.answers += [json.loads(one.value) for part in polled.values() for one in part]
            return len(self.answers) >= len(self.sent)

        eventually(came, 60, "every payment was answered")
        return str(self.answers[-1]["model_version"])

    def until(self, version: str) -> None:
        """Go on until this version answers under the usual name."""

        def there() -> bool:
            serving = self.vertical.versions.serving
            return self.round() == version and serving.name == "fraud"

        eventually(there, 90, f"{version} answers")

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._producer.close()
        self._reader.close()


@contextlib.contextmanager
def streaming(node: KafkaNode, vertical: FraudScoring) -> Iterator[Streaming]:
    config = node.config(idle_exit_s=None, max_records=64)
    for topic in (config.input_topic, config.output_topic):
        node.create(topic, partitions=1)
    prepare(config)
    made = Streaming(node, config, vertical)
    try:
        yield made
    finally:
        made.end()


@torch.inference_mode()
def scores(store: Path, version: str, raws: Sequence[bytes]) -> list[float | None]:
    """Of a version that was alone from the first payment on."""
    settings = FraudSettings(store=store, model_version=version, max_ahead_seconds=None)
    vertical = FraudScoring(settings)
    models = {model.spec.name: model.module for model in vertical.models()}
    found: list[Any] = []
    for start in range(0, len(raws), 256):
        read = [vertical.parse(raw) for raw in raws[start : start + 256]]
        found += drive(vertical.infer(read), lambda call: models[call.model](call.rows))
    return [one.score for one in found]


def test_no_payment_is_lost_and_each_decision_names_the_version_that_made_it(
    kafka_node: KafkaNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(tmp_path, "1.0.0")
    add_version(tmp_path, "2.0.0", shift=1.0)
    Champion(tmp_path).promote("1.0.0", by="training", champion=None)
    (tmp_path / "plinth.toml").write_text(f'[verticals.finance]\nstore = "{tmp_path}"\n')
    told = ["--config", str(tmp_path / "plinth.toml")]
    before = shadowed()
    vertical = FraudScoring(
        FraudSettings(store=tmp_path, challenger="newest", max_ahead_seconds=None)
    )
    with streaming(kafka_node, vertical) as stream:
        assert stream.round() == "1.0.0"
        eventually(lambda: bool(stream.round()) and shadowed() > before, 60, "a challenger scores")
        for words, version in ((["promote", "2.0.0"], "2.0.0"), (["rollback"], "1.0.0")):
            with pytest.raises(SystemExit) as ended:
                main(["finance", *words, *told])
            assert ended.value.code == 0
            stream.until(version)
    assert [one["transaction_id"] for one in stream.answers] == [
        json.loads(raw)["transaction_id"] for raw in stream.sent
    ], "each payment once, in order"
    assert stream.summary[0].dead_letters == {}
    by = {version: scores(tmp_path, version, stream.sent) for version in ("1.0.0", "2.0.0")}
    versions = [one["model_version"] for one in stream.answers]
    changes = [(a, b) for a, b in itertools.pairwise(versions) if a != b]
    assert changes == [("1.0.0", "2.0.0"), ("2.0.0", "1.0.0")]
    own = [by[version][place] for place, version in enumerate(versions)]
    assert [one["score"] for one in stream.answers] == pytest.approx(own, abs=1e-6)
    assert "2.0.0 -> 1.0.0" in capsys.readouterr().err


def test_the_report_says_what_is_not_fulfilled_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(tmp_path, "1.0.0")
    (tmp_path / "plinth.toml").write_text(f'[verticals.finance]\nstore = "{tmp_path}"\n')
    words = ["finance", "compare", "--json", "--config", str(tmp_path / "plinth.toml")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "no challenger has scored anything yet" in capsys.readouterr().err
    report = {"champion": "1.0.0", "challenger": "2.0.0", "figures": {"frauds": 1.0}}
    for rule, unmet, code in (({}, ["frauds: 1"], 1), ({}, [], 0), (None, [], 1)):
        (tmp_path / "fraud" / "challenger.json").write_text(
            json.dumps({**report, "rule": rule, "unmet": unmet})
        )
        for more in ([], ["--json"]):
            with pytest.raises(SystemExit) as ended:
                main([*words[:2], *words[3:], *more])
            assert ended.value.code == code
