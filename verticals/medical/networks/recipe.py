"""What a network needs and gives: read from its own metadata, or from a JSON file beside it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from plinth.engine.tables import Table

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]
_Count = Annotated[int, Field(ge=1)]
_Index = Annotated[int, Field(ge=0)]
_Mm = Annotated[float, Field(gt=0)]
Voxels = tuple[_Count, _Count, _Count]
Indices = tuple[_Index, _Index, _Index]
Millimetres = tuple[_Mm, _Mm, _Mm]


class _Step(Table):
    """One thing that is done to a volume."""


class Orient(_Step):
    """Turn and flip the axes, to the nearest patient axis.

    Args:
        codes: where each axis of the array points, such as ``"RAS"``: the first towards the
            patient's right, the second anterior, the third superior.
    """

    op: Literal["orient"] = "orient"
    codes: str = Field(pattern=r"^[RLAPSI]{3}$")

    @field_validator("codes")
    @classmethod
    def _each_once(cls, codes: str) -> str:
        if {frozenset(pair) & set(codes) != set() for pair in ("RL", "AP", "SI")} != {True}:
            raise ValueError(f"{codes!r} does not name each of the three patient axes once")
        return codes


class Transpose(_Step):
    """Reorder the axes.

    Args:
        order: the present axis that becomes the first, second and third.
    """

    op: Literal["transpose"] = "transpose"
    order: Triple

    @field_validator("order")
    @classmethod
    def _permutes(cls, order: Triple) -> Triple:
        if sorted(order) != [0, 1, 2]:
            raise ValueError(f"{order} is no order of three axes")
        return order


class Space(_Step):
    """Resample to a spacing.

    Args:
        mm: of each axis of the array as it then lies; 0 keeps the spacing of that axis.
        keep: what stays in place: the ``"first"`` voxel's centre (MONAI), or the outer
            ``"edges"`` (nnU-Net).
        order: of the spline: 0 nearest, 1 linear, 3 cubic.
        coarse_order: instead of ``order`` along an axis whose spacing is more than three times
            the others' (nnU-Net); with 0 outputs come back along such an axis by the nearest voxel.
    """

    op: Literal["space"] = "space"
    mm: Spacing
    keep: Literal["first", "edges"] = "first"
    order: Literal[0, 1, 3] = 1
    coarse_order: Literal[0, 1, 3] | None = None


class Resize(_Step):
    """To a number of voxels, each the nearest one (torch's ``nearest-exact``).

    Args:
        size: voxels of each axis.
    """

    op: Literal["resize"] = "resize"
    size: Voxels


class Cut(_Step):
    """To a box of indices; what lies outside is background on the way back.

    Args:
        start: first index of each axis.
        stop: index after the last.
    """

    op: Literal["cut"] = "cut"
    start: Indices
    stop: Voxels


class Conform(_Step):
    """A grid of fixed size and spacing around the middle of the field of view, linear.

    Args:
        size: voxels of each axis.
        mm: spacing of each axis.
    """

    op: Literal["conform"] = "conform"
    size: Voxels
    mm: Millimetres


class Crop(_Step):
    """Cut to the box of voxels above 0 (MONAI), or unequal 0 (nnU-Net).

    Args:
        above: only voxels above 0 count.
        margin: voxels left on each side of each axis.
        multiple: the box grows on both sides until the voxels of each axis are a multiple of these.
        beyond: where the margin reaches beyond the volume there are zeros, instead of nothing.
    """

    op: Literal["crop"] = "crop"
    above: bool = True
    margin: Indices = (0, 0, 0)
    multiple: Voxels = (1, 1, 1)
    beyond: bool = False


class Pad(_Step):
    """Pad with a value, half of it before and the larger half behind.

    Args:
        least: voxels of each axis at least.
        multiple: voxels of each axis are a multiple of these.
        value: of the padding.
        mode: ``"replicate"``: the values at the border instead of ``value``.
    """

    op: Literal["pad"] = "pad"
    least: Triple = (1, 1, 1)
    multiple: Voxels = (1, 1, 1)
    value: float = 0.0
    mode: Literal["constant", "replicate"] = "constant"


class Clip(_Step):
    """Values below ``low`` become ``low``, those above ``high`` become ``high``."""

    op: Literal["clip"] = "clip"
    low: float | None = None
    high: float | None = None


class Scale(_Step):
    """``from_`` low..high becomes ``to`` low..high.

    Args:
        low: lower value; a percentile (0 to 100) with ``percentiles``, the smallest if ``None``.
        high: upper value, likewise.
        to: what they become.
        clip: values beyond are clipped.
        percentiles: ``low`` and ``high`` are percentiles of the values.
    """

    op: Literal["scale"] = "scale"
    low: float | None = None
    high: float | None = None
    to: tuple[float, float] = (0.0, 1.0)
    clip: bool = False
    percentiles: bool = False

    @model_validator(mode="after")
    def _both(self) -> Scale:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both low and high, or neither")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class Normalise(_Step):
    """(value - mean) / deviation.

    Args:
        mean: subtracted; ``None`` takes that of the values.
        deviation: divided by; ``None`` takes that of the values.
        nonzero: only voxels unequal 0 are counted and changed.
        filled: with ``nonzero``, holes of the region unequal 0 are part of it (nnU-Net).
    """

    op: Literal["normalise"] = "normalise"
    mean: float | None = None
    deviation: float | None = Field(default=None, gt=0)
    nonzero: bool = False
    filled: bool = False


class Affine(_Step):
    """value * factor + offset."""

    op: Literal["affine"] = "affine"
    factor: float = 1.0
    offset: float = 0.0


Step = Annotated[
    Orient
    | Transpose
    | Space
    | Resize
    | Cut
    | Conform
    | Crop
    | Pad
    | Clip
    | Scale
    | Normalise
    | Affine,
    Field(discriminator="op"),
]


class Window(Table):
    """How the prepared volume goes through the network.

    Args:
        size: voxels of a window along each axis; ``None``: the whole volume at once.
        overlap: share of it shared with its neighbour; of a network that gives labels, which cannot
            be blended, each has its half of that.
        blend: weights inside a window.
        even: windows are spread evenly (nnU-Net).
        beyond: what lies beyond a volume that is smaller than a window: ``beyond_value``, or with
            ``"replicate"`` the values at its border.
        halo: voxels an answer depends on in each direction, if the network is nothing but
            convolutions, normalisation by constants, and functions of single voxels.
    """

    size: Voxels | None = None
    overlap: float = Field(default=0.25, ge=0, le=0.9)
    blend: Literal["gaussian", "constant", "floored"] = "gaussian"
    even: bool = False
    beyond: Literal["constant", "replicate"] = "constant"
    beyond_value: float = 0.0
    halo: Indices | None = None


class Recipe(Table):
    """What a network needs and gives.

    Args:
        name: of the network.
        version: of the network.
        source: what it was read from, such as ``"MONAI bundle"``.
        description: what its authors say it does.
        licence: of its weights, where it is said.
        modality: DICOM modalities it was made for; none named: any.
        labels: names by value of the label map; 0 is background and not named.
        axes: order of the array's axes before any step: ``"xyz"`` (columns, rows, slices, as
            MONAI and nibabel have it) or ``"zyx"`` (as SimpleITK and nnU-Net have it).
        steps: done to the volume, in this order.
        window: how it goes through the network.
        activation: of the network's output; ``"none"`` if it gives probabilities or labels.
        reduce: how output becomes labels; see :class:`plinth.engine.Tiling`.
        channels: of the output, where they are known.
        output: which it is, counted from 0, of a network that gives several.
        largest: labels of which only the largest component is kept.
        filled: labels whose holes are filled, after that.
        back: how outputs come to the native grid: probabilities interpolated (``"linear"``), what
            the network gives interpolated before its activation (``"raw"``, nnU-Net), or the label
            of the ``"nearest"`` voxel.
        notes: what a reader of the report should know.
        worth: what is known of its quality; empty: nothing, and the report says so.
    """

    name: str
    version: str = "1"
    source: str = "description beside the file"
    description: str = ""
    licence: str = ""
    modality: tuple[str, ...] = ()
    labels: dict[int, str]
    axes: Literal["xyz", "zyx"] = "xyz"
    steps: tuple[Step, ...] = ()
    window: Window = Window()
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    reduce: Literal["argmax", "threshold", "labels"] = "argmax"
    channels: int | None = Field(default=None, ge=1, le=256)
    output: int | None = Field(default=None, ge=0, le=255)
    largest: tuple[int, ...] = ()
    filled: tuple[int, ...] = ()
    back: Literal["linear", "raw", "nearest"] = "linear"
    notes: tuple[str, ...] = ()
    worth: str = ""

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: dict[int, str]) -> dict[int, str]:
        named = {value: _tidy(name) for value, name in labels.items() if value != 0}
        if not named or any(not 1 <= value <= 255 for value in named):
            raise ValueError("expected names for label values from 1 to 255")
        if any(not name or len(name) > 64 for name in named.values()):
            raise ValueError("expected label names of 1 to 64 characters")
        often = Counter(named.values())
        return {
            value: name if often[name] == 1 else f"{name[:58]} ({value})"
            for value, name in named.items()
        }

    @model_validator(mode="after")
    def _of_the_output(self) -> Recipe:
        """A label that no channel gives would be reported as not found."""
        if self.channels is None or self.reduce == "labels":
            return self
        if self.reduce == "argmax" and self.channels == 1:
            raise ValueError('one channel has no largest one: expected reduce "threshold"')
        most = self.channels - (self.reduce == "argmax")
        if max(self.labels) > most:
            raise ValueError(
                f"label {max(self.labels)} ({self.labels[max(self.labels)]}) is none of the "
                f"{self.channels} channels of the output, which give labels 1 to {most}"
            )
        return self


def _tidy(name: str) -> str:
    """A name as DICOM can hold it: no control characters, no backslash, no spaces around it."""
    return " ".join("".join(c if c.isprintable() and c != "\\" else " " for c in name).split())
