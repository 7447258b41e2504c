"""Archives that are damaged or mean harm: a 400 or 413 in the JSON shape, within bounds."""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
from archive_builders import BOUNDARY, FORM, ZIP, form, zipped
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, error

from plinth.engine import InputError
from plinth.pipelines.config.settings import UploadConfig
from plinth.pipelines.folders.archives import Sink, unzip

ROUTE = "/v1/shelf/read"
FILES = [("a.txt", b"1"), ("b.txt", b"2" * 500)]
METHODS = {
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
    "stored": zipfile.ZIP_STORED,
}


def unpacked(archive: bytes, limits: UploadConfig | None = None) -> dict[str, bytes]:
    """Content by stored name of an archive that is taken."""
    with tempfile.TemporaryDirectory() as place:
        packed, folder = Path(place) / "body", Path(place) / "in"
        packed.write_bytes(archive)
        folder.mkdir()
        unzip(packed, Sink(folder, limits or UploadConfig()))
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_recorded_damaged_archives_are_400(shelf: Running, cases: Path) -> None:
    for case in sorted(cases.glob("zip_*.zip")):
        response = shelf.post(ROUTE, content=case.read_bytes(), headers=ZIP)
        error(response, 400, "malformed_upload")


@pytest.mark.parametrize("method", ["bzip2", "lzma"])
def test_packings_that_let_a_client_choose_the_memory_are_refused(
    shelf: Running, method: str
) -> None:
    body = zipped(FILES, METHODS[method])
    refusal = error(shelf.post(ROUTE, content=body, headers=ZIP), 400, "malformed_upload")
    assert refusal["hint"] == "zip it again with deflate"


@settings(max_examples=200)
@given(
    st.sampled_from(list(METHODS.values())),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_a_damaged_archive_is_refused_or_its_files_are_whole(
    method: int, damage: list[tuple[int, int]]
) -> None:
    body = bytearray(zipped(FILES, method))
    for at, value in damage:
        body[at % len(body)] = value
    found: dict[str, bytes] = {}
    with contextlib.suppress(InputError):
        found = unpacked(bytes(body))
    # Where the checksums hold, only names and dates may have changed.
    assert set(found.values()) <= {content for _, content in FILES}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_archive_cut_anywhere_is_refused(method: int) -> None:
    whole = zipped(FILES, method)
    for end in range(0, len(whole) - 1, 7):
        with pytest.raises(InputError) as refused:
            unpacked(whole[:end])
        assert refused.value.reason == "malformed_upload"


def test_a_directory_longer_than_it_claims_is_counted() -> None:
    """The end says one entry; there are 30,000, each of which would cost memory."""
    entry = b"PK\x01\x02" + bytes(42)
    directory = entry * 30_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0, 0)
    with pytest.raises(InputError, match="more than 10,000 files"):
        unpacked(directory + end)


@settings(max_examples=10)
@given(st.integers(0, 500), st.binary(max_size=40))
def test_an_archive_of_many_parts_behind_a_prefix_is_read_whole(count: int, prefix: bytes) -> None:
    files = {f"{number}-{'x' * 90}": str(number).encode() for number in range(count)}
    assert unpacked(prefix + zipped(files.items())) == files


def test_of_four_thousand_files_only_a_few_are_in_memory_at_once(tmp_path: Path) -> None:
    packed, folder = tmp_path / "body", tmp_path / "in"
    packed.write_bytes(zipped((f"study/series/IM{n:06}", b"1") for n in range(4000)))
    folder.mkdir()
    held: list[int] = []

    def look(size: int) -> None:
        if sink.files % 1000 == 0:
            held.append(sum(isinstance(one, zipfile.ZipInfo) for one in gc.get_objects()))

    sink = Sink(folder, UploadConfig(), spend=look)
    unzip(packed, sink)
    assert sum(1 for path in folder.rglob("*") if path.is_file()) == 4000
    assert len(held) == 4
    assert max(held) < 500


def test_folders_are_counted_too() -> None:
    files = [(f"{n}/" + "/".join("abcdefgh") + "/f.txt", b"1") for n in range(20)]
    with pytest.raises(InputError, match="more than 50 folders"):
        unpacked(zipped(files), UploadConfig(max_files=50))


def test_a_bomb_is_stopped_by_its_ratio_and_a_herd_of_small_ones_by_their_sum() -> None:
    with pytest.raises(InputError, match="bytes per packed byte"):
        unpacked(zipped([("a", bytes(20_000_000))]))
    herd = [(f"{n}", bytes(2_000_000)) for n in range(8)]
    with pytest.raises(InputError, match="more than 10,000,000 bytes"):
        unpacked(zipped(herd), UploadConfig(max_unpacked_bytes=10_000_000))


def test_an_archive_in_an_archive_is_not_opened(shelf: Running) -> None:
    inner = zipped([(f"{n}.txt", b"1") for n in range(49)])
    body = zipped([("inner.zip", inner)])
    refusal = error(
        shelf.post(ROUTE, content=body, headers=ZIP, params={"wait": True}), 422, "nothing_found"
    )
    assert "another archive" in refusal["hint"]


# -- forms ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "boundary", ["b" * 5000, "b" * 257, '"', ""], ids=["5000", "257", "a quote", "empty"]
)
def test_boundaries_that_are_refused(shelf: Running, boundary: str) -> None:
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    error(shelf.post(ROUTE, content=form(FILES), headers=kind), 400, "malformed_upload")


@pytest.mark.parametrize("end", range(1, len(form(FILES)) - 4, 23))
def test_a_form_cut_anywhere_is_refused(shelf: Running, end: int) -> None:
    response = shelf.post(ROUTE, content=form(FILES)[:end], headers=FORM)
    error(response, 400, "malformed_upload")


def test_a_form_of_very_many_fields_is_refused_early(shelf: Running) -> None:
    field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f"\r\n\r\n\r\n'.encode()
    body = field * 20_000 + f"--{BOUNDARY}--\r\n".encode()
    refusal = error(shelf.post(ROUTE, content=body, headers=FORM), 413, "body_too_large")
    assert "more than 1,000 fields" in refusal["message"]


def test_a_form_of_very_many_files_is_refused(shelf: Running) -> None:
    body = form([(f"{n}.txt", b"1") for n in range(51)])
    refusal = error(shelf.post(ROUTE, content=body, headers=FORM), 413, "body_too_large")
    assert "more than 50 files" in refusal["message"]


def test_what_looks_like_a_boundary_inside_a_file_is_part_of_it(shelf: Running) -> None:
    tricky = b"\r\n--a-boundar" * 20_000 + b"\r" * 50_000
    files = [("noise.bin", tricky), ("n.txt", b"4")]
    response = shelf.post(ROUTE, content=form(files), headers=FORM, params={"wait": True})
    assert [item["result"]["twice"] for item in response.json()["items"]] == [8.0]


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_any_bytes_are_no_archive_or_a_refusal(body: bytes) -> None:
    with pytest.raises(InputError) as refused:
        unpacked(body + os.urandom(1))
    assert refused.value.reason == "malformed_upload"
