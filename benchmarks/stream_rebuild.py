"""What it costs to make a state from the log again: seconds and CPU of 100,000 payments.

    python benchmarks/stream_rebuild.py [--records 100000] [--partitions 4] [--runs 3] [--json]

Payments are written to a real Kafka (KAFKA_HOME, else ../shared/kafka), and the group's offsets are
those of their ends, so that a worker of finance without a state reads all of them again before it
answers. Told are the time from the first to the last of them, the CPU of the worker's process, and
of its thread alone, which decodes, parses and observes.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from kafka import KafkaConsumer, TopicPartition  # noqa: E402
from kafka.structs import OffsetAndMetadata  # noqa: E402
from kafka_node import KafkaNode, find_home  # noqa: E402
from stream_chaos import payment  # noqa: E402

from plinth.engine import Engine  # noqa: E402
from plinth.pipelines.stream.settings import StreamConfig  # noqa: E402
from plinth.pipelines.stream.worker import run  # noqa: E402
from plinth.verticals.finance import FraudScoring  # noqa: E402

UNIT = 100_000


class Timed(FraudScoring):
    """Notes when it was told of records of the past first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, float, float]] = []

    def observe(self, requests: Sequence[Any]) -> None:
        """Take records in, and note the time."""
        if not self.times:
            self._tick()
        super().observe(requests)
        self._tick()

    def _tick(self) -> None:
        self.times.append((time.monotonic(), time.process_time(), time.thread_time()))


def answered(config: StreamConfig) -> None:
    """Have the group's offsets at the ends of the input."""
    with contextlib.closing(
        KafkaConsumer(bootstrap_servers=config.bootstrap_servers, group_id=config.group)
    ) as consumer:
        numbers = consumer.partitions_for_topic(config.input_topic)
        places = [TopicPartition(config.input_topic, number) for number in numbers]
        consumer.assign(places)
        ends = consumer.end_offsets(places)
        consumer.commit({place: OffsetAndMetadata(at, "", -1) for place, at in ends.items()})


def rebuilt(config: StreamConfig) -> dict[str, float]:
    """Figures of one worker that begins without a state."""
    vertical = Timed()
    with Engine() as engine:
        for model in vertical.models():
            engine.add(model, sla=vertical.sla)
        summary = run(vertical, engine, config, threading.Event())
    names = "seconds", "cpu seconds of the process", "cpu seconds of its thread"
    spans = zip(vertical.times[0], vertical.times[-1], strict=True)
    return {
        f"{name} per {UNIT:,}": (end - begin) / summary.replayed * UNIT
        for name, (begin, end) in zip(names, spans, strict=True)
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--records", type=int, default=UNIT)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        node = KafkaNode(find_home(), Path(name))
        try:
            config = node.config(partitions=given.partitions, idle_exit_s=0.2)
            node.fill(config, (payment(n, alert=False) for n in range(given.records)))
            answered(config)
            runs = [rebuilt(config) for _ in range(given.runs)]
        finally:
            node.kill()
    figures = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
    if given.json:
        print_json(figures)
    else:
        for name, value in figures.items():
            print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
