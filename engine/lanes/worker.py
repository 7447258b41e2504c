"""A worker process of the pool in ``compute_pool``, and how values travel to it and back.

Run by its path, it has the standard library alone: a step's own modules, torch among them, are
imported when the first step that needs them comes.

A value crosses as one message on a socket pair: a short head, and descriptors of memory without a
name (``memfd_create(2)``, elsewhere a file that is already unlinked) which hold the pickle and,
behind it, the bytes of large arrays. Memory without a name is freed by the kernel with its last
holder, so that no end of either process leaves anything in ``/dev/shm``, whose size bounds nothing
here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

STEP, TAKEN, DONE = b"s", b"t", b"d"
"""Kinds of messages: a step to run; it arrived; what it came to."""

READY, UNIT, LOAD, FORGET, REPLY, LOGGED, ENDED = b"r", b"u", b"l", b"f", b"a", b"g", b"e"
"""Messages of a lane: it serves; a unit; a recipe; a model's name; an answer; a log record; why it
ends."""
NEED, PIECE = b"n", b"p"
"""And on the way to another machine: files of a model; a piece of one."""

Outcome = tuple[Any, BaseException | None, str, list[tuple[str, int, str]]]
"""The value; or the exception and where it was raised; and what was logged meanwhile."""

_HEAD = struct.Struct("<cQB")  # kind, bytes of the first segment, number of segments
_TABLE = struct.Struct("<QQ")  # bytes of the pickle, number of buffers
_ENTRY = struct.Struct("<QQQB")  # segment, offset, bytes, read-only
_APART = 16 << 10
"""Bytes from which an array is not part of the pickle."""
_ALIGN = 64
_MAX_LOGGED = 1000


class Segment(mmap.mmap):
    """Memory that came from another process, for as long as an array lies in it."""

    descriptor = -1
    address = 0

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


_segments: WeakSet[Segment] = WeakSet()
"""What this process received and kept the descriptors of: sent on, it is not copied again."""


def send(sock: socket.socket, kind: bytes, value: Any, *, alone: bool = False) -> None:
    """Send a value; arrays and tensors keep dtype, shape, order and bits.

    Args:
        sock: where to.
        kind: of message.
        value: what.
        alone: in one piece of memory, with nothing that lies elsewhere.

    Raises:
        OSError: the other end is gone, or there is no memory.
        Exception: whatever pickling raises.
    """
    layout = _Layout(value, alone)
    descriptor = _memory(layout.size)
    try:
        layout.fill(memoryview(mmap.mmap(descriptor, layout.size)))
        descriptors = [descriptor, *(other.descriptor for other in layout.others)]
        socket.send_fds(sock, [_HEAD.pack(kind, layout.size, len(descriptors))], descriptors)
    finally:
        os.close(descriptor)


def pass_on(sock: socket.socket, kind: bytes, packed: Any) -> None:
    """Send what was packed elsewhere.

    Args:
        sock: where to.
        kind: of message.
        packed: bytes, or what has them in one piece.
    """
    view = memoryview(packed).cast("B")
    descriptor = _memory(len(view))
    try:
        _copy(memoryview(mmap.mmap(descriptor, len(view))), view)
        socket.send_fds(sock, [_HEAD.pack(kind, len(view), 1)], [descriptor])
    finally:
        os.close(descriptor)


def pack(value: Any) -> mmap.mmap:
    """A value in one piece, as :func:`send` would send it.

    Raises:
        Exception: whatever pickling raises.
    """
    layout = _Layout(value, alone=True)
    memory = mmap.mmap(-1, layout.size)
    layout.fill(memoryview(memory))
    return memory


def unpack(packed: Any) -> Any:
    """The value in a copy of what :func:`pack` made, which the value may change."""
    view = memoryview(packed).cast("B")
    memory = mmap.mmap(-1, len(view))
    _copy(memoryview(memory), view)
    return _read([memory])


class _Layout:
    """Where each part of a value lies in the memory that carries it.

    Args:
        value: what.
        alone: nothing of it lies in memory that came from another process.

    Attributes:
        size: bytes of the memory.
        others: segments that hold the rest.
    """

    def __init__(self, value: Any, alone: bool) -> None:
        self._views: list[memoryview] = []
        out = io.BytesIO()
        _Pickler(out, protocol=5, buffer_callback=self._apart).dump(value)
        self._data = out.getbuffer()
        known = [None if alone else _known(view) for view in self._views]
        self.others = list(dict.fromkeys(found[0] for found in known if found is not None))[:200]
        end = _TABLE.size + len(self._views) * _ENTRY.size
        self._table: list[tuple[int, int, int, bool]] = []
        self._begin = end
        end += len(self._data)
        for view, found in zip(self._views, known, strict=True):
            if found is not None and found[0] in self.others:
                entry = (self.others.index(found[0]) + 1, found[1])
            else:
                offset = -(-end // _ALIGN) * _ALIGN
                entry, end = (0, offset), offset + view.nbytes
            self._table.append((*entry, view.nbytes, view.readonly))
        self.size = end

    def _apart(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _APART:
            return True
        self._views.append(view)
        return False

    def fill(self, memory: memoryview) -> None:
        """Write it there."""
        begin, data, table = self._begin, self._data, self._table
        head = [_TABLE.pack(len(data), len(table)), *(_ENTRY.pack(*entry) for entry in table)]
        memory[:begin] = b"".join(head)
        memory[begin : begin + len(data)] = data
        for view, (number, offset, size, _) in zip(self._views, table, strict=True):
            if number == 0:
                _copy(memory[offset : offset + size], view)


def receive(sock: socket.socket, *, keep: bool) -> tuple[bytes, Callable[[], Any]] | None:
    """The next message: its kind, and what reads its value; ``None`` at the end of the other end.

    Args:
        sock: where from.
        keep: the arrays share memory with whoever gets them sent on; otherwise a change stays here.

    Raises:
        TimeoutError: nothing came within the socket's timeout.
    """
    message = receive_packed(sock, keep=keep)
    if message is None:
        return None
    kind, mapped = message

    def read() -> Any:
        segments = mapped()
        return _read(segments) if segments else None

    return kind, read


def receive_packed(
    sock: socket.socket, *, keep: bool
) -> tuple[bytes, Callable[[], list[Segment]]] | None:
    """The next message as it came: its kind, and what maps its memory; see :func:`receive`.

    Raises:
        TimeoutError: nothing came within the socket's timeout.
    """
    data, descriptors = b"", []
    while len(data) < _HEAD.size:
        part, fds, _, _ = socket.recv_fds(sock, _HEAD.size - len(data), 256)
        descriptors += fds
        if not part:
            return None
        data += part
    kind, size, count = _HEAD.unpack(data)
    if len(descriptors) != count:
        raise OSError(f"{len(descriptors)} of {count} descriptors of a message came")

    def mapped() -> list[Segment]:
        return [_mapped(fd, size if n == 0 else 0, keep) for n, fd in enumerate(descriptors)]

    return kind, mapped


def tell(sock: socket.socket, kind: bytes) -> None:
    """Send a message without a value."""
    sock.sendall(_HEAD.pack(kind, 0, 0))


def _read(segments: Sequence[mmap.mmap]) -> Any:
    first = memoryview(segments[0])
    size, count = _TABLE.unpack_from(first, 0)
    buffers = []
    for n in range(count):
        number, offset, length, fixed = _ENTRY.unpack_from(first, _TABLE.size + n * _ENTRY.size)
        view = memoryview(segments[number])[offset : offset + length]
        buffers.append(view.toreadonly() if fixed else view)
    begin = _TABLE.size + count * _ENTRY.size
    return pickle.loads(first[begin : begin + size], buffers=buffers)  # noqa: S301 - own process


def _mapped(descriptor: int, size: int, keep: bool) -> Segment:
    access = mmap.ACCESS_WRITE if keep else mmap.ACCESS_COPY
    segment = Segment(descriptor, size, access=access)
    if keep:
        segment.descriptor = descriptor
        segment.address = _address(memoryview(segment))
        _segments.add(segment)
    else:
        os.close(descriptor)
    return segment


def _memory(size: int) -> int:
    """A descriptor of memory without a name; its pages are there, or this raises."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("plinth", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            os.close(descriptor)
            raise
    return descriptor


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; NumPy lets other threads run meanwhile."""
    numpy = _imported("numpy")
    if numpy is None:
        target[:] = source
    else:
        numpy.copyto(numpy.frombuffer(target, "u1"), numpy.frombuffer(source, "u1"))


def _imported(name: str) -> Any:
    """A module that is imported whole; another thread may be in the middle of it."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def _address(view: memoryview) -> int:
    return int(sys.modules["numpy"].frombuffer(view, "u1").ctypes.data)


def _known(view: memoryview) -> tuple[Segment, int] | None:
    """The segment in which these bytes lie already, and where."""
    if not _segments:
        return None
    address = _address(view)
    for segment in list(_segments):
        offset = address - segment.address
        if offset >= 0 and offset + view.nbytes <= len(segment):
            return segment, offset
    return None


class _Pickler(pickle.Pickler):
    """Carries tensors as arrays, and arrays of any order of axes outside of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        """See :class:`pickle.Pickler`."""
        torch, numpy = _imported("torch"), _imported("numpy")
        if torch is not None and type(value) is torch.Tensor and not value.requires_grad:
            with contextlib.suppress(TypeError, RuntimeError):  # a dtype or layout NumPy lacks
                array = value.numpy()
                if array.flags.writeable and array.dtype.isnative:
                    return torch.from_numpy, (array,)
        elif numpy is not None and type(value) is numpy.ndarray and _scattered(value):
            axes = sorted(range(value.ndim), key=lambda axis: -abs(value.strides[axis]))
            packed = numpy.ascontiguousarray(value.transpose(axes))
            return numpy.transpose, (packed, [axes.index(axis) for axis in range(value.ndim)])
        return NotImplemented


def _scattered(array: Any) -> bool:
    """Whether the pickle of an array would hold a copy of it."""
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    return not contiguous and not array.dtype.hasobject


# -- the process -------------------------------------------------------------------------------
def main(descriptor: int, parent: int, level: int, niceness: int) -> None:
    """Run steps until the process at the other end ends.

    Args:
        descriptor: of our end of the socket pair.
        parent: process that started this one.
        level: of log records that it wants to have.
        niceness: how far others go first where the machine is short of CPU.
    """
    begin(parent, niceness)
    records = _Records()
    logging.getLogger().addHandler(records)
    logging.getLogger().setLevel(level)
    sock = socket.socket(fileno=descriptor)
    while (message := receive(sock, keep=False)) is not None:
        kind, read = message
        tell(sock, TAKEN)
        if kind != STEP:
            sys.path[:] = read()
            continue
        outcome = _run(read, records)
        del message, read
        try:
            send(sock, DONE, outcome)
        except Exception as error:  # noqa: BLE001 - a result that cannot be pickled
            kept = TypeError(f"its result cannot be sent: {type(error).__name__}")
            send(sock, DONE, (None, kept, _frames(error), outcome[3]))
        del outcome


def _run(read: Callable[[], Any], records: _Records) -> Outcome:
    """Run one step; an exception that cannot be pickled is told by the name of its type."""
    try:
        function, arguments = read()
        value, error, frames = function(*arguments), None, ""
    except BaseException as raised:  # noqa: BLE001 - it is raised again where the flow is
        frames = _frames(raised)
        raised = raised.with_traceback(None)
        raised.__cause__ = raised.__context__ = None
        value, error = None, raised
        try:
            pickle.loads(pickle.dumps(raised))  # noqa: S301 - our own
        except Exception:  # noqa: BLE001 - whatever its type's own code raises
            error = RuntimeError(f"it raised {type(raised).__name__}, which cannot be sent")
    return value, error, frames, records.take()


def _frames(error: BaseException) -> str:
    """Where an exception was raised, without its text, which may hold what belongs to a patient."""
    frames = traceback.extract_tb(error.__traceback__)
    return "".join(traceback.format_list(frames))


class _Records(logging.Handler):
    """What steps log, for the log of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        if len(self._kept) < _MAX_LOGGED:
            self._kept.append((record.name, record.levelno, self.format(record)))

    def take(self) -> list[tuple[str, int, str]]:
        """What came since the last time."""
        kept, self._kept = self._kept, []
        return kept


def begin(parent: int, niceness: int) -> None:
    """Be a process that only its parent ends: the first thing that one does.

    Args:
        parent: process that started this one.
        niceness: how far others go first where the machine is short of CPU.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent says when work is over
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what a step prints is no answer of the command
    end_with(parent)
    yield_to_others(niceness)


def end_with(parent: int) -> None:
    """Let the kernel end this process with the thread that started it, SIGKILL included.

    Elsewhere than on Linux the end of the socket ends it once its step is over.
    """
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)


def call_itself(name: str) -> None:
    """Let lists of processes show this one by a name of up to 15 characters, on Linux."""
    _prctl(15, name.encode())  # PR_SET_NAME


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(option, value)


def yield_to_others(niceness: int) -> None:
    """Let others go first where the machine is short of CPU, and last where of memory.

    A crash leaves no core file either, which would hold what the step was given.
    """
    with contextlib.suppress(OSError):
        os.nice(niceness)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # proc(5)
    with contextlib.suppress(ImportError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
