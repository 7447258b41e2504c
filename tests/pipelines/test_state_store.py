"""State on disk by parts: a checkpoint is there whole, or not at all; what was logged is there."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from state_on_disk import payments

from plinth.engine import ConfigError, InputError
from plinth.pipelines.state.store import DiskStore, KeptState
from plinth.verticals.contract import StateError
from plinth.verticals.finance import FraudScoring, FraudSettings

ORIGIN = {"vertical": "tests"}
FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def opened(
    folder: Path, origin: dict[str, str] | None = None, *, logs: bool = False
) -> Iterator[DiskStore]:
    with contextlib.closing(DiskStore(folder, origin or ORIGIN, logs=logs)) as store:
        yield store


def test_what_was_put_is_there_with_its_commit_and_not_before(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.reopen() == {}
        for number in range(600):
            store.put(b"k%d" % number, b"one")
        assert store.get(b"k0") is None
        store.commit({"offsets": [1]}).result(30)
        assert (store.get(b"k0"), store.get(b"k599")) == (b"one", b"one")
        for number in range(600):
            store.put(b"k%d" % number, b"two")
        assert store.get(b"k0") == b"one"
        assert store.reopen()["offsets"] == [1]
        store.commit({"offsets": [2]}).result(30)
        assert store.get(b"k0") == b"one", "what was dropped does not come with a later commit"
        assert store.bytes_on_disk > 0
    with opened(tmp_path) as store:
        assert store.reopen()["offsets"] == [2]
        assert store.get(b"k599") == b"one"
        store.wipe()
        assert store.reopen() == {}
        assert store.get(b"k599") is None


def test_the_log_is_read_behind_the_checkpoint(tmp_path: Path) -> None:
    with opened(tmp_path, logs=True) as store:
        store.reopen()
        for number in range(1_000):
            store.append(b"%d" % number)
        store.durable().result(30)
        mark = store.mark()
        store.append(b"more")
        store.commit(mark).result(30)
    with opened(tmp_path, logs=True) as store:
        store.reopen()
        assert list(store.entries()) == [b"more"]
        store.commit(store.mark()).result(30)
    with opened(tmp_path, logs=True) as store:  # its numbers go on where no entry is left
        store.reopen()
        assert list(store.entries()) == []
        store.append(b"last")
    with opened(tmp_path, logs=True) as store:
        store.reopen()
        assert list(store.entries()) == [b"last"]
        store.wipe()
        assert list(store.entries()) == []


def endless(folder: Path, told: Connection) -> None:
    """Log and put for ever; of three checkpoints two are given up."""
    store = DiskStore(folder, ORIGIN, logs=True)
    store.reopen()
    for turn in itertools.count():
        for number in range(500):
            store.put(b"k%d" % number, b"%d" % turn)
            store.append(b"%d" % turn)
        store.durable().result()
        told.send(turn)
        if turn % 3 == 0:
            store.commit({"turn": turn, **store.mark()}).result()
        else:
            store.reopen()


def test_a_killed_process_leaves_whole_checkpoints_and_all_that_was_said_durable(
    tmp_path: Path,
) -> None:
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=endless, args=(tmp_path, there), daemon=True)
    process.start()
    there.close()
    told = [here.recv() for _ in range(8)][-1]
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
        while True:
            told = here.recv()
    with opened(tmp_path, logs=True) as store:
        turn = store.reopen()["turn"]
        assert {store.get(b"k%d" % number) for number in range(500)} == {b"%d" % turn}
        assert turn >= told - 3
        behind = [int(entry) for entry in store.entries()]
        assert set(range(turn + 1, told + 1)) <= set(behind)
        assert all(behind.count(one) == 500 for one in set(behind))


def with_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = DiskStore(folder, ORIGIN, logs=True)
    store.reopen()
    store.put(b"k", b"one")
    store.append(b"first")
    store.durable().result()
    store.commit({"turn": 1, **store.mark()}).result()
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    for pid in (os.getpid(), store.writer_pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 18, room[1]))
    for number in range(1_000):
        store.put(b"%d" % number, bytes(1_000))
    failure = store.commit({"turn": 2, **store.mark()}).exception()
    assert isinstance(failure, StateError), failure
    assert (store.get(b"0"), store.get(b"k")) == (None, b"one")
    store.append(bytes(1 << 19))
    assert isinstance(store.durable().exception(), StateError)
    for pid in (os.getpid(), store.writer_pid):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, room)
    assert store.durable().exception() is None
    assert list(store.entries()) == [bytes(1 << 19)]
    store.put(b"k", b"three")
    store.commit({"turn": 3, **store.mark()}).result()
    assert (store.get(b"0"), store.get(b"k")) == (None, b"three")
    store.close()


def test_a_full_disk_costs_the_checkpoint_alone_and_entries_wait(tmp_path: Path) -> None:
    process = FORK.Process(target=with_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_a_writing_process_that_was_killed_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put(b"k", b"one")
        store.commit({"turn": 1}).result(30)
        for before in (b"", b"two"):
            if before:
                store.put(b"k", before)
            os.kill(store.writer_pid, signal.SIGKILL)
            with pytest.raises(StateError, match="SIGKILL"):
                store.commit({"turn": 2}).result(30)
            assert store.get(b"k") == b"one"
            store.put(b"l", b"three")
            store.commit({"turn": 3}).result(30)
            assert (store.get(b"k"), store.get(b"l")) == (b"one", b"three")


def test_one_process_writes_at_a_time_and_the_next_waits_for_its_end(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        first = DiskStore(tmp_path, ORIGIN)
        second = thread.submit(DiskStore, tmp_path, ORIGIN)
        assert not wait((second,), 0.5).done
        first.put(b"k", b"one")
        first.commit({"turn": 1}).result(30)
        first.close()
        with contextlib.closing(second.result(30)) as store:
            assert store.reopen()["turn"] == 1


def test_a_store_of_another_origin_is_refused_but_one_that_logs_begins_with_a_streams(
    tmp_path: Path,
) -> None:
    stream = {**ORIGIN, "topic": "payments"}
    with opened(tmp_path / "stream", stream) as store:
        store.put(b"k", b"one")
        store.commit({}).result(30)
    with opened(tmp_path / "stream") as store, pytest.raises(InputError, match="another"):
        store.reopen()
    shutil.copytree(tmp_path / "stream", tmp_path / "serve")
    with opened(tmp_path / "serve", {**ORIGIN, "door": "http"}, logs=True) as store:
        store.reopen()
        assert store.get(b"k") == b"one"
    with (
        opened(tmp_path / "serve", {"vertical": "other"}, logs=True) as store,
        pytest.raises(InputError, match="another"),
    ):
        store.reopen()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "parts.lmdb"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="cannot be opened"):
        DiskStore(tmp_path, ORIGIN)
    path.unlink()
    with opened(tmp_path) as store:
        for number in range(2_000):
            store.put(b"k%d" % number, bytes(300))
        store.commit({}).result(30)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match=f"has {len(raw) // 2} bytes"):
        DiskStore(tmp_path, ORIGIN)
    path.write_bytes(raw[: 4096 * 8] + b"\xff" * (len(raw) - 4096 * 8))
    keys = [b"k%d" % number for number in range(2_000)]
    with pytest.raises((ConfigError, StateError)), opened(tmp_path) as store:
        list(map(store.get, keys))
    (tmp_path / "parts.db").touch()
    with pytest.raises(ConfigError, match="earlier version"):
        DiskStore(tmp_path, ORIGIN)


def without_address_space(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(ConfigError, match="1 TiB of address space"):
        DiskStore(folder, ORIGIN)


def test_a_limit_on_address_space_is_named(tmp_path: Path) -> None:
    process = FORK.Process(target=without_address_space, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_keys_longer_than_the_store_takes_stay_apart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for end in "ab":
            store.put(b"cards:" + b"x" * 1_000 + end.encode(), end.encode())
        store.commit({}).result(30)
        keys = [b"cards:" + b"x" * 1_000 + end for end in (b"a", b"b", b"c")]
        assert [store.get(key) for key in keys] == [b"a", b"b", None]
        assert store.fetch(keys) == {keys[0]: b"a", keys[1]: b"b"}


def test_many_parts_are_those_that_are_read_one_by_one(tmp_path: Path) -> None:
    parts = {b"part %d" % n: b"x" * n for n in range(400)}
    with opened(tmp_path) as store:
        assert store.fetch([]) == store.fetch(list(parts)) == {}
        for key, part in parts.items():
            store.put(key, part)
        store.commit({}).result(30)
    with opened(tmp_path) as store:
        for asked in (400, 399, 40, 15, 1, 0):  # at first by several readers at a time
            keys = random.sample([*parts, b"another", b"part"], asked)
            assert store.fetch(keys) == {key: parts[key] for key in keys if key in parts}


def test_garbage_is_looked_for_among_few_objects_however_many_are_read_back(tmp_path: Path) -> None:
    vertical = FraudScoring(
        FraudSettings(max_cards=5_000, max_terminals=5_000, max_customers=5_000)
    )
    thresholds, young = gc.get_threshold(), 0
    gc.collect()
    gc.set_threshold(1_000_000)  # as where as many objects go as come: nobody looks otherwise
    try:
        with opened(tmp_path) as store:
            kept = KeptState(vertical, store)
            kept.load()
            for chunk in payments(6_000, 40_000):
                if not kept.busy:
                    kept.begin({})
                vertical.state.update(chunk)
                kept.step()
                young = max(young, len(gc.get_objects(0)) + len(gc.get_objects(1)))
    finally:
        gc.set_threshold(*thresholds)
    assert store.reads > 10_000
    assert young < 40_000
