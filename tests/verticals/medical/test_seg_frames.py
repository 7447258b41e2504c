"""Frames that are put together as bytes are those that highdicom writes, element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.output import dicom_seg, seg_frames, standard_tables
from plinth.verticals.medical.output.derived import made_by
from plinth.verticals.medical.output.standard_tables import Modules, read_in_parts
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series
from plinth.verticals.medical.volumes.labelled import slices_with

OWN = ("UID", "Date", "Time")
"""What is new in every file."""


def segment(number: int) -> Any:
    """A description of a segment."""
    import highdicom
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=f"part {number}",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.Lung,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="test", version="1", family=codes.DCM.ArtificialIntelligence
        ),
    )


def _told(dataset: pydicom.Dataset) -> list[Any]:
    """Elements with what they hold, but for what is new in every file."""
    found: list[Any] = []
    for element in dataset:
        if element.VR == "SQ":
            found.append((element.tag, [_told(item) for item in element.value]))
        elif element.keyword.startswith("Referenced") or not element.keyword.endswith(OWN):
            found.append((element.tag, element.VR, element.value))
    return found


@pytest.mark.parametrize(
    ("columns", "found", "frames"), [(20, [2, 4], 8 + 7), (21, [2, 4], 8 + 7), (21, [4], 7)]
)
def test_frames_are_those_of_highdicom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, found: list[int], frames: int
) -> None:
    phantom = Phantom(shape=(columns, 11, 9), spacing=(7.3, 9.1, 1.7))
    write_series(phantom, tmp_path / "series")
    volume = load_volume(tmp_path / "series")
    labels = np.random.default_rng(1).integers(0, 5, volume.shape).astype(np.uint8)
    labels[2], labels[4] = 0, 2  # a slice without a segment, and one with a single one
    values = np.array(found, np.uint8)
    segments = [segment(number) for number, _ in enumerate(found, 1)]
    calls = []

    def never(*given: object) -> bool:
        calls.append(given)
        return False

    given = (volume, labels, values, segments, made_by("test", 900, "test"))
    dicom_seg.save_seg(*given, tmp_path / "own.dcm", "binary")
    monkeypatch.setattr(dicom_seg, "matched", never)
    dicom_seg.save_seg(*given, tmp_path / "library.dcm", "binary")
    assert len(calls) == 1
    own, library = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in ("own", "library"))
    assert np.array_equal(own.pixel_array, library.pixel_array)
    assert len(own.PixelData) == len(library.PixelData)
    del own.PixelData, library.PixelData  # highdicom fills an odd length up with "0"
    assert _told(own) == _told(library)
    assert own.NumberOfFrames == frames


def test_slices_that_hold_a_label() -> None:
    labels = np.zeros((3, 2, 2), np.uint8)
    labels[1, 0, 0], labels[2, 1, 1] = 7, 9
    held = slices_with(labels, np.array([7, 8, 9], np.uint8))
    assert held.tolist() == [[False, True, False], [False] * 3, [False, False, True]]


def test_tables_of_the_standard_are_those_that_highdicom_reads_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length of a module, and wherever a block of the file ends."""
    monkeypatch.setattr(standard_tables, "BLOCK", 997)
    names = [f"module-{n}" for n in range(40)]
    whole = {
        name: [{"keyword": "K" * (n * 7 + 1), "path": ["A"], "type": "1"}] * n
        for n, name in enumerate(names)
    }
    path = tmp_path / "map.json"
    path.write_text(json.dumps(whole, indent=2))
    modules = Modules(path)
    assert list(modules) == names
    assert all(modules[name] == whole[name] for name in names)
    assert "module-40" not in modules
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="by module"):
        Modules(path)
    assert read_in_parts()


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("slices", [1, 9])
def test_rounded_directions_and_single_slices_read_back_where_they_lie(
    tmp_path: Path, kind: Any, slices: int
) -> None:
    """Directions of three digits are not orthogonal to the line that the slices lie on."""
    from highdicom.seg import segread

    shape, spacing = (22, 20, slices), (15.0, 12.0, 20.0)
    phantom = Phantom(shape=shape, spacing=spacing, rotation=(3.0, 7.0, -2.0))
    for path in write_series(phantom, tmp_path / "series"):
        image = pydicom.dcmread(path)
        image.Modality = "MR"  # so few and large voxels of a CT look like two scans in turn
        image.ImageOrientationPatient = [f"{v:.3f}" for v in image.ImageOrientationPatient]
        image.save_as(path)
    volume = load_volume(tmp_path / "series")
    labels = np.random.default_rng(1).integers(0, 2, volume.shape).astype(np.uint8)
    one = np.ones(1, np.uint8)
    path = tmp_path / "seg.dcm"
    dicom_seg.save_seg(volume, labels, one, [segment(1)], made_by("t", 900, "t"), path, kind)
    read = segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    affine = dicom_seg.highdicom_affine(volume)
    order = slice(None, None, int(np.sign(read.affine[:3, 0] @ affine[:3, 0])))
    assert np.array_equal(read.array[order], labels)
    assert np.allclose(np.abs(read.affine[:3, :3]), np.abs(affine[:3, :3]), atol=0.03)
    assert list(segread_places(path)) == pytest.approx(list(slice_places(volume)), abs=1e-3)


def segread_places(path: Path) -> list[float]:
    """All coordinates of a SEG's frames, by slice."""
    return sorted(value for place in seg_frames.places_in(path) for value in place)


def slice_places(volume: Any) -> list[float]:
    """All coordinates of a volume's slices."""
    index = np.array([[0, 0, k] for k in range(volume.shape[0])], float)
    return sorted(volume.index_to_lps(index).ravel().tolist())
