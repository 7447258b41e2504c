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
    "Input records by what became of them: scored, dead_letter, skipped, replayed.",
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
CHUNK_SECONDS = Histogram(
    "plinth_kafka_chunk_seconds",
    "Time to parse, score and encode one chunk of records.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
    registry=REGISTRY,
)
RECOVERIES = Counter(
    "plinth_kafka_recoveries_total",
    "Returns to the committed offsets by cause: assigned, commit_failed, commit_refused, poison.",
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
LOST = Counter(
    "plinth_kafka_lost_records_total",
    "Offsets deleted by retention before this group had read them. Any increase is an alarm.",
    ("topic", "partition"),
    registry=REGISTRY,
)
CUT = Counter(
    "plinth_kafka_cut_records_total",
    "Offsets that this group had answered and that a log which was cut lacks. Any is an alarm.",
    ("topic", "partition"),
    registry=REGISTRY,
)
REBUILD = Gauge(
    "plinth_kafka_rebuild_records",
    "Offsets still to be read again for the state before all partitions of this worker are served.",
    ("topic",),
    registry=REGISTRY,
)
OPEN_TRANSACTION = Gauge(
    "plinth_kafka_open_transaction_records",
    "Offsets that cannot be read because somebody's transaction in the input is still open.",
    ("topic", "partition"),
    registry=REGISTRY,
)
APART = Counter(
    "plinth_kafka_apart_records_total",
    "Records in another partition than what they must meet by the settings. Any is an alarm.",
    ("topic",),
    registry=REGISTRY,
)
STATE_SINCE = Gauge(
    "plinth_kafka_state_since_timestamp_seconds",
    "Time before which records are missing in this worker's state; 0: it has all.",
    ("topic",),
    registry=REGISTRY,
)
GROWN = Gauge(
    "plinth_kafka_partitions_grown_timestamp_seconds",
    "When keys were last seen to move: more partitions, or records apart that must meet; 0: never.",
    ("topic",),
    registry=REGISTRY,
)
DEAD_SHARE = Gauge(
    "plinth_dead_letter_share",
    "Share of dead letters among the latest records of this worker (dead_letter_window).",
    ("topic",),
    registry=REGISTRY,
)
DEAD_ALARM = Gauge(
    "plinth_dead_letter_alarm",
    "1 while the share of dead letters is above dead_letter_alarm_share, else 0.",
    ("topic",),
    registry=REGISTRY,
)
