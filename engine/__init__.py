"""Tensors under deadlines. Knows no domain."""

from engine.batching import Batcher
from engine.errors import (
    Cancelled,
    Closed,
    ConfigError,
    DeadlineRefused,
    DeviceError,
    InputError,
    ModelError,
    PlinthError,
    QueueFull,
    Refused,
)
from engine.flow import Answer, Call, Flow, Sla, Timing
from engine.latency import LatencyModel
from engine.model import Model, ModelSpec, ModelStore, TensorSpec, architecture, from_pretrained
from engine.runtime import Engine
from engine.tiling import Tiling
from engine.work import Batch, Work

__all__ = [
    "Answer",
    "Batch",
    "Batcher",
    "Call",
    "Cancelled",
    "Closed",
    "ConfigError",
    "DeadlineRefused",
    "DeviceError",
    "Engine",
    "Flow",
    "InputError",
    "LatencyModel",
    "Model",
    "ModelError",
    "ModelSpec",
    "ModelStore",
    "PlinthError",
    "QueueFull",
    "Refused",
    "Sla",
    "TensorSpec",
    "Tiling",
    "Timing",
    "Work",
    "architecture",
    "from_pretrained",
]
