"""A cohort of very many files: how long until the first result, and how fast the walk is.

    python benchmarks/dicom_cohort.py [--files 1000000] [--walked 100000] [--json]
    python benchmarks/dicom_cohort.py --studies 200 [--shape 256,256,60] [--json]

With ``--studies`` so many studies are analysed to the end, with the outputs that are on by default,
and told are studies per hour. Without, it writes small CT studies of 24 images each, every one
with identifiers of its own, runs ``plinth batch medical`` over them in process until the first
result stands on disk, and then reads ``--walked`` headers to measure the walk. A million files take
4 GB of disk.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
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


EXTENT = (336.0, 279.0, 300.0)


def write_cohort(root: Path, files: int, shape: tuple[int, int, int] = (40, 34, SLICES)) -> int:
    """Studies below ``root``, ten to a patient's folder; returns how many.

    Args:
        root: an empty folder.
        files: at least so many files.
        shape: columns, rows, slices of each study.
    """
    x, y, z = (extent / n for extent, n in zip(EXTENT, shape, strict=True))
    write_series(Phantom(shape=shape, spacing=(x, y, z)), root / "pattern")
    pattern = [path.read_bytes() for path in sorted((root / "pattern").glob("*.dcm"))]
    for path in (root / "pattern").iterdir():
        path.unlink()
    (root / "pattern").rmdir()
    studies = -(-files // shape[2])
    for study in range(studies):
        folder = root / "cohort" / f"{study // 10:05d}" / f"{study:06d}"
        folder.mkdir(parents=True)
        patient, uid = f"P-{study:010d}".encode(), f"{10_000 + study}".encode()
        for k, data in enumerate(pattern):
            data = data.replace(b"PHANTOM-0007", patient).replace(b"2.25.", uid)
            (folder / f"{k:03d}.dcm").write_bytes(data)
    return studies


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


def whole(cohort: Path, out: Path, studies: int) -> dict[str, float]:
    """Analyse a cohort to the end."""
    done: list[str] = []

    def note(step: Progress) -> None:
        if step.kind == "finished":
            assert step.state == "done", step
            done.append(step.item)

    workers = len(os.sched_getaffinity(0))
    with Engine(backend="auto", compute_workers=workers) as engine:
        begun = time.perf_counter()
        Batch(CtAnalysis(), engine, cohort, out, processes=workers, on_progress=note).run()
        seconds = time.perf_counter() - begun
    assert len(done) == studies, f"{len(done)} of {studies}"
    each = seconds / studies
    return {"seconds_each": round(each, 3), "studies_per_hour": round(3600 / each)}


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
    parser.add_argument("--walked", type=int, default=100_000, help="headers of the walk")
    parser.add_argument("--studies", type=int, help="analyse so many to the end instead")
    parser.add_argument("--shape", default="256,256,60", help="columns, rows, slices of these")
    given = parser.parse_args()
    if given.studies:
        x, y, z = (int(n) for n in given.shape.split(","))
        with tempfile.TemporaryDirectory() as name:
            write_cohort(Path(name), given.studies * z, (x, y, z))
            rate = whole(Path(name) / "cohort", Path(name) / "out", given.studies)
        print_json(rate) if given.json else print(rate)
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
