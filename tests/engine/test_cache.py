"""The cache folder: what was used longest ago leaves, what is in use stays, two may be at it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from plinth.engine import ConfigError, cache

pytestmark = pytest.mark.cpu

MB = 1_000_000
OLD = 7200.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_looked", [float("-inf")])
    return tmp_path


def put(path: Path, megabytes: int, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(MB * megabytes))
    aged(path, age)
    return path


def aged(path: Path, age: float) -> None:
    at = time.time() - age
    os.utime(path, (at, at))


def test_who_was_used_longest_ago_leaves_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = put(folder / "openvino" / "cpu" / "a.blob", 2, OLD + 90)
    pair = [put(folder / "quantised" / f"q.{end}", 1, OLD + 80) for end in ("xml", "bin")]
    tree = put(folder / "onnxruntime" / "digest" / "model.onnx", 2, OLD + 70).parent
    aged(tree, OLD + 70)
    read = put(folder / "onnx" / "read.onnx", 2, OLD + 99)
    written = read.stat().st_mtime_ns
    cache.used(read)
    mine = put(folder / "batch" / "first", 3, OLD + 500)
    assert [entry.kind for entry in cache.entries()] == [
        *("openvino", "quantised", "onnxruntime", "onnx")
    ]
    monkeypatch.setenv("PLINTH_CACHE_MB", "5")
    assert 2 * MB < cache.keep_bound() < 5 * MB
    assert not oldest.exists()
    assert not any(path.exists() for path in pair)
    stay = [tree, read, mine]
    assert all(path.exists() for path in stay), "within the bound, or not of models"
    assert read.stat().st_mtime_ns == written, "a mapped file does not look written to"


def test_what_is_fresh_stays_beyond_the_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLINTH_CACHE_MB", "1")
    fresh = put(folder / "onnx" / "fresh.onnx", 3, 1)
    old = put(folder / "onnxruntime" / "digest" / "model.onnx", 2, OLD).parent
    aged(old, OLD)
    assert cache.keep_bound() > MB
    assert fresh.is_file()
    assert list(old.parent.iterdir()) == [], "nothing is left of it"


def test_what_a_dead_process_began_leaves(folder: Path) -> None:
    begun = put(folder / "onnx" / ".new-dead" / "model.onnx", 1, 2 * cache.STALE_S).parent
    running = put(folder / "onnx" / ".new-live" / "model.onnx", 1, 1).parent
    aged(begun, 2 * cache.STALE_S)
    cache.keep_bound()
    assert running.is_dir()
    assert not begun.exists()


def test_one_process_at_a_time_and_not_at_every_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLINTH_CACHE_MB", "0")
    put(folder / "onnx" / "old.onnx", 1, OLD)
    with (cache.cache_folder("bound") / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cache.keep_bound() == 0
    assert cache.keep_bound() == 0, "it has just looked"
    monkeypatch.setattr(cache, "_looked", [float("-inf")])
    assert cache.keep_bound() >= MB


def test_a_bound_that_is_no_number_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("-1", "5 GB", "1e9", "9" * 40):
        monkeypatch.setenv("PLINTH_CACHE_MB", wrong)
        with pytest.raises(ConfigError, match="PLINTH_CACHE_MB"):
            cache.cache_bound()
