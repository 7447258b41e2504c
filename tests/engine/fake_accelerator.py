"""A device made of Python, for tests: torch's PrivateUse1 backend over hidden host tensors.

Run as a script: places a small network on ``fakeacc:0`` through the engine and prints JSON.
torch calls the hook this rests on experimental; the test skips where it is gone.
"""

from __future__ import annotations

import json
import sys
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


def wrap(raw: Any) -> Any:
    if not isinstance(raw, torch.Tensor) or raw.device.type != "cpu":
        return raw
    raw = raw.contiguous()  # as the device's own tensor is
    with torch.inference_mode(False):
        remote = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    HELD[storage(remote)] = raw
    return remote


def unwrap(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "fakeacc":
        return HELD[storage(value)]
    return torch.device("cpu") if isinstance(value, torch.device) else value


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    RAN.append(str(op))
    host_args, host_kwargs = pytree.tree_map(unwrap, (args, kwargs))
    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map(wrap, op(*host_args, **host_kwargs))


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    return wrap(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    return wrap(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    unwrap(target).copy_(unwrap(source))
    return target


def install() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend("fakeacc")
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    every.fallback(compute, "PrivateUse1")
    for name, answer in ACCELERATOR.items():
        setattr(torch.accelerator, name, answer)
    return [aten, every]


ACCELERATOR = {
    "synchronize": lambda *_: None,
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
