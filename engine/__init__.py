"""Tensors under deadlines. Knows no domain.

Each name is loaded from its module when it is first asked for: errors and promises need no torch.
"""

from typing import TYPE_CHECKING

from plinth.faces import loads_on_demand

if TYPE_CHECKING:
    from plinth.engine.errors import (
        Cancelled,
        Closed,
        ComputeError,
        ConfigError,
        DeadlineRefused,
        DeviceError,
        EngineFailed,
        InputError,
        ModelError,
        PlinthError,
        QueueFull,
        Refused,
    )
    from plinth.engine.flow import Answer, Call, Compute, Flow, Pause, Sla, Timing, Told
    from plinth.engine.models.store import (
        Model,
        ModelSpec,
        ModelStore,
        TensorSpec,
        architecture,
        from_pretrained,
    )
    from plinth.engine.runtime.engine import Engine
    from plinth.engine.scheduler.batcher import Batcher
    from plinth.engine.scheduler.cost_model import LatencyModel
    from plinth.engine.scheduler.work import Batch, Work
    from plinth.engine.tiling import Tiling

__all__ = [
    "Answer",
    "Batch",
    "Batcher",
    "Call",
    "Cancelled",
    "Closed",
    "Compute",
    "ComputeError",
    "ConfigError",
    "DeadlineRefused",
    "DeviceError",
    "Engine",
    "EngineFailed",
    "Flow",
    "InputError",
    "LatencyModel",
    "Model",
    "ModelError",
    "ModelSpec",
    "ModelStore",
    "Pause",
    "PlinthError",
    "QueueFull",
    "Refused",
    "Sla",
    "TensorSpec",
    "Tiling",
    "Timing",
    "Told",
    "Work",
    "architecture",
    "from_pretrained",
]

_HOMES = {
    "errors": "Cancelled Closed ComputeError ConfigError DeadlineRefused DeviceError EngineFailed "
    "InputError ModelError PlinthError QueueFull Refused",
    "flow": "Answer Call Compute Flow Pause Sla Timing Told",
    "models.store": "Model ModelSpec ModelStore TensorSpec architecture from_pretrained",
    "runtime.engine": "Engine",
    "scheduler.batcher": "Batcher",
    "scheduler.cost_model": "LatencyModel",
    "scheduler.work": "Batch Work",
    "tiling": "Tiling",
}

__getattr__ = loads_on_demand(__name__, _HOMES)
