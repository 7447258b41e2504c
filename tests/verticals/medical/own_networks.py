"""Small networks of others in their own formats, written as their libraries write them."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

LABELS = {"0": "background", "1": "spleen", "2": "liver"}
PRE: list[dict[str, Any]] = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
    {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing", "mode": "bilinear"},
    {
        "_target_": "ScaleIntensityRanged",
        "keys": "image",
        "a_min": -1000,
        "a_max": "$400",
        "b_min": 0.0,
        "b_max": 1.0,
        "clip": True,
    },
]
POST: list[dict[str, Any]] = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "device": "@device",
        "nearest_interp": False,
    },
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
]
UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 8],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
PATCH = (32, 32, 16)


def extra(name: str) -> Any:
    """A package of requirements-extras.lock; its absence fails where extras are required."""
    if os.environ.get("PLINTH_REQUIRE_EXTRAS"):
        return __import__(name)
    return pytest.importorskip(name)


class Blobs(nn.Module):
    """Three smooth classes by brightness and place, from convolutions of fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 3, 3, padding=1)
        )

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, z, y, x) to (n, 3, z, y, x)."""
        return self.body(volume)


def write_bundle(folder: Path, network: nn.Module | None = None, **changed: Any) -> Path:
    """A MONAI bundle; ``network`` is stored as TorchScript, else a UNet as safetensors."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    metadata = {
        "version": "0.1.0",
        "description": "a test",
        "network_data_format": {
            "inputs": {"image": {"type": "image", "modality": "CT", "num_channels": 1}},
            "outputs": {"pred": {"num_channels": 3, "channel_def": LABELS}},
        },
    }
    config: dict[str, Any] = {
        "imports": ["$import glob"],
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "spacing": [4.0, 4.0, 6.0],
        "network_def": UNET,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": PRE},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(PATCH),
            "sw_batch_size": 4,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": POST},
    }
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps(config | changed))
    if network is not None:
        write_script(network, folder / "models" / "model.ts")
        return folder
    from safetensors.torch import save_file

    save_file(unet().state_dict(), folder / "models" / "model.safetensors")
    return folder


def write_script(network: nn.Module, path: Path, *, trace: bool = True) -> None:
    """A network as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # files of it are still about
        if trace:
            scripted = torch.jit.trace(network.eval(), torch.rand(1, 1, *PATCH))
        else:
            scripted = torch.jit.script(network)
        torch.jit.save(scripted, str(path))


def unet() -> nn.Module:
    """The UNet of the bundle, with weights that are the same each time."""
    from monai.networks import nets

    torch.manual_seed(11)
    return nets.UNet(**{k: v for k, v in UNET.items() if k != "_target_"}).eval()


def write_beside(path: Path, **changed: Any) -> Path:
    """The JSON that says what a file without metadata needs."""
    described = {
        "name": "blobs",
        "modality": ["CT"],
        "labels": {"1": "spleen", "2": "liver"},
        "steps": [
            {"op": "orient", "codes": "RAS"},
            {"op": "space", "mm": [4.0, 4.0, 6.0]},
            {"op": "scale", "low": -1000, "high": 400, "clip": True},
        ],
        "window": {"size": list(PATCH), "overlap": 0.5, "blend": "floored"},
        "channels": 3,
    }
    path.with_suffix(".json").write_text(json.dumps(described | changed))
    return path
