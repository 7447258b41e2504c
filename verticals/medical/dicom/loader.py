"""Load a DICOM series as a volume that says how far its geometry can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.medical.dicom import geometry
from plinth.verticals.medical.dicom.alternating import unlike_neighbours
from plinth.verticals.medical.dicom.choose import choose
from plinth.verticals.medical.dicom.decode import CT_AIR, CT_TOP, MAX_BYTES, decode, padding_hu
from plinth.verticals.medical.dicom.discover import Series
from plinth.verticals.medical.dicom.geometry import Stack
from plinth.verticals.medical.dicom.header import Frame
from plinth.verticals.medical.dicom.regrid import regrid
from plinth.verticals.medical.volumes.resample import (
    Grid,
    Interpolation,
    fit_size,
    fit_spacing,
    resample,
)
from plinth.verticals.medical.volumes.volume import (
    SEVERITY,
    Affine,
    Array,
    Issue,
    SeriesFacts,
    Status,
    Verdict,
    Volume,
)
from plinth.verticals.medical.volumes.window import Function, apply_window_, check_window

Gaps = Literal["refuse", "fill"]

STATUS_OF: dict[str, Status] = {
    "single_slice": "single_slice",
    "duplicate": "duplicates_dropped",
    "mixed": "mixed_split",
    "no_position": "partial",
    "damaged": "partial",
    "partial": "partial",
    "gap": "gaps_filled",
    "spacing": "resampled_spacing",
    "tilt": "resampled_tilt",
    "alternating": "unlike_neighbours",
    "unlike": "unlike_neighbours",
}

ALIKE = 1.01
"""Times that slices of one thickness may differ: it is written as text, and rounded."""
OVERLAP = 8.0
"""Slice Thickness over the step from slice to slice, beyond which a note doubts the places."""

MAX_FILLED, MAX_FILLED_SHARE = 3, 0.1
"""Slices that are interpolated in one gap, and in all as a share of those at hand, at most."""

LOSSY_SYNTAXES = tuple(f"1.2.840.10008.1.2.4.{end}" for end in (50, 51))
"""JPEG of 8 and 12 bits: with loss, whatever the header says."""

LEFT_OUT = ("mixed", "no_position", "damaged")
"""Issues that tell of images beside the volume: where slices are missing, they may be the ones."""

NOTES = ("padding", "left_out", "part", "units", "window", "identity", "lossy", "thickness")
"""Issues that concern no voxel's place; they leave a verdict ``"ok"``."""


def load_volume(
    path_or_series: str | Path | Series,
    strict: bool = False,
    *,
    series: str | Series | None = None,
    gaps: Gaps = "refuse",
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read one series as a volume with its true geometry.

    Args:
        path_or_series: a folder, zip, DICOMDIR or file, or a series from ``discover``.
        strict: refuse whatever is not regular instead of repairing it.
        series: which series of a path with several: its id, its UID or the end of its UID.
        gaps: ``"refuse"`` a series with slices missing, or ``"fill"`` the gap by linear
            interpolation (the verdict then says ``gaps_filled`` and how many mm).
        max_bytes: what the voxels may take; checked before they are read.

    Returns:
        The volume. A leaning stack or uneven spacing was resampled to an orthogonal, even grid;
        ``verdict`` says so.

    Raises:
        InputError: names the file or lists the series to choose from; also for geometry that
            was refused, with the mm.
    """
    chosen, found = choose(path_or_series, series)
    stack = geometry.stack(chosen.frames)
    notes = (*chosen.notes, *found)
    _refuse(chosen, stack, notes, strict=strict, gaps=gaps)
    _check_rescale(stack.frames)
    lossy: set[int] = set()
    voxels = decode(stack.frames, max_bytes, lossy)
    _check_repeats(stack, voxels)
    notes = (*notes, *_unlike(chosen, stack, voxels, strict=strict))
    facts = _facts(chosen, stack)
    found = (
        *notes,
        *stack.issues,
        *_padding_note(stack),
        *_units_note(facts),
        *_lossy(stack, lossy),
        *_thickness_notes(stack),
    )
    verdict = _verdict(found, stack)
    if stack.regular:
        return Volume(voxels, stack.affine(), verdict, facts)
    voxels, affine, filled = regrid(voxels, stack, max_bytes)
    return Volume(voxels, affine, verdict, facts, filled)


@dataclass(frozen=True, eq=False)
class LoadedVolume:
    """A volume prepared for a model, and the way back.

    Args:
        tensor: (1, z, y, x) float32 in [0, 1].
        affine: (4, 4) voxel index (i, j, k) of the tensor to patient LPS mm.
        grid: how the tensor's grid lies on the native one.
        native: the volume at its own resolution, in modality units.
        verdict: what was found in the geometry.
    """

    tensor: Tensor
    affine: Affine
    grid: Grid
    native: Volume
    verdict: Verdict

    def to_native(self, labels: Tensor | npt.NDArray[np.generic]) -> Array:
        """Labels (z, y, x) on the tensor's grid, by nearest neighbour on the native grid.

        Args:
            labels: any dtype; a leading axis of 1 is dropped.

        Returns:
            (z, y, x) of ``native.shape``, same dtype.

        Raises:
            InputError: when the labels' shape is not the tensor's.
        """
        values = labels.numpy() if isinstance(labels, Tensor) else labels
        if values.ndim == 4 and values.shape[0] == 1:
            values = values[0]
        if values.shape != self.grid.size:
            raise InputError(
                f"labels of shape {values.shape} for a volume of {self.grid.size}",
                field="labels",
                hint="give one label per voxel of the tensor",
            )
        return self.grid.to_native(values)


class DICOMLoader:
    """From a path to a windowed tensor of fixed size or spacing.

    Args:
        volume_size: (x, y, z) = (columns, rows, slices) of the tensor, which covers the whole
            field of view; not used when ``spacing`` is given.
        window_center: centre of the window, modality units (HU for CT; 40/400 is soft tissue).
        window_width: width of the window.
        spacing: (x, y, z) mm per voxel, keeping the aspect; the size follows.
        interpolation: ``"linear"``, or ``"area"``, which averages instead of skipping samples
            when it shrinks.
        window: ``"linear_exact"`` (PS3.3 C.11.2.1.3.2) or ``"linear"`` (C.11.2.1.2.1, as displays
            do).
        strict: refuse series that are not regular instead of repairing them.
        gaps: as for :func:`load_volume`.

    Raises:
        ConfigError: a size, spacing, window or mode that cannot be.
    """

    def __init__(
        self,
        volume_size: tuple[int, int, int] = (256, 256, 128),
        window_center: float = 40,
        window_width: float = 400,
        *,
        spacing: tuple[float, float, float] | None = None,
        interpolation: Interpolation = "linear",
        window: Function = "linear_exact",
        strict: bool = False,
        gaps: Gaps = "refuse",
    ) -> None:
        if len(volume_size) != 3 or not all(1 <= n <= 4096 for n in volume_size):
            raise ConfigError(f"volume_size is {volume_size}, expected (x, y, z) of 1 to 4096")
        if spacing is not None and not (len(spacing) == 3 and all(s >= 0.01 for s in spacing)):
            raise ConfigError(f"spacing is {spacing}, expected (x, y, z) mm of at least 0.01")
        if interpolation not in ("linear", "area"):
            raise ConfigError(f"interpolation is {interpolation!r}, expected 'linear' or 'area'")
        if gaps not in ("refuse", "fill"):
            raise ConfigError(f"gaps is {gaps!r}, expected 'refuse' or 'fill'")
        check_window(window_center, window_width, window)
        self.volume_size = volume_size
        self.window_center, self.window_width, self.window = window_center, window_width, window
        self.spacing, self.interpolation = spacing, interpolation
        self.strict, self.gaps = strict, gaps

    def load(self, path: str | Path | Series, series: str | Series | None = None) -> LoadedVolume:
        """Read one series; see :func:`load_volume` for the arguments and errors."""
        native = load_volume(path, self.strict, series=series, gaps=self.gaps)
        return self.prepare(native)

    def prepare(self, native: Volume) -> LoadedVolume:
        """Resample and window a volume that is already loaded."""
        grid = self._grid(native)
        tensor = resample(native.voxels, grid, self.interpolation)
        apply_window_(tensor, self.window_center, self.window_width, self.window)
        if native.series.photometric == "MONOCHROME1":
            tensor.neg_().add_(1)
        verdict = native.verdict
        if native.series.modality != "CT":
            text = (
                f"window {self.window_center:g}/{self.window_width:g} on "
                f"{native.series.modality or 'unknown'} values, which have no fixed scale"
            )
            verdict = replace(verdict, issues=(*verdict.issues, Issue("window", text)))
        affine = grid.affine(native.affine)
        return LoadedVolume(tensor.unsqueeze(0), affine, grid, native, verdict)

    def _grid(self, native: Volume) -> Grid:
        x, y, z = self.volume_size
        if self.spacing is None:
            return fit_size(native.shape, (z, y, x))
        (sx, sy, sz), (wx, wy, wz) = native.spacing, self.spacing
        grid = fit_spacing(native.shape, (sz, sy, sx), (wz, wy, wx))
        if np.prod(grid.size, dtype=float) > 1 << 31:
            raise ConfigError(
                f"spacing {self.spacing} asks for {grid.size} voxels", hint="ask for coarser voxels"
            )
        return grid


def _refuse(
    series: Series, stack: Stack, notes: Sequence[Issue], *, strict: bool, gaps: Gaps
) -> None:
    issues = [issue for issue in (*notes, *stack.issues) if issue.kind not in NOTES]
    refused = gaps == "refuse" or not _may_be_filled(stack)
    blocking = issues if strict else [i for i in issues if i.kind == "gap" and refused]
    if not blocking:
        return
    beside = [i for i in issues if i.kind in LEFT_OUT and i not in blocking]
    text = "; ".join(issue.message for issue in (*blocking, *beside))
    kinds = sorted({issue.kind for issue in blocking})
    if kinds == ["gap"]:
        hint = 'send the missing images, or accept interpolated ones with gaps="fill"'
        if not _may_be_filled(stack):
            hint = f"send the missing images: at most {MAX_FILLED} in a row are interpolated"
        if strict:
            hint = 'send the missing images, or load with strict=False and gaps="fill"'
    else:
        hint = "load with strict=False to have it repaired"
    raise InputError(
        f"series {series.id}: {text}",
        field=series.id,
        hint=hint,
        reason=f"geometry_{kinds[0]}",
    )


def _may_be_filled(stack: Stack) -> bool:
    """Gaps are short, and few beside what is there."""
    missing = [count for _, count in stack.gaps]
    few = sum(missing) <= max(MAX_FILLED, MAX_FILLED_SHARE * len(stack.frames))
    return few and max(missing, default=0) <= MAX_FILLED


def _check_rescale(frames: Sequence[Frame]) -> None:
    """Values of all slices are in one unit, by a rescale that can be one (PS3.3 C.11.1).

    Raises:
        InputError: slope 0, a rescale in some slices only, half of one in a CT image or in some
            slices, or none in PET, whose slope is of each slice (PS3.3 C.8.9.4).
    """
    for frame in frames:
        if frame.slope == 0:
            raise _bad_rescale(frame, "Rescale Slope is 0, so all values would be equal")
        if frame.header.modality != "CT":
            continue
        if frame.half_rescaled:
            raise _bad_rescale(frame, "one of Rescale Slope and Rescale Intercept is missing")
        if "RescaleType" in frame.marks and not frame.rescaled:
            raise _bad_rescale(frame, "a Rescale Type without Rescale Slope and Intercept")
    bare = [frame for frame in frames if not (frame.rescaled or frame.half_rescaled)]
    if 0 < len(bare) < len(frames):
        count = f"{len(bare)} of {len(frames)} images"
        raise _bad_rescale(bare[0], f"Rescale Slope and Intercept are missing in {count}")
    half = [frame for frame in frames if frame.half_rescaled]
    if 0 < len(half) < len(frames):
        count = f"{len(half)} of {len(frames)} images"
        raise _bad_rescale(half[0], f"Rescale Slope or Intercept is missing in {count}")
    if frames[0].header.modality == "PT":
        if not all(frame.units for frame in frames):
            raise _bad_rescale(frames[0], "PET without Units (0054,1001)")
        if bare or half:
            raise _bad_rescale(frames[0], "PET without Rescale Slope and Intercept")
    units = sorted({frame.units or "no unit" for frame in frames})
    if len(units) > 1:
        raise _bad_rescale(frames[0], f"the images are in different units: {', '.join(units)}")


def _bad_rescale(frame: Frame, why: str) -> InputError:
    return InputError(
        f"{frame.header.source.name}: {why}",
        field="RescaleSlope",
        hint="ask the sender for the original images",
        reason="bad_rescale",
    )


def _check_repeats(stack: Stack, voxels: Array) -> None:
    """Images at one position must be copies of each other."""
    for k, frame in stack.repeats:
        again = decode([frame])[0]
        if not np.array_equal(again, voxels[k]):
            first = stack.frames[k].header
            if frame.header.sop_uid == first.sop_uid and frame.header.source != first.source:
                raise _changed(stack.frames[k], frame)
            raise InputError(
                f"{stack.frames[k].header.source.name} and {frame.header.source.name} are "
                f"different images at one position, and no attribute tells the "
                f"{len(stack.repeats) + len(stack.frames)} images of this series apart",
                field="ImagePositionPatient",
                hint="load the phases, echoes or reconstructions as separate series",
                reason="ambiguous_repeats",
            )


def _unlike(series: Series, stack: Stack, voxels: Array, *, strict: bool) -> tuple[Issue, ...]:
    """Slices that are of one kind; two kinds in turn are refused in CT, all else is told.

    In MR excited in turn, and in PET of direct and cross planes, some of it is the scanner's.
    """
    found, slices = unlike_neighbours(voxels, hounsfield=series.modality == "CT")
    slices = tuple(k for k in slices if _evenly_among(stack, k))
    if found is None and slices:
        names = ", ".join(stack.frames[k].header.source.name for k in slices[:3])
        more = f" and {len(slices) - 3} more" if len(slices) > 3 else ""
        text = f"unlike both its neighbours, as if of another stack: slice {names}{more}"
        if strict:
            raise InputError(
                f"series {series.id}: {text}", field=series.id, reason="geometry_unlike"
            )
        return (Issue("unlike", text, None, slices),)
    if found is None:
        return ()
    text = f"odd and even slices are of two kinds: {found}"
    if series.modality == "CT" or strict:
        raise InputError(
            f"series {series.id}: {text}; two reconstructions, doses or phases lie in turn, and no "
            "attribute tells them apart",
            field=series.id,
            hint="send each of them as a series of its own",
            reason="geometry_alternating",
        )
    return (Issue("alternating", text),)


def _evenly_among(stack: Stack, k: int) -> bool:
    """The two slices on either side lie at equal steps: beyond a gap another content is due."""
    steps = np.diff(stack.depths)[max(0, k - 2) : k + 2]
    return bool(np.ptp(steps) <= 0.1 * steps.mean())


def _changed(one: Frame, other: Frame) -> InputError:
    return InputError(
        f"{one.header.source.name} and {other.header.source.name} carry one SOP Instance UID and "
        "one position, and other pixels: one of them was changed or is damaged",
        field="SOPInstanceUID",
        hint="find out which is the original, and remove the other",
        reason="changed_copy",
    )


def _verdict(issues: tuple[Issue, ...], stack: Stack) -> Verdict:
    states: list[Status] = [STATUS_OF[i.kind] for i in issues if i.kind in STATUS_OF]
    if "resampled_tilt" in states and not stack.even:
        states.append("resampled_tilt_spacing")
    worst = max(states, key=SEVERITY.index, default=SEVERITY[0])
    return Verdict(worst, issues)


def _padding_note(stack: Stack) -> tuple[Issue, ...]:
    span = padding_hu(stack.frames[0])
    if span is None:
        return ()
    low, high = span
    if low >= CT_AIR and high <= CT_TOP:
        return ()
    return (Issue("padding", f"padding of {low:g} HU is shown as {CT_AIR} HU"),)


def _thickness_notes(stack: Stack) -> tuple[Issue, ...]:
    """Slices of several thicknesses, and such as overlap more than any scanner lets them."""
    told = sorted({frame.thickness for frame in stack.frames if frame.thickness is not None})
    notes = []
    if told and told[-1] > ALIKE * told[0]:
        text = (
            f"Slice Thickness is {told[0]:g} to {told[-1]:g} mm: noise and densities are not those "
            "of one reconstruction"
        )
        notes.append(Issue("thickness", text))
    if len(stack.frames) > 1 and told and told[-1] > OVERLAP * stack.step:
        text = (
            f"slices of {told[-1]:g} mm lie {stack.step:.3g} mm apart: if their places are not in "
            "mm, lengths and volumes are wrong"
        )
        notes.append(Issue("thickness", text))
    return tuple(notes)


def _lossy(stack: Stack, coded: set[int]) -> tuple[Issue, ...]:
    """Images whose values a compression has changed, now or before they were stored as they are."""
    count = sum(
        k in coded or frame.header.lossy or frame.header.syntax in LOSSY_SYNTAXES
        for k, frame in enumerate(stack.frames)
    )
    if not count:
        return ()
    text = (
        f"{count} of {len(stack.frames)} images were compressed with loss: their values, noise and "
        "densities are not the scanner's"
    )
    return (Issue("lossy", text),)


def _units_note(facts: SeriesFacts) -> tuple[Issue, ...]:
    if facts.modality != "CT" or facts.units == "HU":
        return ()
    why = f"of Rescale Type {facts.units}" if facts.units else "without Rescale Slope"
    return (Issue("units", f"CT {why}: the values are not Hounsfield units"),)


def _facts(series: Series, stack: Stack) -> SeriesFacts:
    header = stack.frames[0].header
    x, y = stack.pixel
    thick = [frame.thickness for frame in stack.frames if frame.thickness is not None]
    alike = len(thick) == len(stack.frames) and max(thick) <= ALIKE * min(thick)
    return SeriesFacts(
        id=series.id,
        modality=header.modality,
        sop_class_uid=header.sop_class,
        rows=header.rows,
        columns=header.columns,
        spacing=(x, y, stack.step),
        units="/".join(sorted({frame.units for frame in stack.frames})),
        number_of_slices=len(stack.frames),
        slice_thickness=thick[0] if alike else None,
        kernel=stack.frames[0].kernel,
        contrast=any(frame.header.contrast for frame in stack.frames),
        kind=stack.frames[0].kind,
        photometric=header.photometric,
        image_type=header.image_type,
        transfer_syntax_uid=header.syntax,
        windows=header.windows,
        burned_in=_burned_in(stack.frames),
        study_instance_uid=header.study_uid,
        series_instance_uid=header.series_uid,
        frame_of_reference_uid=header.frame_of_reference or None,
        sop_instance_uids=tuple(frame.header.sop_uid for frame in stack.frames),
        frame_numbers=tuple(frame.index + 1 for frame in stack.frames),
        positions=tuple((float(x), float(y), float(z)) for x, y, z in stack.positions),
        sources=tuple(frame.header.source for frame in stack.frames),
    )


def _burned_in(frames: Sequence[Frame]) -> str | None:
    values = {frame.header.burned_in for frame in frames}
    return "YES" if "YES" in values else next(iter(values)) if len(values) == 1 else None
