"""Every door drives heavy steps in worker processes, and outlives them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from apart import Apart, ApartFiles, HeavyApart, own
from serving import Running, running

from plinth.engine import ConfigError, Engine, EngineFailed, Sla
from plinth.pipelines.config.settings import Config
from plinth.pipelines.folders import carrier
from plinth.pipelines.folders.batch import Batch
from plinth.pipelines.folders.carrier import Carrier, carry, shares_of
from plinth.pipelines.stream.chunks import Chunk, Partition
from plinth.pipelines.stream.processor import Processor
from plinth.verticals import Item
from plinth.verticals.testing import check_vertical, feed


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(compute_workers=1) as started:
        yield started


@pytest.fixture(scope="module", params=[Apart, HeavyApart], ids=["light", "heavy"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    verticals = {"apart": request.param(), "files": ApartFiles()}
    with running(verticals, engine={"compute_workers": 1}) as started:
        yield started


def told(body: dict[str, Any]) -> tuple[float, int]:
    """The doubled number, and the process that did it."""
    return body["twice"], int(body["id"].split()[-1])


# -- records over HTTP -------------------------------------------------------------------------
def test_a_record_is_computed_in_another_process(server: Running) -> None:
    answer = server.post("/v1/apart/double", json={"id": "a", "value": 4.0})
    twice, by = told(answer.json())
    assert twice == 8
    assert by != os.getpid()


def test_a_crash_costs_its_record_and_never_the_server(server: Running) -> None:
    values = [1.0, 911.0, 13.0, 666.0, 2.0]
    answer = server.post("/v1/apart/double", json=[{"id": "a", "value": v} for v in values])
    one, crash, unlucky, fault, two = answer.json()["results"]
    assert (told(one["result"])[0], told(two["result"])[0]) == (2, 4)
    assert crash["error"]["reason"] == "worker_died"
    assert "SIGSEGV" in crash["error"]["message"]
    assert unlucky["error"]["reason"] == "unlucky"
    assert fault["error"]["reason"] == "internal"
    assert "4111" not in answer.text
    assert told(server.post("/v1/apart/double", json={"id": "a", "value": 4.0}).json())[0] == 8


def test_metrics_count_steps_by_their_outcome(server: Running) -> None:
    server.post("/v1/apart/double", json={"id": "a", "value": 13.0})
    text = server.client.get("/metrics").text
    assert 'plinth_compute_steps_total{outcome="raised",step="apart_steps.double"}' in text
    assert 'plinth_compute_seconds_total{step="apart_steps.double"}' in text


# -- folders -----------------------------------------------------------------------------------
def numbers(folder: Path, **values: float) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in values.items():
        (folder / f"{name}.txt").write_text(str(value))
    return folder


def test_an_upload_whose_step_crashes_fails_by_name(server: Running) -> None:
    parts = [("files", (f"{v}.txt", v.encode())) for v in ("4", "911")]
    job = server.post("/v1/files/double", files=parts, params={"wait": True})
    items = {item["id"]: item for item in job.json()["items"]}
    assert items["4"]["state"] == "done"
    assert items["911"]["error"]["reason"] == "worker_died"
    assert items["911"]["error"]["step"] == "analysing"


def test_a_batch_goes_on_after_a_crash(engine: Engine, tmp_path: Path) -> None:
    folder = numbers(tmp_path / "in", a=1, b=911, c=13, d=666, e=5)
    out = tmp_path / "out"
    summary = Batch(Apart(), engine, folder, out, processes=1).run()
    failed = {entry.id: (entry.error or {})["reason"] for entry in summary.failed}
    assert failed == {"b": "worker_died", "c": "unlucky", "d": "internal"}
    assert summary.count("done") == 2
    assert (out / "e" / "twice.txt").read_text() == "10.0"
    assert int((out / "e" / "writer.txt").read_text()) != os.getpid()
    again = Batch(Apart(), engine, folder, out, processes=1).run()
    assert again.count("skipped") == 2


@pytest.mark.soak
def test_whole_items_in_processes_of_their_own(tmp_path: Path) -> None:
    folder, out = numbers(tmp_path / "in", a=1, b=911, c=13, d=666, e=5), tmp_path / "out"
    with Engine(device="cpu", threads=1, compute_workers=2) as engine:
        apart = Carrier(engine, Apart(), own)
        apart.prepare()
        summary = Batch(Apart(), engine, folder, out, processes=2, carry=apart.carry).run()
        lame = Carrier(engine, Apart(), lame_own)
        with pytest.raises(EngineFailed, match="could not be made ready: no such thing"):
            Batch(Apart(), engine, folder, tmp_path / "no", processes=2, carry=lame.carry).run()
    failed = {each.id: (each.error or {}) for each in summary.failed}
    assert {name: each["reason"] for name, each in failed.items()} == {
        "b": "worker_died",
        "c": "unlucky",
        "d": "internal",
    }
    steps = [failed[name]["step"] for name in "bc"]
    assert steps == ["a worker process had it", "analysing"]
    assert summary.count("done") == 2
    assert (out / "e" / "twice.txt").read_text() == "10.0"
    assert int((out / "e" / "writer.txt").read_text()) != os.getpid()


@contextmanager
def lame_own() -> Iterator[carrier.Own]:
    raise ConfigError("no such thing")
    yield


def test_an_item_is_carried_whole_and_told_without_its_result(tmp_path: Path) -> None:
    folder = numbers(tmp_path / "in", a=2, c=13)
    items = {item.id: item for item in Apart().survey(folder) if isinstance(item, Item)}
    try:
        good, bad = (
            carry("k", own, (), items[name], None, tmp_path / name, Sla()) for name in "ac"
        )
        assert len(carrier._owns) == 1
        with pytest.raises(EngineFailed, match="no such thing"):
            carry("other", lame_own, (), items["a"], None, tmp_path / "b", Sla())
        assert not carrier._owns
    finally:
        while carrier._owns:
            carrier._owns.popitem()[1][0].close()
    assert good.done is not None
    assert good.error is None
    assert json.loads(good.done.encoded)["twice"] == 4
    assert good.done.answer.value is None
    assert list(good.begun) == ["load", "infer", "write"]
    assert (bad.done, bad.stage, getattr(bad.error, "reason", "")) == (None, "infer", "unlucky")
    assert sorted(good.done.files) == ["twice.txt", "writer.txt"]


def test_the_first_process_of_a_cohort_makes_its_engine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    inside, go, at_once = threading.Event(), threading.Event(), threading.Semaphore(0)

    def first() -> None:
        with carrier._first_alone("k"):
            inside.set()
            go.wait(60)

    def other() -> None:
        with carrier._first_alone("k"):
            at_once.release()
            others.wait(60)  # both are in it at the same time

    others = threading.Barrier(2)
    threads = [threading.Thread(target=each) for each in (first, other, other)]
    threads[0].start()
    assert inside.wait(60)
    for each in threads[1:]:
        each.start()
    assert not at_once.acquire(timeout=0.05)
    go.set()
    for each in threads:
        each.join(60)
    assert not others.broken
    assert at_once.acquire(timeout=0)


def test_each_process_gets_its_share_of_the_machine() -> None:
    config = Config.model_validate({"engine": {"device": "cpu", "memory_budget": 8 << 30}})
    own_config = shares_of(config, 2)
    assert own_config is not None
    assert own_config.engine.memory_budget == 4 << 30
    assert own_config.engine.compute_workers == 0
    unsaid = shares_of(Config.model_validate({"engine": {"device": "cpu"}}), 3)
    assert unsaid is not None
    assert 1 << 20 <= (unsaid.engine.memory_budget or 0) <= psutil.virtual_memory().total / 3
    lanes = Config.model_validate({"engine": {"devices": ["process:cpu"]}})
    assert shares_of(lanes, 2) is None


def test_reading_that_fails_is_told_of_reading(engine: Engine, tmp_path: Path) -> None:
    (numbers(tmp_path / "in", a=1) / "b.txt").write_text("not a number")
    summary = Batch(Apart(), engine, tmp_path / "in", tmp_path / "out").run()
    assert summary.states == {"a": "done", "b": "failed"}
    assert (summary.failed[0].error or {})["step"] == "reading the files"


# -- streams, and without an engine ------------------------------------------------------------
def test_a_stream_drives_steps_too(engine: Engine) -> None:
    values = (1.0, 13.0, 3.0)
    raws = [json.dumps({"id": str(n), "value": v}).encode() for n, v in enumerate(values)]
    line = {"topic": "in", "partition": 0, "timestamp": 0, "key": None, "headers": ()}
    records = [SimpleNamespace(offset=n, value=raw, **line) for n, raw in enumerate(raws)]
    place = Partition("in", 0)
    steps = Processor(Apart(), engine).process(Chunk([*records], {place: 0}, {place: 3}))
    try:
        while True:
            next(steps)
    except StopIteration as end:
        messages = end.value.messages
    good = [told(json.loads(one.value))[0] for one in messages if one.error is None]
    assert good == [2, 6]
    assert [one.error.reason for one in messages if one.error is not None] == ["unlucky"]


def test_the_kit_runs_steps_in_place(tmp_path: Path) -> None:
    check_vertical(Apart(), folder=numbers(tmp_path / "in", a=1, b=2)).raise_if_failed()
    (found,) = feed(Apart().infer([Apart().example()]))
    assert (found.twice, found.id) == (3, f"a {os.getpid()}")
