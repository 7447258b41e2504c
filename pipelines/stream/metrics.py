"""Prometheus metrics of the Kafka door, in the engine's registry.

Labels are topics, partitions and short reasons; never keys, ids or contents of records.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from plinth.engine.metrics import REGISTRY

LAG = Gauge(
    "plinth_kafka_lag_records",
    "Records between this worker's position and the end of the partition.",
    ("topic", "partition"),
    registry=REGISTRY,
)
RECORDS = Counter(
    "plinth_kafka_records_total",
    "Input records by what became of them: scored, dead_letter, replayed.",
    ("topic", "outcome"),
    registry=REGISTRY,
)
DEAD_LETTERS = Counter(
    "plinth_dead_letters_total",
    "Records sent to the dead-letter topic by reason.",
    ("topic", "reason"),
    registry=REGISTRY,
)
COMMIT_SECONDS = Histogram(
    "plinth_kafka_commit_seconds",
    "Time of one transaction (or flush and offset commit), from first send to commit.",
    ("guarantee",),
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
    registry=REGISTRY,
)
SCORE_SECONDS = Histogram(
    "plinth_kafka_chunk_seconds",
    "Time to parse, score and encode one chunk of records.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
    registry=REGISTRY,
)
RECOVERIES = Counter(
    "plinth_kafka_recoveries_total",
    "Returns to the committed offsets by cause: assigned, commit_failed, commit_timeout, poison.",
    ("cause",),
    registry=REGISTRY,
)
REFUSED = Counter(
    "plinth_kafka_refused_total",
    "Times the engine refused a chunk's work and it was offered again later.",
    registry=REGISTRY,
)
PARTITIONS = Gauge(
    "plinth_kafka_assigned_partitions",
    "Partitions this worker reads now.",
    registry=REGISTRY,
)
