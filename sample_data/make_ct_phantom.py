"""Make the CT phantom: the committed sample, or a series of any size and with any fault.

python sample_data/make_ct_phantom.py                      # remake sample_data/ct_phantom
python sample_data/make_ct_phantom.py /tmp/full --full     # 200 slices of 512 x 512
python sample_data/make_ct_phantom.py /tmp/odd --tilt 15 --missing 10 --compression rle
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import SYNTAX, Faults, write_series


def main(arguments: list[str] | None = None) -> None:
    """Write the series that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parent / "ct_phantom"
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    parser.add_argument("--full", action="store_true", help="200 slices of 512 x 512")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm")
    parser.add_argument("--rotation", type=float, nargs=3, metavar=("X", "Y", "Z"), help="degrees")
    parser.add_argument("--tilt", type=float, default=0.0, help="degrees of gantry tilt")
    parser.add_argument("--noise", type=float, help="HU")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--missing", type=int, nargs="*", default=[], help="slices left out")
    parser.add_argument("--duplicate", type=int, nargs="*", default=[], help="slices twice")
    parser.add_argument("--shuffle", action="store_true", help="names and numbers in disorder")
    parser.add_argument("--compression", choices=list(SYNTAX), default="jpegls")
    given = parser.parse_args(arguments)
    phantom = Phantom.full() if given.full else Phantom()
    changes = {
        "shape": given.shape and tuple(given.shape),
        "spacing": given.spacing and tuple(given.spacing),
        "rotation": given.rotation and tuple(given.rotation),
        "noise_hu": given.noise,
    }
    present = {name: value for name, value in changes.items() if value is not None}
    phantom = replace(phantom, seed=given.seed, tilt=given.tilt, **present)
    faults = Faults(tuple(given.missing), tuple(given.duplicate), given.shuffle)
    files = write_series(phantom, given.folder, compression=given.compression, faults=faults)
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB, in {given.folder}")


if __name__ == "__main__":
    main()
