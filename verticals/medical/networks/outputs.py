"""What is written of a network's segmentation: report, page, pictures, SEG, NIfTI, volumes."""

from __future__ import annotations

import colorsys
import csv
import io
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from plinth.engine import InputError
from plinth.verticals.medical.networks.analysis import Segmentation
from plinth.verticals.medical.output.derived import SHORT_TEXT, made_by
from plinth.verticals.medical.output.dicom_seg import SegType, save_seg
from plinth.verticals.medical.output.dicom_sr import write_measurements
from plinth.verticals.medical.output.nifti import write_nifti
from plinth.verticals.medical.output.outputs import (
    MEASUREMENTS,
    SEGMENTATION,
    Found,
    Wanted,
    for_archives,
    peak_memory_mb,
    tried,
)
from plinth.verticals.medical.output.page import segmentation_page
from plinth.verticals.medical.output.pictures import lettered, png
from plinth.verticals.medical.output.report import CtReport, Origin
from plinth.verticals.medical.output.rtstruct import Structure
from plinth.verticals.medical.volumes.labelled import slices_with
from plinth.verticals.medical.volumes.measured import Measured
from plinth.verticals.medical.volumes.orientation import Orientation
from plinth.verticals.medical.volumes.shape import ValueStatistics

SIDE = 512


def write_segmentation_outputs(
    report: CtReport, found: Segmentation, folder: Path, wanted: Wanted
) -> list[Path]:
    """Write a report and what belongs to it; returns the files.

    Args:
        report: of the study.
        found: what the network made of it.
        folder: exists.
        wanted: what to write.
    """
    begun = time.perf_counter()
    files, outputs = [folder / "segmentation.nii.gz"], {"segmentation.nii.gz": "written"}
    origin = report.origin()
    write_nifti(found.labels, found.volume, files[0], origin.brief)
    if found.uncertainty is not None:
        files.append(folder / "uncertainty.nii.gz")
        write_nifti(found.uncertainty, found.volume, files[-1], origin.brief)
    files.append(folder / "volumes.csv")
    files[-1].write_text(_table(report, found), encoding="utf-8")
    seg, sr = folder / SEGMENTATION, folder / MEASUREMENTS
    if wanted.segmentation:
        outputs[seg.name] = tried(lambda: write_seg(found, origin, seg, wanted.segmentation_type))
    if wanted.measurements:
        beside = seg if seg.exists() else None
        source = found.recipe.source
        outputs[sr.name] = tried(
            lambda: write_measurements(report, found.volume, source, beside, sr)
        )
    files += [path for path in (seg, sr) if path.exists()]
    drawn = _pictures(found, origin) if wanted.page or wanted.pictures or wanted.captures else {}
    if wanted.pictures:
        for name, data in drawn.items():
            files.append(folder / f"{name}.png")
            files[-1].write_bytes(data)
        outputs["pictures"] = "written"
    named = [Structure(value, name) for value, name in found.recipe.labels.items()]
    made = Found(found.volume, found.labels, named, drawn, found.recipe.source, origin)
    files += for_archives(made, folder, wanted, outputs)
    outputs |= {"report.html": "written"} if wanted.page else {}
    final = report.model_copy(
        update={
            "seconds": {**found.seconds, "outputs": round(time.perf_counter() - begun, 3)},
            "outputs": outputs,
            "peak_memory_mb": peak_memory_mb(),
        }
    )
    if wanted.page:
        files.append(folder / "report.html")
        colours = _colours(found)
        legend = [(name, colours[value]) for value, name in found.recipe.labels.items()]
        files[-1].write_text(segmentation_page(final, drawn, legend), encoding="utf-8")
    files.append(folder / "report.json")
    files[-1].write_text(final.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return files


def write_seg(found: Segmentation, origin: Origin, path: Path, kind: SegType) -> None:
    """Write every label that was found as a segment of one SEG; its geometry is checked.

    Args:
        found: what the network made of a study.
        origin: how it did.
        path: the file.
        kind: of SEG.

    Raises:
        InputError: nothing was found, there are no source images, or their headers are not good
            enough for an object that refers to them.
    """
    import highdicom  # heavy: only when a SEG is written
    from pydicom.sr.codedict import codes

    recipe, volume = found.recipe, found.volume
    known = np.array(sorted(recipe.labels), np.uint8)
    values = known[slices_with(found.labels, known).any(axis=1)]
    present = values.tolist()
    if not present:
        raise InputError("none of the network's labels was found", reason="empty")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=recipe.name[:64],
        version=recipe.version[:64],
        family=codes.DCM.ArtificialIntelligence,
        parameters={
            "made": origin.text(SHORT_TEXT),
            "files": found.plan["network_files_sha256"],
        },
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=recipe.labels[value][:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=highdicom.sr.CodedConcept(
                f"LABEL{value}", "99PLINTH", recipe.labels[value][:64]
            ),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_id=recipe.labels[value][:64],
            tracking_uid=highdicom.UID(),
        )
        for number, value in enumerate(present, 1)
    ]
    about = made_by(recipe.source, 901, f"{recipe.name[:30]}, research use only")
    save_seg(volume, found.labels, values, segments, about, path, kind)


def _table(report: CtReport, found: Segmentation) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    others = ("title", "unit", "values", "uncertainty")
    sizes = [name for name in Measured.model_fields if name not in others]
    statistics = [field.name for field in fields(ValueStatistics)]
    how = ["computed_in", "worst_dice", "network", "version", "weights_sha256", "statement"]
    rows.writerow(["study", "series", "label", "name", *sizes, "unit", *statistics, *how])
    agreed = found.agreement
    said = [found.plan["computed_in"], "" if agreed is None else agreed.worst]
    by = report.network
    said += ["", "", ""] if by is None else [by.name, by.version, by.digest]
    said.append(report.statement)
    for value, name in sorted(found.recipe.labels.items()):
        one = found.structures.get(f"label_{value}")
        cells: list[object] = [0, 0.0, *[""] * (len(sizes) + len(statistics) - 1)]
        if one is not None:
            cells = [getattr(one, size) for size in sizes]
            cells += [one.unit, *(getattr(one.values, key) for key in statistics)]
        rows.writerow([report.study, report.series, value, name, *cells, *said])
    return out.getvalue()


def _colours(found: Segmentation) -> dict[int, tuple[int, int, int]]:
    """A colour for each label, far apart for neighbouring numbers."""
    colours = {}
    for value in found.recipe.labels:
        red, green, blue = colorsys.hsv_to_rgb((value * 0.61803) % 1, 0.75, 1.0)
        colours[value] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def _pictures(found: Segmentation, origin: Origin) -> dict[str, bytes]:
    """Three planes through the middle of what was found, outlined."""
    orientation = Orientation.of(found.volume.affine)
    voxels = orientation.to_patient(found.volume.voxels)
    labels = orientation.to_patient(found.labels)
    z, y, x = _middle(labels)
    spacing = orientation.spacing(found.volume.spacing)
    low, high = np.percentile(found.volume.voxels[::4, ::4, ::4].astype(np.float32), [1, 99.5])
    if found.volume.series.modality == "CT":
        low, high = -160.0, 240.0
    colours, drawn = _colours(found), {}
    for name, index, mm in (
        ("axial", (z,), (spacing[1], spacing[2])),
        ("coronal", (slice(None, None, -1), y), (spacing[0], spacing[2])),
        ("sagittal", (slice(None, None, -1), slice(None), x), (spacing[0], spacing[1])),
    ):
        at: Any = index
        grey = (voxels[at].astype(np.float32) - low) / max(high - low, 1e-6)
        picture = _drawn(np.clip(grey, 0, 1), labels[at], mm, colours)
        drawn[name] = png(lettered(picture, SIDE, name), origin)
    return drawn


def _middle(labels: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    found = ndimage.find_objects((labels[::2, ::2, ::2] > 0).astype(np.uint8))
    if not found:
        z, y, x = (n // 2 for n in labels.shape)
        return z, y, x
    z, y, x = (span.start + span.stop for span in found[0])
    return z, y, x


def _drawn(
    grey: npt.NDArray[np.float32],
    labels: npt.NDArray[np.uint8],
    mm: tuple[float, float],
    colours: dict[int, tuple[int, int, int]],
) -> Image.Image:
    extent = [n * step for n, step in zip(grey.shape, mm, strict=True)]
    height, width = (max(1, round(SIDE * size / max(extent))) for size in extent)
    picture = Image.fromarray((255 * grey).astype(np.uint8))
    coloured = np.asarray(
        picture.resize((width, height), Image.Resampling.BILINEAR).convert("RGB")
    ).copy()
    shown = np.asarray(
        Image.fromarray(np.ascontiguousarray(labels)).resize(
            (width, height), Image.Resampling.NEAREST
        )
    )
    lowest = ndimage.minimum_filter(shown, 3)
    edge = (shown > 0) & (lowest != ndimage.maximum_filter(shown, 3))
    palette = np.zeros((256, 3), np.uint8)
    for value, colour in colours.items():
        palette[value] = colour
    coloured[edge] = palette[shown[edge]]
    return Image.fromarray(coloured)
