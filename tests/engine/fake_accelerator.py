"""A device made of Python, for tests: torch's PrivateUse1 backend over hidden host tensors.

Copies between it and pinned memory happen late, as on a GPU: when somebody waits for an event, or
the device computes. Graphs record its operations and run them again, and nothing of the model's.

Run as a script: places a small network on ``fakeacc:0`` through the engine and prints JSON.
torch calls the hook this rests on experimental; the test skips where it is gone.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

RAN: list[str] = []


HELD: dict[int, torch.Tensor] = {}
"""The host tensor behind each fake storage, which a tensor's aliases share."""


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


CAPACITY: list[int] = []
"""Bytes of the largest tensor that the device has room for; none: of any."""


def wrap(raw: Any) -> Any:
    if not isinstance(raw, torch.Tensor) or raw.device.type != "cpu":
        return raw
    if CAPACITY and raw.nbytes > CAPACITY[-1]:
        raise torch.OutOfMemoryError(f"fakeacc out of memory: tried to allocate {raw.nbytes} bytes")
    raw = raw.contiguous()  # as the device's own tensor is
    with torch.inference_mode(False):
        remote = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    HELD[storage(remote)] = raw
    return remote


def unwrap(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "fakeacc":
        raw = HELD[storage(value)]
        with torch.inference_mode(raw.is_inference()):
            start = raw.storage_offset() + value.storage_offset()
            return raw.as_strided(value.size(), value.stride(), start)
    return torch.device("cpu") if isinstance(value, torch.device) else value


PENDING: list[Callable[[], object]] = []
"""Copies that the host was told of and the device has not done."""
LOCK = threading.RLock()
PINNED: set[int] = set()
"""Host storages that the device copies by itself."""
TAPES: dict[int, list[Callable[[], object]]] = {}
"""What is captured, by thread."""


def flush() -> None:
    with LOCK:
        while PENDING:
            PENDING.pop(0)()


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    RAN.append(str(op))
    flush()
    tape = TAPES.get(threading.get_ident())
    if tape is not None and "_local_scalar_dense" in str(op):
        raise RuntimeError("operation not permitted when stream is capturing")
    host_args, host_kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if "as_strided" in str(op) and len(host_args) > 3 and host_args[3] is not None:
        raw, size, stride, start = host_args[:4]  # counted from where the fake storage begins
        host_args = (raw, size, stride, start + raw.storage_offset(), *host_args[4:])

    def run() -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return op(*host_args, **host_kwargs)

    raw = run()
    if tape is not None:
        kept = [each for each in pytree.tree_leaves(raw) if isinstance(each, torch.Tensor)]

        def again() -> None:
            found = [each for each in pytree.tree_leaves(run()) if isinstance(each, torch.Tensor)]
            for old, new in zip(kept, found, strict=True):
                with torch.inference_mode(old.is_inference()):
                    old.copy_(new)

        tape.append(again)
    return pytree.tree_map(wrap, raw)


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    with torch.inference_mode(False):
        return wrap(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    with torch.inference_mode(False):
        return wrap(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    there, here = unwrap(target), unwrap(source)
    host = next((each for each in (source, target) if each.device.type == "cpu"), None)
    tape = TAPES.get(threading.get_ident())
    if tape is not None and host is not None:
        raise RuntimeError("cannot copy between host and device while capturing")

    def copy() -> None:
        with torch.inference_mode(there.is_inference()), torch.no_grad():
            there.copy_(here)

    if tape is not None:
        tape.append(copy)
    with LOCK:
        if non_blocking and host is not None and storage(host) in PINNED:
            PENDING.append(copy)
            return target
    flush()
    copy()
    return target


class FakeStream:
    def wait_event(self, event: Any) -> None:
        assert event.at is not None

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class FakeEvent:
    """Copies are done when somebody waits for it, not when it is recorded."""

    def __init__(self) -> None:
        self.at: float | None = None

    def record(self, stream: FakeStream) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        flush()

    def elapsed_time(self, end: Any) -> float:
        assert self.at is not None
        return (end.at - self.at) * 1e3


class FakeGraph:
    """Replays what a thread computed while it captured."""

    replays = 0

    def __init__(self) -> None:
        self.tape: list[Callable[[], object]] = []

    def capture_begin(self, capture_error_mode: str = "global") -> None:
        TAPES[threading.get_ident()] = self.tape

    def capture_end(self) -> None:
        del TAPES[threading.get_ident()]

    def replay(self) -> None:
        FakeGraph.replays += 1
        flush()
        for step in self.tape:
            step()


def pinned(_: Any, size: int) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    PINNED.add(storage(buffer))
    KEPT.append(buffer)
    return buffer


KEPT: list[torch.Tensor] = []
"""Every pinned buffer that was ever asked for."""


def install() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend("fakeacc")
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    every.fallback(compute, "PrivateUse1")
    for name, answer in ACCELERATOR.items():
        setattr(torch.accelerator, name, answer)
    from plinth.engine.devices.device import Device

    for name, made in (("stream", FakeStream), ("event", FakeEvent), ("graph", FakeGraph)):
        setattr(Device, name, lambda _, made=made: made())
    Device.pinned = pinned  # type: ignore[method-assign]
    return [aten, every]


ACCELERATOR = {
    "synchronize": lambda *_: flush(),
    "empty_cache": lambda *_: None,
    "memory_reserved": lambda *_: 2 << 30,
    "get_memory_info": lambda *_: (8 << 30, 16 << 30),
    "memory_allocated": lambda *_: 1 << 30,
    "max_memory_allocated": lambda *_: (1 << 30) + (1 << 20),
    "reset_peak_memory_stats": lambda *_: None,
}
"""What torch asks a device's driver; Python backends have none. A forward takes 1 MiB."""


def main() -> None:
    from plinth.engine import Model, ModelSpec, TensorSpec
    from plinth.engine.backends import prepare
    from plinth.engine.devices.device import devices, pick

    keep = install()
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    spec = ModelSpec(
        name="net",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(2,)),),
    )
    device = pick("auto")
    executable = prepare(Model(spec, module), device, "fp32", "eager")
    rows = torch.randn(5, 4)
    output = executable.run({"x": rows})["y"]
    json.dump(
        {
            "device": str(device),
            "devices": [str(entry) for entry in devices()],
            "on": output.device.type,
            "equal": torch.allclose(unwrap(output), module(rows), atol=1e-6),
            "original": next(module.parameters()).device.type,
            "ran": sorted(set(RAN)),
            "libraries": len(keep),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
