"""A cohort of very many files: how long until the first result, and how fast the walk is.

    python benchmarks/dicom_cohort.py [--files 1000000] [--walked 100000] [--json]
    python benchmarks/dicom_cohort.py --studies 200 [--shape 256,256,60] [--keep FOLDER] [--json]
    python benchmarks/dicom_cohort.py --whole --files 1000000 --one-in 1000 [--json]

With ``--studies`` so many studies are analysed to the end, with the outputs that are on by default,
and told are studies per hour, and the memory of all processes after each study. ``--keep FOLDER
--seconds N`` ends after about so many seconds, and the next call goes on there. Without, it writes
small CT studies of 24 images each, every one with identifiers of its own, runs ``plinth batch
medical`` over them in process until the first result stands on disk, and then reads ``--walked``
headers to measure the walk. With ``--whole`` the batch goes on to the end; one study in
``--one-in`` is CT and analysed, the others say that they are MR and are left out, so that what is
measured is files and not analyses. Told are the first result, the whole, the largest memory, and
that what was done, failed and was left out is what was written.
A million files take 4 GB of disk.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from plinth.engine import Engine  # noqa: E402
from plinth.pipelines.folders.batch import Batch, Progress  # noqa: E402
from plinth.verticals.medical import CtAnalysis  # noqa: E402
from plinth.verticals.medical.dicom.discover import Found, survey  # noqa: E402
from plinth.verticals.medical.phantom.chest import Phantom  # noqa: E402
from plinth.verticals.medical.phantom.dicom import write_series  # noqa: E402

SLICES = 24


MODALITY = b"\x08\x00\x60\x00CS\x02\x00"
EXTENT = (336.0, 279.0, 300.0)


def write_cohort(
    root: Path, files: int, shape: tuple[int, int, int] = (40, 34, SLICES), one_in: int = 1
) -> int:
    """Studies below ``root``, ten to a patient's folder; returns how many.

    Args:
        root: an empty folder.
        files: at least so many files.
        shape: columns, rows, slices of each study.
        one_in: of so many studies one is CT; the others say that they are MR.
    """
    x, y, z = (extent / n for extent, n in zip(EXTENT, shape, strict=True))
    write_series(Phantom(shape=shape, spacing=(x, y, z)), root / "pattern")
    pattern = [path.read_bytes() for path in sorted((root / "pattern").glob("*.dcm"))]
    for path in (root / "pattern").iterdir():
        path.unlink()
    (root / "pattern").rmdir()
    studies = -(-files // shape[2])
    with ProcessPoolExecutor() as pool:
        parts = [range(n, min(n + 500, studies)) for n in range(0, studies, 500)]
        writing = [pool.submit(write_studies, root, part, pattern, one_in) for part in parts]
        for one in writing:
            one.result()
    return studies


def write_studies(root: Path, studies: range, pattern: list[bytes], one_in: int) -> None:
    """Write some studies of a cohort."""
    for study in studies:
        folder = root / "cohort" / f"{study // 10:05d}" / f"{study:06d}"
        folder.mkdir(parents=True)
        patient, uid = f"P-{study:010d}".encode(), f"{10_000 + study}".encode()
        for k, data in enumerate(pattern):
            data = data.replace(b"PHANTOM-0007", patient).replace(b"2.25.", uid)
            if study % one_in:
                data = data.replace(MODALITY + b"CT", MODALITY + b"MR")
            (folder / f"{k:03d}.dcm").write_bytes(data)


def to_the_end(cohort: Path, out: Path, studies: int, one_in: int) -> dict[str, Any]:
    """Run a batch over a cohort to its end: what became of every file, and what it took."""
    first: list[float] = []

    def note(step: Progress) -> None:
        if step.kind == "finished" and not first:
            assert step.state == "done", step
            first.append(time.perf_counter() - begun)

    with Engine() as engine:
        before = psutil.Process().memory_info().rss
        begun = time.perf_counter()
        summary = Batch(CtAnalysis(), engine, cohort, out, on_progress=note).run()
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with (out / "cohort.csv").open(newline="", encoding="utf-8") as table:
        files = Counter[str]()
        for row in csv.DictReader(table):
            files[row["state"]] += int(row["files"])
    done = -(-studies // one_in)
    assert summary.count("done") == done, summary.count("done")
    assert files.total() == studies * SLICES, files
    return {
        "files": files.total(),
        "files_by_state": dict(files),
        "studies_done": done,
        "first_result_seconds": round(first[0], 2),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1e6),
        "peak_above_start_mb": round((peak - before) / 1e6),
    }


def first_result(cohort: Path, out: Path) -> float:
    """Seconds from the start of a batch to its first result on disk."""
    seconds: list[float] = []
    with Engine() as engine:
        batch = Batch(CtAnalysis(), engine, cohort, out, on_progress=lambda step: note(step))
        begun = time.perf_counter()

        def note(step: Progress) -> None:
            if step.kind == "finished":
                seconds.append(time.perf_counter() - begun)
                assert step.state == "done", step
                assert (out / step.item / "report.json").exists()
                batch.stop()

        batch.run()
    return seconds[0]


def whole(place: Path, studies: int, shape: tuple[int, int, int], most: float) -> dict[str, Any]:
    """Analyse a cohort to the end, or for some time: the next call goes on where this one stopped.

    Args:
        place: holds the cohort, the results and what earlier calls took; made where it is not.
        studies: of the cohort.
        shape: columns, rows, slices of each.
        most: seconds after which no further study is begun.
    """
    told, cohort = place / "taken.json", place / "cohort"
    if not cohort.exists():
        write_cohort(place, studies * shape[2], shape)
    taken = json.loads(told.read_text()) if told.exists() else {"seconds": 0.0, "peak_mb": 0}
    largest = Largest()
    workers = len(os.sched_getaffinity(0))
    with Engine(backend="auto", compute_workers=workers) as engine:
        begun = time.perf_counter()

        def note(step: Progress) -> None:
            if step.kind == "finished":
                assert step.state == "done", step
                largest.look()
                if time.perf_counter() - begun > most:
                    batch.stop()

        out = place / "out"
        batch = Batch(CtAnalysis(), engine, cohort, out, processes=workers, on_progress=note)
        batch.run()
        taken["seconds"] += time.perf_counter() - begun
    taken["peak_mb"] = max(taken["peak_mb"], largest.mb)
    told.write_text(json.dumps(taken))
    done = sum(1 for _ in out.glob("*/report.json"))
    return {
        "studies_done": done,
        "of": studies,
        "seconds": round(taken["seconds"], 1),
        "studies_per_hour": round(3600 * done / taken["seconds"]),
        "peak_mb_of_all_processes": taken["peak_mb"],
    }


class Largest:
    """The most memory that this process and its children held together when it was looked at.

    Proportional set size: what several of them share counts once.
    """

    def __init__(self) -> None:
        self.mb = 0

    def look(self) -> None:
        """Look now."""
        total = 0
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        self.mb = max(self.mb, round(total / 1e6))


def walk(cohort: Path, files: int) -> dict[str, float]:
    """Headers per second, and MB that the process grew by meanwhile."""
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.perf_counter()
    read = sum(
        len(one.series.frames)
        for one in islice(survey(cohort), files // SLICES)
        if isinstance(one, Found)
    )
    seconds = time.perf_counter() - begun
    grown = (process.memory_info().rss - before) / 1e6
    return {"files": read, "per_second": round(read / seconds), "grown_mb": round(grown, 1)}


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--files", type=int, default=1_000_000, help="files of the cohort")
    parser.add_argument("--whole", action="store_true", help="run the batch to its end")
    parser.add_argument("--one-in", type=int, default=1000, help="studies of which one is CT")
    parser.add_argument("--walked", type=int, default=100_000, help="headers of the walk")
    parser.add_argument("--studies", type=int, help="analyse so many to the end instead")
    parser.add_argument("--keep", type=Path, help="folder of theirs, to go on in a later call")
    parser.add_argument("--seconds", type=float, default=3e4, help="for this call, about")
    parser.add_argument("--shape", default="256,256,60", help="columns, rows, slices of these")
    given = parser.parse_args()
    if given.studies:
        x, y, z = (int(n) for n in given.shape.split(","))
        with tempfile.TemporaryDirectory() as name:
            place = given.keep or Path(name)
            rate = whole(place, given.studies, (x, y, z), given.seconds)
        print_json(rate) if given.json else print(rate)
        return
    if given.whole:
        with tempfile.TemporaryDirectory() as name:
            studies = write_cohort(Path(name), given.files, one_in=given.one_in)
            ended = to_the_end(Path(name) / "cohort", Path(name) / "out", studies, given.one_in)
        print_json(ended) if given.json else print(ended)
        return
    with tempfile.TemporaryDirectory() as name:
        studies = write_cohort(Path(name), given.files)
        told: dict[str, Any] = {
            "studies": studies,
            "files": studies * SLICES,
            "first_result_seconds": round(
                first_result(Path(name) / "cohort", Path(name) / "out"), 2
            ),
            "walk": walk(Path(name) / "cohort", given.walked),
        }
    if given.json:
        print_json(told)
    else:
        print(
            f"{told['files']:,} files: first result after {told['first_result_seconds']} s; "
            f"{told['walk']['per_second']:,} headers per second, "
            f"{told['walk']['grown_mb']} MB more for {told['walk']['files']:,} of them"
        )


if __name__ == "__main__":
    main()
