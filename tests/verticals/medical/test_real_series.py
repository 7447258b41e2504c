"""Real series from real scanners, against independent readers where those are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.decode import CT_AIR, decode, padding_hu
from plinth.verticals.medical.dicom.discover import discover
from plinth.verticals.medical.dicom.geometry import stack
from plinth.verticals.medical.dicom.loader import DICOMLoader, load_volume
from plinth.verticals.medical.volumes.volume import Volume

Real = Callable[[str], Path]


def slices(folder: Path) -> list[pydicom.Dataset]:
    """The images below a folder, sorted by projection on the normal."""
    images = []
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "DIRFILE":
            images.append(pydicom.dcmread(path))
    row, column = np.reshape(images[0].ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(row, column)
    return sorted(images, key=lambda image: float(np.dot(place(image), normal)))


def place(image: pydicom.Dataset) -> np.ndarray:
    return np.array([float(str(value)) for value in image.ImagePositionPatient])


def hu(image: pydicom.Dataset) -> np.ndarray:
    return image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)


@pytest.mark.parametrize(
    "name",
    ["philips-ct-s2010-28x5mm", "philips-ct-tilt-s2010", "ge-head-ct-28", "t1-mr-384"],
)
def test_every_slice_has_the_values_that_simpleitk_reads(real: Real, name: str) -> None:
    """SimpleITK's own reader is the judge of each image, whatever the stack's geometry."""
    sitk = pytest.importorskip("SimpleITK")
    (series,) = discover(real(name))
    frames = stack(series.frames).frames[:: max(1, len(series.frames) // 40)]
    values = decode(frames)
    for frame, ours in zip(frames, values, strict=True):
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(frame.header.source.path)))[0]
        padding = padding_hu(frame)
        if padding is not None:
            theirs = np.where(theirs == padding[0], CT_AIR, theirs)
        assert np.array_equal(ours, theirs)


def best_match(volume: Volume, image: pydicom.Dataset) -> tuple[int, int, int]:
    """Shift in pixels (z, y, x) at which an image fits best around its true place."""
    i, j, k = np.rint(volume.lps_to_index(place(image))).astype(int)
    source = hu(image)[100:400, 100:400]
    scores = {}
    for dz in (-1, 0, 1):
        for dy in (-2, -1, 0, 1, 2):
            for dx in (-1, 0, 1):
                z, y, x = k + dz, j + dy + 100, i + dx + 100
                if not 0 <= z < volume.shape[0]:
                    continue
                part = volume.voxels[z, y : y + 300, x : x + 300]
                scores[dz, dy, dx] = float(np.abs(part - source).mean())
    return min(scores, key=scores.__getitem__)


def test_a_regular_series_equals_simpleitk(real: Real) -> None:
    sitk = pytest.importorskip("SimpleITK")
    folder = real("philips-ct-s2010-28x5mm")
    volume = load_volume(folder, strict=True)
    reader = sitk.ImageSeriesReader()
    inner = folder / "S21570" / "S2010"
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(inner)))
    image = reader.Execute()
    assert volume.verdict.ok
    assert volume.voxels.dtype == np.int16
    assert np.array_equal(volume.voxels, sitk.GetArrayFromImage(image))
    assert volume.spacing == pytest.approx(image.GetSpacing())
    for index in ((0, 0, 0), (511, 511, 27), (100, 300, 14)):
        assert volume.index_to_lps(index) == pytest.approx(
            image.TransformIndexToPhysicalPoint(index), abs=1e-3
        )


def test_a_tilted_series_lies_where_its_slices_lie(real: Real) -> None:
    folder = real("philips-ct-tilt-s2010")
    volume = load_volume(folder)
    assert volume.verdict.status == "resampled_tilt"
    assert volume.verdict.issues[0].mm == pytest.approx(42.04, abs=0.01)
    assert volume.direction.T @ volume.direction == pytest.approx(np.eye(3), abs=1e-6)
    images = slices(folder)
    for k in (0, 26, 53):
        index = volume.lps_to_index(place(images[k]))
        assert index[2] * volume.spacing[2] == pytest.approx(k * volume.spacing[2], abs=0.01)
        assert best_match(volume, images[k]) == (0, 0, 0)
        assert abs(index[1] - round(index[1])) * volume.spacing[1] < 0.5
    with pytest.raises(InputError, match="gantry tilt"):
        load_volume(folder, strict=True)


def test_tilt_and_uneven_steps_together(real: Real) -> None:
    folder = real("ge-head-ct-28")
    volume = load_volume(folder)
    assert volume.verdict.status == "resampled_tilt_spacing"
    kinds = {issue.kind: issue for issue in volume.verdict.issues}
    assert kinds["tilt"].mm == pytest.approx(48.21, abs=0.01)
    assert "1.081 to 6.999 mm" in kinds["spacing"].message
    images = slices(folder)
    for k in (0, 27):
        index = volume.lps_to_index(place(images[k]))
        assert index[2] == pytest.approx(round(index[2]), abs=1e-3)
        assert best_match(volume, images[k]) == (0, 0, 0)
    assert volume.voxels.min() == -1024
    with pytest.raises(InputError) as refusal:
        load_volume(folder, strict=True)
    assert "18.50 degrees" in str(refusal.value)


def test_long_decimal_strings_and_oblong_pixels(real: Real) -> None:
    folder = real("t1-mr-384")
    volume = load_volume(folder, strict=True)
    assert volume.shape == (384, 384, 274)
    assert volume.spacing == pytest.approx((0.699988, 0.666667, 0.666667), abs=1e-5)
    paths = sorted(folder.rglob("*.dcm"))
    for path in paths[:: len(paths) // 7]:
        image = pydicom.dcmread(path)
        k = volume.series.sop_instance_uids.index(image.SOPInstanceUID)
        assert volume.index_to_lps([0, 0, k]) == pytest.approx(place(image), abs=0.01)
        assert np.array_equal(volume.voxels[k], image.pixel_array)
        row, column = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
        far = place(image) + row * 273 * 0.699987828731537 + column * 383 * 0.666666686534882
        assert volume.index_to_lps([273, 383, k]) == pytest.approx(far, abs=0.01)


def test_a_model_ready_tensor_of_a_real_head(real: Real) -> None:
    loaded = DICOMLoader((256, 256, 32), spacing=(1.0, 1.0, 4.0)).load(real("ge-head-ct-28"))
    assert np.linalg.norm(loaded.affine[:3, :3], axis=0) == pytest.approx((1.0, 1.0, 4.0))
    labels = (loaded.tensor[0] > 0.99).numpy()
    native = loaded.to_native(labels)
    bone = loaded.native.voxels > 240
    dice = 2 * (native & bone).sum() / (native.sum() + bone.sum())
    assert dice > 0.85
