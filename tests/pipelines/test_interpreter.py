"""How soon threads give the interpreter up: the shortest that is asked for, and as before after."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest

from plinth.pipelines.interpreter import (
    BESIDE_S,
    STREAM_THRESHOLDS,
    SWITCH_INTERVAL_S,
    beside_others,
    frozen,
    one_heap,
    set_for_serving,
)


def test_the_shortest_interval_holds_whoever_ends_first() -> None:
    before = sys.getswitchinterval()
    with ExitStack() as loading:
        loading.enter_context(beside_others())
        serving = ExitStack()
        serving.enter_context(set_for_serving())
        assert sys.getswitchinterval() == pytest.approx(BESIDE_S)
        loading.close()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
        serving.close()
    assert sys.getswitchinterval() == pytest.approx(before)


def test_a_stream_looks_for_old_garbage_next_to_never_and_others_as_before() -> None:
    before = gc.get_threshold()
    with set_for_serving(STREAM_THRESHOLDS):
        assert gc.get_threshold() == STREAM_THRESHOLDS
    assert gc.get_threshold() == before


def test_what_lives_is_frozen_and_new_garbage_is_still_found() -> None:
    class Loop:
        def __init__(self) -> None:
            self.me = self

    old = Loop()
    with frozen():
        assert gc.get_freeze_count() > 0
        assert not any(one is old for one in gc.get_objects())
        found = weakref.ref(Loop())
        gc.collect()
        assert found() is None
    assert gc.get_freeze_count() == 0


HEAPS = """
import ctypes, sys, threading
import plinth.pipelines.interpreter as interpreter

if sys.argv[1] == "one":
    interpreter.one_heap()
here = threading.Barrier(3)
held = []

def allocate():
    here.wait(10)
    held.append([bytes(n) for n in range(1000, 2000)])

threads = [threading.Thread(target=allocate) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
c = ctypes.CDLL(None)
c.fopen.restype = ctypes.c_void_p
stream = c.fopen(sys.argv[2].encode(), b"w")
assert c.malloc_info(0, ctypes.c_void_p(stream)) == 0
c.fclose(ctypes.c_void_p(stream))
"""


def test_threads_allocate_from_one_heap(tmp_path: Path) -> None:
    def heaps(word: str) -> int:
        told = tmp_path / word
        subprocess.run([sys.executable, "-c", HEAPS, word, str(told)], check=True, timeout=60)
        return told.read_text().count("<heap nr=")

    assert heaps("one") == 1 < heaps("each")


def test_where_the_c_library_has_no_heaps_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    one_heap()
