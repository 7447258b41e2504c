"""How soon threads give the interpreter up: the shortest that is asked for, and as before after."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import ExitStack

import pytest

from plinth.pipelines.interpreter import (
    BESIDE_S,
    STREAM_THRESHOLDS,
    SWITCH_INTERVAL_S,
    beside_others,
    frozen,
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
