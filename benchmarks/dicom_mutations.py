"""Damaged DICOM files: does one crash, hang or fill the loader, or give a wrong place or value?

    python benchmarks/dicom_mutations.py [--files 10000] [--step 7] [--seed 7] [--here] [--json]

``--files``: small files in every encoding that is read, multi-frame objects, archives and
DICOMDIRs, each with one to six changes: bytes and bits flipped, cut out, doubled, moved, lengths
and counts set to extremes, pieces of other files. ``--step``: every file cut short after each
``step`` bytes.

Each is loaded in a child process that may hold 1 GiB more than it starts with and take 10 s a
file (with ``--here`` in this one, which starts no other). Wrong is
whatever ends the child or raises anything but a refusal that names its reason; a volume whose
places, spacing or values are not those that pydicom reads of the same bytes; and a file cut short
that loads with other values than the whole one. Damage inside code streams: dicom_streams.py.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from dicom_faults import _enhanced, compressed, encoded, plain
from head import parser_of, print_json
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from plinth.engine import InputError
from plinth.verticals.medical import Volume, load_volume
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import datasets

Line = tuple[int, str, str, str | None]
"""Number and encoding of a file, what became of it, and what is wrong."""
SECONDS, MORE_BYTES = 10, 1 << 30
FAR = 1e-3
"""mm, direction cosine or modality value beyond which a difference is one."""


MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
"""Where files are written that are read once."""


# -- what is damaged -----------------------------------------------------------------------------
def originals() -> dict[str, bytes]:
    """Whole files by the name of their encoding."""
    phantom = Phantom(shape=(34, 32, 4), spacing=(9.0, 9.0, 50.0))
    made: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        for encoding, write in (
            ("explicit", plain(ExplicitVRLittleEndian)),
            ("implicit", plain(ImplicitVRLittleEndian)),
            ("big endian", plain(ExplicitVRBigEndian)),
            ("RLE", compressed(RLELossless)),
            ("JPEG-LS", compressed(JPEGLSLossless)),
            ("JPEG 2000", compressed(JPEG2000Lossless)),
            ("multi-frame", _enhanced),
        ):
            folder = Path(name) / encoding
            folder.mkdir()
            write(list(datasets(phantom)), folder, random.Random(3))
            made[encoding] = next(iter(sorted(folder.glob("*.dcm")))).read_bytes()
        image = next(iter(datasets(phantom)))
        made["deflated"] = _deflated(image)
        made["JPEG lossless"] = _jpeg_lossless(image, Path(name))
        made["several frames, JPEG 2000"] = _several_frames(list(datasets(phantom)))
        made["DICOMDIR"] = dicomdir(list(datasets(phantom)), Path(name) / "set")
        made["zip"] = _zipped(made)
    return made


def _saved(image: Dataset) -> bytes:
    out = io.BytesIO()
    image.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _deflated(image: Dataset) -> bytes:
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = _saved(image)
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return whole


def _jpeg_lossless(image: Dataset, folder: Path) -> bytes:
    """As SimpleITK packs it, with the phantom's header."""
    SimpleITK: Any = importlib.import_module("SimpleITK")
    stored = np.frombuffer(image.PixelData, "<u2").reshape(1, image.Rows, -1)
    writer, path = SimpleITK.ImageFileWriter(), folder / "packed.dcm"
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(path))
    writer.Execute(SimpleITK.GetImageFromArray(stored))
    image.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    image.PixelData = pydicom.dcmread(path).PixelData
    image["PixelData"].is_undefined_length = True
    return _saved(image)


def _several_frames(images: list[Dataset]) -> bytes:
    """An enhanced object of compressed frames."""
    with tempfile.TemporaryDirectory() as name:
        _enhanced(images, Path(name), random.Random(5))
        whole = pydicom.dcmread(next(Path(name).glob("*.dcm")))
    frames = np.frombuffer(whole.PixelData, "<u2").reshape(-1, whole.Rows, whole.Columns)
    whole.PixelData = encapsulate([encoded(f, UID(JPEG2000Lossless), 12) for f in frames])
    whole["PixelData"].VR = "OB"
    whole["PixelData"].is_undefined_length = True
    whole.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return _saved(whole)


def dicomdir(images: list[Dataset], folder: Path) -> bytes:
    """The images as a file set in a folder; its DICOMDIR."""
    files = FileSet()
    for image in images:
        files.add(image)
    files.write(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it leaves a folder to the collector
        del files
        gc.collect()
    return (folder / "DICOMDIR").read_bytes()


def _zipped(made: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.dcm", made["explicit"])
        archive.writestr("a/2.dcm", made["RLE"])
    return out.getvalue()


EXTREMES = tuple(
    value.to_bytes(size, "little")
    for size, values in ((2, (0, 1, 0x7FFF, 0xFFFF)), (4, (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    for value in values
)
MARKS = tuple(
    bytes.fromhex(mark)
    for mark in ("28001000", "28001100", "28000800", "20003200", "e07f1000", "feff00e0", "fffbff4f")
)
"""Rows, Columns, Number of Frames, position, pixel data, an item; changes near them matter most."""


def mutated(chance: random.Random, made: dict[str, bytes]) -> tuple[str, bytes]:
    """A file with one to six changes, and the name of the one that it was."""
    name = chance.choice(list(made))
    content = bytearray(made[name])
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        _change(chance, content, made)
    if chance.random() < 0.05:
        del content[chance.randint(0, len(content)) :]
    return name, bytes(content)


def _change(chance: random.Random, content: bytearray, made: dict[str, bytes]) -> None:
    if len(content) < 8:
        return
    at = _where(chance, content)
    how = chance.randrange(7)
    if how == 0:
        content[at] ^= 1 << chance.randrange(8)
    elif how == 1:
        content[at] = chance.randrange(256)
    elif how == 2:
        value = chance.choice(EXTREMES)
        content[at : at + len(value)] = value
    elif how == 3:
        del content[at : at + chance.choice((1, 2, 4, 8, 40))]
    elif how == 4:
        content[at:at] = content[at : at + chance.choice((1, 2, 8, 100))]
    elif how == 5:
        other = made[chance.choice(list(made))]
        start = chance.randrange(len(other))
        content[at : at + 16] = other[start : start + 16]
    else:
        content[at : at + 1] = chance.choice((b"\\", b"-", b"e", b"9", b"\0", b".."))


def _where(chance: random.Random, content: bytearray) -> int:
    """Anywhere, or near an attribute that says how much there is."""
    if chance.random() < 0.5:
        found = content.find(chance.choice(MARKS))
        if found >= 0:
            return min(len(content) - 1, found + chance.randrange(14))
    return chance.randrange(len(content))


# -- what is made of it ----------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """Files for one process, from number ``first`` on.

    Args:
        first: number of the first.
        count: number after the last; ``None``: all there are of those cut short.
        seed: of the changes.
        cut: files cut short instead of changed ones.
        step: bytes between two cuts.
    """

    first: int
    count: int | None
    seed: int
    cut: bool = False
    step: int = 1


def cases(work: Work, made: dict[str, bytes]) -> Iterator[tuple[int, str, bytes]]:
    """(number, encoding, bytes) of the files of some work."""
    if work.cut:
        cuts = ((name, kept) for name in made for kept in range(0, len(made[name]), work.step))
        for number, (name, kept) in islice(enumerate(cuts), work.first, work.count):
            yield number, name, made[name][:kept]
        return
    assert work.count is not None
    for number in range(work.first, work.count):
        yield number, *mutated(random.Random(work.seed * 1_000_003 + number), made)


def child(work: Work) -> None:
    """Load files, one line of JSON each; a file that takes too long ends the process."""

    def begin(first: bool) -> None:
        if first:
            print(json.dumps("ready"), flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    for line in loaded(work, originals(), begin):
        print(json.dumps(line), flush=True)


def loaded(
    work: Work, made: dict[str, bytes], begin: Callable[[bool], None] = lambda first: None
) -> Iterator[Line]:
    """Load files in this process: number, encoding, what became of each, and what is wrong.

    Args:
        work: which.
        made: the whole files.
        begin: called before each, told whether it is the first.
    """
    place = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        whole = _whole(made, folder)
        with _memory_limited():
            for nth, (number, kind, content) in enumerate(cases(work, made)):
                begin(nth == 0)
                since = time.perf_counter()
                what, wrong = _taken(folder, kind, content, whole.get(kind) if work.cut else None)
                if time.perf_counter() - since > SECONDS:
                    wrong = wrong or "took too long"
                yield number, kind, what, wrong


def _whole(made: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """Values of the whole files; a decoder that is loaded late is loaded now."""
    values = {}
    for name, content in made.items():
        try:
            values[name] = load_volume(_written(folder, name, content)).voxels
        except InputError as error:
            if name not in ("DICOMDIR", "zip"):
                raise AssertionError(f"{name}: {error}") from error
    return values


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / {"zip": "study.zip", "DICOMDIR": "DICOMDIR"}.get(name, "image.dcm")
    path.write_bytes(content)
    return path


@contextmanager
def _memory_limited() -> Iterator[None]:
    """So much more than is held now; as before, afterwards."""
    with Path("/proc/self/status").open() as status:
        held = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, ((held << 10) + MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _taken(folder: Path, name: str, content: bytes, whole: Any) -> tuple[str, str | None]:
    """``loaded`` or the reason of a refusal, and what is wrong with it."""
    path = _written(folder, name, content)
    try:
        volume = load_volume(path)
    except InputError as error:
        vague = error.reason == "invalid_input" or len(str(error)) > 1500
        return error.reason, f"a vague refusal: {error}" if vague else None
    except Exception as error:  # noqa: BLE001 - whatever comes is what is looked for
        return "raised", f"{type(error).__name__}: {error}"
    if whole is not None and not np.array_equal(volume.voxels, whole):
        return "loaded", "other values than the whole file has"
    if name in ("DICOMDIR", "zip"):
        return "loaded", None
    return "loaded", _differing(volume, path)


def _differing(volume: Volume, path: Path) -> str | None:
    """How the volume differs from what pydicom reads of the same bytes, where it reads them."""
    try:
        image = pydicom.dcmread(path, force=True)
        frames = [_by_pydicom(image, n) for n in range(len(volume.series.sources))]
    except Exception:  # noqa: BLE001 - pydicom refuses what is odd in many ways
        return None
    for n, (place, cosines, spacing) in enumerate(frames):
        if n + 1 not in volume.series.frame_numbers:
            continue  # left out, and told
        k = volume.series.frame_numbers.index(n + 1)
        index = volume.lps_to_index(place)
        if (
            volume.verdict.status in ("ok", "single_slice")
            and np.abs(index - [0, 0, k]).max() > FAR
        ):
            return f"frame {n + 1} lies at {index.tolist()}"
        axes = volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)
        if np.abs(axes.T.ravel() - cosines).max() > 0.02:
            return f"its axes are {axes.T.ravel().tolist()}, not {cosines.tolist()}"
        if np.abs(np.array(volume.spacing[1::-1]) - spacing).max() > FAR:
            return f"its spacing is {volume.spacing[1::-1]}, not {spacing.tolist()}"
    return None


def _by_pydicom(image: Dataset, n: int) -> tuple[Any, Any, Any]:
    """Position, orientation and pixel spacing of a frame."""
    groups = image.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        at = image, image, image
    else:
        shared = image.SharedFunctionalGroupsSequence[0]
        at = (
            groups[n].PlanePositionSequence[0],
            shared.PlaneOrientationSequence[0],
            shared.PixelMeasuresSequence[0],
        )
    return (
        np.array(at[0].ImagePositionPatient, float),
        np.array(at[1].ImageOrientationPatient, float),
        np.array(at[2].PixelSpacing, float),
    )


# -- the parent ------------------------------------------------------------------------------
def check(work: Work, here: bool = False) -> dict[str, Any]:
    """Load all files of some work in child processes, a new one after each that was ended.

    Args:
        work: which.
        here: in this process instead: a decoder that crashes takes it along.

    Returns:
        How many there were, how many of them were loaded, refusals by reason, and what was wrong.
    """
    if here:
        return _counted(list(loaded(work, originals())), [])
    first = work.first
    lines: list[Line] = []
    wrong: list[str] = []
    while True:
        done = _run(replace(work, first=first))
        told = [json.loads(line) for line in done.stdout.splitlines()]
        if told[:1] != ["ready"]:
            how = f"ended with {done.returncode}"
            raise RuntimeError(f"the child did not start, it {how}: {done.stderr[-2000:]}")
        lines += told[1:]
        if not done.returncode:
            return _counted(lines, wrong)
        culprit = told[-1][0] + 1 if told[1:] else first
        how = "took too long" if done.returncode == -signal.SIGALRM else "ended the process"
        wrong.append(f"file {culprit} {how} ({done.returncode}): {done.stderr[-300:]}")
        first = culprit + 1


def _counted(lines: list[Line], ended: list[str]) -> dict[str, Any]:
    counts = Counter(what for _, _, what, _ in lines)
    wrong = [f"file {number}, {name}: {problem}" for number, name, _, problem in lines if problem]
    return {"files": len(lines) + len(ended), **counts, "wrong": ended + wrong}


def _run(work: Work) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(work))],
        capture_output=True,
        text=True,
    )


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="changed files")
    parser.add_argument("--step", type=int, default=7, help="bytes between two cuts; 0: none")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--child", help="work for this process; used by the command itself")
    given = parser.parse_args()
    if given.child:
        child(Work(**json.loads(given.child)))
        return
    told: dict[str, Any] = {}
    for name, work in (
        ("changed", Work(0, given.files, given.seed)),
        ("cut short", Work(0, None, given.seed, cut=True, step=given.step)),
    ):
        if work.cut and not given.step:
            continue
        begun = time.perf_counter()
        told[name] = check(work, given.here) | {"seconds": round(time.perf_counter() - begun, 1)}
    if given.json:
        print_json(told)
    else:
        for name, result in told.items():
            counts = {key: value for key, value in result.items() if key != "wrong"}
            print(f"{name}: {len(result['wrong'])} wrong; {counts}")
            print("\n".join(result["wrong"][:20]))
    sys.exit(any(result["wrong"] for result in told.values()))


if __name__ == "__main__":
    main()
