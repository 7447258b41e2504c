"""What is written for each study: report.json, report.html, pictures, DICOM SEG and SR."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from plinth.engine import InputError
from plinth.engine.parallel import spread
from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE
from plinth.verticals.medical.output.captures import write_captures
from plinth.verticals.medical.output.dicom_seg import Labels, SegType, write_segmentation
from plinth.verticals.medical.output.dicom_sr import write_measurements
from plinth.verticals.medical.output.nifti import write_nifti
from plinth.verticals.medical.output.page import page
from plinth.verticals.medical.output.pictures import key_image, overview, png
from plinth.verticals.medical.output.report import RULES, CtResult, Origin
from plinth.verticals.medical.output.rtstruct import Structure, write_rtstruct
from plinth.verticals.medical.volumes.volume import Volume

REPORT, PAGE = "report.json", "report.html"
SEGMENTATION, MEASUREMENTS = "segmentation.dcm", "measurements.dcm"
STRUCTURES = "structures.dcm"


class Wanted(Protocol):
    """The settings that say what is written."""

    @property
    def page(self) -> bool:
        """Write ``report.html``."""

    @property
    def pictures(self) -> bool:
        """Write PNGs."""

    @property
    def key_images(self) -> int:
        """Nodules that get a picture, at most."""

    @property
    def segmentation(self) -> bool:
        """Write ``segmentation.dcm``."""

    @property
    def segmentation_type(self) -> SegType:
        """Kind of SEG."""

    @property
    def contours(self) -> bool:
        """Write ``structures.dcm``."""

    @property
    def nifti(self) -> bool:
        """Write ``segmentation.nii.gz``."""

    @property
    def volume(self) -> bool:
        """Write ``volume.nii.gz``."""

    @property
    def captures(self) -> bool:
        """Write the pictures as DICOM too."""

    @property
    def measurements(self) -> bool:
        """Write ``measurements.dcm``."""


def write_outputs(result: CtResult, folder: Path, wanted: Wanted) -> list[Path]:
    """Write a report and what belongs to it; returns the files.

    Args:
        result: from the vertical's flow.
        folder: exists.
        wanted: what to write.
    """
    begun = time.perf_counter()
    report, artefacts = result.response, result.artefacts
    outputs: dict[str, str] = {}
    drawn: dict[str, bytes] = {}
    files: list[Path] = []
    seg, sr = folder / SEGMENTATION, folder / MEASUREMENTS

    def draw() -> None:
        if wanted.page or wanted.pictures or wanted.captures:
            drawn.update(_pictures(result, wanted.key_images))

    def encode() -> None:
        if wanted.segmentation:
            outputs[SEGMENTATION] = tried(
                lambda: write_segmentation(result, seg, wanted.segmentation_type)
            )
        if wanted.measurements:
            beside = seg if seg.exists() else None
            outputs[MEASUREMENTS] = tried(
                lambda: write_measurements(report, artefacts.volume, RULES, beside, sr)
            )

    spread(lambda step: step(), (draw, encode))
    if wanted.pictures:
        for name, data in drawn.items():
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(data)
        outputs = {"pictures": "written", **outputs}
    files += [path for path in (seg, sr) if path.exists()]
    labels = artefacts.analysis.labels
    if wanted.nifti:
        files.append(folder / "segmentation.nii.gz")
        write_nifti(labels, artefacts.volume, files[-1], report.origin().brief)
        outputs[files[-1].name] = "written"
    named = [Structure(LUNG_RIGHT, "Right lung"), Structure(LUNG_LEFT, "Left lung")]
    for nodule in report.nodules or []:
        name = f"Nodule candidate {nodule.number}"
        named.append(Structure(NODULE + nodule.number - 1, name))
    found = Found(artefacts.volume, labels, named, drawn, RULES, report.origin())
    files += for_archives(found, folder, wanted, outputs)
    outputs |= {PAGE: "written"} if wanted.page else {}
    seconds = {**artefacts.seconds, "outputs": round(time.perf_counter() - begun, 3)}
    final = report.model_copy(
        update={"seconds": seconds, "outputs": outputs, "peak_memory_mb": peak_memory_mb()}
    )
    if wanted.page:
        files.append(folder / PAGE)
        files[-1].write_text(page(final, drawn), encoding="utf-8")
    files.append(folder / REPORT)
    files[-1].write_text(final.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return files


@dataclass(frozen=True, eq=False)
class Found:
    """What contours and pictures as DICOM are made of.

    Args:
        volume: whose images they are of.
        labels: (z, y, x).
        structures: the labels that become contours.
        pictures: PNG files by name.
        model: the rules or the network that made them.
        origin: how they did.
    """

    volume: Volume
    labels: Labels
    structures: list[Structure]
    pictures: dict[str, bytes]
    model: str
    origin: Origin


def for_archives(found: Found, folder: Path, wanted: Wanted, outputs: dict[str, str]) -> list[Path]:
    """Write the volume, and contours and pictures as DICOM, where wanted; returns the files.

    Args:
        found: what they are made of.
        folder: exists.
        wanted: what to write.
        outputs: told, by name, what was written or why not.
    """
    files: list[Path] = []
    if wanted.volume:
        files.append(folder / "volume.nii.gz")
        write_nifti(
            found.volume.voxels, found.volume, files[-1], "images as read; research use only"
        )
        outputs[files[-1].name] = "written"
    structure_set = folder / STRUCTURES
    if wanted.contours:
        outputs[STRUCTURES] = tried(
            lambda: write_rtstruct(
                found.volume,
                found.labels,
                found.structures,
                found.model,
                found.origin,
                structure_set,
            )
        )
        files += [structure_set] if structure_set.exists() else []
    if wanted.captures:
        outputs["captures"] = tried(
            lambda: files.extend(
                write_captures(found.volume, found.pictures, found.model, found.origin, folder)
            )
        )
    return files


def _pictures(result: CtResult, count: int) -> dict[str, bytes]:
    artefacts = result.artefacts
    origin = result.response.origin()
    drawn = {name: png(picture, origin) for name, picture in overview(artefacts)}
    for nodule in (result.response.nodules or [])[:count]:
        drawn[f"nodule-{nodule.number}"] = png(key_image(artefacts, nodule), origin)
    return drawn


def tried(write: Callable[[], None]) -> str:
    """Write one output; ``"written"``, or why not."""
    try:
        write()
    except InputError as error:
        return f"not written: {error.message}"
    return "written"


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far, where the system tells it."""
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)  # Windows
    if peak is None:
        status = Path("/proc/self/status")
        if not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    return round(float(peak) / 1e6, 1)
