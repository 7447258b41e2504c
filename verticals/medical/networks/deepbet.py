"""deepbet: brain extraction from T1 MR by two networks, one after the other.

Fisch et al., Computers in Biology and Medicine 2024 (deepbet, MIT). A folder holds
``bbox_model.pt``, which finds the brain in the whole image at 128 x 128 x 128, and ``model.pt``,
which segments it in the box that was found, at 256 x 256 x 256; both TorchScript.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from torch import nn

from plinth.engine import InputError
from plinth.verticals.medical.networks.prepare import Prepared, prepare
from plinth.verticals.medical.networks.recipe import (
    Affine,
    Cut,
    Normalise,
    Orient,
    Recipe,
    Resize,
    Scale,
    Window,
)
from plinth.verticals.medical.networks.weights import read_script
from plinth.verticals.medical.volumes.volume import Volume

FILES = ("bbox_model.pt", "model.pt")
SMALL, SIDE = 128, 256
QUANTILES = (0.5, 99.5)  # percent, of the small image; between them values become 0 to 1
MARGIN = 0.1  # of the box on each side
SLIGHT = 0.02  # share of a plane that is brain, below which it is not part of the box


def is_deepbet(folder: Path) -> bool:
    """Whether a folder holds the networks of deepbet."""
    return folder.is_dir() and all((folder / name).is_file() for name in FILES)


def read_deepbet(folder: Path) -> tuple[tuple[nn.Module, Recipe], tuple[nn.Module, Recipe]]:
    """The network that segments and the one that finds the box, each with its recipe.

    The first recipe lacks where to cut and between which values to scale: :func:`narrowed`.

    Raises:
        ModelError: the files cannot be used.
    """
    common = Recipe(
        name="deepbet",
        source="deepbet",
        description="Brain extraction by the networks of deepbet for T1-weighted MR of the head",
        licence="MIT",
        modality=("MR",),
        labels={1: "Brain"},
        axes="xyz",
        steps=(Orient(codes="RAS"), Resize(size=(SIDE,) * 3), *_values(Scale())),
        window=Window(size=(SIDE,) * 3, overlap=0.0, blend="constant"),
        channels=2,
        largest=(1,),
        filled=(1,),
        back="nearest",
    )
    scale = Scale(low=QUANTILES[0], high=QUANTILES[1], percentiles=True, clip=True)
    small = common.model_copy(
        update={
            "name": "deepbet-box",
            "steps": (Orient(codes="RAS"), Resize(size=(SMALL,) * 3), *_values(scale)),
            "window": Window(size=(SMALL,) * 3, overlap=0.0, blend="constant"),
        }
    )
    box, main = (read_script(folder / name) for name in FILES)
    return (main, common), (box, small)


def _values(scale: Scale) -> tuple[Scale, Normalise, Affine]:
    return scale, Normalise(), Affine(factor=0.226, offset=0.449)


def narrowed(volume: Volume, small: Recipe, recipe: Recipe, found: npt.NDArray[np.uint8]) -> Recipe:
    """The recipe of the second network for one volume: the box, and the values to scale between.

    Args:
        volume: MR.
        small: recipe of the first network.
        recipe: of the second.
        found: (a, b, c) labels of the first on its own grid.

    Raises:
        InputError: the first network found no brain.
    """
    turned, resize, *_ = small.steps
    unscaled = small.model_copy(update={"steps": (turned, resize)})
    values = prepare(volume, unscaled).rows.numpy()
    low, high = (float(v) for v in np.percentile(values, QUANTILES))
    whole = prepare(volume, small.model_copy(update={"steps": (turned,), "window": Window()}))
    start, stop = _box(volume, found, whole)
    return recipe.model_copy(
        update={
            "steps": (
                turned,
                Cut(start=start, stop=stop),
                Resize(size=(SIDE,) * 3),
                *_values(Scale(low=low, high=high, clip=True)),
            )
        }
    )


def _box(
    volume: Volume, found: npt.NDArray[np.uint8], whole: Prepared
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First and last index of the brain and its margin along each axis of the turned volume."""
    components, count = ndimage.label(found > 0, np.ones((3, 3, 3)))
    if not count:
        raise InputError(f"series {volume.series.id}: no brain was found", reason="empty")
    brain = components == int(np.bincount(components.ravel())[1:].argmax()) + 1
    starts, stops = [], []
    for axis, size in enumerate(whole.shape):
        others = tuple(n for n in range(3) if n != axis)
        planes = np.flatnonzero(brain.mean(others) > SLIGHT)
        if not len(planes):
            raise InputError(f"series {volume.series.id}: no brain was found", reason="empty")
        scale = size / found.shape[axis]
        middle = np.rint((planes[-1] + 1 + planes[0]) / 2 * scale)
        extent = np.rint((planes[-1] + 1 - planes[0]) * scale * (1 + 2 * MARGIN))
        starts.append(max(0, int(middle - extent / 2)))
        stops.append(min(size, int(middle + extent / 2)))
    return (starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2])
