"""The least a stream can do exactly once: read, copy, commit; nothing of Plinth is in it.

    python benchmarks/bare_stream.py '{"bootstrap_servers": ..., "input_topic": ..., ...}'

What ``stream_throughput.py --only latency`` starts beside the worker, with the worker's settings as
JSON: librdkafka's consumer, two transactional producers in turn, and for each record an answer and
an audit record as long as Plinth's. It ends after ``max_events`` and tells what a worker tells.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

AUDIT_BYTES = 1_000
"""About what an audit record of the fraud vertical holds."""


def chunk_of(consumer: Any, most: int, linger_s: float) -> list[Any]:
    """Up to ``most`` records, or what came within the linger time of the first."""
    found = consumer.consume(1, 0.2)
    until = time.monotonic() + linger_s
    while found and len(found) < most:
        found += consumer.consume(most - len(found), 0.0)
        if (left := until - time.monotonic()) <= 0:
            break
        if (message := consumer.poll(left)) is not None:
            found.append(message)
    return [message for message in found if message.error() is None]


def write(
    producer: Any, chunk: list[Any], offsets: list[Any], consumer: Any, settings: dict[str, Any]
) -> None:
    """One transaction: an answer and an audit record for each record, and the offsets."""
    producer.begin_transaction()
    audit = b"x" * AUDIT_BYTES
    for message in chunk:
        place = message.partition()
        answer = b'{"transaction_id":%s}' % json.dumps(_id_of(message)).encode()
        producer.produce(settings["output_topic"], answer.ljust(300), message.key(), place)
        if settings.get("audit_topic"):
            producer.produce(settings["audit_topic"], audit, None, place)
    producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 30)
    producer.commit_transaction(30)


def _id_of(message: Any) -> str:
    found: str = json.loads(message.value())["transaction_id"]
    return found


def main() -> None:
    """Copy until ``max_events``; print the account as JSON."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    servers = {"bootstrap.servers": settings["bootstrap_servers"]}
    consumer = Consumer(servers | {
        "group.id": settings["group"], "auto.offset.reset": "earliest",
        "enable.auto.commit": False, "isolation.level": "read_committed",
        "fetch.queue.backoff.ms": 10,
    })  # fmt: skip
    consumer.subscribe([settings["input_topic"]])
    producers = [
        Producer(servers | {
            "transactional.id": f"bare-{settings['group']}-{slot}", "retry.backoff.ms": 5,
            "retry.backoff.max.ms": 50, "compression.type": settings["compression"],
        })
        for slot in range(2)
    ]  # fmt: skip
    for producer in producers:
        producer.init_transactions(30)
    times: list[float] = []
    ends: dict[int, int] = {}
    done = turn = 0
    writing: threading.Thread | None = None
    cpu = time.process_time()
    began = 0.0

    def timed(producer: Any, chunk: list[Any], offsets: list[Any]) -> None:
        started = time.perf_counter()
        write(producer, chunk, offsets, consumer, settings)
        times.append(time.perf_counter() - started)

    while done < settings["max_events"]:
        chunk = chunk_of(consumer, settings["max_records"], settings["linger_ms"] / 1e3)
        if not chunk:
            continue
        began = began or time.perf_counter()
        ends |= {message.partition(): message.offset() + 1 for message in chunk}
        offsets = [TopicPartition(settings["input_topic"], p, at) for p, at in ends.items()]
        if writing is not None:
            writing.join()
        writing = threading.Thread(target=timed, args=(producers[turn], chunk, offsets))
        writing.start()
        turn = 1 - turn
        done += len(chunk)
    if writing is not None:
        writing.join()
    consumer.close()
    cuts = statistics.quantiles(times, n=100)
    print(json.dumps({
        "records": done, "transactions": len(times), "cpu_seconds": time.process_time() - cpu,
        "records_per_second": done / (time.perf_counter() - began),
        "commit_ms_p50": cuts[49] * 1e3, "commit_ms_p99": cuts[98] * 1e3,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
