"""The lungs of the CT analysis, held against lung labels of a real scan.

    python benchmarks/lung_labels.py IMAGES LABELS [--right 12 13 14] [--left 9 10 11] [--json]

IMAGES is a folder of DICOM, LABELS a label map on the grid of the images, in a format that
SimpleITK reads; a label is the lower byte of its values. The defaults are those of the Chest
Imaging Platform, whose repository carries a chest of 79 slices with labels of the lungs' thirds:
``Testing/Data/Input`` of ``https://github.com/acil-bwh/ChestImagingPlatform``, ``ct-64Dicom`` and
``lm-64.nrrd``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from head import parser_of, print_found

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Volumes in mL and Dice of each lung and of both."""
    import numpy as np
    import SimpleITK as sitk

    from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT
    from plinth.verticals.medical.dicom.loader import load_volume
    from plinth.verticals.medical.steps import find_by_rules

    volume = load_volume(given.images)
    analysis = find_by_rules(volume, 3.0, None).analysis
    read: Any = sitk.ReadImage(str(given.labels))
    labels = sitk.GetArrayFromImage(read) & 255
    if labels.shape != volume.shape:
        raise SystemExit(f"the labels are {labels.shape}, the images {volume.shape}")
    ours = {"right lung": [LUNG_RIGHT], "left lung": [LUNG_LEFT]}
    theirs = {"right lung": given.right, "left lung": given.left}
    ours["both lungs"] = ours["right lung"] + ours["left lung"]
    theirs["both lungs"] = theirs["right lung"] + theirs["left lung"]
    told: dict[str, Any] = {"grid": str(volume.shape), "spacing_mm": str(volume.spacing)}
    for name in ours:
        one, other = np.isin(analysis.labels, ours[name]), np.isin(labels, theirs[name])
        told[name] = {
            "ml": round(float(one.sum()) * volume.voxel_volume_mm3 / 1000, 1),
            "ml_labelled": round(float(other.sum()) * volume.voxel_volume_mm3 / 1000, 1),
            "dice": round(float(2 * (one & other).sum() / (one.sum() + other.sum())), 4),
        }
    return told


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--right", type=int, nargs="+", default=[12, 13, 14])
    parser.add_argument("--left", type=int, nargs="+", default=[9, 10, 11])
    given = parser.parse_args()
    print_found(measure(given), given.json)


if __name__ == "__main__":
    main()
