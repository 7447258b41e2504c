"""nnU-Net v2 results folders: plans and dataset are read as data, weights without a pickle.

Isensee et al., Nat Methods 2021. The architectures are those of the package
dynamic-network-architectures, chosen by name from an allow-list.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from plinth.engine import ModelError
from plinth.verticals.medical.networks.recipe import (
    Clip,
    Crop,
    Normalise,
    Orient,
    Recipe,
    Scale,
    Space,
    Step,
    Transpose,
    Window,
)
from plinth.verticals.medical.networks.texts import object_of
from plinth.verticals.medical.networks.weights import fill, read_state, tensors_of

NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
PARTS: dict[str, Any] = {
    "torch.nn.modules.conv.Conv3d": nn.Conv3d,
    "torch.nn.modules.instancenorm.InstanceNorm3d": nn.InstanceNorm3d,
    "torch.nn.modules.batchnorm.BatchNorm3d": nn.BatchNorm3d,
    "torch.nn.modules.activation.LeakyReLU": nn.LeakyReLU,
    "torch.nn.LeakyReLU": nn.LeakyReLU,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.ReLU": nn.ReLU,
    "torch.nn.modules.dropout.Dropout3d": nn.Dropout3d,
}
READERS = ("SimpleITKIO", "NibabelIO")
TURNING = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
"""nnU-Net's readers: as images are stored, and turned to RAS first."""

CHECKPOINTS = (
    *("checkpoint_final.safetensors", "checkpoint_final.pth"),
    *("checkpoint_best.safetensors", "checkpoint_best.pth"),
)


class Mean(nn.Module):
    """The mean of what several networks give: the folds of a cross-validation."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, volume: Tensor) -> Tensor:
        """(n, c, z, y, x) to the mean of their outputs."""
        first, *others = self.networks
        total = cast(Tensor, first(volume))
        for network in others:
            total = total + network(volume)
        return total / len(self.networks)


def is_nnunet(folder: Path) -> bool:
    """Whether a folder looks like a trained nnU-Net v2."""
    return all((folder / name).is_file() for name in ("plans.json", "dataset.json"))


def read_nnunet(folder: Path) -> tuple[nn.Module, Recipe]:
    """Network and recipe of a folder ``<trainer>__<plans>__<configuration>``.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_*/checkpoint_final.*``; the
            output of several folds is averaged, as nnU-Net does.

    Raises:
        ModelError: names the file and what in it cannot be used.
    """
    plans, dataset = object_of(folder / "plans.json"), object_of(folder / "dataset.json")
    name = _configuration(folder, plans)
    configuration = _inherited(plans, name)
    channels = dataset.get("channel_names") or dataset.get("modality") or {}
    if len(channels) != 1:
        raise ModelError(
            f"{folder.name} takes {len(channels)} images at once ({', '.join(channels.values())}); "
            "one series is one image here"
        )
    outputs, labels, reduce = _labels(dataset)
    try:
        recipe = _recipe(plans, dataset, configuration, next(iter(channels.values())))
        recipe = recipe.model_copy(update={"labels": labels, "reduce": reduce, "channels": outputs})
        if reduce == "threshold":
            recipe = recipe.model_copy(update={"activation": "sigmoid"})
        folds = _folds(folder)
        networks = [_network(configuration, outputs, path) for path in folds]
    except (KeyError, TypeError, ValueError) as error:
        what = str(error).partition("\n")[0][:120]
        raise ModelError(
            f"{folder.name}: plans.json cannot be used: {type(error).__name__}: {what}",
            hint="plans of nnU-Net 2.4 or newer name their architecture",
        ) from error
    notes = [f"{len(folds)} fold(s): {', '.join(_fold_name(path) for path in folds)}"]
    left = [] if folds[0].parent.name == "fold_all" else _without_weights(folder, folds)
    notes += [f"without weights, left out: {', '.join(left)}"] if left else []
    network = networks[0] if len(networks) == 1 else Mean(networks)
    return network.eval(), recipe.model_copy(update={"notes": tuple(notes)})


def _configuration(folder: Path, plans: Mapping[str, Any]) -> str:
    found = plans.get("configurations")
    known = sorted(found) if isinstance(found, dict) else []
    named: str = folder.resolve().name.rpartition("__")[2]
    if named in known:
        return named
    full = [str(name) for name in known if name.startswith("3d_fullres")]
    if len(full) == 1:
        return full[0]
    raise ModelError(
        f"{folder.name} does not say which of {', '.join(known) or 'no'} configurations it is",
        hint="keep nnU-Net's name of the folder: <trainer>__<plans>__<configuration>",
    )


def _inherited(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    configurations, chain = plans["configurations"], []
    at: str | None = name
    while at is not None:
        if at in chain or at not in configurations:
            raise ModelError(f"plans.json: configuration {name} inherits from {at}")
        chain.append(at)
        at = configurations[at].get("inherits_from")
    merged: dict[str, Any] = {}
    for one in reversed(chain):
        merged |= configurations[one]
    if merged.get("previous_stage"):
        raise ModelError(f"{name} is the second stage of a cascade", hint="use 3d_fullres")
    return merged


def _labels(dataset: Mapping[str, Any]) -> tuple[int, dict[int, str], str]:
    """Channels of the output, names by label value, and how output becomes labels."""
    found = {str(name): value for name, value in (dataset.get("labels") or {}).items()}
    found.pop("background", None)
    found.pop("ignore", None)  # of the training alone: it has no channel of its own
    if not found:
        raise ModelError("dataset.json has no labels")
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in found.values()):
        order = dataset.get("regions_class_order") or []
        if order != list(range(1, len(found) + 1)):
            raise ModelError(
                f"dataset.json: regions_class_order is {order}, only 1, 2, 3, ... is supported"
            )
        return len(found), dict(enumerate(found, 1)), "threshold"
    values = {
        int(value[0] if isinstance(value, list) else value): name for name, value in found.items()
    }
    if sorted(values) != list(range(1, len(values) + 1)):
        raise ModelError(f"dataset.json: labels are {sorted(values)}, expected 1, 2, 3, ...")
    return len(values) + 1, values, "argmax"


def _recipe(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    configuration: Mapping[str, Any],
    channel: str,
) -> Recipe:
    spacing, patch = configuration["spacing"], configuration["patch_size"]
    if len(spacing) != 3 or len(patch) != 3:
        raise ModelError("a 2d configuration is not supported", hint="use 3d_fullres or 3d_lowres")
    steps: list[Step] = _reading(plans, dataset)
    order = [int(axis) for axis in plans.get("transpose_forward", (0, 1, 2))]
    if order != [0, 1, 2]:
        steps.append(Transpose(order=(order[0], order[1], order[2])))
    steps += [Crop(above=False), *_normalisation(plans, configuration)]
    steps.append(_resampling(configuration))
    modality = "CT" if channel.upper() == "CT" else "MR" if "MR" in channel.upper() else ""
    return Recipe(
        name=re.sub(r"[^a-z0-9._-]+", "-", str(plans.get("dataset_name", "nnunet")).lower()),
        version="1",
        source="nnU-Net v2",
        description=str(dataset.get("description", ""))[:500],
        licence=str(dataset.get("licence", dataset.get("license", "")))[:100],
        modality=(modality,) if modality else (),
        labels={1: "unnamed"},
        axes="zyx",
        steps=tuple(steps),
        back="raw",
        window=Window(size=(patch[0], patch[1], patch[2]), overlap=0.5, even=True),
    )


def _reading(plans: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[Step]:
    """How nnU-Net's reader turns an image before all else: to RAS, or not at all.

    A reader that turns gives (z, y, x) towards superior, anterior and right.
    """
    named = dataset.get("overwrite_image_reader_writer") or plans.get("image_reader_writer")
    reader = str(named or READERS[0])
    if reader in TURNING:
        return [Orient(codes="SAR")]
    if reader in READERS:
        return []
    raise ModelError(
        f"images are read by {reader!r}, which is not one of nnU-Net's own for volumes: how it "
        "turns them is not known"
    )


def _normalisation(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> list[Step]:
    (scheme,) = configuration["normalization_schemes"]
    (masked,) = configuration["use_mask_for_norm"]
    if scheme == "CTNormalization":
        found = plans["foreground_intensity_properties_per_channel"]["0"]
        return [
            Clip(low=found["percentile_00_5"], high=found["percentile_99_5"]),
            Normalise(mean=found["mean"], deviation=max(found["std"], 1e-8)),
        ]
    if scheme == "ZScoreNormalization":
        return [Normalise(nonzero=bool(masked), filled=bool(masked))]
    if scheme == "RescaleTo01Normalization":
        return [Scale()]
    if scheme == "NoNormalization":
        return []
    raise ModelError(f"plans.json: normalisation {scheme!r} is not one of nnU-Net's own for 3D")


def _resampling(configuration: Mapping[str, Any]) -> Space:
    function = configuration.get("resampling_fn_data", "resample_data_or_seg_to_shape")
    options = configuration.get("resampling_fn_data_kwargs") or {"order": 3, "order_z": 0}
    if function != "resample_data_or_seg_to_shape" or options.get("force_separate_z") is True:
        raise ModelError(f"plans.json: resampling by {function} {options} is not supported")
    back = configuration.get("resampling_fn_probabilities", function)
    known = {"is_seg": False, "order": 1, "order_z": 0}
    how = known | (configuration.get("resampling_fn_probabilities_kwargs") or {})
    forced = how.pop("force_separate_z", options.get("force_separate_z"))
    if back != function or how != known or forced != options.get("force_separate_z"):
        raise ModelError(f"plans.json: outputs resampled by {back} {how} are not supported")
    coarse = None if options.get("force_separate_z") is False else options.get("order_z", 0)
    spacing = [float(mm) for mm in configuration["spacing"]]
    return Space(
        mm=(spacing[0], spacing[1], spacing[2]),
        keep="edges",
        order=options.get("order", 3),
        coarse_order=coarse,
    )


def _folds(folder: Path) -> list[Path]:
    """The checkpoint of each fold; that of all data alone, where there is one."""
    found = []
    for fold in sorted(folder.glob("fold_*")):
        path = next((fold / name for name in CHECKPOINTS if (fold / name).is_file()), None)
        if path is not None:
            found.append(path)
    if not found:
        raise ModelError(f"{folder.name} has no fold_*/{CHECKPOINTS[1]}")
    return [path for path in found if path.parent.name == "fold_all"] or found


def _fold_name(path: Path) -> str:
    """The fold's name, and which of its checkpoints it is where that is not the final one."""
    final = path.stem == "checkpoint_final"
    return path.parent.name if final else f"{path.parent.name} ({path.stem})"


def _without_weights(folder: Path, folds: list[Path]) -> list[str]:
    """Folds that have a folder and no checkpoint: they are no part of the mean."""
    used = {path.parent for path in folds}
    return [one.name for one in sorted(folder.glob("fold_*")) if one.is_dir() and one not in used]


def _network(configuration: Mapping[str, Any], outputs: int, path: Path) -> nn.Module:
    architecture = configuration["architecture"]
    name = str(architecture["network_class_name"]).rpartition(".")[2]
    if name not in NETWORKS:
        raise ModelError(
            f"plans.json: the network {architecture['network_class_name']!r} is not one of "
            f"{', '.join(NETWORKS)}"
        )
    options = dict(architecture["arch_kwargs"])
    for key in architecture.get("_kw_requires_import", ()):
        if options.get(key) is not None:
            if options[key] not in PARTS:
                raise ModelError(f"plans.json: {key} is {options[key]!r}, which is not known")
            options[key] = PARTS[options[key]]
    try:
        unet = importlib.import_module("dynamic_network_architectures.architectures.unet")
    except ImportError:
        raise ModelError(
            "nnU-Net's networks need the package dynamic-network-architectures",
            hint="pip install dynamic-network-architectures",
        ) from None
    with torch.device("meta"):
        network = cast(
            nn.Module,
            getattr(unet, name)(
                input_channels=1, num_classes=outputs, deep_supervision=False, **options
            ),
        )
    network = network.to_empty(device="cpu")
    state = tensors_of(read_state(path), "network_weights", "state_dict")
    fill(network, state, path)
    return network
