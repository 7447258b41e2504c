"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from plinth.verticals.medical.output.pictures import COLOURS
from plinth.verticals.medical.output.report import CtReport, words

TEMPLATES = Path(__file__).parent / "templates"
UNITS = {"mm": "mm", "hu": "HU", "zyx": "z × y × x"}
"""How the last part of a setting's name is written."""


Legend = list[tuple[str, tuple[int, int, int]]]
"""Name and RGB colour of each outline."""

CT_LEGEND: Legend = [
    ("right lung", COLOURS["right"]),
    ("left lung", COLOURS["left"]),
    ("nodule candidate", COLOURS["nodule"]),
]


def page(report: CtReport, pictures: dict[str, bytes]) -> str:
    """The report of the CT analysis as HTML, pictures inside.

    Args:
        report: what was found.
        pictures: PNG files by name; names that start with ``nodule`` are shown by the nodules.
    """
    legend = CT_LEGEND if report.nodules else CT_LEGEND[:2]
    return _rendered("report.html", report, pictures, legend)


def segmentation_page(report: CtReport, pictures: dict[str, bytes], legend: Legend) -> str:
    """The report of a network's segmentation as HTML, pictures inside.

    Args:
        report: what was found.
        pictures: PNG files by name.
        legend: of the labels.
    """
    return _rendered("segmentation.html", report, pictures, legend)


def _rendered(name: str, report: CtReport, pictures: dict[str, bytes], legend: Legend) -> str:
    inline = {
        name: "data:image/png;base64," + base64.b64encode(data).decode()
        for name, data in pictures.items()
    }
    views = {name: data for name, data in inline.items() if not name.startswith("nodule")}
    keys = {name: data for name, data in inline.items() if name not in views}
    return _template(name).render(report=report, views=views, keys=keys, legend=legend)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    environment.filters["figure"] = figure
    environment.filters["named"] = named
    return environment.get_template(name)


def figure(value: float) -> str:
    """A measurement as people read it: whole from a thousand on, else one decimal."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def named(key: str) -> str:
    """What a setting is called: its unit or its order of axes behind a comma."""
    name, _, last = key.rpartition("_")
    return f"{words(name)}, {UNITS[last]}" if name and last in UNITS else words(key)
