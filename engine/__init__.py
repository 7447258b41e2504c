"""Tensors under deadlines. Knows no domain."""

from engine.batching import Batch, Batcher, Work
from engine.errors import (
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
from engine.tiling import Tiling

__all__ = [
    "Answer",
    "Batch",
    "Batcher",
    "Call",
    "ConfigError",
    "DeadlineRefused",
    "DeviceError",
    "Flow",
    "InputError",
    "LatencyModel",
    "ModelError",
    "PlinthError",
    "QueueFull",
    "Refused",
    "Sla",
    "Tiling",
    "Timing",
    "Work",
]
