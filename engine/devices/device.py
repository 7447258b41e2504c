"""One thin layer over ``torch.accelerator``: which devices there are and what they can do.

Nothing else in the engine names ``torch.cuda`` or another vendor's module. The CPU and
one NVIDIA H100 have run so far; the other kinds follow torch's documentation and are untested.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Event, Stream, Tensor

from plinth.engine.errors import ConfigError, DeviceError

_log = logging.getLogger(__name__)

_VENDORS = {"cpu": "", "cuda": "NVIDIA", "npu": "Huawei", "xpu": "Intel", "mps": "Apple"}
"""The kinds of device that torch serves here, and who makes them."""

_ISA = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"},
}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device: in use by this process, free for it, and altogether."""

    allocated: int
    available: int
    total: int


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Args:
        kind: ``"cpu"``, ``"cuda"`` (NVIDIA and AMD), ``"npu"``, ``"xpu"``, ``"mps"``.
        index: which one; ``None`` for the CPU.
        vendor: who made it.
        name: what it is called.
        dtypes: precisions with instructions of their own, not emulated.
    """

    kind: str
    index: int | None = None
    vendor: str = ""
    name: str = ""
    dtypes: tuple[str, ...] = ("fp32",)

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    @property
    def torch(self) -> torch.device:
        """As torch spells it."""
        return torch.device(str(self))

    def native(self, precision: str) -> bool:
        """Whether ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"`` is not emulated here."""
        return precision in self.dtypes

    def memory(self) -> Memory:
        """Bytes now; for the CPU of this process and within its cgroup's limit."""
        if self.kind == "cpu":
            return _host_memory()
        free, total = torch.accelerator.get_memory_info(self.torch)
        return Memory(torch.accelerator.memory_allocated(self.torch), int(free), int(total))

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.kind != "cpu":
            torch.accelerator.synchronize(self.torch)

    def failure(self) -> str | None:
        """Why it does nothing any more in this process, or ``None``.

        An index outside of a table, say, stops a GPU for the process that sent it, for good.
        """
        try:
            self.synchronize()
        except Exception as error:  # noqa: BLE001 - drivers raise errors of any kind
            return str(error).strip().partition("\n")[0][:200] or type(error).__name__
        return None

    # -- what only accelerators have ---------------------------------------------------------
    def stream(self) -> Stream:
        """A queue of work on the device; those of different queues overlap."""
        return torch.Stream(self.torch)

    def event(self) -> Event:
        """A mark in a stream that one can wait for, with the device's own time.

        Who waits sleeps: a thread that spins would take the core that prepares the next batch.
        """
        return torch.Event(self.torch, enable_timing=True, blocking=True)

    def pinned(self, size: int) -> Tensor:
        """Bytes of the host that the device copies by itself; ordinary ones where it has none."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # NotImplementedError is one
            _log.warning("%s: no pinned memory, copies will wait: %s", self, type(error).__name__)
            return torch.empty(size, dtype=torch.uint8)

    def give_back_memory(self) -> None:
        """Let the allocator give what it keeps for later to whoever needs it now."""
        if self.kind != "cpu":
            torch.accelerator.empty_cache()

    def graph(self) -> Any:
        """An empty graph of torch's for this kind of device, or ``None`` where there is none."""
        made = getattr(torch.get_device_module(self.kind), f"{self.kind.upper()}Graph", None)
        return None if made is None else made()

    def keep_float32(self) -> None:
        """Let float32 be float32: by default torch multiplies in TF32 in convolutions and RNNs.

        TF32 keeps 10 bits of the mantissa; outputs were off by 3e-4 in place of 1e-6. The setting
        is torch's for the process: one who wants TF32 sets it after the engine is made.
        """
        if self.kind == "cuda":
            # torch's newer setting, one for each operation, is one that its exporter refuses.
            torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True, slots=True)
class Absent:
    """A kind of device that is not there, and why."""

    kind: str
    reason: str


def devices() -> list[Device | Absent]:
    """Every kind of device: those that are there, and the others with the reason."""
    found: list[Device | Absent] = [_cpu()]
    current = _current()
    kinds = [kind for kind in _VENDORS if kind != "cpu"]
    if current is not None and current not in kinds:
        kinds.append(current)
    for kind in kinds:
        if kind == current:
            found += [
                _accelerator(kind, index) for index in range(torch.accelerator.device_count())
            ]
        else:
            found.append(Absent(kind, _why_absent(kind, current)))
    return found


def pick(device: str = "auto") -> Device:
    """The device of a setting.

    Args:
        device: ``"auto"`` (an accelerator if there is one, else the CPU), a kind such as
            ``"cuda"``, or a kind and an index such as ``"cuda:1"``.

    Raises:
        ConfigError: not the name of a device.
        DeviceError: it is not there; says why and what is.
    """
    every = devices()
    present = [entry for entry in every if isinstance(entry, Device)]
    if device == "auto":
        return present[1] if len(present) > 1 else present[0]
    kind, colon, index = device.partition(":")
    known = {entry.kind for entry in every}
    if kind not in known or (colon and not index.isdecimal()):
        raise ConfigError(
            f"device {device!r} is not the name of a device",
            hint=f"use auto, {', '.join(sorted(known))}, or a name and an index such as cuda:1",
        )
    for entry in present:
        if entry.kind == kind and (not colon or (entry.index or 0) == int(index)):
            return entry
    reasons = {entry.kind: entry.reason for entry in every if isinstance(entry, Absent)}
    raise DeviceError(
        f"there is no device {device}: {reasons.get(kind, 'its index is too high')}",
        hint=f"there are {', '.join(map(str, present))}",
    )


# -- what is there -----------------------------------------------------------------------------
def _current() -> str | None:
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return None if current is None else str(current.type)


def _accelerator(kind: str, index: int) -> Device:
    vendor = "AMD" if kind == "cuda" and torch.version.hip else _VENDORS.get(kind, "unknown")
    module: Any = torch.get_device_module(kind)
    name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
    dtypes = ("fp32", *(["bf16"] if _accelerates_bf16(module) else []))
    return Device(kind, index, vendor, str(name), dtypes)


def _accelerates_bf16(module: Any) -> bool:
    probe = getattr(module, "is_bf16_supported", None)
    if probe is None:
        return False
    try:
        return bool(probe(including_emulation=False))
    except TypeError:
        return bool(probe())


def _why_absent(kind: str, current: str | None) -> str:
    if current is not None:
        return f"torch serves one kind of accelerator per process, here {current}"
    if kind == "npu":
        there = importlib.util.find_spec("torch_npu") is not None
        return "torch_npu finds no device" if there else "the package torch_npu is not installed"
    built = {
        "cuda": bool(torch.version.cuda or torch.version.hip),
        "xpu": bool(getattr(torch.version, "xpu", None)),
        "mps": torch.backends.mps.is_built(),
    }
    if not built.get(kind, False):
        return f"this torch ({torch.__version__}) is built without it"
    return "torch finds no device or no driver"


# -- the CPU -----------------------------------------------------------------------------------
@cache
def _cpu() -> Device:
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    native = tuple(name for name, isa in _ISA.items() if flags & isa)
    name = facts.get("model name") or platform.processor() or platform.machine()
    vendor = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(facts.get("vendor_id", ""), "")
    return Device("cpu", None, vendor, name, ("fp32", *native))


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host_memory() -> Memory:
    host = psutil.virtual_memory()
    limit, used = cgroup_memory()
    total = min(host.total, limit) if limit else host.total
    available = min(host.available, max(0, limit - used)) if limit else host.available
    return Memory(psutil.Process().memory_info().rss, available, total)


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int]:
    """Tightest memory limit on this process's cgroups and what it uses, bytes; (0, 0) for none.

    Pages of files that were not read lately are not counted as used: the kernel drops them.

    Args:
        root: where the cgroup file system is mounted.
        own: the file that names the cgroup of this process.
    """
    found: list[tuple[int, int]] = []
    for controllers, path in _cgroups(own):
        old = "memory" in controllers.split(",")
        top = root / "memory" if old else root
        folder = top / path.lstrip("/")
        for level in [folder, *folder.parents]:
            if top in (level, *level.parents):
                found += _limit(level, *(_OLD if old else _NEW))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(0, 0))


_NEW = "memory.max", "memory.current", "inactive_file"
_OLD = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
"""Of cgroup v2 and v1: files of a limit and of what is used, and the statistic of pages of files
that the kernel drops when memory is asked for."""


def _cgroups(own: Path) -> list[tuple[str, str]]:
    """Controllers (none in v2) and path of each cgroup of this process that may limit memory."""
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    found = [(each[1], each[2]) for each in lines if len(each) == 3]
    kept = [each for each in found if each[0] == "" or "memory" in each[0].split(",")]
    return [*kept, ("memory", "/")]


def _limit(folder: Path, limit: str, used: str, idle: str) -> list[tuple[int, int]]:
    try:
        most, now = ((folder / name).read_text().strip() for name in (limit, used))
    except OSError:
        return []
    if not (most.isdecimal() and now.isdecimal()) or int(most) >= 1 << 60:
        return []
    return [(int(most), max(0, int(now) - _statistic(folder / "memory.stat", idle)))]


def _statistic(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
