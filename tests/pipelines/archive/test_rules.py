"""The file of ``plinth archive``: what it may say, and which series its rules choose."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import lists, sampled_from, text
from orthanc import study
from pydantic import ValidationError
from pydicom import DataElement, dcmread

from plinth.engine import ConfigError, InputError
from plinth.pipelines.archive.rules import Facts, chosen, facts_of, facts_of_answer, why_not
from plinth.pipelines.archive.settings import EXAMPLE, Rule, read

CHEST = Facts(
    {
        "modality": "CT",
        "kernel": "B30f",
        "body_part": "CHEST",
        "description": "Thorax 1.0 soft",
        "study_description": None,
    },
    thickness=1.0,
    images=300,
)


def rule(**wanted: object) -> Rule:
    return Rule.model_validate({"analysis": "lungs", **wanted})


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({}, None),
        ({"modality": "CT"}, None),
        ({"modality": ["MR", "ct"]}, None),
        ({"kernel": "b30*"}, None),
        ({"thickness_mm": [1, 3]}, None),
        ({"description": ["thorax*", "!*lung*"]}, None),
        ({"min_images": 300}, None),
        ({"modality": "MR"}, "modality (Modality) does not fit"),
        ({"kernel": ["B7?*", "LUNG"]}, "kernel (ConvolutionKernel) does not fit"),
        ({"thickness_mm": [1.1, 3]}, "thickness_mm is 1, not 1.1 to 3"),
        ({"description": ["*", "!*SOFT"]}, "description (SeriesDescription) does not fit"),
        ({"study_description": "*chest*"}, "study_description (StudyDescription) is not said"),
        ({"min_images": 301}, "300 images, not 301 or more"),
    ],
)
def test_every_line_of_a_rule_has_to_hold(wanted: dict[str, object], why: str | None) -> None:
    assert why_not(rule(**wanted), CHEST) == why


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"modality": []}, "an empty pattern fits nothing"),
        ({"modality": ""}, "an empty pattern fits nothing"),
        ({"kernel": ["B30*", "!"]}, "an empty pattern fits nothing"),
        ({"modality": ["CT", "!ct"]}, "nothing can fit"),
        ({"description": "!*"}, "nothing can fit"),
        ({"thickness_mm": [3.0, 0.5]}, "the smaller one first"),
        ({"thickness_mm": [float("nan"), 1.0]}, "finite number"),
    ],
)
def test_a_rule_that_nothing_or_anything_fits_by_mistake_is_refused(
    wanted: dict[str, object], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        rule(**wanted)


@pytest.mark.parametrize("name", ["../../x", "", ".", "a/b", "a b"])
def test_an_analysis_is_called_what_a_folder_can_be(tmp_path: Path, name: str) -> None:
    path = tmp_path / "archive.toml"
    path.write_text(EXAMPLE.replace("analyses.lungs", f'analyses."{name}"'), encoding="utf-8-sig")
    with pytest.raises(ConfigError, match="String should match pattern"):
        read(path)


def test_values_that_are_none_of_their_kind_say_nothing(tmp_path: Path) -> None:
    (file,) = study(tmp_path, shape=(8, 7, 1))
    image = dcmread(file)
    image["SliceThickness"] = DataElement(0x00180050, "LO", "nan")
    image["SharedFunctionalGroupsSequence"] = DataElement(0x52009229, "LO", "none")
    image.save_as(file)
    assert facts_of(file, 1).thickness is None
    cut = b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff"
    file.write_bytes(b"\0" * 128 + b"DICM" + cut)
    with pytest.raises(InputError, match="a header cannot be read"):
        facts_of(file, 1)


def test_what_a_series_does_not_say_fits_nothing_that_is_asked() -> None:
    silent = Facts(dict.fromkeys(CHEST.texts), thickness=None, images=1)
    assert why_not(rule(), silent) is None
    assert why_not(rule(kernel="?*"), silent) == "kernel (ConvolutionKernel) is not said"
    assert why_not(rule(kernel="!B70*"), silent) is None
    assert why_not(rule(thickness_mm=[0, 5]), silent) == "thickness_mm (SliceThickness) is not said"


def test_an_archive_s_answer_rules_out_only_what_it_says() -> None:
    answer = facts_of_answer({"Modality": "CT", "SeriesDescription": "Scout"}, 300)
    asked = {"kernel": "B30*", "thickness_mm": [1, 3], "body_part": "CHEST"}
    assert why_not(rule(modality="CT", **asked), answer) is None  # known once they are fetched
    assert why_not(rule(description="!scout", **asked), answer) is not None


@given(
    lists(sampled_from(["CT", "*", "!CT", "C?", "!M*", "[", "!["]), max_size=4),
    text("CTM*[!", max_size=5),
)
def test_a_pattern_that_bars_always_wins(patterns: list[str], name: str) -> None:
    facts = Facts({**CHEST.texts, "description": name}, 1.0, 300)
    only = why_not(Rule.model_construct(analysis="lungs", description=(*patterns, "!*")), facts)
    assert only is not None


def test_a_series_gets_each_analysis_once_in_the_order_of_the_rules() -> None:
    rules = [rule(modality="MR"), rule(), rule(kernel="B30*"), Rule(analysis="spleen")]
    assert chosen(rules, CHEST) == ["lungs", "spleen"]


def test_facts_of_a_file(tmp_path: Path) -> None:
    facts = facts_of(study(tmp_path, spacing=(4.3, 4.9, 8.5))[0], 24)
    assert facts.texts["modality"] == "CT"
    assert facts.texts["kernel"] == "NONE"
    assert facts.texts["body_part"] == "CHEST"
    assert (facts.thickness, facts.images) == (8.5, 24)


# -- the file -------------------------------------------------------------------------------------
def test_the_example_is_whole_and_its_paths_start_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "archive.toml"
    path.write_text(EXAMPLE)
    found = read(path)
    assert found.folder == tmp_path / "archive"
    assert found.listen is not None
    assert found.listen.callers == ("ORTHANC",)
    assert found.analyses["lungs"].model_extra == {"contours": True}


def test_the_file_of_the_page_is_whole(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "archive.md"
    whole, store = (part.partition("```")[0] for part in page.read_text().split("```toml\n")[1:])
    path = tmp_path / "archive.toml"
    path.write_text(whole)
    assert [rule.analysis for rule in read(path).rules] == ["lungs", "spleen"]
    send = re.search(r"\[send\].*?\n\n", whole, re.DOTALL)
    assert send is not None
    path.write_text(whole.replace(send[0], store))
    found = read(path)
    assert found.store is not None
    assert (found.send, found.store.title, found.store.commitment) == (None, "PACS", True)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('analysis = "lungs"', 'analysis = "lung"', "asks for analysis 'lung', which has no table"),
        ('modality = "CT"', 'modalty = "CT"', "unknown key rules.0.modalty"),
        ('callers = ["ORTHANC"]', "callers = []", "listen.callers"),
        ('callers = ["ORTHANC"]', 'callers = ["A\\\\B"]', "expected an AE title"),
        ('title = "PLINTH"', 'title = "SEVENTEEN LETTERS"', "expected an AE title"),
        ("port = 11112", "port = 70000", "listen.port"),
        (
            "[analyses.lungs]",
            "[store]\ntitle = 'A'\nhost = 'b'\nport = 104\n[analyses.lungs]",
            r"give \[send\] or \[store\], not both",
        ),
        ("days = 2 ", "days = -1 ", "poll.days"),
        ('url = "http://127.0.0.1:8042/dicom-web"\nevery', 'url = "pacs"\nevery', "poll.url"),
        ("[analyses.lungs]", "[analyses.lungs", "archive.toml"),
        (
            'host = "127.0.0.1"  ',
            'callers = "*"\nhost = "0.0.0.0"  ',
            "needs a host of loopback, or tls.client_ca",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    assert EXAMPLE.count(before) == 1
    path = tmp_path / "archive.toml"
    text = EXAMPLE.replace(before, after)
    if 'callers = "*"' in after:
        text = text.replace('callers = ["ORTHANC"]', "")
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(path)
    assert re.search(said, str(error.value)), str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.toml'}: {os.strerror(2)}")):
        read(tmp_path / "none.toml")
