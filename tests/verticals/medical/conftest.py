"""Series to load: small phantoms written as DICOM, odd variants of them, and real ones."""

from __future__ import annotations

import fcntl
import os
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from medical.chests import dicom_of

from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import Faults

SHARED = Path(__file__).resolve().parents[4] / "shared" / "dicom"

SMALL = {"shape": (36, 30, 10), "spacing": (9.0, 8.0, 5.0), "noise_hu": 5.0}

Write = Callable[..., Path]
Edit = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small phantom series: ``write(name, tilt=..., compression=..., missing=...)``."""

    def write(name: str = "series", **options: Any) -> Path:
        folder = tmp_path / name
        faults = Faults(
            missing=options.pop("missing", ()),
            duplicated=options.pop("duplicated", ()),
            shuffled=options.pop("shuffled", False),
        )
        compression = options.pop("compression", "none")
        series = options.pop("series", 1)
        phantom = Phantom(**{**SMALL, **options})
        return dicom_of(phantom, folder, compression, faults, series)

    return write


@pytest.fixture
def edit() -> Edit:
    """Change attributes of files: ``edit(folder, lambda image, k: ...)``, k counts the files."""

    def edit(where: Path, change: Callable[[pydicom.Dataset, int], None]) -> None:
        files = sorted(where.glob("*.dcm")) if where.is_dir() else [where]
        for k, path in enumerate(files):
            image = pydicom.dcmread(path)
            change(image, k)
            image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
            image.save_as(path, enforce_file_format=True)

    return edit


@pytest.fixture
def expected() -> Callable[..., np.ndarray]:
    """The voxels that the small phantom must load as: (z, y, x) HU."""

    def expected(**options: Any) -> np.ndarray:
        return _rendered(Phantom(**{**SMALL, **options})).copy()

    return expected


@cache
def _rendered(phantom: Phantom) -> np.ndarray:
    slices = [phantom.slice_hu(k) for k in range(phantom.shape[2])]
    return np.clip(np.rint(np.stack(slices)), -1024, 3071).astype(np.int16)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpack a real series once for all processes of a run: ``real("ge-head-ct-28")``."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def real(name: str) -> Path:
        archive = SHARED / f"{name}.tar.xz"
        if not archive.exists():
            pytest.skip(f"{archive} is absent: real series are kept beside the project")
        folder = root / "real" / name
        folder.parent.mkdir(exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                with tarfile.open(archive) as packed:
                    packed.extractall(folder.with_suffix(".part"), filter="data")
                folder.with_suffix(".part").rename(folder)
        return folder

    return real


@pytest.fixture(scope="session")
def pydicom_data() -> Callable[[str], Path]:
    """A test file that comes with pydicom or pydicom-data."""
    extra = pytest.importorskip("data_store", reason="pydicom-data is not installed")
    folders = [
        Path(pydicom.__file__).parent / "data" / "test_files",
        Path(extra.__file__).parent / "data",
    ]

    def pydicom_data(name: str) -> Path:
        found = [folder / name for folder in folders if (folder / name).exists()]
        assert found, name
        return found[0]

    return pydicom_data
