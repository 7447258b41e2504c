"""Faults that DICOM folders have, generated: is a loaded value ever wrong, are patients ever mixed?

    python benchmarks/dicom_faults.py [--series 500] [--folders 100000] [--seed 7] [--json]

``--series``: small series with a fault of encoding, geometry or values. Each must load as two
independent readers read it (pydicom; SimpleITK where it knows the encoding), slice by slice at
its place, or be refused for the reason that is true of its fault.

``--folders``: folders of two or three stacks whose identifiers are empty, equal or swapped, all
but at least one. No series that can be loaded may hold images of two stacks.
"""

from __future__ import annotations

import copy
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
from functools import cache
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
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from plinth.engine import InputError  # noqa: E402
from plinth.verticals.contract import LeftOut  # noqa: E402
from plinth.verticals.medical import CtAnalysis, Volume, load_volume  # noqa: E402
from plinth.verticals.medical.dicom.discover import discover, series_of  # noqa: E402
from plinth.verticals.medical.dicom.header import Frame, read_frames  # noqa: E402
from plinth.verticals.medical.phantom.chest import Phantom  # noqa: E402
from plinth.verticals.medical.phantom.dicom import datasets, write_series  # noqa: E402
from plinth.verticals.medical.source import Source  # noqa: E402

SHAPE, SPACING = (48, 40, 6), (7.0, 6.0, 30.0)
Array = npt.NDArray[Any]
Write = Callable[[list[Dataset], Path, random.Random], None]
LONGEST = 1500
"""Characters of a refusal, at most: a user reads it."""

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
        statuses: of the verdicts of the volumes that it holds when it loads, sorted.
        judge: what is wrong with how the folder was taken; :func:`judged` by default.
        units: of the values when it loads.
    """

    name: str
    write: Write
    refused: str | None = None
    statuses: tuple[str, ...] = ("ok",)
    judge: Callable[[Fault, Path], str | None] | None = None
    units: str = "HU"


def save(images: list[Dataset], folder: Path) -> None:
    """One file for each image."""
    for k, image in enumerate(images):
        image.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)


def plain(syntax: UID) -> Write:
    """An uncompressed transfer syntax, declared as it is."""

    def write(images: list[Dataset], folder: Path, chance: random.Random) -> None:
        for k, image in enumerate(images):
            raw(image, folder / f"{k:03d}.dcm", syntax, syntax)

    return write


def declared(syntax: UID, real: UID) -> Write:
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


def compressed(syntax: UID) -> Write:
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


def signed_stream(syntax: UID, wide: bool) -> Write:
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


def each(change: Callable[[Dataset, int, random.Random], None]) -> Write:
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


# -- several acquisitions, other kinds of image ------------------------------------------------
PHASES = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers", "TriggerTime", "KVP"),
    *("EchoTime", "InversionTime", "ConvolutionKernel"),
)
"""Attributes that tell the phases of a series apart."""


def another(images: list[Dataset], number: int, chance: random.Random) -> list[Dataset]:
    """The same places again with other values, as one more phase of the series."""
    made = []
    for image in images:
        again = copy.deepcopy(image)
        stored = np.frombuffer(image.PixelData, "<u2").astype(np.int32)
        again.PixelData = np.clip(stored + 7 * number, 0, 4095).astype("<u2").tobytes()
        again.SOPInstanceUID = f"{image.SOPInstanceUID}.{number}"[:64]
        again.file_meta.MediaStorageSOPInstanceUID = again.SOPInstanceUID
        again.InstanceNumber = image.InstanceNumber + 100 * number
        made.append(again)
    return made


def _phases(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """Three phases; of the last one the first or last slices are there."""
    mark, count = chance.choice(PHASES), chance.randint(2, len(images) - 2)
    last = images[:count] if chance.random() < 0.5 else images[-count:]
    stacks = [images, another(images, 1, chance), another(last, 2, chance)]
    for number, stack in enumerate(stacks, 1):
        for image in stack:
            setattr(image, mark, f"B{number}0f" if mark == "ConvolutionKernel" else number)
    save([image for stack in stacks for image in stack], folder)


def _overlapping(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """Two acquisitions of a part each, which share one to three places."""
    shared = chance.randint(1, 3)
    middle = (len(images) + shared) // 2
    second = another(images[middle - shared :], 1, chance)
    for image in second:
        image.AcquisitionNumber = 2
    save(images[:middle] + second, folder)


def _shifted(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """Two acquisitions of the same length, the second a part of a step higher."""
    second, up = another(images, 1, chance), chance.uniform(0.1, 0.9) * SPACING[2]
    for image in second:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, y, f"{float(z) + up:.6g}"]
        image.AcquisitionNumber = 2
    save(images + second, folder)


def _wide_gap(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """Two pieces of a stack, 5 to 90 steps apart."""
    away = chance.randint(5, 90) * SPACING[2]
    for image in images[3:]:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, y, f"{float(z) + away:.6g}"]
    save(images, folder)


def _tiny_steps(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """One or two steps of the stack are a few hundredths to tenths of the others."""
    tiny = set(chance.sample(range(1, len(images)), chance.randint(1, 2)))
    z = float(images[0].ImagePositionPatient[2])
    for k, image in enumerate(images):
        step = SPACING[2] * (chance.uniform(0.02, 0.4) if k in tiny else 1)
        z += step if k else 0
        image.ImagePositionPatient = [*image.ImagePositionPatient[:2], f"{z:.6f}"]
    save(images, folder)


def _pet(image: Dataset, k: int, chance: random.Random) -> None:
    image.Modality, image.SOPClassUID = "PT", PositronEmissionTomographyImageStorage
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.Units, image.DecayCorrection = "BQML", "START"
    image.RescaleSlope = f"{10 ** chance.uniform(-8, 2):.6g}"
    image.RescaleIntercept = 0
    del image.RescaleType, image.KVP, image.ConvolutionKernel


DERIVED = (
    (["DERIVED", "SECONDARY", "AXIAL", "MIP"], "thick slab"),
    (["DERIVED", "PRIMARY", "AXIAL", "MINIMUM"], ""),
    (["DERIVED", "SECONDARY", "OTHER", "VRT"], ""),
    (["ORIGINAL", "PRIMARY", "AXIAL"], "MIP 25/5"),
    (["DERIVED", "PRIMARY", "AXIAL", "VMI"], ""),
    (["ORIGINAL", "PRIMARY", "AXIAL"], "MonoE 40 keV"),
    (["DERIVED", "PRIMARY", "AXIAL", "IODINE"], ""),
    (["DERIVED", "SECONDARY", "SCREEN SAVE"], "Dose Report"),
    (["DERIVED", "PRIMARY", "AXIAL", "PERFUSION"], "CBF"),
)
"""Image Type and Series Description of images whose values are no attenuation."""


def _derived(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    image_type, description = chance.choice(DERIVED)
    for image in images:
        image.ImageType, image.SeriesDescription = image_type, description
    save(images, folder)


def _bare(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """No preamble, no meta group, or neither; the data set's VR follows the meta group if any."""
    preamble, meta = chance.choice([(False, False), (False, True), (True, False)])
    syntax = chance.choice([ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    for k, image in enumerate(images):
        path = folder / f"{k:03d}.dcm"
        raw(image, path, syntax, syntax)
        whole = path.read_bytes()
        start = 144 + int.from_bytes(whole[140:144], "little")
        head = b"\0" * 128 + b"DICM" if preamble else b""
        path.write_bytes(head + (whole[132:] if meta else whole[start:]))


def _mosaic(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """Siemens: all slices of a volume side by side in one image, one image for each time."""
    times = chance.randint(1, 3)
    tiles = [np.frombuffer(image.PixelData, "<u2").reshape(image.Rows, -1) for image in images]
    whole = np.block([[tiles[0], tiles[1], tiles[2]], [tiles[3], tiles[4], tiles[5]]])
    for k, image in enumerate(images[:times]):
        image.Modality, image.SOPClassUID = "MR", MRImageStorage
        image.file_meta.MediaStorageSOPClassUID = MRImageStorage
        image.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
        image.ImagePositionPatient = images[0].ImagePositionPatient
        image.AcquisitionNumber = k + 1
        image.Rows, image.Columns = whole.shape
        image.PixelData = whole.astype("<u2").tobytes()
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType
    save(images[:times], folder)


def item(**values: Any) -> Dataset:
    """An item of a sequence."""
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _enhanced(images: list[Dataset], folder: Path, chance: random.Random) -> None:
    """One multi-frame object whose private groups repeat standard attributes, wrongly."""
    whole, private = copy.deepcopy(images[0]), chance.choice([0x2001, 0x2005, 0x0021])
    where = chance.choice(["frame", "shared", "inside", "root"])
    wrong = item(
        ImagePositionPatient=[1, 2, 3],
        ImageOrientationPatient=[0, 1, 0, 1, 0, 0],
        PixelSpacing=[1, 1],
        RescaleSlope=3,
        RescaleIntercept=7,
        EchoTime=chance.randint(1, 9),
    )

    def planted(group: Dataset) -> Dataset:
        block = group.private_block(private, "OTHER MEANING", create=True)
        block.add_new(0x0F, "SQ", Sequence([wrong]))
        return group

    cosines = list(images[0].ImageOrientationPatient)
    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=cosines)]),
        PixelMeasuresSequence=Sequence(
            [item(PixelSpacing=list(images[0].PixelSpacing), SliceThickness=SPACING[2])]
        ),
    )
    order = chance.sample(images, len(images))
    groups = []
    for image in order:
        place = item(ImagePositionPatient=list(image.ImagePositionPatient))
        rescale = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
        group = item(
            PlanePositionSequence=Sequence([planted(place) if where == "inside" else place]),
            PixelValueTransformationSequence=Sequence([rescale]),
        )
        groups.append(planted(group) if where == "frame" else group)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(whole, name)
    del whole.RescaleSlope, whole.RescaleIntercept, whole.RescaleType
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(order)
    whole.SharedFunctionalGroupsSequence = Sequence(
        [planted(shared) if where == "shared" else shared]
    )
    whole.PerFrameFunctionalGroupsSequence = Sequence(groups)
    whole.PixelData = b"".join(image.PixelData for image in order)
    save([planted(whole) if where == "root" else whole], folder)


def _own_series(image: Dataset, k: int, chance: random.Random) -> None:
    image.SeriesInstanceUID = f"{image.SeriesInstanceUID}.{k}"[-64:]


# -- judges ------------------------------------------------------------------------------------
def never_filled(fault: Fault, folder: Path) -> str | None:
    """As :func:`judged`, and refused where filling was asked for."""
    try:
        load_volume(folder, gaps="fill")
    except InputError as error:
        return judged(fault, folder) if error.reason == fault.refused else f"filling: {error}"
    return "slices were invented"


def not_analysed(fault: Fault, folder: Path) -> str | None:
    """What the analysis has to leave out, with its reason."""
    seen = []
    try:
        for one in CtAnalysis().survey(folder):
            seen.append(one.reason if isinstance(one, LeftOut) else "analysed")
    except InputError as error:
        if error.reason != "no_ct":
            return f"refused as {error.reason}: {error}"
    return None if seen == [fault.refused] else f"was {', '.join(seen)}"


def resampled(fault: Fault, folder: Path) -> str | None:
    """Every plane of a resampled stack lies between the true neighbours, by their distances."""
    volume = load_volume(folder)
    if volume.verdict.status not in fault.statuses:
        return f"the verdict is {volume.verdict.status}"
    read = sorted((by_pydicom(path) for path in folder.glob("*.dcm")), key=lambda one: one[0][2])
    depths, planes = np.array([place[2] for place, _ in read]), np.stack([v for _, v in read])
    for k, plane in enumerate(volume.voxels):
        depth = volume.index_to_lps([0, 0, k])[2]
        n = int(np.clip(np.searchsorted(depths, depth) - 1, 0, len(depths) - 2))
        share = np.clip((depth - depths[n]) / (depths[n + 1] - depths[n]), 0, 1)
        true = planes[n] * (1 - share) + planes[n + 1] * share
        if np.abs(plane - true).max() > 0.51 + np.ptp(planes) * 1e-4:
            return f"plane {k} at {depth:.2f} mm is off by {np.abs(plane - true).max():.1f}"
    missed = volume.index_to_lps([0, 0, volume.shape[0] - 1])[2] - depths[-1]
    return f"the stack ends {missed:.2f} mm off" if abs(missed) > SPACING[2] else None


def by_frames(fault: Fault, folder: Path) -> str | None:
    """A multi-frame object against pydicom, frame by frame, and against highdicom's volume."""
    highdicom: Any = importlib.import_module("highdicom")
    (path,) = folder.glob("*.dcm")
    volume, image = load_volume(path), pydicom.dcmread(path)
    for n, group in enumerate(image.PerFrameFunctionalGroupsSequence):
        place = [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient]
        index = volume.lps_to_index(place)
        k = round(float(index[2]))
        if np.abs(index - (0, 0, k)).max() > 1e-3:
            return f"frame {n + 1} lies at {index}"
        if np.abs(volume.voxels[k] - (image.pixel_array[n] - 1024.0)).max() > 1e-2:
            return f"frame {n + 1} differs from pydicom"
    theirs = highdicom.imread(path).get_volume(apply_modality_transform=True)
    corners = np.array([[0, 0, 0], [SHAPE[0] - 1, 0, SHAPE[2] - 1], [0, SHAPE[1] - 1, 2]])
    places = np.array([volume.index_to_lps(corner) for corner in corners])
    index = theirs.map_reference_to_indices(places)  # slice, row, column; either way up
    turned = np.rint(index[0, 0]) == SHAPE[2] - 1
    wanted = corners[:, ::-1].astype(float)
    if turned:
        wanted[:, 0] = SHAPE[2] - 1 - wanted[:, 0]
    if np.abs(index - wanted).max() > 1e-3:
        return f"highdicom places the corners at {index.tolist()}"
    values = theirs.array[::-1] if turned else theirs.array
    return None if np.abs(values - volume.voxels).max() < 1e-2 else "differs from highdicom"


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
    Fault("an image twice", _copies, statuses=("duplicates_dropped",)),
    Fault("end lost", _lost, statuses=("partial",)),
    Fault("three phases, the last partial", _phases, statuses=("ok", "ok", "partial")),
    Fault("overlapping acquisitions", _overlapping, statuses=("partial", "partial")),
    Fault("interleaved acquisitions", _shifted, statuses=("ok", "ok")),
    Fault("tiny steps", _tiny_steps, statuses=("resampled_spacing",), judge=resampled),
    Fault("PET, a slope for each slice", each(_pet), units="BQML"),
    Fault("no preamble or meta group", _bare),
    Fault("private groups repeat standard attributes", _enhanced, judge=by_frames),
    Fault("a series UID for each slice", each(_own_series), "several_series"),
    Fault("a wide gap", _wide_gap, "geometry_gap", judge=never_filled),
    Fault("derived images", _derived, "derived", judge=not_analysed),
    Fault("a mosaic", _mosaic, "not_a_volume"),
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


@cache
def rendered() -> tuple[Dataset, ...]:
    """The images of one phantom."""
    return tuple(datasets(Phantom(shape=SHAPE, spacing=SPACING)))


def healthy(chance: random.Random) -> list[Dataset]:
    """A series without faults, whose noise nobody else has."""
    images, noise = copy.deepcopy(rendered()), np.random.default_rng(chance.randint(1, 10**6))
    for image in images:
        stored = np.frombuffer(image.PixelData, "<u2")
        noisy = stored + noise.integers(0, 40, stored.size)
        image.PixelData = np.minimum(noisy, 4095).astype("<u2").tobytes()
    return list(images)


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
            fault.write(healthy(chance), folder, chance)
            problem = (fault.judge or judged)(fault, folder)
        counts["refused" if fault.refused else "loaded"] += 1
        if problem:
            wrong.append(f"case {number}, {fault.name}: {problem}")
    return {"cases": cases, **counts, "wrong": wrong}


def judged(fault: Fault, folder: Path) -> str | None:
    """What is wrong with how a faulty series was taken, or ``None``."""
    try:
        if len(fault.statuses) == 1:
            volumes = [load_volume(folder)]
        else:
            volumes = [load_volume(one) for one in discover(folder)]
    except InputError as error:
        if len(str(error)) > LONGEST:
            return f"a refusal of {len(str(error))} characters"
        return None if error.reason == fault.refused else f"refused as {error.reason}: {error}"
    statuses = tuple(sorted(volume.verdict.status for volume in volumes))
    if fault.refused or statuses != fault.statuses:
        return f"loaded with the verdicts {', '.join(statuses)}"
    if {volume.series.units for volume in volumes} != {fault.units}:
        return f"is in {volumes[0].series.units or 'no unit'}, not {fault.units}"
    paths = sorted(folder.glob("*.dcm"))
    return next(filter(None, (differing(path, volumes) for path in paths)), None)


def differing(path: Path, volumes: list[Volume]) -> str | None:
    """How an image's place or values differ from those in the volume it is part of."""
    sources = [{source.path for source in volume.series.sources} for volume in volumes]
    volume = next((v for v, files in zip(volumes, sources, strict=True) if path in files), None)
    if volume is None:
        return None if path.name == "copy.dcm" or len(volumes) == 1 else f"{path.name} is in none"
    place, values = by_pydicom(path)
    index = volume.lps_to_index(place)
    k = round(float(index[2]))
    if np.abs(index - (0, 0, k)).max() > 1e-3:
        return f"{path.name} lies at {index}"
    close = max(1e-9, 4e-6 * float(np.abs(values).max()))
    for reader, theirs in (("pydicom", values), ("SimpleITK", by_simpleitk(path))):
        if theirs is not None and np.abs(volume.voxels[k] - theirs).max() > close:
            return f"{path.name} differs from {reader}"
    return None


def by_pydicom(path: Path) -> tuple[Array, Array]:
    """Place and modality values of an image."""
    image = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in image.file_meta:
        implicit, _ = image.original_encoding
        image.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        )
    values = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
    return np.array([float(value) for value in image.ImagePositionPatient]), values


def by_simpleitk(path: Path) -> Array | None:
    """Modality values of an image, where SimpleITK reads its encoding as it was meant."""
    SimpleITK: Any = importlib.import_module("SimpleITK")
    image = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    syntax = image.file_meta.get("TransferSyntaxUID")
    if image.BitsStored == 16 or syntax in (None, ExplicitVRBigEndian):
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
