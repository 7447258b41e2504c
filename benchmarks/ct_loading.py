"""How long a CT series takes from files to a volume, and how much memory, beside SimpleITK.

    python benchmarks/ct_loading.py [--slices 200] [--size 512] [--runs 5] [--cores 1] [--json]
    python benchmarks/ct_loading.py --cores 2 --compression none jpeglossless jpeg2000

The chest phantom is written as DICOM CT once per transfer syntax. Each load runs in a process of
its own, the loaders in turn, from finding the files to the last voxel; all must give the
same voxels, spacing and origin, or the run fails. Seconds and CPU seconds are medians; memory is
what the process holds at most, and how much of it was added after the imports. Each process may
use ``--cores`` CPUs; the page cache is warm.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

EXTENT = (348.0, 348.0, 208.0)
LOADERS = ("plinth", "plinth tensor", "simpleitk")
"""``plinth tensor`` also resamples to 256 x 256 x 128 and windows, and keeps the volume."""


Loaded = tuple[npt.NDArray[Any], tuple[float, ...], tuple[float, ...], object]
"""Voxels, spacing, origin, and the image that owns the voxels."""


def resident_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (at most so far) of this process, MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def load(loader: str, folder: str, cores: int) -> dict[str, Any]:
    """Load the series once in this process; what it took and what came out."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if loader == "plinth":
        from plinth.verticals.medical.dicom.loader import load_volume

        def read() -> Loaded:
            volume = load_volume(folder, strict=True)
            return volume.voxels, volume.spacing, volume.origin, volume
    elif loader == "plinth tensor":
        from plinth.verticals.medical.dicom.loader import DICOMLoader

        def read() -> Loaded:
            loaded = DICOMLoader(strict=True).load(folder)
            volume = loaded.native
            return volume.voxels, volume.spacing, volume.origin, loaded
    else:
        sitk: Any = importlib.import_module("SimpleITK")
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(cores)

        def read() -> Loaded:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
            image = reader.Execute()
            voxels = sitk.GetArrayViewFromImage(image)
            return voxels, image.GetSpacing(), image.GetOrigin(), image

    before = resident_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    voxels, spacing, origin, _image = read()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "import_mb": before,
        "peak_mb": resident_mb("VmHWM"),
        "volume_mb": voxels.nbytes / 1e6,
        "dtype": str(voxels.dtype),
        "sha256": hashlib.sha256(voxels.astype("<i2").tobytes()).hexdigest(),
        "place": [*spacing, *origin],
    }


def compare(given: argparse.Namespace, compression: Any) -> dict[str, dict[str, Any]]:
    """Write the series in one transfer syntax, load it in turn, and take medians."""
    from plinth.verticals.medical.phantom.chest import Phantom
    from plinth.verticals.medical.phantom.dicom import write_series

    x, y, z = (
        extent / n for extent, n in zip(EXTENT, (*[given.size] * 2, given.slices), strict=True)
    )
    phantom = Phantom(shape=(given.size, given.size, given.slices), spacing=(x, y, z))
    runs: dict[str, list[dict[str, Any]]] = {loader: [] for loader in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        written: Any = "none" if compression in PACKED else compression
        files = write_series(phantom, Path(folder), compression=written)
        if compression in PACKED:
            for path in files:
                pack(path, *PACKED[compression])
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        (Path(folder) / "truth.json").unlink()
        for _ in range(given.runs):
            for loader in LOADERS:
                runs[loader].append(in_own_process(loader, folder, given.cores))
    check_equal([one for made in runs.values() for one in made])
    return {
        loader: medians(made) | {"files_mb": round(megabytes, 1)} for loader, made in runs.items()
    }


PACKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeglossless": (
        "1.2.840.10008.1.2.4.70",
        "jpeg8_encode",
        {"lossless": True, "predictor": 1, "bitspersample": 16},
    ),
    "jpeg2000": (
        "1.2.840.10008.1.2.4.90",
        "jpeg2k_encode",
        {"codecformat": "j2k", "reversible": True, "level": 0},
    ),
}
"""Transfer syntaxes that the phantom is not written in: UID, and imagecodecs' encoder."""


def pack(path: Path, syntax: str, encoder: str, options: dict[str, Any]) -> None:
    """Store an uncompressed image in another transfer syntax, in place."""
    import pydicom
    from pydicom.encaps import encapsulate

    image = pydicom.dcmread(path)
    encode = getattr(importlib.import_module("imagecodecs"), encoder)
    image.PixelData = encapsulate([encode(image.pixel_array, **options)])
    image["PixelData"].is_undefined_length = True
    image["PixelData"].VR = "OB"
    image.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    image.save_as(path)


def in_own_process(loader: str, folder: str, cores: int) -> dict[str, Any]:
    """One load in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, __file__, "--loader", loader, "--folder", folder, "--cores", str(cores)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cores)},
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def check_equal(runs: list[dict[str, Any]]) -> None:
    """Every run gave the same voxels at the same place."""
    if len({run["sha256"] for run in runs}) != 1:
        raise SystemExit("the loaders disagree about the voxels")
    if not np.allclose([run["place"] for run in runs], runs[0]["place"], atol=1e-3):
        raise SystemExit("the loaders disagree about spacing or origin")


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The middle of each measure."""

    def middle(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    return {
        "seconds": round(middle("seconds"), 3),
        "cpu_seconds": round(middle("cpu_seconds"), 3),
        "peak_mb": round(middle("peak_mb")),
        "added_mb": round(statistics.median(run["peak_mb"] - run["import_mb"] for run in runs)),
        "volume_mb": round(runs[0]["volume_mb"], 1),
        "dtype": runs[0]["dtype"],
    }


def share(part: float, whole: float) -> str:
    """One over the other; a dash where the other is too small to be measured."""
    return f"{part / whole:.2f}" if whole else "-"


def show(told: dict[str, dict[str, dict[str, Any]]], given: argparse.Namespace) -> None:
    """Print one table."""
    from rich.console import Console
    from rich.table import Table

    columns = (
        "files",
        "loader",
        "seconds",
        "CPU seconds",
        "ratio",
        "peak MB",
        "added MB",
        "/ volume",
    )
    table = Table(*columns, title=f"{given.slices} slices of {given.size} x {given.size}")
    for compression, loaders in told.items():
        reference = loaders["simpleitk"]
        for loader, one in loaders.items():
            table.add_row(
                f"{compression}, {one['files_mb']:g} MB",
                loader,
                f"{one['seconds']:.2f}",
                f"{one['cpu_seconds']:.2f}",
                f"{share(one['seconds'], reference['seconds'])}, "
                f"{share(one['cpu_seconds'], reference['cpu_seconds'])}",
                f"{one['peak_mb']}",
                f"{one['added_mb']}",
                share(one["added_mb"], one["volume_mb"]),
            )
    console = Console(width=100)
    console.print(table)
    console.print(
        "ratio: wall, CPU seconds over SimpleITK's; / volume: added memory over int16 voxels"
    )


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="CPUs of a loader's process")
    parser.add_argument(
        "--compression",
        nargs="+",
        choices=["none", "implicit", "rle", "jpegls", *PACKED],
        default=["none", "jpegls"],
    )
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loader:
        print(json.dumps(load(given.loader, given.folder, given.cores)))
        return
    told = {compression: compare(given, compression) for compression in given.compression}
    if given.json:
        print_json({"slices": given.slices, "size": given.size, "loads": told})
    else:
        show(told, given)


if __name__ == "__main__":
    main()
