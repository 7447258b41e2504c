"""Dead letters: the original record with headers that say where it came from and why.

Header names follow Spring Kafka (``kafka_dlt-*``) where it has one, so that existing tools read
them, and ``plinth_*`` for the rest. All values are text.
"""

from __future__ import annotations

from plinth.engine import InputError
from plinth.pipelines.stream.loop import Record

MAX_TEXT = 500
MAX_OWN_HEADERS = 16_384
ATTEMPT = "plinth_attempt"
REASON = "plinth_error-reason"
TRUNCATED = "plinth_truncated-from-bytes"
OURS = ("kafka_dlt-", "plinth_")
Headers = list[tuple[str, bytes]]


def headers(record: Record, error: InputError, *, group: str, vertical: str, app: str) -> Headers:
    """Headers of the dead letter: the record's own, then origin and cause.

    Args:
        record: the original record.
        error: why it has no answer.
        group: the consumer group that read it.
        vertical: the vertical that refused it.
        app: version of Plinth.
    """
    origin = {
        "kafka_dlt-original-topic": record.topic,
        "kafka_dlt-original-partition": record.partition,
        "kafka_dlt-original-offset": record.offset,
        "kafka_dlt-original-timestamp": record.timestamp,
        "kafka_dlt-original-consumer-group": group,
        "kafka_dlt-exception-fqcn": f"{type(error).__module__}.{type(error).__qualname__}",
        "kafka_dlt-exception-message": str(error)[:MAX_TEXT],
        REASON: error.reason,
        "plinth_error-field": error.field or "",
        ATTEMPT: attempt(record) + 1,
        "plinth_vertical": vertical,
        "plinth_version": app,
    }
    return own(record) + [(name, str(value).encode()) for name, value in origin.items()]


def own(record: Record) -> Headers:
    """The record's own headers, without those of an earlier dead letter; none if they are huge."""
    kept = [(name, value or b"") for name, value in record.headers if not name.startswith(OURS)]
    size = sum(len(name) + len(value) for name, value in kept)
    return kept if size <= MAX_OWN_HEADERS else []


def attempt(record: Record) -> int:
    """How often the record was a dead letter before."""
    text = dict(record.headers).get(ATTEMPT) or b"0"
    return int(text) if text.isdigit() and len(text) < 10 else 0


def payload(record: Record, limit: int) -> tuple[bytes | None, Headers]:
    """The original bytes, and a header with the full size when they had to be cut to ``limit``."""
    value = record.value
    if value is None or len(value) <= limit:
        return value, []
    return value[:limit], [(TRUNCATED, str(len(value)).encode())]
