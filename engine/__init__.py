"""Tensors under deadlines. Knows no domain."""

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
