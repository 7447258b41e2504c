"""What becomes of each real series beside the project: right, limited or refused, as a table.

    python benchmarks/dicom_series.py [--series NAME ...] [--json]

Unpacks each archive of ``../shared/dicom`` and gives it to the CT analysis as a batch would,
without the nodule network. The table is the one of docs/medical.md ("Real series"); tests hold the
two against each other.
"""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from head import parser_of, print_json

from plinth.engine import InputError
from plinth.verticals.contract import Item, WithArtefacts
from plinth.verticals.medical import CtAnalysis
from plinth.verticals.medical.output.report import CtReport
from plinth.verticals.testing import feed

SHARED = Path(__file__).resolve().parents[2] / "shared" / "dicom"
SERIES = {
    "chest-ct-64": "chest CT, mass in the left upper lobe",
    "ct-abdomen-20": "abdomen CT, JPEG 2000, UIDs emptied",
    "ge-head-ct-28": "head CT, tilted gantry, uneven steps",
    "philips-ct-s2010-28x5mm": "quality phantom, CT",
    "philips-ct-tilt-s2010": "quality phantom, CT, tilted gantry",
    "chest-2-slices": "two single chest slices, no Modality",
    "t1-mr-384": "T1 of a head, oblique, oblong pixels",
}
"""Archive, and what is in it (``mr-brain1`` is no DICOM)."""
HEADINGS = ("series", "what it is", "geometry", "measured", "limited or refused")


@dataclass(frozen=True)
class Told:
    """What the product says of a series.

    Args:
        geometry: verdict, grid and values of the volume; empty where there is none.
        measured: the main numbers.
        limits: what is withheld, warned of or refused, in the product's own words.
        report: the whole of it, if there is one.
    """

    geometry: str
    measured: str
    limits: tuple[str, ...]
    report: CtReport | None

    def row(self, name: str) -> str:
        """A line of the table in Markdown."""
        cells = (f"`{name}`", SERIES[name], self.geometry, self.measured, "; ".join(self.limits))
        return f"| {' | '.join(cell or 'none' for cell in cells)} |"


def told_of(folder: Path) -> Told:
    """Give what is below a folder to the CT analysis.

    Args:
        folder: one series.
    """
    vertical = CtAnalysis()
    try:
        items = [one for one in vertical.survey(folder) if isinstance(one, Item)]
        request = vertical.load(items[0])
        (result,) = feed(vertical.infer([request]))
        if isinstance(result, InputError):
            raise result
    except InputError as error:
        why = error.message.rpartition(": ")[2]
        return Told("", "", (f"refused (`{error.reason}`): {why}",), None)
    assert isinstance(result, WithArtefacts)
    report, volume = result.response, request.volume
    z, y, x = volume.shape
    spacing = " × ".join(f"{step:.4g}" for step in volume.spacing)
    grid = f"`{volume.verdict.status}`: {z} slices of {x} × {y}, {spacing} mm"
    found = {one.key: one for one in report.findings if one.value is not None}
    numbers = [
        f"{title} {_short(found[key].value)} {found[key].unit}"
        for key, title in MAIN.items()
        if key in found
    ]
    absent = [one.title.partition(", ")[2] for one in report.findings if one.value is None]
    told = ", ".join(dict.fromkeys(absent))
    limits = [f"withheld: {told}"] if LUNGS in found and told else []
    return Told(grid, ", ".join(numbers), (*limits, *report.warnings), report)


def _short(value: float | None) -> str:
    """Four digits, and no powers of ten."""
    assert value is not None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


LUNGS = "lungs_volume"


MAIN = {
    LUNGS: "lungs",
    "lungs_density": "their density",
    "airway_volume": "airway",
    "body_volume": "body",
    "bone_volume": "bone",
    "tissue_noise": "noise",
}


def unpacked(name: str, into: Path) -> Path:
    """The folder of an archive's files."""
    with tarfile.open(SHARED / f"{name}.tar.xz") as packed:
        packed.extractall(into / name, filter="data")
    return into / name


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: told_of(unpacked(name, Path(folder))) for name in given.series}
    if given.json:
        print_json({name: {**asdict(told), "report": None} for name, told in found.items()})
        return
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name, told in found.items():
        print(told.row(name))


if __name__ == "__main__":
    main()
