"""Damaged, hostile and merely strange files: read exactly, or refused by name; never a crash."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEGLosslessSV1

from plinth.engine.errors import InputError
from plinth.verticals.medical import Volume, load_volume
from plinth.verticals.medical.dicom.discover import scan
from plinth.verticals.medical.dicom.loader import STATUS_OF
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series

Write = Callable[..., Path]
Edit = Callable[..., None]
Files = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore")


# -- other people's files ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("within", "loaded", "refused"),
    [("CT_small.dcm", 40, 100), ("eCT_Supplemental.dcm", 10, 35)],
    ids=["pydicom", "pydicom-data"],
)
def test_every_file_of_a_collection_is_exact_or_refused_with_a_reason(
    pydicom_data: Files, within: str, loaded: int, refused: int
) -> None:
    outcomes: Counter[str] = Counter()
    for path in sorted(pydicom_data(within).parent.rglob("*")):
        if not path.is_file() or path.name == "DICOMDIR":
            continue
        try:
            volume = load_volume(path, strict=False)
        except InputError as error:
            outcomes["refused"] += 1
            outcomes["vague"] += error.reason == "invalid_input" or not error.hint
        else:
            assert_exact(volume)
            outcomes["loaded"] += 1
    assert outcomes["vague"] == 0
    assert outcomes["loaded"] >= loaded
    assert outcomes["refused"] >= refused


def assert_exact(volume: Volume) -> None:
    """Every voxel is pydicom's value, but for padding outside the range of HU."""
    series = volume.series
    for k, (source, number) in enumerate(zip(series.sources, series.frame_numbers, strict=True)):
        if series.transfer_syntax_uid == JPEGLosslessSV1:
            continue  # pydicom has no free decoder; SimpleITK is the judge in test_pixels.py
        image = source.dataset()
        values = image
        if "SharedFunctionalGroupsSequence" in image:
            shared = image.SharedFunctionalGroupsSequence[0]
            values = shared.PixelValueTransformationSequence[0]
        stored = image.pixel_array.reshape(-1, image.Rows, image.Columns)[number - 1]
        slope, intercept = values.get("RescaleSlope", 1), values.get("RescaleIntercept", 0)
        exact = (stored * float(slope) + float(intercept)).astype(np.float32)
        if any(issue.kind == "padding" for issue in volume.verdict.issues):
            exact[stored == image.PixelPaddingValue] = -1024
        assert np.array_equal(volume.voxels[k], exact), source.name


# -- damaged bytes ------------------------------------------------------------------------------
SYNTAXES = ("none", "implicit", "rle", "jpegls", "big", "deflated")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small slice in several transfer syntaxes."""
    folder = tmp_path_factory.mktemp("whole")
    phantom = Phantom(shape=(12, 10, 1), spacing=(25.0, 25.0, 25.0))
    made = {}
    for name in ("none", "implicit", "rle", "jpegls"):
        (path,) = write_series(phantom, folder / name, compression=name)
        made[name] = path.read_bytes()
    for name, syntax in (
        ("big", ExplicitVRBigEndian),
        ("deflated", DeflatedExplicitVRLittleEndian),
    ):
        image = pydicom.dcmread(folder / "none" / "slice_0001.dcm")
        if name == "big":
            image.PixelData = np.frombuffer(image.PixelData, "<u2").astype(">u2").tobytes()
        image.file_meta.TransferSyntaxUID = syntax
        path = folder / f"{name}.dcm"
        little = name != "big"
        pydicom.dcmwrite(path, image, implicit_vr=False, little_endian=little)
        made[name] = path.read_bytes()
    return made


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_whole_slice_is_read_in_every_syntax(
    whole: dict[str, bytes], tmp_path: Path, syntax: str
) -> None:
    path = tmp_path / "slice"
    path.write_bytes(whole[syntax])
    phantom = Phantom(shape=(12, 10, 1), spacing=(25.0, 25.0, 25.0))
    exact = np.clip(np.rint(phantom.slice_hu(0)), -1024, 3071)
    assert np.array_equal(load_volume(path).voxels[0], exact)


@pytest.mark.parametrize("compression", ["none", "implicit", "rle", "jpegls"])
def test_a_file_cut_anywhere_is_never_an_image(
    whole: dict[str, bytes], tmp_path: Path, compression: str
) -> None:
    content = whole[compression]
    path = tmp_path / "cut.dcm"
    end = len(content) - {"rle": 10, "jpegls": 10}.get(compression, 1)
    for kept in range(0, end, 7):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"cut\.dcm"):
            load_volume(path)


# -- bounds -------------------------------------------------------------------------------------
def element(group: int, number: int, vr: bytes, length: int) -> bytes:
    return struct.pack("<HH2s", group, number, vr) + (
        struct.pack("<HI", 0, length)
        if vr in (b"OB", b"UN", b"UT", b"SQ")
        else struct.pack("<H", length)
    )


def test_an_endless_header_is_refused_and_not_held_in_memory(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A wanted attribute of 100 MiB, most of it a hole in the file."""
    path = tmp_path / "endless.dcm"
    marker = whole["none"].index(struct.pack("<HH", 0x0020, 0x0032))
    with path.open("wb") as file:
        file.write(whole["none"][:marker] + element(0x0020, 0x0032, b"UT", 100 << 20))
        file.truncate(marker + (100 << 20))
    with pytest.raises(InputError, match="a header of more than 67108864 bytes"):
        load_volume(path)


def test_unwanted_attributes_of_any_length_are_passed_over(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "long.dcm"
    content = whole["none"]
    marker = content.index(struct.pack("<HH", 0x0028, 0x0002))
    with path.open("wb") as file:
        file.write(content[:marker] + element(0x0021, 0x1001, b"UN", 100 << 20))
        file.seek(100 << 20, 1)
        file.write(content[marker:])
    assert load_volume(path).shape == (1, 10, 12)


def test_a_deflated_bomb_is_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    content = whole["deflated"]
    start = 144 + struct.unpack_from("<I", content, 140)[0]
    data = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(data + element(0x7FE1, 0x1001, b"UN", 270 << 20))
    for _ in range(270):
        packed += packer.compress(bytes(1 << 20))
    path = tmp_path / "bomb.dcm"
    path.write_bytes(content[:start] + packed + packer.flush())
    with pytest.raises(InputError, match="a deflated data set of more than"):
        load_volume(path)


# -- sizes that only a header claims --------------------------------------------------------------
Claim = dict[str, int]

CLAIMS: dict[str, tuple[str, Claim, str, str]] = {
    "one huge image of RLE": (
        "rle",
        {"Rows": 16_384, "Columns": 16_384},
        "too_large",
        "1 images of 16384 x 16384 .* are 536870912 bytes from [0-9]+ compressed ones",
    ),
    "beyond what may be read": (
        "rle",
        {"Rows": 65_535, "Columns": 65_535},
        "too_large",
        "are 8589672450 bytes, at most 4294967296 are read",
    ),
    "frames that no byte is there for": (
        "jpegls",
        {"NumberOfFrames": 60_000},
        "damaged",
        "60000 frames in [0-9]+ bytes of pixel data",
    ),
    "uncompressed frames that are not there": (
        "none",
        {"NumberOfFrames": 60_000, "Rows": 4096, "Columns": 4096},
        "damaged",
        "60000 frames in [0-9]+ bytes of pixel data",
    ),
    "more frames than any file has": (
        "none",
        {"NumberOfFrames": 2_000_000_000},
        "damaged",
        "2000000000 frames, at most 65536 are read",
    ),
    "a code stream that claims the same": (
        "jpegls",
        {"Rows": 10_000, "Columns": 10_000},
        "damaged_pixels",
        "in the decoder|bytes decoded for",
    ),
}
"""Transfer syntax, what the header claims, the reason and what the message says."""

CHILD = """
import json, resource, sys
from pathlib import Path
from plinth.engine.errors import InputError
from plinth.verticals.medical import load_volume
from plinth.verticals.medical.dicom.discover import scan

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = held()
data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (data + (768 << 20),) * 2)
told = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_volume(folder)
        told[folder.name] = ["loaded", ""]
    except InputError as error:
        ignored = " ".join(one.reason for one in scan(folder).ignored)
        damaged = error.reason == "no_images"
        told[folder.name] = ["damaged", ignored] if damaged else [error.reason, str(error)]
print(json.dumps({"told": told, "grown": held() - before}))
"""


def test_no_memory_is_taken_on_a_header_s_word(tmp_path: Path, write: Write, edit: Edit) -> None:
    """Crafted headers, read by a process that may take 768 MiB: each refused for its reason."""
    for name, (compression, claim, _, _) in CLAIMS.items():
        folder = write(f"claims/{name}", compression=compression, shape=(12, 10, 1))

        def claims(image: pydicom.Dataset, _: int, claim: Claim = claim) -> None:
            for keyword, value in claim.items():
                setattr(image, keyword, value)

        edit(folder, claims)
        if "code stream" in name:
            path = folder / "slice_0001.dcm"
            content = path.read_bytes()
            at = content.index(b"\xff\xf7") + 5
            path.write_bytes(content[:at] + struct.pack(">HH", 10_000, 10_000) + content[at + 4 :])
    many = write("claims/many large images", compression="rle", shape=(12, 10, 40))
    edit(many, lambda image, _: (setattr(image, "Rows", 4096), setattr(image, "Columns", 4096)))
    items = tmp_path / "claims" / "items without end"
    items.mkdir()
    content = (many / "slice_0001.dcm").read_bytes()
    at = content.index(struct.pack("<HH", 0x7FE0, 0x0010))
    sequence = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, 8 << 20)
    empty = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    (items / "slice.dcm").write_bytes(content[:at] + sequence + empty * (1 << 20) + content[at:])

    child = [sys.executable, "-c", CHILD, str(tmp_path / "claims")]
    done = subprocess.run(child, capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)
    expected = {name: (reason, says) for name, (_, _, reason, says) in CLAIMS.items()}
    expected["many large images"] = "too_large", "1342177280 bytes from [0-9]+ compressed ones"
    expected["items without end"] = "damaged", "a header of more than 300000 items"
    assert set(found["told"]) == set(expected)
    for name, (reason, message) in found["told"].items():
        assert reason == expected[name][0], (name, message)
        assert re.search(expected[name][1], message), (name, message)
    assert found["grown"] < 400 << 20


def test_a_volume_may_be_bounded_below_what_the_reader_allows(write: Write) -> None:
    folder = write()
    assert load_volume(folder, max_bytes=36 * 30 * 10 * 2).shape == (10, 30, 36)
    with pytest.raises(InputError, match="are 21600 bytes, at most 21599 are read"):
        load_volume(folder, max_bytes=21_599)


def test_pixel_data_shorter_than_the_image_is_refused(write: Write, edit: Edit) -> None:
    path = write() / "slice_0001.dcm"
    edit(path, lambda image, _: setattr(image, "Rows", 31))
    with pytest.raises(InputError) as refusal:
        load_volume(path)
    assert refusal.value.reason in ("truncated", "damaged_pixels")
    assert "slice_0001.dcm" in str(refusal.value)


def test_a_code_stream_of_another_size_is_not_decoded(write: Write) -> None:
    path = write(compression="jpegls", shape=(12, 10, 1)) / "slice_0001.dcm"
    content = path.read_bytes()
    at = content.index(b"\xff\xf7") + 5
    path.write_bytes(content[:at] + struct.pack(">HH", 60000, 60000) + content[at + 4 :])
    with pytest.raises(InputError, match=re.escape("is 60000 x 60000 pixels, not 12 x 10")):
        load_volume(path)


# -- one bad value --------------------------------------------------------------------------------
@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "RescaleSlope", "PixelSpacing"])
def test_a_number_that_is_none_is_named(write: Write, keyword: str) -> None:
    path = write() / "slice_0001.dcm"
    image = pydicom.dcmread(path)
    tag = struct.pack("<HH", image[keyword].tag.group, image[keyword].tag.element)
    content = path.read_bytes()
    at = content.index(tag + b"DS") + 8
    path.write_bytes(content[:at] + b"?" + content[at + 1 :])
    with pytest.raises(InputError, match=rf"slice_0001\.dcm .*{keyword} is no finite number"):
        load_volume(path)


def test_a_bad_thickness_harms_nothing_but_itself(write: Write) -> None:
    folder = write()
    for path in folder.glob("*.dcm"):
        content = path.read_bytes()
        at = content.index(struct.pack("<HH", 0x0018, 0x0050) + b"DS") + 8
        path.write_bytes(content[:at] + b"?" + content[at + 1 :])
    volume = load_volume(folder, strict=True)
    assert volume.series.slice_thickness is None
    assert volume.spacing[2] == pytest.approx(5.0)


def test_a_folder_of_which_some_is_hostile_still_gives_its_series(
    write: Write, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = write()
    (folder / "cut").write_bytes(whole["none"][:700])
    (folder / "noise").write_bytes(bytes(128) + b"DICM" + np.random.default_rng(0).bytes(4000))
    found = scan(folder)
    assert [len(series.frames) for series in found.series] == [10]
    assert {"cut", "noise"} <= {Path(bad.name).name for bad in found.ignored}


# -- documentation --------------------------------------------------------------------------------
def test_every_reason_for_a_refusal_is_documented() -> None:
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "dicom.md").read_text()
    modules = [
        "header",
        "decode",
        "codecs",
        "choose",
        "discover",
        "geometry",
        "regrid",
        "loader",
    ]
    room = root / "verticals" / "medical"
    text = (room / "source.py").read_text()
    text += "".join((room / "dicom" / f"{name}.py").read_text() for name in modules)
    reasons = set(re.findall(r'reason(?:=| = )[^\n]*?"([a-z_]+)"', text))
    reasons |= {f"geometry_{kind}" for kind in STATUS_OF}
    assert len(reasons) > 25
    assert {reason for reason in reasons if f"`{reason}`" not in page} == set()


def test_an_archive_of_a_version_to_come_is_refused(tmp_path: Path) -> None:
    """As a flipped bit in its directory makes one; ``zipfile`` says it with another error."""
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.dcm", b"")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 189
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"zip file version 18\.9") as refusal:
        load_volume(path)
    assert refusal.value.reason == "bad_archive"
