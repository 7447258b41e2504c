"""The folder door: resumable, one bad item never stops the rest, killed at any moment."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import resource
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
from serving import until
from tiny_verticals import GATE, Gate, Page, Shelf, install

from plinth.engine import ConfigError, Engine, Flow, InputError, PlinthError
from plinth.pipelines.assembly import build_engine
from plinth.pipelines.config.settings import Config
from plinth.pipelines.folders import batch as batch_module
from plinth.pipelines.folders.batch import Batch, Progress, Summary
from plinth.pipelines.folders.journal import Journal
from plinth.pipelines.folders.storage import write_whole
from plinth.verticals import Item, LeftOut, Settings
from plinth.verticals.medical import CtAnalysis, CtSettings
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import Command

PLAIN = Config.model_validate({"engine": {"backend": "eager", "precision": "fp32"}})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build_engine(PLAIN, {"shelf": Shelf()}) as running:
        yield running


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """Four items: two good, one bad, one that meets a fault of the vertical."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in {"a": "1", "b": "not a number", "c": "bug", "d": "4"}.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def run(engine: Engine, folder: Path, out: Path, **options: Any) -> Summary:
    return Batch(Shelf(), engine, folder, out, **options).run()


def test_one_bad_item_never_stops_the_rest(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run(engine, shelf, out)
    assert summary.states == {"a": "done", "b": "failed", "c": "failed", "d": "done"}
    assert summary.exit_code == 1
    assert (out / "a" / "twice.txt").read_text() == "2.0\n"
    assert (out / "d" / "twice.txt").read_text() == "8.0\n"
    assert not (out / "b").exists()
    failed = {line["id"]: line for line in _lines(out / "failed.jsonl")}
    assert failed["b"]["message"] == "b: expected a number"
    assert failed["b"]["field"] == "b.txt"
    assert failed["c"]["reason"] == "internal"
    assert "KeyError" in failed["c"]["message"]
    assert json.loads((out / "summary.json").read_text())["failed"] == 2
    assert not list(out.glob(".partial-*"))


def test_a_second_run_skips_what_is_done_and_tells_what_failed(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(engine, shelf, out)
    (shelf / "e.txt").write_text("5")
    summary = run(engine, shelf, out)
    assert summary.states == {
        "a": "skipped",
        "b": "failed before",
        "c": "failed before",
        "d": "skipped",
        "e": "done",
    }
    assert summary.exit_code == 1
    assert len(_lines(out / "failed.jsonl")) == 2


def test_failed_items_run_again_when_asked(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(engine, shelf, out)
    (shelf / "b.txt").write_text("7")  # its files changed: it would run again anyway
    (shelf / "c.txt").write_text("3.5")
    summary = run(engine, shelf, out, retry_failed=True)
    assert summary.states == {"a": "skipped", "b": "done", "c": "done", "d": "skipped"}
    assert summary.exit_code == 0
    assert _lines(out / "failed.jsonl") == []


def test_changed_files_and_newer_models_run_again(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(engine, shelf, out)
    (shelf / "a.txt").write_text("10")
    assert run(engine, shelf, out).states["a"] == "done"
    assert (out / "a" / "twice.txt").read_text() == "20.0\n"
    newer = Batch(Shelf(), engine, shelf, out)
    newer.models = {"page": "4"}
    assert newer.run().states["d"] == "done"


def test_other_settings_run_again(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    class Marked(Settings):
        mark: str

    def run_with(mark: str) -> Summary:
        vertical = Shelf()
        vertical.settings = Marked(mark=mark)
        return Batch(vertical, engine, shelf, tmp_path / "out").run()

    assert run_with("x").states["a"] == "done"
    assert run_with("x").states["a"] == "skipped"
    assert run_with("y").states["a"] == "done"


def test_files_that_vanish_fail_their_own_item(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    class Vanishing(Shelf):
        def discover(self, folder: Path) -> Iterator[Item]:
            items = list(super().discover(folder))
            items[0].paths[0].unlink()
            yield from items

    summary = Batch(Vanishing(), engine, shelf, tmp_path / "out").run()
    assert summary.states == {"a": "failed", "b": "failed", "c": "failed", "d": "done"}
    assert summary.failed[0].error is not None
    assert summary.failed[0].error["reason"] == "io"


def test_outputs_that_were_deleted_are_made_again(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(engine, shelf, out)
    (out / "a" / "twice.txt").unlink()
    (out / "a" / "report.html").unlink()
    (out / "a").rmdir()
    assert run(engine, shelf, out).states["a"] == "done"


def test_without_resume_everything_runs_again(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    run(engine, shelf, tmp_path / "out")
    summary = run(engine, shelf, tmp_path / "out", resume=False)
    assert summary.count("done") == 2
    assert summary.count("failed") == 2


def test_the_next_item_loads_while_one_infers(tmp_path: Path) -> None:
    """One item waits in the model; another is loaded meanwhile, the third is not."""
    folder, gate = tmp_path / "in", Gate(tmp_path)
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text("1000")
    seen: list[tuple[str, str]] = []
    both_load = threading.Event()

    def note(step: Progress) -> None:
        seen.append((step.item, step.stage))
        if {("a", "load"), ("b", "load")} <= set(seen):
            both_load.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GATE, str(tmp_path))
        with build_engine(PLAIN, {"shelf": Shelf()}) as engine:
            batch = Batch(Shelf(), engine, folder, tmp_path / "out", on_progress=note)
            runner = threading.Thread(target=batch.run)
            runner.start()
            gate.await_arrival()
            loaded = both_load.wait(60)
            before = list(seen)
            gate.open()  # whatever was found: who waits at the gate does so without bound
            for _ in range(2):
                gate.await_arrival()
                gate.open()
            runner.join(60)
    assert loaded
    assert ("c", "load") not in before
    assert batch.summary.count("done") == 3


def test_one_items_own_steps_leave_the_device_to_the_next(engine: Engine, tmp_path: Path) -> None:
    """The first item measures until the second has been through the engine."""
    second_answered = threading.Event()

    class Measuring(Shelf):
        def infer(self, requests: Sequence[tuple[str, float]]) -> Flow[list[Page | InputError]]:
            pages = yield from super().infer(requests)
            if requests[0][0] == "b":
                second_answered.set()
            assert second_answered.wait(60), "the second item never had the device"
            return pages

    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("1")
    summary = Batch(Measuring(), engine, folder, tmp_path / "out", workers=1).run()
    assert summary.states == {"a": "done", "b": "done"}


def test_two_runs_never_share_an_output(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out"),
        pytest.raises(ConfigError, match="another run is writing"),
    ):
        run(engine, shelf, tmp_path / "out")


@pytest.mark.parametrize("inside", [".", "results"])
def test_output_inside_the_input_is_refused(engine: Engine, shelf: Path, inside: str) -> None:
    with pytest.raises(ConfigError, match="lies inside the input"):
        run(engine, shelf, shelf / inside)


def test_nothing_to_do_is_said(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError, match="found nothing to do"):
        run(engine, tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no folder"):
        run(engine, tmp_path / "absent", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_said(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(PlinthError, match=r"cannot write to .*out: File exists"):
        run(engine, shelf, tmp_path / "out")


def test_a_torn_last_line_is_forgotten_a_damaged_one_is_not(tmp_path: Path) -> None:
    good = b'{"id":"a","state":"done","models":{},"inputs":"x"}\n'
    (tmp_path / "journal.jsonl").write_bytes(good + b'{"id":"b","sta')
    with Journal(tmp_path) as journal:
        assert list(journal.entries) == ["a"]
    assert (tmp_path / "journal.jsonl").read_bytes() == good
    (tmp_path / "journal.jsonl").write_bytes(b"rubbish\n" + good)
    with pytest.raises(ConfigError, match=r"journal.jsonl:1: this line is damaged"):
        Journal(tmp_path)


def test_a_failed_write_leaves_the_old_outputs(tmp_path: Path) -> None:
    target = tmp_path / "item"

    def good(folder: Path) -> list[Path]:
        (folder / "x").write_text("old")
        return [folder / "x"]

    def bad(folder: Path) -> list[Path]:
        (folder / "x").write_text("half")
        raise OSError("disk full")

    assert write_whole(target, good) == ("x",)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, bad)
    assert (target / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["item"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


# -- odd names, odd items --------------------------------------------------------------------


def test_any_name_of_a_file_is_an_item_like_others(engine: Engine, tmp_path: Path) -> None:
    """Among them one in Latin-1 and two with the same last part."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for number, name in enumerate(ODD_NAMES):
        path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118 - a path of bytes
        Path(os.fsdecode(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(os.fsdecode(path)).write_text(str(number))
    summary = run(engine, folder, out)
    assert summary.count("done") == len(ODD_NAMES)
    assert summary.exit_code == 0
    assert run(engine, folder, out).count("skipped") == len(ODD_NAMES)
    rows = _table(out / "cohort.csv")
    assert {row["source"] for row in rows} >= {"\\udce9tude.txt", "患者甲/IM 1.txt", "x/a.txt"}
    assert "'=cmd()|x.txt" in {row["source"] for row in rows}
    twice = {float(row["twice"]): row["id"] for row in rows}
    assert sorted(twice) == [2.0 * number for number in range(len(ODD_NAMES))]
    for value, name in twice.items():
        assert (out / name / "twice.txt").read_text() == f"{value}\n"


ODD_NAMES = [
    b"\xe9tude.txt",
    "患者甲/IM 1.txt".encode(),
    b"x/a.txt",
    b"y/a.txt",
    b"..a.txt",
    b"=cmd()|x.txt",
    b"line\nbreak.txt",
    b"n" * 200 + b".txt",
]


def test_the_cohort_leads_from_results_and_failures_to_files(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    run(engine, shelf, tmp_path / "out")
    table = tmp_path / "out" / "cohort.csv"
    assert table.stat().st_mode & 0o777 == 0o600
    rows = {row["id"]: row for row in _table(table)}
    assert list(rows) == ["a", "b", "c", "d"]
    assert rows["a"]["source"] == "a.txt"
    assert float(rows["d"]["twice"]) == 8.0
    assert (rows["b"]["state"], rows["b"]["message"]) == ("failed", "b: expected a number")
    assert _lines(tmp_path / "out" / "failed.jsonl")[0]["step"] == "reading the files"


def test_every_number_of_a_result_has_its_column_and_none_stays_in_memory(
    engine: Engine, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 numbers of each item; where a table has fewer columns, the rest is told."""

    class Thorough(Shelf):
        def infer(self, requests: Sequence[tuple[str, float]]) -> Flow[list[Page | InputError]]:
            pages = yield from super().infer(requests)
            for page in pages:
                assert isinstance(page, Page)
                page.found += [{"key": f"n{k}", "value": page.twice + k} for k in range(5000)]
            return pages

    out = tmp_path / "out"
    batch = Batch(Thorough(), engine, shelf, out)
    batch.run()
    rows = {row["id"]: row for row in _table(out / "cohort.csv")}
    for name, twice in (("a", 2.0), ("d", 8.0)):
        numbers = [float(rows[name][f"found.n{k}"]) for k in range(5000)]
        assert numbers == [twice + k for k in range(5000)]
    assert rows["b"]["found.n0"] == rows["a"]["message"] == ""
    assert not any(entry.numbers for entry in batch.summary.entries.values())
    monkeypatch.setattr(batch_module, "MAX_COLUMNS", 3000)
    Batch(Thorough(), engine, shelf, out).run()
    rows = {row["id"]: row for row in _table(out / "cohort.csv")}
    assert len(rows["a"]) == 3000
    assert rows["a"]["message"] == "2009 more numbers stand in its own files alone"


def test_the_first_result_does_not_wait_for_the_last_file(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    finished = threading.Event()

    class Endless(Shelf):
        def discover(self, folder: Path) -> Iterator[Item]:
            items = list(super().discover(folder))
            yield items[0]
            assert finished.wait(60), "the first item was not worked on"
            yield from items[1:]

    def note(step: Progress) -> None:
        if step.kind == "finished":
            finished.set()

    summary = Batch(Endless(), engine, shelf, tmp_path / "out", on_progress=note).run()
    assert len(summary.states) == 4


def test_files_that_are_no_item_stand_in_the_cohort_with_their_reason(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    class Wary(Shelf):
        def survey(self, folder: Path) -> Iterator[Item | LeftOut]:
            yield LeftOut(folder / "notes" / "=x.pdf", "no_text", "not a text", files=3)
            yield from self.discover(folder)
            yield LeftOut(folder / "torn.txt", "torn", "cut short", failed=True)

    out = tmp_path / "out"
    summary = Batch(Wary(), engine, shelf, out).run()
    rows = _table(out / "cohort.csv")
    assert (out / "cohort.csv").stat().st_mode & 0o777 == 0o600
    states = Counter(row["state"] for row in rows)
    assert [row["found.number"] for row in rows if row["state"] == "done"] == ["1.0", "4.0"]
    told = json.loads((out / "summary.json").read_text())
    assert states == {"done": 2, "failed": 3, "skipped": 1}
    assert told["done"] + told["failed"] + told["skipped"] == told["found"] == 6
    pdf, torn = (row for row in rows if not row["id"])
    assert (pdf["source"], pdf["files"], pdf["reason"]) == ("notes/=x.pdf", "3", "no_text")
    assert (torn["state"], torn["message"]) == ("failed", "cut short")
    assert summary.exit_code == 1
    again = Batch(Wary(), engine, shelf, out).run().as_dict()
    assert again["done"] + again["failed"] + again["skipped"] == again["found"] == 6
    assert not list(out.glob(".partial-*"))


def test_an_item_that_was_told_too_early_is_done_again_in_its_place(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    """Two items turn out to be one; the later word stands, also on the next run."""

    class Hasty(Shelf):
        def discover(self, folder: Path) -> Iterator[Item]:
            one, other = folder / "a.txt", folder / "d.txt"
            yield Item("a", (one,))
            yield Item("d", (other,))
            yield Item("d", (other, one), replaces=("a", "d"))

    out = tmp_path / "out"
    for _ in range(2):
        summary = Batch(Hasty(), engine, shelf, out).run()
        assert summary.states == {"d": "done"}
        assert not (out / "a").exists()
        assert (out / "d" / "twice.txt").read_text() == "8.0\n"
        (row,) = _table(out / "cohort.csv")
        assert row["files"] == "2"


@pytest.mark.parametrize("fault", [KeyError("x"), SystemExit(3), PermissionError(13, "denied")])
def test_a_folder_that_cannot_be_read_to_its_end_is_told_after_what_was_found(
    engine: Engine, shelf: Path, tmp_path: Path, fault: BaseException
) -> None:
    class Torn(Shelf):
        def discover(self, folder: Path) -> Iterator[Item]:
            yield from list(super().discover(folder))[:2]
            raise fault

    batch = Batch(Torn(), engine, shelf, tmp_path / "out")
    with pytest.raises(PlinthError):
        batch.run()
    assert batch.summary.states == {"a": "done", "b": "failed"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["items"] == 2


@pytest.mark.parametrize("step", ["load", "infer", "encode", "write"])
@pytest.mark.parametrize("fault", [KeyError("x"), SystemExit(3), MemoryError()], ids=repr)
def test_whatever_a_vertical_raises_fails_one_item(
    engine: Engine, shelf: Path, tmp_path: Path, step: str, fault: BaseException
) -> None:
    def fail(self: Shelf, given: Any, *rest: Any) -> Any:
        if "'d'" in repr(given):
            raise fault
        return getattr(Shelf, step)(self, given, *rest)

    faulty = type("Faulty", (Shelf,), {step: fail})
    summary = Batch(faulty(), engine, shelf, tmp_path / "out").run()
    assert summary.states == {"a": "done", "b": "failed", "c": "failed", "d": "failed"}
    assert not (tmp_path / "out" / "d").exists()


def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    engine: Engine, shelf: Path, tmp_path: Path
) -> None:
    class Verbose(Shelf):
        def write(self, result: Any, folder: Path) -> list[Path]:
            (folder / "big.bin").write_bytes(bytes(3 << 20))
            return [folder / "big.bin"]

    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(PlinthError, match=r"cannot write to .*the disk is full"):
            Batch(Verbose(), engine, shelf, out).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "a").exists()
    assert Batch(Verbose(), engine, shelf, out).run().states["a"] == "done"


# -- through the command, in a process that is stopped or killed -------------------------------


class Held:
    """``plinth batch`` in a process of its own whose third item waits at the gate."""

    def __init__(self, tmp_path: Path) -> None:
        self.out = tmp_path / "out"
        self.folder = tmp_path / "held"
        self.folder.mkdir()
        for name, text in {"a": "1", "b": "bad", "c": "hold", "d": "4"}.items():
            (self.folder / f"{name}.txt").write_text(text)
        self.gate = Gate(tmp_path)
        self._site = tmp_path / "site"
        install(self._site)
        self._env = {
            GATE: str(tmp_path),
            "PLINTH_ENGINE__BACKEND": "eager",
            "PLINTH_ENGINE__PRECISION": "fp32",
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[Command]:
        words = ["plinth", "batch", "shelf", str(self.folder), "--out", str(self.out), "--json"]
        command = Command(words, self._site, self._env, self._site / "said.txt")
        try:
            yield command
        finally:
            command.end()

    def await_items(self, command: Command, count: int) -> None:
        """Until the command has told of ``count`` finished items."""

        def told() -> bool:
            found = re.findall(r"(?m)^[1-4]/", command.said)
            assert len(found) >= count or command.wait(0) is None, command.said
            return len(found) >= count

        until(told)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    return Held(tmp_path)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_stopped_run_goes_on_where_it_was(
    held: Held, engine: Engine, number: signal.Signals, code: int
) -> None:
    with held.running() as command:
        held.gate.await_arrival()
        held.await_items(command, 2)
        command.signal(number)
        if number != signal.SIGKILL:
            held.gate.open()
        assert command.wait(60) == code, command.said
    before = (held.out / "a" / "twice.txt").stat().st_mtime_ns
    (held.folder / "c.txt").write_text("3")
    states = run(engine, held.folder, held.out).states
    assert states["a"] == "skipped"
    assert states["b"] == "failed before"
    assert states["c"] == "done"
    assert (held.out / "a" / "twice.txt").stat().st_mtime_ns == before
    assert not list(held.out.glob(".partial-*"))


def test_the_journal_is_for_its_owner_to_read(engine: Engine, shelf: Path, tmp_path: Path) -> None:
    run(engine, shelf, tmp_path / "out")
    entries = {entry["id"]: entry for entry in _lines(tmp_path / "out" / "journal.jsonl")}
    assert entries["a"]["models"] == {"page": "3"}
    assert entries["a"]["files"] == ["report.html", "twice.txt"]
    assert entries["a"]["facts"] == {"bytes": 1}
    assert os.access(tmp_path / "out" / "a", os.R_OK | os.X_OK)


def test_the_cohort_s_table_tells_whole_scans_from_others(tmp_path: Path) -> None:
    """Who averages over its columns sees which rows are of a scan that was cut."""
    chest = Phantom(shape=(40, 34, 24), spacing=(8.4, 8.2, 9.0))
    write_series(chest, tmp_path / "in" / "whole")
    for path in write_series(replace(chest, seed=8), tmp_path / "in" / "cut")[12:]:
        path.unlink()
    for path in (tmp_path / "in" / "cut").glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.ImagesInAcquisition = 24
        image.save_as(path)
    settings = CtSettings(page=False, pictures=False, segmentation=False, measurements=False)
    with Engine(devices=["cpu"]) as engine:
        Batch(CtAnalysis(settings), engine, tmp_path / "in", tmp_path / "out").run()
    rows = {row["source"]: row for row in _table(tmp_path / "out" / "cohort.csv") if row["id"]}
    assert rows["whole"]["geometry.ok"] == "True"
    assert rows["cut"]["geometry.ok"] == "False"
    assert float(rows["cut"]["warnings"]) > float(rows["whole"]["warnings"])
