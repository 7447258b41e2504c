"""Files in memory, page by page as they are read, and given back to the system when told to.

A page of a mapped file that nobody has written to is *clean*: the system may drop it at any time,
and it comes again from the file when it is next read. :func:`give_back` drops such pages at once,
so that weights in a file take memory only while something computes with them.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plinth.engine.errors import ModelError

_PAGE = mmap.PAGESIZE
_DIRTY = np.uint64(1 << 63 | 1 << 62)  # present or swapped ...
_OF_FILE = np.uint64(1 << 61)  # ... and not of the file any more: proc(5), pagemap
_POPULATE_READ = 22  # madvise(2), Linux 5.14
_SCAN = 0xC0606610  # PAGEMAP_SCAN of linux/fs.h, Linux 6.7; its argument is twelve numbers
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4


@cache
def _madvise() -> Callable[[int, int, int], int]:
    """madvise(2) that lets other threads run: mmap's own method holds the interpreter's lock."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = function
    return found


def trim() -> None:
    """Give freed memory back to the system, so that it does not hide growth.

    What glibc holds of the process, and the buffers that MKL keeps for this thread until it ends,
    a dozen megabytes after some convolutions (``mkl_thread_free_buffers`` of its manual).
    """
    with suppress(OSError, AttributeError):
        free_buffers()()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def free_buffers() -> Callable[[], None]:
    """What frees the buffers of this thread in the MKL that torch was built with.

    Raises:
        OSError, AttributeError: it was built with another library.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    found: Callable[[], None] = ctypes.CDLL(str(library)).mkl_serv_thread_free_buffers
    return found


def zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """An array of zeros that takes memory page by page where other numbers are written.

    Those of NumPy ask the system for pages of 2 MB, which one number fills.

    Args:
        shape: with at least one element.

    Returns:
        uint8 of the shape.
    """
    place = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(place, np.uint8).reshape(shape)


class Mapping(mmap.mmap):
    """A file in memory; writing to it changes the memory of this process alone.

    Made by :func:`map_file`.
    """

    path: Path
    address: int
    facts: tuple[int, int, int]

    def holds(self, address: int) -> bool:
        """Whether an address lies in it; none does in one that was closed."""
        try:
            return self.address <= address < self.address + len(self)
        except ValueError:
            return False

    def check(self) -> None:
        """Whether the file is as it was when it was mapped.

        One that was removed, or that another was renamed over, lives on under this mapping alone.

        Raises:
            ModelError: somebody wrote into it or shortened it; names it.
        """
        try:
            now = _facts(self.path.stat())
        except OSError:
            return
        if now[0] == self.facts[0] and now != self.facts:
            raise ModelError(
                f"{self.path} was written to while its weights are served",
                hint="never write into a version of a store: save a new one, or rename over it",
            )


_LOCK = threading.Lock()
_MAPPINGS: dict[int, weakref.ref[Mapping]] = {}


def _facts(found: os.stat_result) -> tuple[int, int, int]:
    """What a file that nobody wrote into keeps."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def map_file(path: Path) -> Mapping:
    """Map a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        found = Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
        found.facts = _facts(os.fstat(file.fileno()))
    found.path = path
    found.address = np.frombuffer(found, np.uint8).ctypes.data
    with _LOCK:
        for known in [key for key, ref in _MAPPINGS.items() if ref() is None]:
            del _MAPPINGS[known]
        _MAPPINGS[found.address] = weakref.ref(found)
    return found


def mappings(tensors: Iterable[Tensor]) -> set[Mapping]:
    """The files that some tensors lie in."""
    return {place for tensor in tensors if (place := _mapping(tensor)) is not None}


def _mapping(tensor: Tensor) -> Mapping | None:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    at = tensor.data_ptr()
    with _LOCK:
        living = [found for ref in _MAPPINGS.values() if (found := ref()) is not None]
    return next((found for found in living if found.holds(at)), None)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file."""
    return _mapping(tensor) is not None


class Pages:
    """The whole pages that tensors take in mapped files.

    Args:
        tensors: those that lie in no file are passed over.

    Attributes:
        bytes: how many there are.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans: dict[Mapping, list[tuple[int, int]]] = {}
        for tensor in tensors:
            found = _mapping(tensor)
            if found is not None and tensor.is_contiguous():
                start = tensor.data_ptr() - found.address
                spans.setdefault(found, []).append((start, start + tensor.nbytes))
        self._spans = {found: list(_whole(each)) for found, each in spans.items()}
        self.bytes = sum(b - a for each in self._spans.values() for a, b in each)

    def __deepcopy__(self, memo: dict[int, object]) -> Pages:
        return self  # of the same file, whoever asks

    def give_back(self) -> int:
        """Drop the pages that are clean; they come again from the file when they are next read.

        A stretch in which anybody wrote to a page stays as it is.

        Returns:
            Bytes of the stretches that were dropped.
        """
        dropped = 0
        for found, spans in self._spans.items():
            for start, stop in spans:
                if _is_clean(found.address + start, stop - start):
                    found.madvise(mmap.MADV_DONTNEED, start, stop - start)
                    dropped += stop - start
        return dropped

    def read_ahead(self) -> None:
        """Bring the pages in with one call of the system, where it has such a call."""
        for found, spans in self._spans.items():
            for start, stop in spans:
                _madvise()(found.address + start, stop - start, _POPULATE_READ)

    def check(self) -> None:
        """See :meth:`Mapping.check`, for all files."""
        for found in self._spans:
            found.check()


def forget(tensor: Tensor) -> None:
    """Drop the pages of a file that a tensor was read from and that nobody wrote to.

    Whatever mapped the file; memory that is of no file stays as it is. The pages come again from
    the file when they are next read.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - start
    if size > 0 and _is_clean(start, size):
        with suppress(OSError, AttributeError):
            _madvise()(start, size, mmap.MADV_DONTNEED)


def _whole(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Whole pages within spans; those that touch one another become one."""
    joined: list[list[int]] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] < 64:  # the alignment of packed files
            joined[-1][1] = max(stop, joined[-1][1])
        else:
            joined.append([start, stop])
    for start, stop in joined:
        first, last = -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE
        if first < last:
            yield first, last


def _is_clean(address: int, size: int) -> bool:
    """Whether all pages are still those of the file; False where the system does not say."""
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return False
    try:
        return _own_pages(pagemap, address, size) == 0
    except OSError:  # an older system
        return _has_no_own_flag(pagemap, address, size)
    finally:
        os.close(pagemap)


def _has_no_own_flag(pagemap: int, address: int, size: int) -> bool:
    try:
        data = os.pread(pagemap, size // _PAGE * 8, address // _PAGE * 8)
    except OSError:
        return False
    flags = np.frombuffer(data, np.uint64)
    own = (flags & _DIRTY != 0) & (flags & _OF_FILE == 0)
    return len(flags) == size // _PAGE and not own.any()


def _own_pages(pagemap: int, address: int, size: int) -> int:
    """0, or 1 where a page is this process's own; a tenth of the time of reading all flags.

    Raises:
        OSError: the system has no such call.
    """
    found = (ctypes.c_uint64 * 3)()
    wanted = (
        _IS_FILE,
        _IS_FILE,
        _IS_PRESENT | _IS_SWAPPED,
        _IS_PRESENT,
    )  # not of a file, but there
    place = ctypes.addressof(found)
    scan = struct.pack("=12Q", 96, 0, address, address + size, 0, place, 1, 1, *wanted)
    return int(fcntl.ioctl(pagemap, _SCAN, bytearray(scan)))
