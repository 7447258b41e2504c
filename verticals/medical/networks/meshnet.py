"""MeshNet: dilated convolutions for brain MR, in the files of the brainchop project.

Fedorov et al., IJCNN 2017; Masoud et al., JOSS 2023 (brainchop, MIT). A folder holds
``model.json`` (layers as Keras names them), one file of float32 weights and ``colormap.json``
with the labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plinth.engine import ModelError
from plinth.engine.models.families.planes import (
    can_stream,
    convolved,
    cut,
    gathered,
    held_bytes,
    streamed,
)
from plinth.verticals.medical.networks.recipe import (
    Conform,
    Orient,
    Recipe,
    Scale,
    Triple,
    Window,
)
from plinth.verticals.medical.networks.texts import object_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "linear": lambda values: values,
}
OVERWRITING: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu_, "elu": F.elu_}
"""The same in the memory of what they are given."""
SIDE = 256
CHUNK = 8  # planes whose classes are there at once
MOST_BYTES = 256 << 20
ROBUST = 99.9
"""Percentile that becomes 1."""


class MeshNet(nn.Module):
    """Convolutions that keep the size, each followed by one function of single voxels.

    Args:
        layers: (taken, given, kernel, dilation, bias) of each convolution.
        activation: after each but the last.
        normed: each but the last is followed by a normalisation over the whole volume.
        labels: give labels (n, 1, z, y, x) uint8 instead of logits (n, k, z, y, x).

    The classes of the last convolution, which is 1 x 1 x 1, are never there for more than a few
    planes when labels are asked for, so that memory does not depend on their number.
    """

    def __init__(
        self,
        layers: list[tuple[int, int, int, int, bool]],
        activation: str,
        normed: bool = False,
        labels: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv3d(taken, given, kernel, padding="same", dilation=dilation, bias=bias)
            for taken, given, kernel, dilation, bias in layers
        )
        self.activation = activation
        self.normed = normed
        self.labels = labels

    @property
    def radius(self) -> int:
        """Voxels an answer depends on in each direction."""
        convolutions = [cast(nn.Conv3d, layer) for layer in self.layers]
        return sum(c.dilation[0] * (c.kernel_size[0] // 2) for c in convolutions)

    def forward(self, volume: Tensor) -> Tensor:
        """(n, 1, z, y, x) float32 to logits, or to labels."""
        if self.labels and not self.normed and can_stream(list(self.layers), volume):
            found = [self._labels_of(row[None]) for row in volume]
            return found[0] if len(found) == 1 else torch.cat(found)
        *body, head = self.layers
        function = ACTIVATIONS[self.activation]
        for layer in body:
            volume = layer(volume)
            if self.normed:
                volume = F.group_norm(volume, volume.shape[1])
            volume = function(volume)
        if not self.labels:
            return cast(Tensor, head(volume))
        parts = [
            head(volume[:, :, first : first + CHUNK]).argmax(1, keepdim=True).to(torch.uint8)
            for first in range(0, volume.shape[2], CHUNK)
        ]
        return torch.cat(parts, 2)

    def forward_bytes(self, size: Triple) -> int | None:
        """What a forward over one volume takes at its peak, where it makes labels plane by plane.

        Args:
            size: (z, y, x) voxels.

        Returns:
            Bytes beside the volume, its labels among them; ``None``: it holds whole results.
        """
        if not self.labels or self.normed:
            return None
        *body, _ = (cast(nn.Conv3d, layer) for layer in self.layers)
        return held_bytes(body, (size[1], size[2])) + math.prod(size)

    def _labels_of(self, volume: Tensor) -> Tensor:
        """(1, 1, z, y, x) to labels, one plane of each result at a time."""
        *body, head = (cast(nn.Conv3d, layer) for layer in self.layers)
        function = OVERWRITING.get(self.activation, ACTIVATIONS[self.activation])
        stages = [(layer, function) for layer in body]
        made = streamed(stages, cut(volume, 1))
        most = (convolved(head, each).argmax(1, keepdim=True).to(torch.uint8) for each in made)
        return gathered(most, volume.shape[2])


def is_meshnet(folder: Path) -> bool:
    """Whether a folder looks like a network of brainchop."""
    return folder.is_dir() and (folder / "model.json").is_file()


def read_meshnet(folder: Path, uncertainty: bool = False) -> tuple[MeshNet, Recipe]:
    """Network and recipe of a brainchop folder.

    Args:
        folder: with ``model.json``, its weights and ``colormap.json``.
        uncertainty: logits are needed, not only labels.

    Raises:
        ModelError: the files are not what MeshNet is made of.
    """
    described = object_of(folder / "model.json")
    try:
        layers = described["modelTopology"]["model_config"]["config"]["layers"]
        (group,) = described["weightsManifest"]
        (file,) = group["paths"]
        network = _network(layers, not uncertainty)
        _fill(network, folder / Path(file).name, group["weights"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"{folder.name}/model.json is not a MeshNet: {type(error).__name__}: {error}"
        ) from error
    names = _labels(folder, cast(nn.Conv3d, network.layers[-1]).out_channels)
    return network, _recipe(folder.name, network, names, _scale(str(described.get("_comment", ""))))


def _network(layers: list[dict[str, Any]], labels: bool) -> MeshNet:
    convolutions, functions, taken, normed = [], set(), 1, False
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        if kind == "Activation":
            functions.add(str(config["activation"]))
        elif kind == "Conv3D":
            kernel, dilation = config["kernel_size"], config["dilation_rate"]
            plain = config["padding"] == "same" and config["strides"] == [1, 1, 1]
            if not plain or len(set(kernel)) > 1 or len(set(dilation)) > 1 or kernel[0] % 2 == 0:
                raise ValueError(f"layer {config['name']} is not what MeshNet is made of")
            given = int(config["filters"])
            convolutions.append((taken, given, kernel[0], dilation[0], bool(config["use_bias"])))
            normed |= str(config["name"]).endswith("_gn")
            taken = given
        elif kind != "InputLayer":
            raise ValueError(f"layers of kind {kind!r} are not supported")
    if len(functions) != 1 or not functions <= ACTIVATIONS.keys():
        raise ValueError(f"activations {sorted(functions)}, expected one of {sorted(ACTIVATIONS)}")
    if len(convolutions) < 2 or convolutions[-1][2] != 1 or convolutions[-1][1] > 256:
        raise ValueError("the last layer is not a 1 x 1 x 1 convolution to at most 256 classes")
    return MeshNet(convolutions, functions.pop(), normed, labels)


def _fill(network: MeshNet, path: Path, manifest: list[dict[str, Any]]) -> None:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{path.name}, the weights, is not there or has more than {MOST_BYTES} B")
    blob, at, named = np.fromfile(path, "<f4"), 0, {}
    for entry in manifest:
        if entry["dtype"] != "float32":
            raise ValueError(f"weights {entry['name']} are {entry['dtype']}, expected float32")
        count = math.prod(entry["shape"])
        named[str(entry["name"])] = torch.from_numpy(
            blob[at : at + count].reshape(entry["shape"]).copy()
        )
        at += count
    if at != len(blob):
        raise ValueError(f"{path.name} has {len(blob)} numbers, the manifest names {at}")
    kernels = [value for name, value in named.items() if name.endswith("/kernel")]
    biases = iter(value for name, value in named.items() if name.endswith("/bias"))
    with torch.no_grad():
        for layer, kernel in zip(network.layers, kernels, strict=True):
            convolution = cast(nn.Conv3d, layer)
            convolution.weight.copy_(kernel.permute(4, 3, 0, 1, 2))
            if convolution.bias is not None:
                convolution.bias.copy_(next(biases))


def _scale(comment: str) -> Scale:
    """From the smallest value to the robust maximum, or between the quantiles a comment names.

    brainchop conforms as FreeSurfer does, which cuts the brightest thousandth off (``f_high`` of
    ``mri_convert --conform``): without that, bright vessels and fat press tissue together.
    """
    named = re.findall(r"(\d+)\s*% quantile", comment)
    if len(named) == 2:
        return Scale(low=float(named[0]), high=float(named[1]), percentiles=True)
    return Scale(low=0.0, high=ROBUST, percentiles=True, clip=True)


def _labels(folder: Path, classes: int) -> dict[int, str]:
    for name in ("colormap3.json", "colormap.json"):
        if (folder / name).is_file():
            labels = object_of(folder / name).get("labels")
            if isinstance(labels, list) and len(labels) == classes:
                return {n: str(label) or f"label {n}" for n, label in enumerate(labels) if n}
    return {n: f"label {n}" for n in range(1, classes)}


def _recipe(name: str, network: MeshNet, labels: dict[int, str], scale: Scale) -> Recipe:
    """T1 at 256 x 256 x 256 voxels of 1 mm, axes to the right, superior and anterior, as brainchop
    conforms."""
    halo: Triple | None = None if network.normed else (network.radius,) * 3
    classes = cast(nn.Conv3d, network.layers[-1]).out_channels
    return Recipe(
        name=f"meshnet-{name}".lower().replace("_", "-"),
        source="brainchop MeshNet",
        description="MeshNet of the brainchop project for T1-weighted MR of the head",
        licence="MIT",
        modality=("MR",),
        labels=labels,
        axes="xyz",
        steps=(
            Orient(codes="RSA"),
            Conform(size=(SIDE,) * 3, mm=(1.0, 1.0, 1.0)),
            scale,
        ),
        window=Window(size=(SIDE,) * 3, halo=halo, overlap=0.0),
        reduce="labels" if network.labels else "argmax",
        channels=1 if network.labels else classes,
    )
