"""SUV by body weight against an independent implementation, on generated and on published headers.

    npm pack @cornerstonejs/calculate-suv && tar xzf cornerstonejs-calculate-suv-*.tgz
    python benchmarks/pet_suv.py --library package --cases 1000

Needs node. Of each generated PET series (tracer, dose, weight, times over midnight or not, Series
Time before or after the images, Philips' factors, several beds) the factors have to agree to
1e-6, or be refused by both. With ``--write`` the cases are kept for the tests, which need no node.
"""

from __future__ import annotations

import datetime
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from head import parser_of, print_json
from pydicom import Dataset

from plinth.engine import InputError
from plinth.verticals.medical.volumes.suv import suv_factor

Case = dict[str, Any]
KEPT = Path(__file__).resolve().parents[1] / "tests" / "verticals" / "medical" / "pet_factors.json"
ITEM = (
    *("RadionuclideTotalDose", "RadionuclideHalfLife", "RadiopharmaceuticalStartTime"),
    "RadiopharmaceuticalStartDateTime",
)
PHILIPS = {"SUVScaleFactor": 0x00, "ActivityConcentrationScaleFactor": 0x09}
ASK = """
const { calculateSUVScalingFactors } = require(process.argv[1]);
console.warn = () => {};
const cases = JSON.parse(require('fs').readFileSync(0, 'utf8'));
console.log(JSON.stringify(cases.map(instances => {
  try { return calculateSUVScalingFactors(instances).map(one => Number(one.suvbw)); }
  catch (error) { return null; }
})));
"""


def headers_of(instances: list[Case]) -> list[Dataset]:
    """What the library calls instances, as DICOM headers with private attributes."""
    return [_header(instance) for instance in instances]


def _header(instance: Case) -> Dataset:
    header, item = Dataset(), Dataset()
    for keyword, value in instance.items():
        if keyword in ITEM:
            setattr(item, keyword, value)
        elif keyword == "PhilipsPETPrivateGroup" and value:
            block = header.private_block(0x7053, "Philips PET Private Group", create=True)
            for name, offset in PHILIPS.items():
                if name in value:
                    block.add_new(offset, "DS", str(value[name]).strip())
        elif keyword == "GEPrivatePostInjectionDateTime":
            block = header.private_block(0x0009, "GEMS_PETD_01", create=True)
            block.add_new(0x0D, "DT", value)
        elif keyword != "PhilipsPETPrivateGroup":
            setattr(header, keyword, value)
    header.RadiopharmaceuticalInformationSequence = [item]
    return header


def generated(rng: random.Random) -> list[Case]:
    """One series as the library wants it."""
    half_life = rng.choice([6586.2, 6588.0, 1223.0, 4062.6, 76.4, 282_276.0])
    scan = datetime.datetime(2020, rng.randint(1, 12), rng.randint(1, 28))
    scan += datetime.timedelta(seconds=rng.randint(0, 86_399))
    uptake = rng.uniform(1, 3 * min(half_life, 9000.0))
    injected = scan - datetime.timedelta(seconds=uptake)
    # Without zeros after the point, which the library leaves out of fractions of a second.
    scan, injected = (at.replace(microsecond=rng.randint(10**5, 10**6 - 1))
                      for at in (scan, injected))  # fmt: skip
    late = rng.random() < 0.3
    series = scan + datetime.timedelta(hours=2) if late else scan
    # The library takes the day of Series Date where only the time of injection is there.
    whole = injected.date() != series.date() or rng.random() < 0.5 or half_life > 12 * 3600
    common: Case = {
        "SeriesDate": f"{series:%Y%m%d}",
        "SeriesTime": f"{series:%H%M%S.%f}",
        "PatientWeight": round(rng.uniform(3, 160), 1),
        "DecayCorrection": "START",
        "Units": rng.choice(["BQML", "BQML", "BQML", "CNTS", "GML"]),
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"],
        "RadionuclideTotalDose": round(rng.uniform(2e7, 8e8)),
        "RadionuclideHalfLife": half_life,
        "RadiopharmaceuticalStartTime": f"{injected:%H%M%S.%f}",
    }
    if whole:
        common["RadiopharmaceuticalStartDateTime"] = f"{injected:%Y%m%d%H%M%S.%f}"
    if common["Units"] == "CNTS":
        names = rng.choice([list(PHILIPS), list(PHILIPS)[:1], list(PHILIPS)[1:]])
        common["PhilipsPETPrivateGroup"] = {name: rng.uniform(1e-4, 5) for name in names}
        for name, value in common["PhilipsPETPrivateGroup"].items():
            common["PhilipsPETPrivateGroup"][name] = float(f"{value:.6g}")
    if late and rng.random() < 0.5:
        common["GEPrivatePostInjectionDateTime"] = f"{scan:%Y%m%d%H%M%S.%f}"
    beds = [scan + datetime.timedelta(seconds=120.0 * bed) for bed in range(rng.randint(1, 3))]
    rng.shuffle(beds)
    return [
        {**common, "AcquisitionDate": f"{at:%Y%m%d}", "AcquisitionTime": f"{at:%H%M%S.%f}"}
        for at in beds
    ]


def ours(instances: list[Case]) -> float | None:
    """The factor, ``None`` where it is refused."""
    headers = headers_of(instances)
    try:
        return suv_factor(headers, headers).value
    except InputError:
        return None


def theirs(library: Path, cases: list[list[Case]]) -> list[list[float] | None]:
    """The factors of the library, a list for each case."""
    done = subprocess.run(
        ["node", "-e", ASK, str(library.resolve())],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[float] | None] = json.loads(done.stdout)
    return found


def main() -> int:
    """Compare; 1 when a factor differs."""
    parser = parser_of(__doc__)
    parser.add_argument("--library", type=Path, required=True, help="the unpacked package")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--published", type=Path, help="folder of *-instances.json of its tests")
    parser.add_argument("--write", type=int, default=0, help="keep so many generated cases")
    given = parser.parse_args()
    rng = random.Random(7)
    cases = [generated(rng) for _ in range(given.cases)]
    names = [f"generated {number}" for number in range(given.cases)]
    for path in sorted(given.published.glob("*-instances.json")) if given.published else []:
        cases.append(json.loads(path.read_text()))
        names.append(path.name.removesuffix("-instances.json"))
    expected = theirs(given.library, cases)
    worst, wrong, refused = 0.0, 0, 0
    for name, instances, factors in zip(names, cases, expected, strict=True):
        found = ours(instances)
        if factors is None or found is None:
            refused += 1
            if (factors is None) != (found is None):
                wrong += 1
                print(f"{name}: here {found}, there {factors}")
            continue
        off = max(abs(found / factor - 1) for factor in factors)
        worst = max(worst, off)
        if off > 1e-6:
            wrong += 1
            print(f"{name}: here {found}, there {factors}")
    if given.write:
        kept = [*range(given.write), *range(given.cases, len(cases))]
        lines = [
            json.dumps({"name": names[n], "factors": expected[n], "instances": cases[n]})
            for n in kept
        ]
        KEPT.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    if given.json:
        print_json({"series": len(cases), "refused": refused, "worst": worst, "disagree": wrong})
    else:
        print(
            f"{len(cases)} series, {refused} refused by both, worst difference {worst:.1e}, "
            f"{wrong} disagree"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
