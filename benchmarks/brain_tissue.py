"""White and grey matter by a MeshNet folder, held against the tissue maps of a labelled T1.

    python benchmarks/brain_tissue.py MESHNET_FOLDER DATA_FOLDER [--backend auto] [--json]

DATA_FOLDER holds the MNI152 template as the package nilearn carries it in ``datasets/data``:
``mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz`` (Fonov et al., NeuroImage 2011). A
voxel is grey or white matter where that map is the larger one and at least half of its largest
value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from head import parser_of, print_found

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))


def read(path: Path) -> Any:
    """A NIfTI file as a volume."""
    import numpy as np
    import SimpleITK as sitk

    from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

    image: Any = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image).astype(np.float32)
    x, y, z = image.GetSpacing()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * (x, y, z)
    affine[:3, 3] = image.GetOrigin()
    rows, columns = voxels.shape[1:]
    facts = SeriesFacts("template", "MR", "", rows, columns, (x, y, z), len(voxels))
    return Volume(voxels, affine, Verdict(), facts)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Volumes in mL and Dice by tissue."""
    import numpy as np

    from plinth.engine import Engine
    from plinth.verticals.medical.networks.analysis import segment, window_of
    from plinth.verticals.medical.networks.load import load_network

    names = (f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm"))
    head, grey, white = (read(given.data / name) for name in names)
    network = window_of(load_network(given.network), given.memory_mb)
    with Engine(threads=1, backend=given.backend) as engine:
        engine.add(network.model, batch_range=(1, 1))
        found = engine.run(segment(head, network)).value
    g, w = grey.voxels / grey.voxels.max(), white.voxels / white.voxels.max()
    truth = {"White Matter": (w >= 0.5) & (w > g), "Grey Matter": (g >= 0.5) & (g >= w)}
    told: dict[str, Any] = {"window": found.plan["window"], "seconds": found.seconds}
    for value, name in network.recipe.labels.items():
        ours, theirs = found.labels == value, truth[name]
        told[name] = {
            "ml": round(float(np.count_nonzero(ours)) * head.voxel_volume_mm3 / 1000, 1),
            "ml_map": round(float(np.count_nonzero(theirs)) * head.voxel_volume_mm3 / 1000, 1),
            "dice": round(float(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())), 4),
        }
    return told


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("network", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--memory-mb", type=int, default=600)
    given = parser.parse_args()
    told = measure(given)
    print_found(told, given.json)


if __name__ == "__main__":
    main()
