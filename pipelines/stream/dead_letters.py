"""Dead letters: the original record with headers that say where it came from and why.

Header names follow Spring Kafka (``kafka_dlt-*``) where it has one, so that existing tools read
them, and ``plinth_*`` for the rest. All values are text.
"""

from __future__ import annotations

import logging
from collections import deque

from plinth.engine import InputError
from plinth.pipelines.stream.chunks import Record, StreamError
from plinth.pipelines.stream.metrics import DEAD_ALARM, DEAD_SHARE
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

MAX_TEXT = 500
MAX_OWN_HEADERS = 16_384
MAX_KEY = 32_768
BESIDE = 40_000
"""Bytes of key and headers for which topics have room beside ``max_record_bytes``: with its default
and what brokers take by default, 1,048,588, that leaves 8 KB for the frame of a batch."""
FRAME = 6
"""Bytes of a header beside its name and value, at most, where these are below 1 MB."""
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
    return kept if size_of(kept) <= MAX_OWN_HEADERS else []


def size_of(some: Headers) -> int:
    """Bytes that headers take in a message, at most."""
    return sum(len(name.encode()) + len(value) + FRAME for name, value in some)


def attempt(record: Record) -> int:
    """How often the record was a dead letter before."""
    text = dict(record.headers).get(ATTEMPT) or b"0"
    return int(text) if text.isdigit() and len(text) < 10 else 0


def payload(record: Record, limit: int, beside: int = 0) -> tuple[bytes | None, Headers]:
    """The original bytes, and a header with the full size when they had to be cut.

    Args:
        record: the original record.
        limit: ``max_record_bytes``.
        beside: bytes of key and headers; where these have more than :data:`BESIDE`, the value has
            less, so that a topic that takes answers takes every dead letter.
    """
    value = record.value
    limit -= max(0, beside - BESIDE)
    if value is None or len(value) <= limit:
        return value, []
    return value[: max(0, limit)], [(TRUNCATED, str(len(value)).encode())]


class DeadLetterShare:
    """The share of dead letters among the latest records, with an alarm and, if asked, an end.

    Args:
        config: window and thresholds.
    """

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.alarm = False
        self._latest: deque[tuple[int, int]] = deque()
        self._records = self._dead = 0

    def take(self, records: int, dead: int) -> None:
        """Count a chunk before it is committed.

        Nothing is judged before a tenth of the window has been seen.

        Raises:
            StreamError: the share is above ``dead_letter_stop_share``.
        """
        config, topic = self.config, self.config.input_topic
        self._latest.append((records, dead))
        self._records += records
        self._dead += dead
        while self._records - self._latest[0][0] >= config.dead_letter_window:
            old, old_dead = self._latest.popleft()
            self._records -= old
            self._dead -= old_dead
        if not self._records or (not dead and not self._dead and not self.alarm):
            return
        share = self._dead / self._records
        DEAD_SHARE.labels(topic).set(share)
        if self._records < config.dead_letter_window // 10:
            return
        self._sound(share > config.dead_letter_alarm_share, share)
        if config.dead_letter_stop_share is not None and share > config.dead_letter_stop_share:
            raise StreamError(
                f"{share:.0%} of the latest {self._records} records of {topic} have no answer, "
                f"above stream.dead_letter_stop_share = {config.dead_letter_stop_share:g}",
                hint="the latest dead letters say why (plinth_error-reason); the chunk in hand "
                "was not committed and will be read again",
            )

    def _sound(self, alarm: bool, share: float) -> None:
        topic = self.config.input_topic
        if alarm and not self.alarm:
            log.error(
                "%.0f %% of the latest %d records of %s are dead letters; their headers say why",
                share * 100, self._records, topic,
            )  # fmt: skip
        elif self.alarm and not alarm:
            log.warning("dead letters of %s are down to %.1f %%", topic, share * 100)
        self.alarm = alarm
        DEAD_ALARM.labels(topic).set(alarm)
