"""Batches of records as kafka-python reads them, bounded, and one bad record at a time.

By itself it unpacks whatever a batch holds (1 MiB of zstd may hold 32 GiB), and never gets past a
record with a header whose name is not UTF-8, which other clients read.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from kafka import codec
from kafka.errors import CorruptRecordError, KafkaError
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint

MAX_UNPACKED = 128 << 20
"""Bytes of one batch, unpacked: a hundred times what topics take of packed ones by default."""
UNREAD = "plinth_unread"
"""Header of a record that was not unpacked; its value says why."""
_XERIAL_HEAD = 16


class _TooLarge(Exception):
    """More than :data:`MAX_UNPACKED` bytes."""


class Batch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch whose records are all given, those that cannot be read without key and value."""

    _buffer: bytearray
    _pos: int
    _decompressed: bool
    _unread = False

    def _maybe_uncompress(self) -> None:
        if self._decompressed:
            return
        if kind := self.compression_type:
            self._assert_has_codec(kind)
            try:
                unpacked = unpack(kind, bytes(memoryview(self._buffer)[self._pos :]))
            except _TooLarge:
                self._unread, unpacked = True, b""
            except KafkaError:
                raise
            except Exception as error:  # noqa: BLE001 - each library has errors of its own
                raise CorruptRecordError(
                    f"the batch at offset {self.base_offset} cannot be unpacked: "
                    f"{type(error).__name__}"
                ) from None
            self._buffer, self._pos = bytearray(unpacked), 0
        self._decompressed = True

    def _read_msg(self) -> Any:
        if self._unread:
            return self._without_content()
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            self._mend_names()
            return super()._read_msg()

    def _without_content(self) -> DefaultRecord:
        """A record in the place of one that was not unpacked."""
        last = self._next_record_index == self._num_records - 1
        offset = self.last_offset if last else self.base_offset + self._next_record_index
        why = b"its batch has more than %d MiB, unpacked" % (MAX_UNPACKED >> 20)
        return DefaultRecord(
            *(0, offset, self.max_timestamp, self.timestamp_type, None, None, [(UNREAD, why)])
        )

    def _mend_names(self) -> None:
        """Put ``?`` for each byte that is not ASCII into the header names of the next record."""
        buffer, at = self._buffer, self._pos
        for _ in range(4):  # size, attributes, time, offset
            _, at = decode_varint(buffer, at)
        for _ in range(2):  # key, value
            size, at = decode_varint(buffer, at)
            at += max(0, size)
        count, at = decode_varint(buffer, at)
        for _ in range(count):
            size, at = decode_varint(buffer, at)
            buffer[at : at + size] = buffer[at : at + size].decode("ascii", "replace").replace(
                "\ufffd", "?"
            ).encode()  # fmt: skip
            size, at = decode_varint(buffer, at + size)
            at += max(0, size)


def unpack(kind: int, packed: bytes) -> bytes:
    """What a batch holds.

    Args:
        kind: of compression, as Kafka numbers them: 1 gzip, 2 snappy, 3 lz4, 4 zstd.
        packed: of the batch, behind its head.

    Raises:
        _TooLarge: more than is read; what the library raises where it is damaged.
    """
    readers: dict[int, Callable[[bytes], bytes]] = {1: _gzip, 2: _snappy, 3: _lz4, 4: _zstd}
    unpacked = readers[kind](packed)
    if len(unpacked) > MAX_UNPACKED:
        raise _TooLarge
    return unpacked


def _gzip(packed: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
        return file.read(MAX_UNPACKED + 1)


def _zstd(packed: bytes) -> bytes:
    reader = codec.zstd.ZstdDecompressor().stream_reader(
        io.BytesIO(packed), read_across_frames=True
    )
    with reader:
        found: bytes = reader.read(MAX_UNPACKED + 1)
    return found


def _lz4(packed: bytes) -> bytes:
    from lz4.frame import LZ4FrameDecompressor

    reader = LZ4FrameDecompressor()
    found: bytes = reader.decompress(packed, max_length=MAX_UNPACKED + 1)
    if not reader.eof and len(found) <= MAX_UNPACKED:
        raise EOFError
    return found


def _snappy(packed: bytes) -> bytes:
    """Snappy says how long a block is before it is unpacked."""
    if not codec._detect_xerial_stream(packed):
        return _snappy_block(packed, MAX_UNPACKED)
    parts, left, at = [], MAX_UNPACKED, _XERIAL_HEAD
    while at < len(packed):
        (size,) = struct.unpack_from("!i", packed, at)
        if size < 0:
            raise zlib.error("a block of less than no bytes")
        parts.append(_snappy_block(packed[at + 4 : at + 4 + size], left))
        left -= len(parts[-1])
        at += 4 + size
    return b"".join(parts)


def _snappy_block(packed: bytes, most: int) -> bytes:
    size = shift = 0
    for byte in packed[:5]:
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if size > most:
        raise _TooLarge
    found: bytes = codec.snappy.decompress(packed)
    return found


def read_bounded() -> None:
    """Have every consumer of kafka-python in this process read batches as :class:`Batch`."""
    memory_records.DefaultRecordBatch = Batch
