"""Batches that would fill the memory, or stop every reader, and what is read of them."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from kafka import codec
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatchBuilder

from plinth.pipelines.stream import kafka_consumer
from plinth.pipelines.stream.kafka_consumer import OFTEN, Unreadable
from plinth.pipelines.stream.wire import batches
from plinth.pipelines.stream.wire.batches import UNREAD, Batch

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}


class _Name(str):
    """A header name as a client in another language may write it."""

    def encode(self, *_: str) -> bytes:
        return b"q\xff\xfe"


def batch(kind: int, *values: bytes, name: str = "h") -> bytes:
    """A batch of records with a key and a header each."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=kind, is_transactional=False, producer_id=-1,
        producer_epoch=-1, base_sequence=-1, batch_size=1 << 24,
    )  # fmt: skip
    for offset, value in enumerate(values):
        builder.append(offset, 1000 + offset, b"k", value, [(name, b"v")])
    return bytes(builder.build())


@pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)
def test_every_codec_reads_what_was_written(kind: int) -> None:
    read = list(Batch(batch(kind, b"one", b"two" * 50_000)))
    assert [(r.offset, r.key, r.value, r.headers) for r in read] == [
        (0, b"k", b"one", [("h", b"v")]),
        (1, b"k", b"two" * 50_000, [("h", b"v")]),
    ]


@pytest.mark.parametrize("kind", list(CODECS.values())[1:], ids=list(CODECS)[1:])
def test_a_batch_that_unpacks_to_more_than_is_read_costs_its_own_records_alone(
    kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_UNPACKED", 100_000)
    read = list(Batch(batch(kind, b"0" * 60_000, b"1" * 60_000)))
    assert [(r.offset, r.key, r.value) for r in read] == [(0, None, None), (1, None, None)]
    assert all(r.headers[0][0] == UNREAD for r in read)
    assert len(list(Batch(batch(kind, b"0" * 60_000)))) == 1


def test_snappy_without_blocks_is_bounded_too() -> None:
    assert batches.unpack(2, codec.snappy.compress(b"x" * 1000)) == b"x" * 1000
    huge = b"\xff\xff\xff\xff\x0f" + b"\x00"
    with pytest.raises(batches._TooLarge):
        batches.unpack(2, huge)


@pytest.mark.parametrize("kind", [0, 4])
def test_a_header_name_that_is_not_utf8_is_read_with_question_marks(kind: int) -> None:
    read = list(Batch(batch(kind, b"one", b"two", name=_Name("q"))))
    assert [(r.value, r.headers) for r in read] == [
        (b"one", [("q??", b"v")]),
        (b"two", [("q??", b"v")]),
    ]


@pytest.mark.parametrize("kind", list(CODECS.values())[1:], ids=list(CODECS)[1:])
def test_what_cannot_be_unpacked_is_named_by_its_offset(kind: int) -> None:
    raw = bytearray(batch(kind, b"one" * 1000))
    struct.pack_into(">q", raw, 0, 77)
    raw[70:] = b"\x01" * len(raw[70:])
    with pytest.raises(CorruptRecordError, match="the batch at offset 77 cannot be unpacked"):
        list(Batch(raw))


def test_reading_is_broken_when_one_error_stays() -> None:
    found = Unreadable()
    assert not found.lasting(0.0)
    for _ in range(OFTEN - 1):
        found = found.again("at offset 5")
        assert not found.lasting(0.0)
    assert found.again("at offset 5").lasting(0.0)
    assert not found.again("at offset 5").lasting(60.0)
    assert not found.again("at offset 6").lasting(0.0)


def test_an_error_that_does_not_come_back_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three alike within weeks ended a worker that had read on all the while."""
    found = Unreadable()
    for at in (0.0, 1.0, 2.0):
        monkeypatch.setattr(kafka_consumer, "time", SimpleNamespace(monotonic=lambda at=at: at))
        found = found.again("at offset 5")
    monkeypatch.setattr(kafka_consumer, "time", SimpleNamespace(monotonic=lambda: 90_000.0))
    assert not found.lasting(30.0)
    assert found.again("at offset 5").times == 1
