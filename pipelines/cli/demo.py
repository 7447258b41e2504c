"""``plinth demo``: payments through a real Kafka protocol, then a CT study from a folder.

Nothing needs to be installed or running: the broker is embedded, data and models come with the
repository. Everything started here has ended when :func:`run` returns.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from rich.live import Live
from rich.table import Table

from plinth.engine import ConfigError
from plinth.pipelines.assembly import load_vertical, running, sample_data, sla_of
from plinth.pipelines.cli.embedded_broker import SESSION_TIMEOUT_MS, EmbeddedBroker
from plinth.pipelines.cli.runs import BatchView
from plinth.pipelines.config.settings import Config
from plinth.pipelines.console import FAILED, OK, err, say, show_table
from plinth.pipelines.folders.batch import Batch, Summary
from plinth.pipelines.process import Signals
from plinth.pipelines.stream import worker as stream
from plinth.verticals import registry

INPUT, OUTPUT, PARTITIONS = "transactions", "decisions", 4
STREAM_SECONDS = 90.0
"""Longest the stream part may take before it is called failed."""
ID, KEY, DECISION, REASONS = "transaction_id", "card", "decision", "reason_codes"


@dataclass(slots=True)
class Board:
    """What the demo knows so far; written by one thread per field, read by the view."""

    events: int = 0
    sent: int = 0
    answered: int = 0
    dead: int = 0
    started: float = 0.0
    ended: float = 0.0
    milliseconds: deque[float] = field(default_factory=lambda: deque(maxlen=50_000))
    decisions: Counter[str] = field(default_factory=Counter)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    def percentile(self, share: float) -> float:
        """Milliseconds from send to a visible answer below which ``share`` of answers lie."""
        times = sorted(self.milliseconds.copy())
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    @property
    def rate(self) -> float:
        """Answers per second since the first event was sent."""
        spent = (self.ended or time.perf_counter()) - self.started
        return self.answered / spent if self.started and spent > 0 else 0.0

    @property
    def complete(self) -> bool:
        """Whether every event has been answered or set aside."""
        return self.answered + self.dead >= self.events

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value of each line of the view."""
        yield "sent", f"{self.sent:,} of {self.events:,}"
        yield "answered", f"{self.answered:,} ({self.dead:,} dead letters)"
        yield "rate", f"{self.rate:,.0f} /s"
        yield (
            "latency",
            f"p50 {self.percentile(0.5):.1f} ms, p99 {self.percentile(0.99):.1f} ms "
            "(send to visible answer)",
        )
        yield "decisions", ", ".join(f"{k} {v:,}" for k, v in self.decisions.most_common())
        yield "last reasons", "\n".join(self.last)


def transactions(folder: Path, count: int) -> list[bytes]:
    """The first ``count`` sample transactions, one JSON object each; at most as many as there are.

    Raises:
        ConfigError: the file is not there.
    """
    file = folder / "transactions" / "transactions.jsonl.gz"
    if not file.is_file():
        raise ConfigError(f"there is no {file}", hint="python sample_data/make_transactions.py")
    with gzip.open(file, "rb") as lines:
        return [line.strip() for line in islice(lines, count)]


def run(out: Path, events: int, rate: float) -> int:
    """Run the demonstration.

    Args:
        out: folder for the results of the CT part.
        events: transactions to stream.
        rate: transactions a second.

    Returns:
        Exit code: 0, 1 when a part failed, 130 after Ctrl-C.
    """
    logging.getLogger("kafka").setLevel(logging.ERROR)
    data = sample_data()
    began = time.perf_counter()
    stop = threading.Event()
    closing = contextlib.ExitStack()

    def end() -> None:
        stop.set()
        closing.close()

    signals = Signals(end)
    board, summary = Board(), None
    with signals.handled():
        say("1/2 payments: embedded Kafka broker, fraud scoring, decisions with reasons")
        board = stream_payments(transactions(data, events), rate, stop)
        if not stop.is_set():
            say("\n2/2 medical: one CT study from a folder to report, segmentation, pictures")
            summary = analyse_study(data / "ct_phantom", out, stop, closing)
    if signals.exit_code is not None:
        say("stopped; nothing is left running")
        return signals.exit_code
    _show_end(board, summary, out, time.perf_counter() - began)
    good = board.complete and summary is not None and summary.exit_code == OK
    return OK if good else FAILED


def stream_payments(records: list[bytes], rate: float, stop: threading.Event) -> Board:
    """Produce, score and read back; returns what was seen.

    Args:
        records: JSON transactions, in event-time order.
        rate: events a second.
        stop: ends it early.
    """
    board = Board(events=len(records))
    # The sample payments have dates of their own, which need not lie in the past of this clock.
    vertical = registry.load("finance", {"max_ahead_seconds": None})
    done, ready = threading.Event(), threading.Event()
    with (
        EmbeddedBroker() as broker,
        running(Config(), {"finance": vertical}) as engine,
        contextlib.ExitStack() as stack,
    ):
        config = stream.StreamConfig(
            bootstrap_servers=broker.bootstrap_servers,
            input_topic=INPUT,
            output_topic=OUTPUT,
            create_topics=True,
            partitions=PARTITIONS,
            replication_factor=1,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            linger_ms=5.0,
        )
        sent: dict[str, float] = {}

        def progress(now: stream.StreamProgress) -> None:
            board.dead = now.dead_letters
            if now.partitions == PARTITIONS:
                ready.set()

        def score() -> None:
            stream.run(vertical, engine, config, done, progress)

        scoring = Task("score", score)
        stack.callback(_end_all, done, [scoring])
        others = [
            Task("produce", lambda: _produce(config, records, rate, ready, done, board, sent)),
            Task("consume", lambda: _consume(config, ready, done, board, sent)),
        ]
        stack.callback(_end_all, done, others)
        with PaymentView(board) as view:
            until = time.monotonic() + STREAM_SECONDS
            while not (board.complete or stop.is_set()) and time.monotonic() < until:
                for task in (scoring, *others):
                    task.check()
                stop.wait(0.25)
                view.refresh()
        board.ended = time.perf_counter()
    return board


class Task(threading.Thread):
    """A started thread that keeps its error for :meth:`check`."""

    def __init__(self, name: str, work: Any) -> None:
        super().__init__(name=f"plinth-demo-{name}", daemon=True)
        self._work = work
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Do the work."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - raised again by check() in the main thread
            self._error = error

    def check(self) -> None:
        """Raise what the work raised, if it did."""
        if self._error is not None:
            raise self._error


def _end_all(done: threading.Event, tasks: list[Task]) -> None:
    done.set()
    for task in tasks:
        task.join(15.0)


def _produce(
    config: stream.StreamConfig,
    records: list[bytes],
    rate: float,
    ready: threading.Event,
    done: threading.Event,
    board: Board,
    sent: dict[str, float],
) -> None:
    from kafka import KafkaProducer

    while not ready.wait(0.2):
        if done.is_set():
            return
    producer = KafkaProducer(bootstrap_servers=config.bootstrap_servers, linger_ms=2)
    board.started = begin = time.perf_counter()
    try:
        for number, record in enumerate(records):
            ahead = begin + number / rate - time.perf_counter()
            if ahead > 0.005 and done.wait(ahead):
                return
            fields = orjson.loads(record)
            sent[str(fields[ID])] = time.perf_counter()
            producer.send(config.input_topic, record, key=str(fields[KEY]).encode())
            board.sent = number + 1
        producer.flush(10)
    finally:
        producer.close(5)


def _consume(
    config: stream.StreamConfig,
    ready: threading.Event,
    done: threading.Event,
    board: Board,
    sent: dict[str, float],
) -> None:
    from kafka import KafkaConsumer, TopicPartition

    while not ready.wait(0.2):
        if done.is_set():
            return
    consumer = KafkaConsumer(
        bootstrap_servers=config.bootstrap_servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        fetch_max_wait_ms=50,
    )
    try:
        consumer.assign([TopicPartition(config.output_topic, n) for n in range(PARTITIONS)])
        while not done.is_set():
            for records in consumer.poll(timeout_ms=100).values():
                for record in records:
                    _note(board, sent, orjson.loads(record.value))
    finally:
        consumer.close()


def _note(board: Board, sent: dict[str, float], answer: dict[str, Any]) -> None:
    at = sent.pop(str(answer[ID]), None)
    if at is not None:
        board.milliseconds.append((time.perf_counter() - at) * 1e3)
    decision = str(answer[DECISION])
    board.decisions[decision] += 1
    if answer.get(REASONS):
        board.last.append(f"{decision}: {', '.join(reason['text'] for reason in answer[REASONS])}")
    board.answered += 1


class PaymentView:
    """A live table on a terminal, a line every few seconds elsewhere; on stderr."""

    EVERY = 3.0

    def __init__(self, board: Board) -> None:
        self._board = board
        self._live = Live(console=err, auto_refresh=False, transient=False)
        self._said = time.monotonic()

    def __enter__(self) -> PaymentView:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if err.is_terminal:
            self.refresh()
            self._live.stop()

    def refresh(self) -> None:
        """Show the board as it is now."""
        if err.is_terminal:
            table = Table(show_header=False, show_edge=False)
            for row in self._board.rows():
                table.add_row(*row)
            self._live.update(table, refresh=True)
        elif time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            say("  " + "; ".join(f"{k}: {v}" for k, v in list(self._board.rows())[:4]))


def analyse_study(
    folder: Path, out: Path, stop: threading.Event, closing: contextlib.ExitStack
) -> Summary:
    """The batch door on one study; every run starts afresh.

    Args:
        folder: the sample study.
        out: where results go.
        stop: told to end.
        closing: gets what ends it at once.
    """
    # The sample is a phantom, which is what the nodule network was trained on.
    config = Config.model_validate({"verticals": {"medical": {"nodules": True}}})
    vertical = load_vertical(config, "medical")
    with running(Config(), {"medical": vertical}) as engine, BatchView() as view:
        batch = Batch(
            vertical,
            engine,
            folder,
            out,
            sla=sla_of(vertical, Config()),
            resume=False,
            on_progress=view.show,
        )
        closing.callback(engine.close, drain=False)
        closing.callback(batch.stop)
        if stop.is_set():  # it came before there was anything to close
            batch.stop()
        summary = batch.run()
        closing.pop_all()
    return summary


def _show_end(board: Board, summary: Summary | None, out: Path, seconds: float) -> None:
    show_table("Payments", ("", ""), [row for row in board.rows() if row[1]])
    if summary is not None:
        rows = [
            (name, summary.states[entry.id], str(out / entry.id / name))
            for entry in summary.entries.values()
            if entry.id in summary.states
            for name in entry.files
        ]
        show_table("CT study", ("file", "state", "path"), rows)
        for entry in summary.failed:
            say(f"failed: {entry.id}: {(entry.error or {}).get('message')}")
    say(f"done in {seconds:.0f} s; try: plinth serve, then open http://127.0.0.1:8000/docs")
