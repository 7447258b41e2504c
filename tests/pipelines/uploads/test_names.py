"""Names of uploaded files: whatever a client calls them, different files stay different files."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from archive_builders import FORM, ZIP, form, zipped
from hypothesis import given
from hypothesis import strategies as st
from serving import Running

from plinth.engine import InputError
from plinth.pipelines.config.settings import UploadConfig
from plinth.pipelines.folders.archives import MAX_DEPTH, Sink, stored_path, unzip

ROUTE = "/v1/shelf/read"
NINE_DEEP = "/".join("abcdefghi")
LONG_TAIL = "x" * 110
HONEST = {
    "folders in Chinese": ["患者甲/IM1.txt", "患者乙/IM1.txt"],
    "a space and an underscore": ["IM 1.txt", "IM_1.txt"],
    "nine folders deep": [f"1/{NINE_DEEP}/a.txt", f"2/{NINE_DEEP}/a.txt"],
    "long names that end alike": [f"A{LONG_TAIL}.txt", f"B{LONG_TAIL}.txt"],
    "one letter in two Unicode forms": ["caf\u00e9.txt", "cafe\u0301.txt"],
    "upper and lower case": ["scan.txt", "SCAN.txt"],
    "a hidden file": [".a.txt", "a.txt"],
    "a file where another has a folder": ["a.txt", "a.txt/b.txt"],
    "punctuation": ["a?b.txt", "a*b.txt", "a:b/c.txt", "a|b.txt", "a&b.txt"],
}


@pytest.mark.parametrize("packed", ["zip", "form"])
@pytest.mark.parametrize("names", HONEST.values(), ids=HONEST)
def test_honest_names_are_taken_and_told_as_they_came(
    shelf: Running, names: list[str], packed: str
) -> None:
    files = [(name, str(number).encode()) for number, name in enumerate(names)]
    body, kind = (zipped(files), ZIP) if packed == "zip" else (form(files), FORM)
    response = shelf.post(ROUTE, content=body, headers=kind, params={"wait": True})
    assert response.status_code == 200, response.text
    items = response.json()["items"]
    found = {item["sources"][0]: item["result"]["twice"] for item in items}
    assert found == {name: 2.0 * number for number, name in enumerate(names)}
    assert len({item["id"] for item in items}) == len(names)


@pytest.mark.parametrize("packed", ["zip", "form"])
def test_one_name_twice_is_two_files(shelf: Running, packed: str) -> None:
    """A browser sends the files of several folders without their folders."""
    files = [("IM1.txt", b"1"), ("IM1.txt", b"2"), ("IM1.txt", b"3")]
    body, kind = (zipped(files), ZIP) if packed == "zip" else (form(files), FORM)
    job = shelf.post(ROUTE, content=body, headers=kind, params={"wait": True}).json()
    assert [item["sources"] for item in job["items"]] == [["IM1.txt"]] * 3
    assert sorted(item["result"]["twice"] for item in job["items"]) == [2.0, 4.0, 6.0]


def test_an_error_names_the_file_as_its_client_did(shelf: Running) -> None:
    body = zipped([("患者甲/mesure 1.txt", b"x"), ("b.txt", b"1")])
    job = shelf.post(ROUTE, content=body, headers=ZIP, params={"wait": True}).json()
    failed = next(item for item in job["items"] if item["error"])
    assert failed["error"]["field"] == "mesure 1.txt"
    assert failed["error"]["step"] == "reading the files"


def test_recorded_names_are_two_files(cases: Path, tmp_path: Path) -> None:
    for number, case in enumerate(sorted(cases.glob("names_*.zip"))):
        target = tmp_path / str(number)
        target.mkdir()
        unzip(case, Sink(target, UploadConfig()))
        assert sum(path.is_file() for path in target.rglob("*")) == 2, case.name


names = st.lists(st.text(max_size=40) | st.text("aA._-/ 1é", max_size=8), max_size=12)


@given(names)
def test_every_file_is_stored_below_the_folder_and_by_itself(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "in"
        folder.mkdir()
        sink = Sink(folder, UploadConfig())
        taken = []
        for number, name in enumerate(names):
            with contextlib.suppress(InputError), sink.open(name) as file:
                sink.write(file, str(number).encode())
                taken.append(str(number))
        stored = [path for path in Path(place).rglob("*") if path.is_file()]
        assert sorted(path.read_text() for path in stored) == sorted(taken)
        assert all(path.is_relative_to(folder) for path in stored)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../a", "leaves its folder"),
        ("a/../../b", "leaves its folder"),
        ("/etc/passwd", "leaves its folder"),
        ("\\\\server\\share", "leaves its folder"),
        ("C:\\a", "leaves its folder"),
        ("a\\..\\..\\b", "leaves its folder"),
        ("a/" * MAX_DEPTH + "b", "folders deep"),
        ("a" * 1025, "more than 1,024 characters"),
    ],
)
def test_names_that_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        stored_path(name, 1)
    assert refused.value.reason == "malformed_upload"
