"""Faults that DICOM folders have, generated: is a loaded value ever wrong, are patients ever mixed?

    python benchmarks/dicom_faults.py [--series 500] [--folders 100000] [--seed 7] [--json]

``--series``: small series with a fault of encoding, geometry or values. Each must load as two
independent readers read it (pydicom; SimpleITK where it knows the encoding), slice by slice at
its place, or be refused for the reason that is true of its fault.

``--folders``: folders of two or three stacks whose identifiers are empty, equal or swapped, all
but at least one. No series that can be loaded may hold images of two stacks.
"""

from __future__ import annotations

import importlib
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from head import parser_of, print_json
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from plinth.engine import InputError  # noqa: E402
from plinth.verticals.medical import load_volume  # noqa: E402
from plinth.verticals.medical.dicom.discover import series_of  # noqa: E402
from plinth.verticals.medical.dicom.header import Frame, read_frames  # noqa: E402
from plinth.verticals.medical.phantom.chest import Phantom  # noqa: E402
from plinth.verticals.medical.phantom.dicom import datasets, write_series  # noqa: E402
from plinth.verticals.medical.source import Source  # noqa: E402

SHAPE, SPACING = (48, 40, 6), (7.0, 6.0, 30.0)
Array = npt.NDArray[Any]

# -- identifiers -------------------------------------------------------------------------------
NAMES = ("patient", "study_uid", "series_uid", "frame_of_reference")
FOLDERS = 3


def templates(root: Path) -> list[Frame]:
    """One real image in each of FOLDERS folders, as the loader reads it."""
    write_series(Phantom(shape=(4, 4, 1), spacing=(70.0, 60.0, 5.0)), root / "0")
    found = []
    for n in range(FOLDERS):
        folder = root / str(n)
        if n:
            shutil.copytree(root / "0", folder)
        found += read_frames(Source(folder / "slice_0001.dcm"))
    return found


@dataclass(frozen=True)
class Image:
    """An image and the stack it truly belongs to."""

    frame: Frame
    stack: int


def mixed_folders(chance: random.Random, given: list[Frame]) -> list[Image]:
    """Images of two or three stacks whose identifiers tell them apart by one means at least.

    Args:
        chance: what is drawn.
        given: from :func:`templates`.
    """
    count = chance.randint(2, FOLDERS)
    true = chance.choice([*NAMES, "folder", "numbers"])
    kept = {true} | {name for name in NAMES if chance.random() < 0.2}
    by_slice = true in NAMES  # else nothing would tell single slices apart
    values = {name: _corrupted(chance, name, count, name in kept, by_slice) for name in NAMES}
    apart = true == "folder" or (true != "numbers" and chance.random() < 0.5)
    numbered = true == "numbers" or chance.random() < 0.7
    higher = chance.choice((0.25, 0.5, 1.0))  # mm, of a step of 5
    images = []
    for stack in range(count):
        base = given[stack if apart else 0]
        size, shift = chance.randint(3, 8), higher * (stack + 1)
        for k in range(size):
            named: dict[str, Any] = {name: values[name](stack, k) for name in NAMES}
            header = replace(
                base.header,
                sop_uid="" if chance.random() < 0.05 else f"2.25.{stack + 1}{k:04d}",
                instance_number=k + 1 if numbered else None,
                origin="",
                **named,
            )
            place = (-100.0, -100.0, 5.0 * k + shift)
            images.append(Image(replace(base, header=header, position=place), stack))
    chance.shuffle(images)
    return images


def _corrupted(
    chance: random.Random, name: str, count: int, keep: bool, by_slice: bool
) -> Callable[[int, int], str]:
    """An identifier by stack and slice: as it should be, empty, equal, or swapped in places."""
    own = [f"1.2.{name}.{stack}" for stack in range(count)]
    how = "own" if keep else chance.choice(["empty", "equal", "swapped", "one empty"])
    odd, turn = chance.randrange(7), chance.randrange(count)
    given: dict[str, Callable[[int, int], str]] = {
        "own": lambda stack, k: own[stack],
        "empty": lambda stack, k: "",
        "equal": lambda stack, k: own[0],
        "one empty": lambda stack, k: "" if stack == 0 else own[0],
        "swapped": lambda stack, k: own[(stack + (k % 7 == odd if by_slice else turn)) % count],
    }
    return given[how]


def wrong_merges(images: list[Image]) -> list[str]:
    """Series that could be loaded and hold images of two stacks; and ids that repeat."""
    stacks = {id(image.frame): image.stack for image in images}
    series = series_of([image.frame for image in images])
    wrong = [
        one.describe()
        for one in series
        if one.problem is None and len({stacks[id(frame)] for frame in one.frames}) > 1
    ]
    ids = Counter(one.id for one in series)
    return wrong + [f"id {name} repeats" for name, times in ids.items() if times > 1]


def check_identities(cases: int, seed: int) -> dict[str, Any]:
    """Draw folders; count those with a wrong merge."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        given = templates(Path(root))
        for number in range(cases):
            found = wrong_merges(mixed_folders(random.Random(seed * 1_000_003 + number), given))
            wrong += [f"case {number}: {line}" for line in found]
    return {"cases": cases, "wrong": wrong}


# -- encodings, values, geometry ---------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """How a healthy series is broken.

    Args:
        name: what it is called.
        write: writes (images, folder, chance).
        refused: the reason it has to be refused for, or ``None`` when it has to load.
        status: of the verdict when it loads.
    """

    name: str
    write: Callable[[list[Dataset], Path, random.Random], None]
    refused: str | None = None
    status: str = "ok"


def save(images: list[Dataset], folder: Path) -> None:
    """One file for each image."""
    for k, image in enumerate(images):
        image.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)


def plain(syntax: UID) -> Callable[[list[Dataset], Path, random.Random], None]:
    """An uncompressed transfer syntax, declared as it is."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for k, image in enumerate(images):
            raw(image, folder / f"{k:03d}.dcm", syntax, syntax)

    return write


def declared(syntax: UID, real: UID) -> Callable[[list[Dataset], Path, random.Random], None]:
    """A meta group that declares another VR than the data set has."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for k, image in enumerate(images):
            raw(image, folder / f"{k:03d}.dcm", syntax, real)

    return write


def raw(image: Dataset, path: Path, syntax: UID, real: UID) -> None:
    """A file whose data set is written in ``real``, whatever ``syntax`` it declares."""
    body, head = DicomBytesIO(), DicomBytesIO()
    body.is_little_endian = real != ExplicitVRBigEndian
    body.is_implicit_VR = real == ImplicitVRLittleEndian
    bare = Dataset()
    bare.update({tag: image[tag] for tag in image.keys()})  # noqa: SIM118
    if not body.is_little_endian:
        bare.PixelData = np.frombuffer(bare.PixelData, "<u2").astype(">u2").tobytes()
    write_dataset(body, bare)
    head.is_little_endian, head.is_implicit_VR = True, False
    image.file_meta.TransferSyntaxUID = syntax
    write_file_meta_info(head, image.file_meta, enforce_standard=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + head.getvalue() + body.getvalue())


def compressed(syntax: UID) -> Callable[[list[Dataset], Path, random.Random], None]:
    """A lossless code stream."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for image in images:
            if syntax == JPEG2000Lossless:
                stored = np.frombuffer(image.PixelData, "<u2").reshape(image.Rows, -1)
                image.PixelData = encapsulate([encoded(stored, syntax, image.BitsStored)])
                image["PixelData"].VR = "OB"
                image.file_meta.TransferSyntaxUID = syntax
            else:
                image.compress(syntax, generate_instance_uid=False)
        save(images, folder)

    return write


def signed(images: list[Dataset], bits: int) -> list[Array]:
    """Stored values become HU, signed, of ``bits`` bits; returns them."""
    values = []
    for image in images:
        hu = np.frombuffer(image.PixelData, "<u2").astype(np.int32) + int(image.RescaleIntercept)
        hu = np.clip(hu, -(1 << (bits - 1)), (1 << (bits - 1)) - 1).reshape(image.Rows, -1)
        image.PixelRepresentation, image.RescaleIntercept = 1, 0
        image.BitsStored, image.HighBit = bits, bits - 1
        image.PixelData = hu.astype("<i2").tobytes()
        values.append(hu)
    return values


def signed_stream(syntax: UID, wide: bool) -> Callable[[list[Dataset], Path, random.Random], None]:
    """Signed values of 13 bits in an unsigned code stream; ``wide``: the header says 16."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for image, values in zip(images, signed(images, 13), strict=True):
            stored = np.ascontiguousarray((values & 0x1FFF).astype("<u2"))
            image.PixelData = encapsulate([encoded(stored, syntax)])
            image["PixelData"].VR = "OB"
            image.file_meta.TransferSyntaxUID = syntax
            if wide:
                image.BitsStored, image.HighBit = 16, 15
        save(images, folder)

    return write


def encoded(stored: Array, syntax: UID, bits: int = 13) -> bytes:
    """One code stream."""
    if syntax == JPEG2000Lossless:
        encode_array = importlib.import_module("openjpeg.utils").encode_array

        return bytes(encode_array(stored, bits_stored=bits, photometric_interpretation=2))
    return bytes(importlib.import_module("jpeg_ls").encode(stored).tobytes())


def each(change: Callable[[Dataset, int, random.Random], None]) -> Callable[..., None]:
    """Change every image, then save."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for k, image in enumerate(images):
            change(image, k, chance)
        save(images, folder)

    return write


def _set(**values: Any) -> Callable[[Dataset, int, random.Random], None]:
    def change(image: Dataset, k: int, chance: random.Random) -> None:
        for name, value in values.items():
            setattr(image, name, value)

    return change


def _fractional(image: Dataset, k: int, chance: random.Random) -> None:
    image.RescaleSlope = f"{chance.uniform(0.1, 3):.6g}"
    image.RescaleIntercept = f"{chance.uniform(-1100, -900):.6g}"


def _signed_16(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    signed(images, chance.choice((12, 13, 16)))
    save(images, folder)


def _some_rescale(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    for image in chance.sample(images, 2):
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType
    save(images, folder)


def _lost(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    for image in images:
        image.ImagesInAcquisition = len(images)
    save(images[: -chance.randint(1, 2)], folder)


def _gap(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    del images[chance.randint(2, len(images) - 3)]
    save(images, folder)


def _cut(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    save(images, folder)
    path = folder / "003.dcm"
    path.write_bytes(path.read_bytes()[: -chance.randint(2, 400)])


def _wrong_stream(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    for image in images:
        image.compress(JPEGLSLossless, generate_instance_uid=False)
        image.file_meta.TransferSyntaxUID = JPEG2000Lossless
    save(images, folder)


def _not_compressed(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    for image in images:
        image.compress(RLELossless, generate_instance_uid=False)
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image["PixelData"].is_undefined_length = True
        image._is_implicit_VR = False
    for k, image in enumerate(images):
        raw(image, folder / f"{k:03d}.dcm", ExplicitVRLittleEndian, ExplicitVRLittleEndian)


def _copies(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    save(images, folder)
    shutil.copy(folder / "002.dcm", folder / "copy.dcm")


FAULTS = (
    Fault("none", each(_set())),
    Fault("implicit VR", plain(ImplicitVRLittleEndian)),
    Fault("big endian", plain(ExplicitVRBigEndian)),
    Fault("says implicit, is explicit", declared(ImplicitVRLittleEndian, ExplicitVRLittleEndian)),
    Fault("says explicit, is implicit", declared(ExplicitVRLittleEndian, ImplicitVRLittleEndian)),
    Fault("RLE", compressed(RLELossless)),
    Fault("JPEG-LS", compressed(JPEGLSLossless)),
    Fault("JPEG 2000", compressed(JPEG2000Lossless)),
    Fault("J2K, signed values, unsigned stream", signed_stream(JPEG2000Lossless, False)),
    Fault("J2K, 13 bits where the header says 16", signed_stream(JPEG2000Lossless, True)),
    Fault("JPEG-LS, signed values", signed_stream(JPEGLSLossless, False)),
    Fault("JPEG-LS, 13 bits where the header says 16", signed_stream(JPEGLSLossless, True)),
    Fault("signed values", _signed_16),
    Fault("a rescale for each slice", each(_fractional)),
    Fault("no Instance Numbers", each(_set(InstanceNumber=None))),
    Fault("empty UIDs", each(_set(StudyInstanceUID="", SeriesInstanceUID=""))),
    Fault("an image twice", _copies, status="duplicates_dropped"),
    Fault("end lost", _lost, status="partial"),
    Fault("rescale missing in some", _some_rescale, "bad_rescale"),
    Fault("slope 0", each(_set(RescaleSlope="0")), "bad_rescale"),
    Fault("empty rescale", each(_set(RescaleSlope="", RescaleIntercept="")), "bad_rescale"),
    Fault("intercept alone", each(_set(RescaleSlope="")), "bad_rescale"),
    Fault("a slice lost", _gap, "geometry_gap"),
    Fault("a file cut short", _cut, "truncated"),
    Fault("Rows too small", each(_set(Rows=33)), "damaged_pixels"),
    Fault("another code stream than declared", _wrong_stream, "damaged_pixels"),
    Fault("compressed, not declared", _not_compressed, "damaged_pixels"),
)


def check_series(cases: int, seed: int) -> dict[str, Any]:
    """Write faulty series, load each, and hold it against independent readers."""
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for number in range(cases):
        chance = random.Random(seed * 1_000_003 + number)
        fault = FAULTS[number % len(FAULTS)]
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(name)
            phantom = Phantom(shape=SHAPE, spacing=SPACING, seed=chance.randint(1, 10**6))
            fault.write(list(datasets(phantom)), folder, chance)
            problem = judged(fault, folder)
        counts["refused" if fault.refused else "loaded"] += 1
        if problem:
            wrong.append(f"case {number}, {fault.name}: {problem}")
    return {"cases": cases, **counts, "wrong": wrong}


def judged(fault: Fault, folder: Path) -> str | None:
    """What is wrong with how a faulty series was taken, or ``None``."""
    try:
        volume = load_volume(folder)
    except InputError as error:
        return None if error.reason == fault.refused else f"refused as {error.reason}: {error}"
    if fault.refused:
        return f"loaded with the verdict {volume.verdict.status}"
    if volume.verdict.status != fault.status:
        return f"the verdict is {volume.verdict.status}"
    for path in sorted(folder.glob("*.dcm")):
        place, values = by_pydicom(path)
        index = volume.lps_to_index(place)
        k = round(float(index[2]))
        if np.abs(index - (0, 0, k)).max() > 1e-3:
            return f"{path.name} lies at {index}"
        for reader, theirs in (("pydicom", values), ("SimpleITK", by_simpleitk(path))):
            if theirs is not None and np.abs(volume.voxels[k] - theirs).max() > 1e-2:
                return f"{path.name} differs from {reader}"
    return None


def by_pydicom(path: Path) -> tuple[Array, Array]:
    """Place and modality values of an image."""
    image = pydicom.dcmread(path)
    values = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
    return np.array([float(value) for value in image.ImagePositionPatient]), values


def by_simpleitk(path: Path) -> Array | None:
    """Modality values of an image, where SimpleITK reads its encoding as it was meant."""
    SimpleITK: Any = importlib.import_module("SimpleITK")
    image = pydicom.dcmread(path, stop_before_pixels=True)
    if image.BitsStored == 16 or image.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
        return None  # it trusts the header where the code stream is right
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        values: Array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
    except RuntimeError:
        return None
    return values


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--series", type=int, default=500, help="faulty series")
    parser.add_argument("--folders", type=int, default=100_000, help="folders of mixed identifiers")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    told: dict[str, Any] = {}
    for name, check, cases in (
        ("series", check_series, given.series),
        ("folders", check_identities, given.folders),
    ):
        begun = time.perf_counter()
        told[name] = check(cases, given.seed) | {"seconds": round(time.perf_counter() - begun, 1)}
    if given.json:
        print_json(told)
    else:
        for name, result in told.items():
            print(f"{name}: {result['cases']} cases, {len(result['wrong'])} wrong")
            print("\n".join(result["wrong"][:20]))
    sys.exit(any(result["wrong"] for result in told.values()))


if __name__ == "__main__":
    main()
