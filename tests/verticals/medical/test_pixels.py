"""Stored pixels become exact modality values, in the smallest type that holds them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
)

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.jpeg import lossless
from plinth.verticals.medical.dicom.jpeg.lossless import frame_header
from plinth.verticals.medical.dicom.jpeg.lossy import DamagedStream, decode_lossy
from plinth.verticals.medical.dicom.loader import load_volume

Write = Callable[..., Path]
Edit = Callable[..., None]
Files = Callable[[str], Path]


def pixels(change: Callable[[np.ndarray], np.ndarray], **attributes: Any) -> Callable[..., None]:
    """An edit that replaces stored values and attributes."""

    def edit(image: pydicom.Dataset, k: int) -> None:
        stored = np.frombuffer(image.PixelData, "<u2").reshape(image.Rows, image.Columns)
        image.PixelData = change(stored).tobytes()
        for name, value in attributes.items():
            setattr(image, name, value(k) if callable(value) else value)

    return edit


# -- stored values to modality values ---------------------------------------------------------
def test_whole_slopes_stay_int16(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s, RescaleSlope=2, RescaleIntercept=-2048))
    volume = load_volume(folder)
    assert volume.voxels.dtype == np.int16
    assert np.array_equal(volume.voxels, expected() * 2)


def test_a_slope_of_its_own_for_every_slice_is_kept_exactly(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s, RescaleSlope=lambda k: 1 + k / 8, RescaleIntercept="-10.5"))
    volume = load_volume(folder)
    assert volume.voxels.dtype == np.float32
    slopes = 1 + np.arange(10) / 8
    exact = (expected().astype(float) + 1024) * slopes[:, None, None] - 10.5
    assert np.array_equal(volume.voxels, exact.astype(np.float32))


def test_values_beyond_int16_become_float32(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    edit(
        folder,
        pixels(lambda s: s * np.uint16(32), BitsStored=16, HighBit=15, RescaleIntercept=0),
    )
    volume = load_volume(folder)
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.max() > 32767
    assert np.array_equal(volume.voxels, (expected().astype(np.int32) + 1024) * 32)


def test_unsigned_sixteen_bits_with_small_values_stay_int16(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s, BitsStored=16, HighBit=15))
    volume = load_volume(folder)
    assert volume.voxels.dtype == np.int16
    assert np.array_equal(volume.voxels, expected())


def test_bits_beyond_bits_stored_are_masked(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s | np.uint16(0xA000)))
    assert np.array_equal(load_volume(folder).voxels, expected())


@pytest.mark.parametrize("signed", [False, True])
def test_values_that_need_bits_beyond_bits_stored_are_refused(
    write: Write, edit: Edit, signed: bool
) -> None:
    """Air and tissue of 12 bits in an image that says ten: without the others both look like HU."""

    def low(stored: np.ndarray) -> np.ndarray:
        return (stored.astype(np.int16) - 1024 * signed).view(np.uint16)

    folder = write()
    said = {"BitsStored": 10, "HighBit": 9, "PixelRepresentation": int(signed)}
    edit(folder, pixels(low, **said, RescaleIntercept=-1024 * (not signed)))
    with pytest.raises(InputError, match="Bits Stored is 10") as refused:
        load_volume(folder)
    assert refused.value.field == "BitsStored"


def test_an_overlay_in_the_bits_beyond_is_no_part_of_the_values(
    write: Write, edit: Edit, expected: Any
) -> None:
    def drawn(stored: np.ndarray) -> np.ndarray:
        marked = stored.copy()
        marked[5:20:3, 4:28:2] |= np.uint16(0x1000)
        return marked

    folder = write()
    edit(folder, pixels(drawn))
    with pytest.raises(InputError, match="no overlay"):
        load_volume(folder)
    edit(folder, lambda image, _: image.add_new(0x60020102, "US", 12))
    assert np.array_equal(load_volume(folder).voxels, expected())


def test_twelve_signed_bits_are_extended(write: Write, edit: Edit, expected: Any) -> None:
    def signed(stored: np.ndarray) -> np.ndarray:
        return (stored.astype(np.int16) - 1024).view(np.uint16) & np.uint16(0x0FFF)

    folder = write()
    edit(folder, pixels(signed, PixelRepresentation=1, RescaleIntercept=0))
    assert np.array_equal(load_volume(folder).voxels, expected())


def test_bits_that_start_higher_are_shifted_down(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s << np.uint16(4), HighBit=15))
    assert np.array_equal(load_volume(folder).voxels, expected())


def test_eight_bit_images(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "RescaleSlope": 16}
    edit(folder, pixels(lambda s: (s // 16).astype(np.uint8), **eight))
    assert np.array_equal(load_volume(folder).voxels, (expected() + 1024) // 16 * 16 - 1024)


def test_nonsense_bits_are_refused(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s, BitsStored=20))
    with pytest.raises(InputError, match="make no sense"):
        load_volume(folder)


@pytest.mark.parametrize("padding", [(-2000, None), (-2000, -1500)])
def test_padding_outside_the_range_of_hu_becomes_air(
    write: Write, edit: Edit, expected: Any, padding: tuple[int, int | None]
) -> None:
    def pad(image: pydicom.Dataset, _: int) -> None:
        stored = np.frombuffer(image.PixelData, "<u2").astype(np.int16) - 1024
        stored[:50] = -1700 if padding[1] else -2000
        image.PixelData = stored.tobytes()
        image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 15, 1
        image.RescaleIntercept = 0
        image.add_new("PixelPaddingValue", "SS", padding[0])
        if padding[1] is not None:
            image.add_new("PixelPaddingRangeLimit", "SS", padding[1])

    folder = write()
    edit(folder, pad)
    volume = load_volume(folder, strict=True)
    exact = expected()
    exact.reshape(10, -1)[:, :50] = -1024
    assert np.array_equal(volume.voxels, exact)
    assert volume.verdict.ok
    assert [issue.kind for issue in volume.verdict.issues] == ["padding"]


@pytest.mark.parametrize(
    ("vr", "padding", "signed"),
    [("US", 63536, False), ("SS", -2000, False), ("SS", -3024, True), ("SS", -2100, True)],
)
def test_padding_that_takes_more_bits_than_are_stored_becomes_air(
    write: Write, edit: Edit, expected: Any, vr: str, padding: int, signed: bool
) -> None:
    """-2000 in 12 bits reads 2096 without its upper bits: a frame of bone around the patient."""

    def pad(image: pydicom.Dataset, _: int) -> None:
        stored = np.frombuffer(image.PixelData, "<u2").astype(np.int16) - 1024 * signed
        stored[:50] = padding if padding < 32768 else padding - 65536
        image.PixelData = stored.tobytes()
        image.PixelRepresentation, image.RescaleIntercept = int(signed), -1024 * (not signed)
        image.add_new("PixelPaddingValue", vr, padding)

    folder = write()
    edit(folder, pad)
    exact = expected()
    exact.reshape(10, -1)[:, :50] = -1024
    volume = load_volume(folder, strict=True)
    assert np.array_equal(volume.voxels, exact)
    assert [issue.kind for issue in volume.verdict.issues] == ["padding"]


def test_a_padding_value_inside_the_range_of_hu_is_kept(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = write()
    edit(folder, lambda image, _: image.add_new("PixelPaddingValue", "US", 1064))
    assert np.array_equal(load_volume(folder).voxels, expected())


def test_colour_and_lookup_tables_are_refused(write: Write, edit: Edit) -> None:
    folder = write()

    def table(image: pydicom.Dataset, _: int) -> None:
        image.ModalityLUTSequence = [pydicom.Dataset()]

    edit(folder, table)
    with pytest.raises(InputError, match="Modality LUT"):
        load_volume(folder)


@pytest.mark.parametrize("name", ["BitsAllocated", "BitsStored", "PixelRepresentation"])
def test_stored_bits_that_may_mean_anything_are_refused(
    write: Write, edit: Edit, name: str
) -> None:
    """Signed values without Pixel Representation would be off by 65,536."""
    folder = write()
    edit(folder, lambda image, _: delattr(image, name))
    with pytest.raises(InputError, match=f"no {name}, without which") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "not_a_volume"


def test_two_slopes_for_one_image_are_refused(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, _: setattr(image, "RescaleSlope", ["1", "2"]))
    with pytest.raises(InputError, match="Rescale Slope has 2 values, expected one"):
        load_volume(folder)


# -- decimal strings and byte orders ----------------------------------------------------------
def test_decimal_strings_of_any_length_are_read(write: Write, expected: Any) -> None:
    folder = write()
    for path in folder.glob("*.dcm"):
        image = pydicom.dcmread(path)
        with pydicom.config.disable_value_validation():
            image.PixelSpacing = ["8.000000000000000001", " 9.0000000000000000000 "]
            image.save_as(path)
    volume = load_volume(folder, strict=True)
    assert volume.spacing == pytest.approx((9.0, 8.0, 5.0), abs=1e-12)
    assert np.array_equal(volume.voxels, expected())


@pytest.mark.filterwarnings("ignore")
def test_big_endian_is_read(pydicom_data: Files) -> None:
    big = load_volume(pydicom_data("MR_small_bigendian.dcm"))
    assert big.series.transfer_syntax_uid == ExplicitVRBigEndian
    assert np.array_equal(big.voxels, load_volume(pydicom_data("MR_small.dcm")).voxels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_implicit.dcm",
        "MR_small_padded.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "explicit_VR-UN.dcm",
        "examples_overlay.dcm",
    ],
)
def test_single_files_agree_with_pydicom(pydicom_data: Files, name: str) -> None:
    volume = load_volume(pydicom_data(name))
    image = pydicom.dcmread(pydicom_data(name))
    reference = image.pixel_array.astype(float)
    reference = reference * float(image.get("RescaleSlope", 1)) + float(
        image.get("RescaleIntercept", 0)
    )
    assert np.array_equal(volume.voxels[0], reference)


def test_jpeg_lossless_equals_simpleitk(pydicom_data: Files) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = pydicom_data("bad_sequence.dcm")
    volume = load_volume(path)
    assert volume.series.transfer_syntax_uid == "1.2.840.10008.1.2.4.70"
    assert volume.voxels.dtype == np.int16
    assert np.array_equal(volume.voxels, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


@pytest.mark.parametrize(
    ("compression", "module", "package", "syntax"),
    [
        ("jpegls", "jpeg_ls", "pyjpegls", "JPEG-LS Lossless Image Compression"),
        ("rle", "rle", "pylibjpeg-rle", "RLE Lossless"),
    ],
)
def test_a_missing_decoder_names_file_syntax_and_package(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    compression: str,
    module: str,
    package: str,
    syntax: str,
) -> None:
    folder = write(compression=compression)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    assert refusal.value.reason == "no_decoder"
    assert refusal.value.hint == f"pip install {package}"
    assert "slice_0001.dcm" in str(refusal.value)
    assert f"is stored as {syntax} (1.2.840.10008.1.2." in str(refusal.value)


def test_a_syntax_nobody_reads_is_named(write: Write) -> None:
    folder = write(compression="rle")
    for path in folder.glob("*.dcm"):
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.9.9\0", 1))
    with pytest.raises(InputError, match=r"stored as 1\.2\.840\.10008\.1\.9\.9") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "unsupported_syntax"


@pytest.mark.filterwarnings("ignore:Expected explicit VR")
def test_pixels_of_an_unknown_order_of_bytes_are_not_read(write: Write, edit: Edit) -> None:
    """GE's own syntax has little-endian headers and big-endian pixels."""
    folder = write()
    edit(folder, pixels(lambda stored: stored.byteswap()))
    for path in folder.glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        image.save_as(path, implicit_vr=True)
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"1.2.840.10008.1.2\0", b"1.2.840.113619.5.2", 1))
    with pytest.raises(InputError, match=r"stored as 1\.2\.840\.113619\.5\.2") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "unsupported_syntax"


# -- JPEG, packed by others -------------------------------------------------------------------
def jpeg_lossless(folder: Path) -> None:
    """Compress the slices of a folder to JPEG Lossless, rescale untouched."""
    sitk = pytest.importorskip("SimpleITK")
    for path in sorted(folder.glob("*.dcm")):
        image = pydicom.dcmread(path)
        stored = sitk.GetImageFromArray(image.pixel_array[None])
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.SetFileName(str(path.with_suffix(".jpeg.dcm")))
        writer.Execute(stored)
        packed = pydicom.dcmread(path.with_suffix(".jpeg.dcm"))
        path.with_suffix(".jpeg.dcm").unlink()
        image.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        image.PixelData = packed.PixelData
        image["PixelData"].is_undefined_length = True
        image.save_as(path)


@pytest.mark.parametrize(
    ("codec", "options", "syntax", "lossy"),
    [
        ("jpegls", {"level": 0}, "80", False),
        ("jpegls", {"level": 0}, "81", False),
        ("jpegls", {"level": 2}, "81", True),
        ("jpegls", {"level": 2}, "80", True),
        ("jpeg2k", {"reversible": True, "codecformat": "j2k"}, "91", False),
        ("jpeg2k", {"level": 60, "codecformat": "j2k"}, "91", True),
        ("jpeg2k", {"level": 60, "codecformat": "j2k"}, "90", True),
        ("htj2k", {"reversible": True}, "201", False),
    ],
)
def test_a_code_stream_tells_of_its_loss_where_the_header_does_not(
    write: Write, edit: Edit, expected: Any, codec: str, options: Any, syntax: str, lossy: bool
) -> None:
    """Lossless ones are read by another library than the one that wrote them, or equal it."""
    encode = getattr(pytest.importorskip("imagecodecs"), f"{codec}_encode")

    def pack(image: pydicom.Dataset, _: int) -> None:
        image.PixelData = encapsulate([encode(image.pixel_array, **options)])
        image["PixelData"].is_undefined_length = True
        image["PixelData"].VR = "OB"
        image.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.4.{syntax}")

    folder = write()
    edit(folder, pack)
    volume = load_volume(folder)
    assert ["lossy" in issue.kind for issue in volume.verdict.issues] == [True] * lossy
    assert np.array_equal(volume.voxels, expected()) is not lossy


@pytest.mark.parametrize(("end", "name"), [("110", "JPEG XL Lossless"), ("112", "JPEG XL")])
def test_jpeg_xl_is_refused_by_its_name(write: Write, edit: Edit, end: str, name: str) -> None:
    known = UID("1.2.840.10008.1.2.4.201")
    folder = write(compression="jpegls")
    edit(folder, lambda image, _: setattr(image.file_meta, "TransferSyntaxUID", known))
    for path in folder.glob("*.dcm"):
        raw = path.read_bytes()
        path.write_bytes(raw.replace(known.encode(), known[:-3].encode() + end.encode(), 1))
    with pytest.raises(InputError, match=f"stored as {name} ") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "unsupported_syntax"


def test_a_damaged_deflated_file_is_said_to_be_one(write: Write) -> None:
    folder = write()
    for path in folder.glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        image.save_as(path)
        raw = path.read_bytes()
        start = 144 + int.from_bytes(raw[140:144], "little")
        path.write_bytes(raw[:start] + b"\xff" * 20 + raw[start + 20 :])
    with pytest.raises(InputError, match="its deflated data set is damaged"):
        load_volume(folder)


@pytest.mark.parametrize("bits", [12, 13, 14, 16])
def test_jpeg_lossless_of_every_precision(
    write: Write, edit: Edit, expected: Any, bits: int
) -> None:
    encode = pytest.importorskip("imagecodecs").jpeg8_encode
    finer = 2 ** (bits - 12)

    def pack(image: pydicom.Dataset, k: int) -> None:
        stored = image.pixel_array * np.uint16(finer)
        image.BitsStored, image.HighBit, image.RescaleSlope = bits, bits - 1, 1 / finer
        how = {"lossless": True, "predictor": k % 7 + 1, "bitspersample": bits}
        image.PixelData = encapsulate([encode(stored, **how)])
        image["PixelData"].is_undefined_length = True
        image["PixelData"].VR = "OB"
        image.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.57")

    folder = write()
    edit(folder, pack)
    assert np.array_equal(load_volume(folder, strict=True).voxels, expected())


@pytest.mark.parametrize("bits", [8, 12])
def test_lossy_jpeg_that_its_decoder_doubts_is_refused(write: Write, edit: Edit, bits: int) -> None:
    """Whole it loads as pydicom has it; short of coded data it would be grey from there on."""
    encode = pytest.importorskip("imagecodecs").jpeg8_encode
    cut = 0

    def pack(image: pydicom.Dataset, _: int) -> None:
        stored = np.clip(image.pixel_array >> (12 - bits), 0, 2**bits - 1)
        stored = stored.astype(np.uint8 if bits == 8 else np.uint16)
        stream = encode(stored, level=95, **({} if bits == 8 else {"bitspersample": bits}))
        stream = stream[: -2 - cut] + stream[-2:]
        image.BitsAllocated, image.BitsStored, image.HighBit = (
            8 if bits == 8 else 16,
            bits,
            bits - 1,
        )
        image.PixelData = encapsulate([stream])
        image["PixelData"].is_undefined_length = True
        image["PixelData"].VR = "OB"
        image.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2.4.{50 if bits == 8 else 51}")

    folder = write(compression="none")
    edit(folder, pack)
    image = pydicom.dcmread(sorted(folder.glob("*.dcm"))[0])
    stored = imagecodecs_decoded(image)
    volume = load_volume(folder)
    assert np.array_equal(volume.voxels[0] - float(image.RescaleIntercept), stored)
    cut = 40
    folder = write("cut", compression="none")
    edit(folder, pack)
    with pytest.raises(InputError, match="premature end of data segment") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "damaged_pixels"
    assert "slice_0001.dcm" in str(refusal.value)


def imagecodecs_decoded(image: pydicom.Dataset) -> np.ndarray:
    """The values of a file's only code stream, by libjpeg as another library binds it."""
    frame = next(generate_frames(image.PixelData, number_of_frames=1))
    return pytest.importorskip("imagecodecs").jpeg8_decode(frame)


@pytest.mark.parametrize("end", [b"\0", b"\xff", b"\0\0\0"])
def test_padding_before_the_end_mark_is_no_damage(end: bytes) -> None:
    encode = pytest.importorskip("imagecodecs").jpeg8_encode
    stored = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) % 211
    stream = encode(stored.astype(np.uint8), level=90)
    whole = decode_lossy(None, stream, frame_header(stream))
    padded = stream[:-2] + end + stream[-2:]
    assert np.array_equal(decode_lossy(None, padded, frame_header(padded)), whole)
    scan = stream.index(b"\xff\xda") + 8  # another end of spectrum, as some encoders write it
    odd = stream[:scan] + b"\0" + stream[scan + 1 :]
    assert np.array_equal(decode_lossy(None, odd, frame_header(odd)), whole)
    with pytest.raises(DamagedStream):
        decode_lossy(None, stream[:-2] + b"\1\2\3\4" + stream[-2:], frame_header(stream))


def test_jpeg_lossless_keeps_every_slices_own_rescale(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = write()
    edit(folder, pixels(lambda s: s, RescaleSlope=lambda k: 1 + k / 8, RescaleIntercept="-10.5"))
    jpeg_lossless(folder)
    volume = load_volume(folder)
    assert volume.series.transfer_syntax_uid == JPEGLosslessSV1
    slopes = 1 + np.arange(10) / 8
    exact = (expected().astype(float) + 1024) * slopes[:, None, None] - 10.5
    assert np.array_equal(volume.voxels, exact.astype(np.float32))


def restarted_jpeg(x: np.ndarray, precision: int, predictor: int, shift: int, every: int) -> bytes:
    """A lossless JPEG as ITU-T T.81 annex H has it, with a restart marker after so many rows."""
    x = x.astype(int) >> shift
    rows, columns = x.shape
    pieces, bits = [], ""
    for r in range(rows):
        for c in range(columns):
            left, above = x[r, c - 1] if c else 0, x[r - 1, c] if r else 0
            corner = x[r - 1, c - 1] if r and c else 0
            choices = [left, above, corner, left + above - corner, left + (above - corner >> 1)]
            choices += [above + (left - corner >> 1), left + above >> 1]
            guess = choices[predictor - 1]
            if r % every == 0:
                guess = left if c else 1 << (precision - shift - 1)
            elif c == 0:
                guess = above
            off = (int(x[r, c]) - int(guess) + 32767) % 65536 - 32767
            size = abs(off).bit_length()
            bits += f"{size:05b}"
            if 0 < size < 16:
                bits += f"{off if off > 0 else off + (1 << size) - 1:0{size}b}"
        if (r + 1) % every == 0 or r + 1 == rows:
            bits += "1" * (-len(bits) % 8)
            data = int(bits, 2).to_bytes(len(bits) // 8, "big")
            pieces.append(data.replace(b"\xff", b"\xff\0"))
            bits = ""
    coded = pieces[0]
    for n, piece in enumerate(pieces[1:]):
        coded += bytes([0xFF, 0xD0 + n % 8]) + piece
    frame = struct.pack(">BHHBBBB", precision, rows, columns, 1, 1, 0x11, 0)
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    segments = [(0xC3, frame), (0xC4, table), (0xDA, bytes([1, 1, 0, predictor, 0, shift]))]
    if every < rows:
        segments.insert(0, (0xDD, struct.pack(">H", every * columns)))
    head = b"".join(struct.pack(">BBH", 0xFF, m, len(body) + 2) + body for m, body in segments)
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


def test_jpeg_lossless_of_every_prediction_shift_and_restart_is_read(write: Write) -> None:
    """Smooth, random and extreme values; a stream that lost a whole interval is refused."""
    path = write(shape=(7, 9, 1)) / "slice_0001.dcm"
    image = pydicom.dcmread(path)
    chance = np.random.default_rng(5)
    image.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.57")
    del image.RescaleSlope, image.RescaleIntercept, image.RescaleType

    def values_of(stream: bytes) -> np.ndarray:
        image.PixelData = encapsulate([stream])
        image["PixelData"].VR = "OB"
        image["PixelData"].is_undefined_length = True
        image.save_as(path)
        voxels: np.ndarray = load_volume(path).voxels[0]
        return voxels

    for number in range(42):
        precision, shift = int(chance.integers(8, 17)), number % 3
        image.BitsAllocated = 8 if precision == 8 else 16
        image.BitsStored, image.HighBit = precision, precision - 1
        top = 1 << precision
        smooth = top // 2 + chance.integers(-3, 4, (9, 7)).cumsum(axis=1)
        kinds = [smooth, chance.integers(0, top, (9, 7)), top - 1 - (smooth % 2) * (top - 1)]
        stored = kinds[number // 7 % 3] >> shift << shift
        every = (9, 1, 2, 4)[number % 4]
        stream = restarted_jpeg(stored, precision, number % 7 + 1, shift, every)
        assert np.array_equal(values_of(stream), stored)
        if every == 2:
            first, second = stream.index(b"\xff\xd0"), stream.index(b"\xff\xd1")
            with pytest.raises(InputError, match="cannot be decoded"):
                values_of(stream[:first] + stream[second:])


@pytest.mark.parametrize("predictor", range(1, 8))
def test_length_of_jpeg_lossless_is_told_from_the_row_after_the_last(
    predictor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole streams are not counted, whatever their last byte; no byte is lost or added unseen."""
    codec = pytest.importorskip("imagecodecs")
    chance = np.random.default_rng(predictor)
    counted: list[str | None] = []
    count = lossless.wrong_length

    def counting(stream: bytes, values: Any) -> str | None:
        counted.append(count(stream, values))
        return counted[-1]

    monkeypatch.setattr(lossless, "wrong_length", counting)
    ends = set()
    for _ in range(40):
        stored = (2000 + chance.normal(0, 30, (80, 90))).astype(np.uint16)
        stream = codec.jpeg8_encode(stored, lossless=True, predictor=predictor, bitspersample=12)
        at, end = frame_header(stream), stream.rindex(b"\xff\xd9")
        ends.add(stream[end - 2 : end] == b"\xff\0")
        read = lossless.decode_lossless(codec.jpeg8_decode, stream, at, 12)
        assert np.array_equal(read, stored)
        assert not counted
        for wrong in (stream[: end - 1], stream[:end] + b"\x55"):
            with pytest.raises(lossless.WrongLength, match="bits"):
                lossless.decode_lossless(codec.jpeg8_decode, wrong + stream[end:], at, 12)
        assert len(counted) == 2
        counted.clear()
        padded = stream[:end] + bytes(2) + stream[end:]
        assert np.array_equal(lossless.decode_lossless(codec.jpeg8_decode, padded, at, 12), stored)
        counted.clear()
    assert False in ends


# -- units ------------------------------------------------------------------------------------
def unscaled(image: pydicom.Dataset, _: int) -> None:
    del image.RescaleSlope, image.RescaleIntercept, image.RescaleType


@pytest.mark.parametrize(
    ("change", "units", "message"),
    [
        (lambda image, _: None, "HU", None),
        (lambda image, _: delattr(image, "RescaleType"), "HU", None),
        (lambda image, _: setattr(image, "RescaleType", "hu"), "HU", None),
        (
            lambda image, _: setattr(image, "RescaleType", "Z_EFF"),
            "Z_EFF",
            "CT of Rescale Type Z_EFF: the values are not Hounsfield units",
        ),
        (unscaled, "", "CT without Rescale Slope: the values are not Hounsfield units"),
    ],
)
def test_ct_that_is_not_in_hounsfield_units_is_remarked(
    write: Write, edit: Edit, change: Callable[..., None], units: str, message: str | None
) -> None:
    folder = write()
    edit(folder, change)
    volume = load_volume(folder, strict=True)
    assert volume.series.units == units
    assert [issue.message for issue in volume.verdict.issues] == ([message] if message else [])


def test_one_colour_image_of_a_series_is_never_read_as_grey(
    write: Write, edit: Edit, expected: Any
) -> None:
    def paint(image: pydicom.Dataset, _: int) -> None:
        image.SamplesPerPixel, image.PhotometricInterpretation = 3, "RGB"
        image.PlanarConfiguration = 0
        image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
        image.PixelData = bytes(image.Rows * image.Columns * 3)

    folder = write()
    edit(folder / "slice_0010.dcm", paint)
    volume = load_volume(folder)
    assert volume.verdict.status == "mixed_split"
    assert np.array_equal(volume.voxels, expected()[:9])
