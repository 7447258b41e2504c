"""Planes of a volume as grey pictures with outlines, as a radiologist expects them to lie."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE
from plinth.verticals.medical.nodules.candidates import Nodule
from plinth.verticals.medical.output.report import RESEARCH_USE, CtArtefacts, Origin
from plinth.verticals.medical.volumes.labelled import boxes_of

LUNG_WINDOW, TISSUE_WINDOW = (-600.0, 1500.0), (40.0, 400.0)
SIZE, CROP_SIZE, CROP_MM, FONT = 512, 256, 60.0, 13
COLOURS = {"right": (80, 200, 255), "left": (120, 230, 120), "nodule": (255, 90, 70)}
PACKED = 3
"""Level of a PNG's compression: 4 % larger than by the usual one, in under half the time."""

PLANES = ("axial", "coronal", "sagittal")
EDGES = {
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "H", "F"),
    "sagittal": ("A", "P", "H", "F"),
}
"""Letters at the left, right, top and bottom edge; axial planes are seen from the feet."""

Grey = npt.NDArray[np.uint8]
Point = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane of voxels, turned for display.

    Args:
        name: ``"axial"``, ``"coronal"`` or ``"sagittal"``.
        hu: (rows, columns).
        labels: (rows, columns) of the analysis.
        spacing: (row, column) mm.
    """

    name: str
    hu: npt.NDArray[np.generic]
    labels: Grey
    spacing: tuple[float, float]


def overview(artefacts: CtArtefacts) -> Iterator[tuple[str, Image.Image]]:
    """Axial, coronal and sagittal plane through the lungs, or the middle where there are none.

    Args:
        artefacts: the volume and its labels.
    """
    middle = _middle(artefacts)
    thin = artefacts.analysis.labels[::4]
    lungs = bool((thin == LUNG_RIGHT).any() or (thin == LUNG_LEFT).any())
    for name in PLANES:
        plane = _plane(artefacts, name, middle)
        yield name, _draw(plane, LUNG_WINDOW if lungs else TISSUE_WINDOW, SIZE)


def key_image(artefacts: CtArtefacts, nodule: Nodule) -> Image.Image:
    """Three crops of CROP_MM around a nodule, side by side.

    Args:
        artefacts: the volume and its labels.
        nodule: with its place in the patient.
    """
    sheet = Image.new("RGB", (3 * CROP_SIZE, CROP_SIZE))
    centre = _place(artefacts, nodule.centre_lps_mm)
    for n, name in enumerate(PLANES):
        plane = _cropped(_plane(artefacts, name, centre), name, centre, artefacts)
        part = _draw(plane, LUNG_WINDOW, CROP_SIZE, note=f"nodule {nodule.number}" if not n else "")
        sheet.paste(part, (n * CROP_SIZE, 0))
    return sheet


def png(picture: Image.Image, origin: Origin) -> bytes:
    """A picture as a PNG file, whose ``Description`` says how it was made."""
    buffer, said = io.BytesIO(), PngInfo()
    said.add_itxt("Description", " ".join(origin.told))
    picture.save(buffer, "PNG", pnginfo=said, compress_level=PACKED)
    return buffer.getvalue()


def _middle(artefacts: CtArtefacts) -> Point:
    """(superior, posterior, left) voxel in the middle of the lungs, in the larger lung."""
    labels = cast(Grey, artefacts.analysis.orientation.to_patient(artefacts.analysis.labels))
    thin = labels[::2, ::2, ::2]
    boxes = boxes_of(thin, (LUNG_RIGHT, LUNG_LEFT))
    if not boxes:
        z, y, x = (n // 2 for n in labels.shape)
        return z, y, x
    sizes = {side: sum(np.count_nonzero(plane == side) for plane in thin) for side in boxes}
    z, y = (
        min(box[axis].start for box in boxes.values())
        + max(box[axis].stop for box in boxes.values())
        for axis in (0, 1)
    )
    across = boxes[max(boxes, key=lambda side: sizes[side])][2]
    return z, y, across.start + across.stop


def _place(artefacts: CtArtefacts, lps: tuple[float, float, float]) -> Point:
    """(superior, posterior, left) voxel nearest to a place in the patient."""
    orientation = artefacts.analysis.orientation
    index = np.rint(artefacts.volume.lps_to_index(lps)).astype(int)[::-1]
    turned = index[list(orientation.axes)]
    sizes = np.asarray(artefacts.volume.shape)[list(orientation.axes)]
    turned = np.where(orientation.flips, sizes - 1 - turned, turned)
    z, y, x = np.clip(turned, 0, sizes - 1).tolist()
    return z, y, x


def _plane(artefacts: CtArtefacts, name: str, at: Point) -> Plane:
    orientation = artefacts.analysis.orientation
    arrays = [
        orientation.to_patient(array)
        for array in (artefacts.volume.voxels, artefacts.analysis.labels)
    ]
    z, y, x = orientation.spacing(artefacts.volume.spacing)
    if name == "axial":
        hu, labels = (array[at[0]] for array in arrays)
        return Plane(name, hu, labels, (y, x))
    if name == "coronal":
        hu, labels = (array[::-1, at[1]] for array in arrays)
        return Plane(name, hu, labels, (z, x))
    hu, labels = (array[::-1, :, at[2]] for array in arrays)
    return Plane(name, hu, labels, (z, y))


def _cropped(plane: Plane, name: str, at: Point, artefacts: CtArtefacts) -> Plane:
    depth = artefacts.analysis.orientation.to_patient(artefacts.analysis.labels).shape[0]
    down = depth - 1 - at[0]
    row, column = {"axial": at[1:], "coronal": (down, at[2]), "sagittal": (down, at[1])}[name]
    box = []
    for centre, size, mm in zip((row, column), plane.hu.shape, plane.spacing, strict=True):
        half = max(2, round(CROP_MM / 2 / mm))
        box.append(slice(max(0, centre - half), min(size, centre + half)))
    part = (box[0], box[1])
    return Plane(plane.name, plane.hu[part], plane.labels[part], plane.spacing)


def _draw(plane: Plane, window: tuple[float, float], size: int, note: str = "") -> Image.Image:
    """The plane with square pixels inside a square of ``size`` pixels, outlined and lettered."""
    level, width = window
    grey = np.clip((plane.hu.astype(np.float32) - level) / width + 0.5, 0, 1) * 255
    mm = [n * step for n, step in zip(plane.hu.shape, plane.spacing, strict=True)]
    height, across = (max(1, round(size * extent / max(mm))) for extent in mm)
    picture = Image.fromarray(grey.astype(np.uint8)).resize(
        (across, height), Image.Resampling.BILINEAR
    )
    coloured = np.asarray(picture.convert("RGB")).copy()
    labels = np.asarray(
        Image.fromarray(np.ascontiguousarray(plane.labels)).resize(
            (across, height), Image.Resampling.NEAREST
        )
    )
    nodules = labels >= NODULE  # drawn last, over the holes they make in the lungs
    for mask, colour in (
        ((labels == LUNG_RIGHT) | nodules, COLOURS["right"]),
        ((labels == LUNG_LEFT) | nodules, COLOURS["left"]),
        (nodules, COLOURS["nodule"]),
    ):
        coloured[mask & ~ndimage.binary_erosion(mask, border_value=1)] = colour
    return lettered(Image.fromarray(coloured), size, plane.name, note)


def lettered(picture: Image.Image, size: int, name: str, note: str = "") -> Image.Image:
    """A plane in the middle of a square, with its directions and its use.

    Args:
        picture: no larger than the square.
        size: of the square, pixels.
        name: of the plane, one of PLANES.
        note: said beside it.
    """
    sheet = Image.new("RGB", (size, size))
    sheet.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    side, middle = sheet.width, sheet.width // 2
    left, right, top, bottom = EDGES[name]
    use = RESEARCH_USE if side >= SIZE else "Research use only"
    for place, text, anchor in (
        ((5, middle), left, "lm"),
        ((side - 5, middle), right, "rm"),
        ((middle, 5), top, "ma"),
        ((middle, side - 5), bottom, "md"),
        ((5, 5), f"{name} {note}".strip(), "la"),
        ((5, side - 5), use, "ld"),
    ):  # a black edge keeps them readable on bone and padding alike
        draw.text(place, text, (255, 220, 120), font, anchor, stroke_width=2, stroke_fill=(0, 0, 0))
    return sheet
