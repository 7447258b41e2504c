"""Kinds of hardware as rows of data: what each needs, and why it is not there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

from plinth.engine.devices.device import Absent, devices


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of hardware.

    Args:
        name: what it is called, and what runs on it fastest.
        device: its kind as torch spells it.
        packages: what must be importable besides torch.
        vendor: build of torch, where several share a kind: ``"hip"`` or ``"cuda"``.
        backends: execution backends of Plinth that can run there; the others say why not.
    """

    name: str
    device: str
    packages: tuple[str, ...] = ()
    vendor: str | None = None
    backends: tuple[str, ...] = ("eager", "inductor")


HARDWARE = (
    Hardware(
        "CPU", "cpu", backends=("eager", "inductor", "aotinductor", "onnxruntime", "openvino")
    ),
    Hardware("CUDA / TensorRT", "cuda", ("tensorrt",), "cuda"),
    Hardware("ROCm / MIGraphX", "cuda", ("migraphx",), "hip"),
    Hardware("Ascend / torch-npu", "npu", ("torch_npu",)),
    Hardware("TPU / XLA", "xla", ("torch_xla",), backends=("eager",)),
    Hardware("Gaudi", "hpu", ("habana_frameworks",)),
    Hardware("Intel XPU", "xpu"),
    Hardware("Apple MPS", "mps"),
)
"""The CPU has run, and eager on CUDA; the rest follows the documentation of torch and vendors."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of a kind of hardware.

    Args:
        hardware: the row.
        devices: its devices, as settings spell them.
        packages: version of each package of the row, ``None`` where it is not installed.
        reason: why it cannot be used; ``None`` when it can.
    """

    hardware: Hardware
    devices: tuple[str, ...]
    packages: dict[str, str | None]
    reason: str | None


def hardware() -> list[Found]:
    """Every row of :data:`HARDWARE`, with its devices or the reason why there are none."""
    present: dict[str, list[str]] = {}
    absent: dict[str, str] = {}
    for entry in devices():
        if isinstance(entry, Absent):
            absent[entry.kind] = entry.reason
        else:
            present.setdefault(entry.kind, []).append(str(entry))
    return [_found(row, present, absent) for row in HARDWARE]


def _found(row: Hardware, present: dict[str, list[str]], absent: dict[str, str]) -> Found:
    packages = {name: _version(name) for name in row.packages}
    missing = [name for name, version in packages.items() if version is None]
    there = present.get(row.device, []) if row.vendor in (None, _built_for()) else []
    if there:
        return Found(row, tuple(there), packages, None)
    reason = absent.get(row.device, "torch does not know this kind of device")
    if row.vendor is not None and row.vendor != _built_for():
        reason = f"this torch ({torch.__version__}) is not built for it"
    if missing := [name for name in missing if name not in reason]:
        reason += f"; not installed: {', '.join(missing)}"
    return Found(row, (), packages, reason)


def _built_for() -> str | None:
    if torch.version.hip:
        return "hip"
    return "cuda" if torch.version.cuda else None


def _version(package: str) -> str | None:
    if find_spec(package) is None:
        return None
    owners = metadata.packages_distributions().get(package, [package])
    try:
        return metadata.version(owners[0])
    except metadata.PackageNotFoundError:
        return "unknown"
